"""Every objective's gradient against something exact, by quadrature in float64, and against recorded vectors."""

import math
from functools import cache

import pytest
import torch
from golden_io import GOLDEN, assert_close, cases, load_npz
from quadrature import (
    F64,
    SETTINGS,
    TEACHERS,
    F,
    dirac_gradients,
    estimate,
    exact,
    expansion,
    gap,
    minimised,
    normal_grid,
    unit,
)

from di_refine import objectives
from di_refine.generators import DistilledGenerator
from di_refine.objectives import WEIGHTS
from torch_utils import persistence

all_settings = pytest.mark.parametrize("teacher, generator, s", SETTINGS, ids=lambda value: str(value))


def check(objective, integrand, teacher, generator, s, factor: float = 1.0):
    target = factor * exact(integrand, teacher, generator, s)
    assert target.abs().min() > 1e-3, "a vanishing gradient would test nothing"
    assert gap(estimate(objective, teacher, generator, s), target) < 1e-6


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", F)
def test_divergence_table(name):
    """h = r^2 f'' and c = h - r h', from f by autograd; f(1) = 0 and f'' > 0 make it a divergence."""
    divergence = objectives.DIVERGENCES[name]
    r = torch.logspace(-3, 3, 61, dtype=F64).requires_grad_()
    torch.testing.assert_close(divergence.f(r), F[name](r))
    (f1,) = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)
    (f2,) = torch.autograd.grad(f1.sum(), r, create_graph=True)
    h = r**2 * f2
    (h1,) = torch.autograd.grad(h.sum(), r)
    torch.testing.assert_close(divergence.h(r), h, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(divergence.c(r), h - r * h1, rtol=1e-6, atol=1e-8 * h.max().item())
    assert F[name](torch.ones(1, dtype=F64)).item() == 0 and (f2 > 0).all()


def test_every_divergence_is_offered_twice():
    assert set(F) == set(objectives.DIVERGENCES)
    divergences = {prefix + name for prefix in ("f-", "uni-") for name in F}
    assert set(objectives.NAMES) == {"ikl", "sds", "dmd", "sim", "sid"} | divergences


@all_settings
@pytest.mark.parametrize("name", [name for name in objectives.NAMES if name != "sds"])
def test_every_gradient_is_exact(name, teacher, generator, s):
    """ikl and dmd of KL(p || q), f-<div> of D_f, uni-<div> of E_p[h(r) |u|^2], sim and sid of their two parts."""
    check(unit(name), minimised(name), teacher, generator, s)


@all_settings
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_is_the_gradient_of_two_parts(alpha, teacher, generator, s):
    check(unit("sid", alpha=alpha), minimised("sid", alpha), teacher, generator, s)


@all_settings
def test_half_alpha_is_exact(teacher, generator, s):
    check(unit("sid", alpha=0.5), lambda p, r, u2: p * u2, teacher, generator, s, factor=0.5)


def test_the_settings_are_many_and_no_special_case():
    """Two teachers at least, each with two generators that are not Gaussian."""
    assert len({teacher for teacher, _, _ in SETTINGS}) >= 2
    for name in TEACHERS:
        assert len({generator for teacher, generator, _ in SETTINGS if teacher == name} - {"gaussian"}) >= 2


@pytest.mark.parametrize("name, alpha", [("sim", 1.0), ("sid", 1.2)])
def test_default_alpha(name, alpha):
    assert objectives.get(name).alpha == alpha
    named = estimate(objectives.get(name), *SETTINGS[1])
    assert torch.equal(named, estimate(objectives.get("sid", alpha=alpha), *SETTINGS[1]))


@pytest.mark.parametrize("name", [name for name in F if name != "rkl"])
def test_detaching_the_ratio_is_biased(name):
    """A tempting simplification that changes what is minimised: the scale's forward KL gradient loses a third."""
    setting = SETTINGS[0]
    kept = estimate(unit(f"uni-{name}"), *setting)
    detached = estimate(unit(f"uni-{name}", detach_ratio=True), *setting)
    assert abs(detached[1] - kept[1]) > {"fkl": 0.3, "chi2": 0.6}.get(name, 0.05) * kept[1].abs()


@pytest.mark.parametrize("name", F)
def test_expansion_over_noise_levels(name):
    """D_f(q0 || p0) = integral of s E_p[h(r) |u|^2] ds from 0 to infinity (the generalised de Bruijn identity)."""
    direct, total = expansion(name)
    assert total == pytest.approx(direct, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------


class Gaussian2d:
    """N(mean, cov) in the plane, with independent noise added."""

    def __init__(self, mean, cov):
        self.mean, self.cov = mean, cov

    def _noised(self, s):
        return self.cov + s**2 * torch.eye(2, dtype=F64)

    def log_prob(self, x, s):
        cov, d = self._noised(s), x - self.mean
        return -0.5 * (d @ cov.inverse() * d).sum(-1) - 0.5 * cov.det().log() - math.log(2 * math.pi)

    def denoise(self, x, s):
        return self.mean + (x - self.mean) @ self._noised(s).inverse() @ self.cov


@pytest.mark.parametrize("prefix", ["f", "uni"])
@pytest.mark.parametrize("name", ["rkl", "js", "chi2"])
def test_several_pixels_share_one_ratio(prefix, name):
    """In the plane: inner products run over all pixels of a sample, which have one density ratio together."""
    s = 0.7
    q = Gaussian2d(torch.tensor([0.3, -0.2], dtype=F64), torch.tensor([[0.5, 0.2], [0.2, 0.4]], dtype=F64))
    theta = torch.tensor([0.0, 0.2, 0.8, 0.7], dtype=F64, requires_grad=True)  # means and scales

    nodes, weights = normal_grid(6, 0.75)
    z1, z2, n1, n2 = torch.meshgrid(nodes, nodes, nodes, nodes, indexing="ij")
    w = torch.einsum("a,b,c,d->abcd", weights, weights, weights, weights).reshape(-1)
    z, n = torch.stack([z1, z2], -1).reshape(-1, 1, 2), torch.stack([n1, n2], -1).reshape(-1, 1, 2)
    fixed = theta.detach()
    p = Gaussian2d(fixed[:2], (fixed[2:] ** 2).diag())
    x0 = theta[:2] + theta[2:] * z
    objective = objectives.get(f"{prefix}-{name}", weight="unit", normalize=False)
    loss = objective(
        x0,
        x0 + s * n,
        torch.full([len(x0)], s, dtype=F64),
        lambda x, _: q.denoise(x, s),
        lambda x, _: p.denoise(x, s),
        lambda x, _: (q.log_prob(x, s) - p.log_prob(x, s)).squeeze(1),
    )
    (estimated,) = torch.autograd.grad((w * loss).sum(), theta)

    axis = torch.linspace(-9, 9, 181, dtype=F64)
    x = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    p = Gaussian2d(theta[:2], (theta[2:] ** 2).diag())
    log_p, log_q = p.log_prob(x, s), q.log_prob(x, s)
    r = (log_q - log_p).exp()
    u2 = (((p.denoise(x, s) - q.denoise(x, s)) / s**2) ** 2).sum(-1)
    values = log_p.exp() * (F[name](r) if prefix == "f" else objectives.DIVERGENCES[name].h(r) * u2)
    (target,) = torch.autograd.grad(values.sum() * (axis[1] - axis[0]) ** 2, theta)
    assert gap(estimated, target) < 1e-6


@pytest.mark.parametrize("teacher, s, theta", [("two", 0.6, 0.7), ("three", 0.8, -0.4)])
def test_sds_is_ikl_for_a_generator_without_randomness(teacher, s, theta):
    """`x0 = theta`: p is N(theta, s^2), its denoiser is theta itself, and the gradient is that of KL(p || q)."""
    sds, target = dirac_gradients("sds", teacher, s, theta)
    assert torch.equal(sds, dirac_gradients("ikl", teacher, s, theta)[0])
    assert abs(target) > 1e-3 and gap(sds, target) < 1e-6


# ----------------------------------------------------------------------------------------------------------------------


def random_call(name: str, dtype=F64, shape=(3, 2, 4, 4), **settings):
    """A call on random tensors with random linear denoisers: (loss [N], gradient with respect to x0)."""
    rng = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(shape, generator=rng, dtype=F64).to(dtype) for _ in range(2))
    sigma = torch.tensor([0.1, 0.7, 3.0], dtype=dtype)
    x0.requires_grad_()
    x_s = x0 + sigma.reshape(-1, *[1] * (len(shape) - 1)) * noise
    loss = objectives.get(name, **settings)(
        x0,
        x_s,
        sigma,
        lambda x, sigma: 0.6 * x + 0.1,
        lambda x, sigma: 0.4 * x.tanh(),
        lambda x, sigma: x.flatten(1).mean(1),
    )
    return loss, torch.autograd.grad(loss.sum(), x0)[0]


@pytest.mark.parametrize("name", objectives.NAMES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_weight_multiplies_each_sample(name, weight):
    sigma = torch.tensor([0.1, 0.7, 3.0], dtype=F64)
    unit, unit_grad = random_call(name, weight="unit")
    loss, grad = random_call(name, weight=weight)
    torch.testing.assert_close(loss, unit * WEIGHTS[weight](sigma))
    torch.testing.assert_close(grad, unit_grad * WEIGHTS[weight](sigma)[:, None, None, None])


@pytest.mark.parametrize("name", objectives.NAMES)
def test_normalisation_multiplies_each_sample(name):
    """normalize=True divides by a detached mean|x0 - Dq|: a weight per sample, through which nothing flows."""
    rng = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 2, 4, 4, generator=rng, dtype=F64) for _ in range(2))
    x_s = x0 + torch.tensor([0.1, 0.7, 3.0], dtype=F64)[:, None, None, None] * noise
    size = (x0 - (0.6 * x_s + 0.1)).abs().mean(dim=[1, 2, 3])
    plain, plain_grad = random_call(name, normalize=False)
    loss, grad = random_call(name, normalize=True)
    torch.testing.assert_close(loss, plain / size)
    torch.testing.assert_close(grad, plain_grad / size[:, None, None, None])


