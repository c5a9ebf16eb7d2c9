import math

import pytest
import torch
from golden_io import load_npz

from di_refine.noise import EdmGrid, LogNormal, expand_as
from di_refine.objectives import WEIGHTS

LAWS = [LogNormal(), LogNormal(0.5, 2.0, 0.01, 50.0), EdmGrid(), EdmGrid(0.01, 10.0, 3.0, 1000.0)]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mean, std", [(-1.2, 1.2), (0.4, 0.7)])
def test_log_normal_moments(mean, std):
    n = 200_000
    logs = LogNormal(mean, std)(n, rng()).double().log()
    assert logs.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(n))
    assert logs.std().item() == pytest.approx(std, abs=4 * std / math.sqrt(2 * n))
    assert (((logs - mean) / std) ** 4).mean().item() == pytest.approx(3, abs=0.1)


def test_log_normal_defaults_are_edm_training():
    assert LogNormal() == LogNormal(-1.2, 1.2, 0.0, float("inf"))


def test_log_normal_clamps():
    free = LogNormal(-1.2, 1.2)(10_000, rng())
    clamped = LogNormal(-1.2, 1.2, sigma_min=0.1, sigma_max=1.0)(10_000, rng())
    assert free.min() < 0.1 and free.max() > 1.0
    assert torch.equal(clamped, free.clamp(0.1, 1.0))


def test_log_normal_without_spread():
    assert torch.equal(LogNormal(math.log(2), 0.0)(5, rng()), torch.full([5], 2.0))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_draws_are_a_function_of_the_generator(law):
    first = law(64, rng(1))
    assert first.shape == (64,) and first.dtype == torch.float32
    assert torch.equal(first, law(64, rng(1)))
    assert not torch.equal(first, law(64, rng(2)))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    law(64, rng(1))
    assert torch.equal(state, torch.get_rng_state()), "the global random state is not touched"


def test_grid_golden():
    data = load_npz("distill/sid.npz")
    uniform = torch.from_numpy(data["sigma_uniform"])
    expected = torch.from_numpy(data["sigma_tmax800"])
    torch.testing.assert_close(EdmGrid().level(uniform * 0.8), expected, rtol=1e-5, atol=0)
    drawn = torch.from_numpy(data["rnd_uniform"]).flatten()
    torch.testing.assert_close(
        EdmGrid().level(drawn * 0.8), torch.from_numpy(data["sigma"]).flatten(), rtol=1e-5, atol=0
    )


def test_grid_ends_and_order():
    grid = EdmGrid(sigma_min=0.01, sigma_max=20.0)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    levels = grid.level(t)
    assert levels[0].item() == pytest.approx(0.01, rel=1e-12) and levels[-1].item() == pytest.approx(20.0, rel=1e-12)
    assert (levels.diff() > 0).all()


@pytest.mark.parametrize("tmax", [1000.0, 800.0, 300.0])
def test_grid_draws_below_tmax(tmax):
    grid = EdmGrid(tmax=tmax)
    draws = grid(20_000, rng()).double()
    top = grid.level(torch.tensor(tmax / 1000, dtype=torch.float64)).item()
    assert draws.min() >= 0.002 * (1 - 1e-5) and draws.max() <= top * (1 + 1e-5)
    # Uniform in the seventh root, so its quantiles are the levels of uniform times.
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = grid.level(quantiles * tmax / 1000) ** (1 / 7)
    torch.testing.assert_close(draws.quantile(quantiles) ** (1 / 7), expected, rtol=0.02, atol=0)


def test_weights():
    sigma = torch.tensor([0.002, 0.5, 2.0, 80.0], dtype=torch.float64)
    powers = {"unit": 0, "sigma": 1, "sigma2": 2, "sigma4": 4}
    assert set(WEIGHTS) == set(powers)
    for name, power in powers.items():
        torch.testing.assert_close(WEIGHTS[name](sigma), sigma**power)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 1, 4, 4)])
def test_expand_as(shape):
    x = torch.zeros(shape, dtype=torch.float64)
    ones = (1,) * (len(shape) - 1)
    for values in (torch.arange(3.0), torch.arange(3.0).reshape(3, *ones), torch.arange(3)):
        expanded = expand_as(values, x)
        assert expanded.shape == (3, *ones) and expanded.dtype == x.dtype
        assert torch.equal((x + expanded).reshape(3, -1)[:, -1], torch.arange(3.0, dtype=torch.float64))
    for value in (0.5, torch.tensor(0.5)):
        assert torch.equal(x + expand_as(value, x), torch.full(shape, 0.5, dtype=torch.float64))
