"""Samplers against recorded noise levels, network calls and results."""

import pytest
import torch
from golden_io import GOLDEN, assert_close, cases, load_npz

from di_refine.edm.sampler import sample, sigma_grid
from di_refine.errors import InputError
from torch_utils import persistence

CASES = cases("edm/sampler.npz")[0]["cases"]
LIMIT = {"heun18": 5e-6, "heun5": 5e-5, "euler5": 5e-5, "churn5": 5e-5}
NETWORKS = ["ddpmpp_cond", "ddpmpp_uncond", "ncsnpp", "adm_cond", "vp", "ve", "iddpm", "fp16_cond"]


def arrays():
    return {k: torch.from_numpy(v.copy()) for k, v in load_npz("edm/sampler.npz").items() if k != "meta"}


def load(name):
    return persistence.load(GOLDEN / "edm" / f"{name}.pkl")["ema"]


class Gaussian(torch.nn.Module):
    """The exact denoiser of N(0, data^2) images."""

    def __init__(self, data=0.5):
        super().__init__()
        self.data, self.sigmas = data, []

    def forward(self, x, sigma, labels=None):
        self.sigmas.append(float(sigma))
        return x * self.data**2 / (sigma**2 + self.data**2)


@pytest.mark.parametrize("name", NETWORKS)
def test_grid(name):
    grid = sigma_grid(load(name))
    assert grid.dtype == torch.float64
    assert_close(grid, arrays()[f"grid18_{name}"], 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_sample(name):
    a, net, calls = arrays(), load("ddpmpp_cond"), []
    net.register_forward_pre_hook(lambda module, args: calls.append(args[1].double()))
    noise = iter(a["churn5_noise"] if name == "churn5" else [])
    seen = []
    x = sample(
        net,
        a["latents"],
        a["labels"],
        **CASES[name]["kwargs"],
        randn_like=lambda like: next(noise).to(like),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert x.dtype == torch.float64
    assert len(calls) == CASES[name]["network_evaluations"]
    assert_close(torch.stack(calls), a[f"{name}_sigma_calls"], 1e-12, "sigma")
    for ours, theirs in zip(x, a[f"{name}_x"]):
        assert_close(ours, theirs, LIMIT[name], name)
    steps = len(a[f"{name}_t"]) - 1
    assert seen == [(i + 1, steps) for i in range(steps)]


def test_order_of_convergence():
    """On a Gaussian the ODE has a closed form: doubling the steps halves Euler's error and quarters Heun's."""
    z = torch.tensor([1.0]).reshape(1, 1, 1, 1)
    exact = 80 * 0.5 / (80**2 + 0.25) ** 0.5
    for solver, low, high in [("euler", 1.7, 2.4), ("heun", 3.4, 5.0)]:
        errors = [abs(sample(Gaussian(), z, num_steps=n, solver=solver).item() - exact) for n in (64, 128)]
        assert low < errors[0] / errors[1] < high, solver


def test_churn_keeps_the_distribution():
    torch.manual_seed(0)
    x = sample(Gaussian(), torch.randn(20000, 1, 1, 1), num_steps=64, S_churn=20)
    assert x.std().item() == pytest.approx(0.5, rel=0.03)


def test_one_step():
    net = Gaussian()
    z = torch.ones(1, 1, 1, 1)
    assert sample(net, z, num_steps=1, sigma_max=3.0).item() == pytest.approx(3 * 0.25 / 9.25, rel=1e-6)
    assert net.sigmas == pytest.approx([3.0])


@pytest.mark.parametrize(
    "kwargs, word",
    [
        ({"solver": "rk4"}, "solver"),
        ({"num_steps": 0}, "num_steps"),
        ({"sigma_min": 90}, "sigma_min"),
        ({"sigma_min": 0}, "sigma_min"),
    ],
)
def test_refusals(kwargs, word):
    with pytest.raises(InputError, match=word):
        sample(Gaussian(), torch.zeros(1, 1, 1, 1), **kwargs)
