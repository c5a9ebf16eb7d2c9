"""Several teachers as one: against closed forms, quadrature, and the networks themselves."""

import copy
import math

import pytest
import torch
from golden_io import GOLDEN
from quadrature import F64, TEACHERS, Mixture

from di_refine.denoisers import Ensemble, check_weights
from di_refine.errors import InputError
from di_refine.generators import DiffusionSampler
from torch_utils import persistence


class Exact(torch.nn.Module):
    """The denoiser of a mixture on the line with the face of a network; it counts its calls."""

    img_resolution = img_channels = 1
    label_dim = 0

    def __init__(self, mixture: Mixture, sigma_min: float = 0.0, sigma_max: float = 80.0, **attributes):
        super().__init__()
        self.mixture, self.sigma_min, self.sigma_max, self.calls = mixture, sigma_min, sigma_max, 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x, sigma, class_labels=None):
        self.calls += 1
        return self.mixture.denoise(x, sigma)

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)


def normal(mean: float, std: float) -> Mixture:
    return Mixture([1.0], [mean], [std])


def network(name: str) -> torch.nn.Module:
    return persistence.load(GOLDEN / "edm" / f"{name}.pkl")["ema"]


def call(name: str = "ddpmpp_cond", count: int = 3):
    net = network(name)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(count, net.img_channels, net.img_resolution, net.img_resolution, generator=rng)
    labels = torch.eye(net.label_dim)[:count] if net.label_dim else None
    return net, (x, torch.tensor([0.1, 0.7, 3.0])[:count], labels)


X = torch.linspace(-4, 4, 33, dtype=F64)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.8), (1.0, 0.0)])
@pytest.mark.parametrize("s", [0.05, 0.6, 3.0])
def test_product_of_gaussians(weights, s):
    """At level s: precision = sum w_i / (v_i + s^2), mean = variance * sum w_i m_i / (v_i + s^2)."""
    experts = [(-1.0, 0.5), (1.3, 0.9)]
    denoised = Ensemble([Exact(normal(*expert)) for expert in experts], weights)(X, s)
    precision = sum(w / (std**2 + s**2) for w, (_, std) in zip(weights, experts))
    mean = sum(w * m / (std**2 + s**2) for w, (m, std) in zip(weights, experts)) / precision
    torch.testing.assert_close((denoised - X) / s**2, (mean - X) * precision, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("s", [0.3, 0.9])
def test_product_of_mixtures(s):
    """The score is that of sum w_i log q_i."""
    weights = (0.3, 0.7)
    x = X.clone().requires_grad_()
    log_product = sum(w * teacher.log_prob(x, s) for w, teacher in zip(weights, TEACHERS.values()))
    (score,) = torch.autograd.grad(log_product.sum(), x)
    denoised = Ensemble([Exact(teacher) for teacher in TEACHERS.values()], weights)(X, s)
    torch.testing.assert_close((denoised - X) / s**2, score, rtol=1e-10, atol=1e-10)


def test_it_is_not_the_noised_product():
    """Of the clean Gaussians' product, then noised: the same where the experts' variances agree, another otherwise."""
    s, weights = 0.8, (0.5, 0.5)

    def both(first_std, second_std):
        experts = [(-1.0, first_std), (1.3, second_std)]
        denoised = Ensemble([Exact(normal(*expert)) for expert in experts], weights)(X, s)
        precision = sum(w / std**2 for w, (_, std) in zip(weights, experts))
        mean = sum(w * m / std**2 for w, (m, std) in zip(weights, experts)) / precision
        return denoised, normal(mean, precision**-0.5).denoise(X, s)

    torch.testing.assert_close(*both(0.7, 0.7), rtol=1e-10, atol=1e-10)
    ours, noised_product = both(0.3, 1.5)
    assert (ours - noised_product).abs().max() > 0.1


def test_equal_weights_are_the_default():
    first, second = Exact(normal(0, 1)), Exact(normal(1, 0.5))
    ensemble = Ensemble([first, second])
    assert ensemble.weights == (0.5, 0.5)
    torch.testing.assert_close(ensemble(X, 0.5), (first(X, 0.5) + second(X, 0.5)) / 2)


@pytest.mark.parametrize("name", ["ddpmpp_cond", "vp"])
def test_one_teacher_is_itself(name):
    """Bit for bit; as is one of several whose fellows have no weight, and who are not even called."""
    net, arguments = call(name)
    idle = Exact(normal(0, 1))
    idle.img_resolution, idle.img_channels, idle.label_dim = net.img_resolution, net.img_channels, net.label_dim
    for ensemble in (Ensemble([net]), Ensemble([net], [1.0]), Ensemble([idle, net], [0.0, 1.0])):
        assert torch.equal(ensemble(*arguments), net(*arguments))
    assert idle.calls == 0


def test_two_networks_and_gradients():
    net, (x, sigma, labels) = call()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.sin(torch.arange(parameter.numel()).float()).reshape(parameter.shape))
    ensemble = Ensemble([net, other], [0.25, 0.75])
    x.requires_grad_()
    out = ensemble(x, sigma, labels)
    expected = 0.25 * net(x, sigma, labels) + 0.75 * other(x, sigma, labels)
    assert torch.equal(out, expected) and not torch.equal(out, net(x, sigma, labels))
    (own,), (wanted,) = (torch.autograd.grad((y**2).sum(), x) for y in (out, expected))
    assert torch.equal(own, wanted)
    assert torch.equal(ensemble(x, sigma, labels, force_fp32=True), expected), "further arguments reach the teachers"