def test_dmd_is_normalised_ikl():
    for own, other in zip(random_call("dmd"), random_call("ikl", normalize=True)):
        assert torch.equal(own, other)


@pytest.mark.parametrize("name", objectives.NAMES)
def test_dtype_and_shape_follow_x0(name):
    wide, wide_grad = random_call(name)
    loss, grad = random_call(name, dtype=torch.float32)
    assert loss.shape == (3,) and loss.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wide, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad.double(), wide_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ikl", "f-js", "sid", "uni-js"])
def test_sigma_may_have_any_shape_that_fits(name):
    x0 = torch.linspace(-1, 1, 12).reshape(3, 1, 2, 2)
    objective = objectives.get(name)
    denoisers = (lambda x, s: 0.6 * x, lambda x, s: 0.4 * x, lambda x, s: x.flatten(1).mean(1))
    losses = [
        objective(x0, x0 + 0.3, sigma, *denoisers)
        for sigma in (0.5, torch.tensor(0.5), torch.full([3], 0.5), torch.full([3, 1, 1, 1], 0.5))
    ]
    assert all(torch.equal(loss, losses[0]) for loss in losses)


@pytest.mark.parametrize("name", objectives.NAMES)
def test_detached_means_no_graph_in_the_denoisers(name):
    """What the trainer relies on to run teacher and student score without autograd."""
    objective = objectives.get(name)
    x0 = torch.randn(2, 1, 2, 2, requires_grad=True)
    seen = []

    def denoiser(x, sigma):
        out = 0.5 * x
        seen.append(out.requires_grad)
        return out

    log_ratio = (lambda x, sigma: denoiser(x, sigma).flatten(1).mean(1)) if objective.needs_ratio else None
    student = denoiser if objective.needs_student else None
    loss = objective(x0, x0 + 0.1, torch.ones(2), denoiser, student, log_ratio)
    assert loss.requires_grad
    assert set(seen) == {not objective.detached}
    assert objective.detached == (not name.startswith(("uni-", "si")))


