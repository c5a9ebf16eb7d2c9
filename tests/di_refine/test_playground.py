import json
import math

import pytest
import torch
from click.testing import CliRunner

from di_refine import playground
from di_refine.playground import MixtureDenoiser


class Affine(torch.nn.Module):
    def __init__(self, mean, scales):
        super().__init__()
        self.mean, self.scales = torch.tensor(mean), torch.tensor(scales)

    def forward(self, z, labels=None):
        return self.mean + self.scales * z


def test_mixture_denoiser_follows_its_density():
    """Tweedie: D(x) = x + sigma^2 grad log p(x)."""
    teacher = playground.ring()
    x = (torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 2).double().requires_grad_()
    for sigma in (0.1, 0.7, 5.0):
        (score,) = torch.autograd.grad(teacher.log_prob(x, sigma).sum(), x)
        denoised = teacher.double()(x, torch.full([50], sigma))
        torch.testing.assert_close(denoised, x + sigma**2 * score, rtol=1e-5, atol=1e-5)


def test_density_of_an_affine_generator():
    mean, scales, sigma = [0.4, -0.7], [0.8, 0.3], 0.2
    density = playground.generator_density(Affine(mean, scales), sigma)
    _, points = playground.plane()
    var = torch.tensor(scales) ** 2 + sigma**2
    exact = (-((points - torch.tensor(mean)) ** 2 / (2 * var)).sum(-1)).exp() / (2 * math.pi * var.prod().sqrt())
    torch.testing.assert_close(density, exact, rtol=1e-3, atol=1e-5)


def test_distances_of_two_gaussians():
    teacher = MixtureDenoiser(torch.tensor([[0.5, 0.0]]), std=0.6)
    same = playground.distances(Affine([0.5, 0.0], 0.6), teacher)
    assert abs(same["kl"]) < 1e-5 and abs(same["js"]) < 1e-5
    shifted = playground.distances(Affine([0.5, 0.9], 0.6), teacher)
    assert shifted["kl"] == pytest.approx(0.9**2 / (2 * (0.6**2 + playground.SIGMA**2)), rel=1e-3)
    far = playground.distances(Affine([-3.0, -3.0], 0.3), teacher)
    assert far["js"] == pytest.approx(math.log(2), rel=1e-2)
    with pytest.raises(ValueError, match="within 5 of the middle"):
        playground.distances(Affine([9.0, 0.0], 0.6), teacher)


def test_command(tmp_path):
    picture = tmp_path / "densities.png"
    result = CliRunner().invoke(playground.main, ["--steps=20", f"--picture={picture}"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout.splitlines()[-1])
    assert values["objective"] == "ikl" and values["steps"] == 20
    assert 0 < values["kl_after"] < values["kl_before"] and 0 < values["js_after"] < values["js_before"] < math.log(2)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, reason", [("f-js", "density ratio"), ("sds", "without randomness"), ("kl", "unknown")])
def test_command_refuses_in_one_sentence(name, reason):
    result = CliRunner().invoke(playground.main, [f"--objective={name}"])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1 and "--objective" in result.stderr and reason in result.stderr