def test_face_of_a_network():
    net, _ = call()
    ensemble = Ensemble([net, copy.deepcopy(net)])
    for name in ("img_resolution", "img_channels", "label_dim", "sigma_min", "sigma_max", "sigma_data"):
        assert getattr(ensemble, name) == getattr(net, name), name
    assert torch.equal(ensemble.round_sigma(0.3), net.round_sigma(0.3))
    assert "weights=0.5, 0.5" in repr(ensemble)
    assert ensemble.eval().teachers[1].training is False and ensemble.train().teachers[0].training is True


def test_noise_levels_in_common():
    teachers = [Exact(normal(0, 1), 0.01, 80, sigma_data=0.4), Exact(normal(0, 1), 0.02, 50, sigma_data=0.6)]
    ensemble = Ensemble(teachers)
    assert (ensemble.sigma_min, ensemble.sigma_max, ensemble.sigma_data) == (0.02, 50, 0.4)
    assert Ensemble([Exact(normal(0, 1))]).sigma_data == 0.5
    vp, ve, edm, table = (network(name) for name in ("vp", "ve", "adm_cond", "iddpm"))
    ensemble = Ensemble([vp, ve])
    assert ensemble.sigma_min == max(vp.sigma_min, ve.sigma_min)
    assert ensemble.sigma_max == min(vp.sigma_max, ve.sigma_max)
    level = torch.tensor([0.123, 4.5])
    assert torch.equal(Ensemble([edm, table]).round_sigma(level), table.round_sigma(level))
    with pytest.raises(InputError, match="`teacher`: the teachers have no noise levels in common: one begins at 60"):
        Ensemble([Exact(normal(0, 1), 60, 80), Exact(normal(0, 1), 0, 50)])


def test_copies():
    net, arguments = call()
    ensemble = Ensemble([net, network("ddpmpp_cond")], [0.4, 0.6])
    before = ensemble(*arguments)
    twin = copy.deepcopy(ensemble)
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.zero_()
    assert torch.equal(twin(*arguments), before) and not torch.equal(ensemble(*arguments), before)
    ensemble.load_state_dict(twin.state_dict())
    assert torch.equal(ensemble(*arguments), before)
    assert type(copy.deepcopy(twin.teachers[0])) is type(net), "a student score is a copy of one teacher"


def test_it_can_be_sampled_from():
    sampler = DiffusionSampler(Ensemble([network("ddpmpp_cond")]), num_steps=2)
    plain = DiffusionSampler(network("ddpmpp_cond"), num_steps=2)
    for own, expected in zip(sampler(0, 3, seed=1), plain(0, 3, seed=1)):
        assert torch.equal(own, expected)


@pytest.mark.parametrize(
    "attribute, what", [("img_resolution", "resolution"), ("img_channels", "channels"), ("label_dim", "classes")]
)
def test_teachers_that_differ(attribute, what):
    with pytest.raises(InputError, match=f"`teacher`: the .*{what} of the teachers is 1 and 7") as caught:
        teacher = Exact(normal(0, 1), **{attribute: 1})
        Ensemble([teacher, Exact(normal(0, 1), **{attribute: 7})])
    assert "\n" not in str(caught.value)


def test_no_teachers():
    with pytest.raises(InputError, match="`teacher` is needed"):
        Ensemble([])


@pytest.mark.parametrize(
    "weights, words",
    [
        ([0.5], "`teacher_weight` is given 1 times and `teacher` 2 times"),
        ([0.5, 0.25, 0.25], "`teacher_weight` is given 3 times and `teacher` 2 times"),
        ([0.5, 0.4], "`teacher_weight` must sum to 1, but 0.5, 0.4 sum to 0.9"),
        ([1.0, 1.0], "must sum to 1"),
        ([1.5, -1.0], "`teacher_weight` must sum to 1, but 1.5, -1 sum to 0.5"),
        ([math.nan, 1.0], "must sum to 1"),
        ([math.inf, 0.0], "must sum to 1"),
    ],
)
def test_bad_weights(weights, words):
    with pytest.raises(InputError, match=words) as caught:
        check_weights(weights, 2)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=words):
        Ensemble([Exact(normal(0, 1)) for _ in range(2)], weights)


def test_guidance_by_an_unconditional_teacher():
    first, second = network("ddpmpp_cond"), network("ddpmpp_uncond")
    (_, (x, sigma, labels)) = call()
    guided = Ensemble([first, second], [1.5, -0.5])(x, sigma, labels)
    assert torch.allclose(guided, 1.5 * first(x, sigma, labels) - 0.5 * second(x, sigma), atol=1e-6)
    assert Ensemble([first, second]).label_dim == first.label_dim
    with pytest.raises(InputError, match="the first is unconditional"):
        Ensemble([second, first])


def test_good_weights():
    assert check_weights([1.5, -0.5], 2) == (1.5, -0.5)
    assert check_weights([], 3) == pytest.approx([1 / 3] * 3) == check_weights(None, 3)
    assert check_weights([0.25, 0.75], 2) == (0.25, 0.75)
    assert check_weights([0.3333333] * 3, 3) == (0.3333333,) * 3, "a millionth is forgiven"
    with pytest.raises(InputError):
        check_weights([0.33333] * 3, 3)
