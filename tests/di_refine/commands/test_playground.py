import json
import math

import pytest
import torch
from click.testing import CliRunner

from di_refine.commands import plane, playground
from di_refine.commands.plane import MixtureDenoiser


class Affine(torch.nn.Module):
    def __init__(self, mean, scales):
        super().__init__()
        self.mean, self.scales = torch.tensor(mean), torch.tensor(scales)

    def forward(self, z, labels=None):
        return self.mean + self.scales * z


def test_mixture_denoiser_follows_its_density():
    """Tweedie: D(x) = x + sigma^2 grad log p(x)."""
    teacher = plane.ring()
    x = (torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 2).double().requires_grad_()
    for sigma in (0.1, 0.7, 5.0):
        (score,) = torch.autograd.grad(teacher.log_prob(x, sigma).sum(), x)
        denoised = teacher.double()(x, torch.full([50], sigma))
        torch.testing.assert_close(denoised, x + sigma**2 * score, rtol=1e-5, atol=1e-5)


def test_density_of_an_affine_generator():
    mean, scales, sigma = [0.4, -0.7], [0.8, 0.3], 0.2
    density = plane.generator_density(Affine(mean, scales), sigma)
    _, points = plane.plane()
    var = torch.tensor(scales) ** 2 + sigma**2
    exact = (-((points - torch.tensor(mean)) ** 2 / (2 * var)).sum(-1)).exp() / (2 * math.pi * var.prod().sqrt())
    torch.testing.assert_close(density, exact, rtol=1e-3, atol=1e-5)


def test_distances_of_two_gaussians():
    teacher = MixtureDenoiser(torch.tensor([[0.5, 0.0]]), std=0.6)
    same = plane.distances(Affine([0.5, 0.0], 0.6), teacher)
    assert abs(same["rkl"]) < 1e-5 and abs(same["js"]) < 1e-5
    shifted = plane.distances(Affine([0.5, 0.9], 0.6), teacher)
    assert shifted["rkl"] == pytest.approx(0.9**2 / (2 * (0.6**2 + plane.SIGMA**2)), rel=1e-3)
    far = plane.distances(Affine([-3.0, -3.0], 0.3), teacher)
    assert far["js"] == pytest.approx(math.log(2), rel=1e-2)
    with pytest.raises(ValueError, match="within 5 of the middle"):
        plane.distances(Affine([9.0, 0.0], 0.6), teacher)


def test_command(tmp_path):
    picture = tmp_path / "densities.png"
    result = CliRunner().invoke(playground.main, ["--steps=20", f"--picture={picture}"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout.splitlines()[-1])
    assert values["objective"] == "ikl" and values["steps"] == 20
    assert 0 < values["kl_after"] < values["kl_before"] and 0 < values["js_after"] < values["js_before"] < math.log(2)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("objective", "steps"), [("f-js", 150), ("sim", 300), ("uni-fkl", 150), ("sds", 300)])
def test_objectives_reduce_what_they_minimise(objective, steps):
    """By four fifths at least, from a bad start; the ratio is learned from samples of the teacher."""
    result = CliRunner().invoke(playground.main, [f"--objective={objective}", "--no-picture", f"--steps={steps}"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout.splitlines()[-1])
    assert values["own"] == {"f-js": "js", "sim": "fisher", "uni-fkl": "fkl", "sds": "rkl"}[objective]
    assert values["reduction"] > 0.8 and values["own_after"] < 0.2 * values["own_before"]


def test_divergences_of_two_gaussians_in_closed_form():
    """Equal covariances: D_f of N(a, S) and N(b, S) is known for every f; here with the plane's own quadrature."""
    var = 0.6**2 + 0.6**2
    d2 = 0.5**2 / var
    teacher = MixtureDenoiser(torch.tensor([[0.5, 0.0]]), std=0.6)
    names = ("rkl", "fkl", "jeffreys", "hellinger", "chi2", "neyman", "fisher")
    found = plane.distances(Affine([0.5, 0.5], 0.6), teacher, names, sigma=0.6)
    expected = {
        "rkl": d2 / 2,
        "fkl": d2 / 2,
        "jeffreys": d2,
        "hellinger": 2 - 2 * math.exp(-d2 / 8),
        "chi2": math.exp(d2) - 1,
        "neyman": math.exp(d2) - 1,
        "fisher": d2 / var,
    }
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=2e-3), name


def test_an_unknown_objective_is_refused_in_one_sentence():
    result = CliRunner().invoke(playground.main, ["--objective=kl"])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1 and "--objective" in result.stderr and "ikl" in result.stderr