def test_bad_names_and_settings():
    for bad in ("kl", "f-kl", "uni-", "IKL", ""):
        with pytest.raises(ValueError, match=f"objective={bad} is unknown") as caught:
            objectives.get(bad)
        assert all(known in str(caught.value) for known in objectives.NAMES)
    with pytest.raises(ValueError, match="weight=sigma3 is unknown; known are default, unit, sigma, sigma2, sigma4"):
        objectives.get("ikl", weight="sigma3")
    with pytest.raises(ValueError, match="alpha=1.2 belongs to objective=sid, not to objective=sim"):
        objectives.get("sim", alpha=1.2)
    for name in ("ikl", "f-fkl", "uni-rkl"):
        with pytest.raises(ValueError, match=f"`detach_ratio` belongs to .*, not to objective={name}"):
            objectives.get(name, detach_ratio=True)
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="objective=f-js needs log_ratio"):
        objectives.get("f-js")(x, x, torch.ones(1), lambda x, s: x, lambda x, s: x)


# ----------------------------------------------------------------------------------------------------------------------


@cache
def network(name: str) -> torch.nn.Module:
    return persistence.load(GOLDEN / "distill" / f"{name}.pkl")["ema"]


def recorded(file: str) -> dict[str, torch.Tensor]:
    arrays = load_npz(f"distill/{file}.npz")
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items() if name != "meta"}


GOLDEN_CASES = [
    ("diff_instruct", "ikl", {}, "gloss", "gloss_grad"),
    ("sid", "sim", {}, "a1_t800_loss", "a1_t800_grad"),
    ("sid", "sid", {}, "a1.2_t800_loss", "a1.2_t800_grad"),
    ("sid", "sid", {"alpha": 1.0}, "a1_t800_loss", "a1_t800_grad"),
    ("sid", "sid", {"alpha": 0.5}, "a0.5_t800_loss", "a0.5_t800_grad"),
]


def networks_as_denoisers(labels):
    return [lambda x, s, name=name: network(name)(x, s, labels) for name in ("teacher", "fake_score")]


@pytest.mark.parametrize("file, name, settings, loss_key, grad_key", GOLDEN_CASES)
def test_golden(file, name, settings, loss_key, grad_key):
    data = recorded(file)
    x0 = data["x0"].requires_grad_()
    objective = objectives.get(name, **settings)
    loss = objective(x0, x0 + data["sigma"] * data["noise"], data["sigma"], *networks_as_denoisers(data["labels"]))
    per_sample = data[loss_key].double().sum(dim=[1, 2, 3])
    # Summands of both signs: the rounding of the sum scales with their magnitudes.
    magnitude = data[loss_key].double().abs().sum(dim=[1, 2, 3])
    assert ((loss.double() - per_sample).abs() <= 5e-6 * magnitude).all()
    (grad,) = torch.autograd.grad(loss.sum(), x0)
    for own, reference in zip(grad, data[grad_key]):
        assert_close(own, reference, 1e-5)


@pytest.mark.parametrize("file, name, scale", [("diff_instruct", "ikl", 1), ("sid", "sid", 100)])
def test_golden_generator_gradients(file, name, scale):
    """From latents to the gradient of every parameter of a one-step generator that begins as the teacher."""
    data, meta = recorded(file), cases(f"distill/{file}.npz")[0]
    net = persistence.load(GOLDEN / "distill" / "teacher.pkl")["ema"].requires_grad_(True)
    x0 = DistilledGenerator(net, [meta["init_sigma"]])(data["gen_z"], data["labels"])
    assert_close(x0, data["gen_out"], 5e-6)
    x_s = x0 + data["sigma"] * data["noise"]
    loss = objectives.get(name)(x0, x_s, data["sigma"], *networks_as_denoisers(data["labels"]))
    (loss.mean() * scale).backward()
    assert loss.mean().item() * scale == pytest.approx(meta["e2e"]["total_float64"], rel=1e-5)
    names = [parameter for parameter, _ in net.named_parameters()]
    assert names == meta["e2e"]["parameter_names"]
    norms = [torch.zeros(()) if p.grad is None else p.grad.norm() for p in net.parameters()]
    assert_close(torch.stack(norms), data["e2e_grad_norms"], 1e-5)


def formula_call(data, y_fake):
    return objectives.get("sid", alpha=1.2)(
        data["formula_y"],
        data["formula_y"],
        torch.ones(4),
        lambda x, s: data["formula_y_real"],
        lambda x, s: y_fake,
    )


def test_golden_formula():
    """Prescribed network outputs; in sample 1 the teacher returns x0 itself, so the normaliser is clipped at 1e-5."""
    data = recorded("sid")
    assert torch.equal(data["formula_y"][1], data["formula_y_real"][1])
    assert_close(formula_call(data, data["formula_y_fake"]), data["formula_loss"].sum(dim=[1, 2, 3]), 1e-5)


def test_golden_nan_stays_visible():
    """The public code drops samples with a NaN; here such a sample's loss is NaN, and the others are as there."""
    data = recorded("sid")
    position = cases("distill/sid.npz")[0]["formula"]["nan_position"]
    y_fake = data["formula_y_fake"].clone()
    y_fake[tuple(position)] = math.nan
    loss = formula_call(data, y_fake)
    bad = torch.arange(4) == position[0]
    assert torch.equal(loss.isnan(), bad)
    assert_close(loss[~bad], data["formula_nan_loss"].sum(dim=[1, 2, 3]), 1e-5)
