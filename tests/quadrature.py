"""Objectives against something exact, on the line, in float64: for the tests and `benchmarks/gradients.py`.

In one dimension every noised density here is a Gaussian mixture: the teachers', a Gaussian generator's, and those of
the non-Gaussian generators, whose latent is integrated by the trapezoidal rule, which makes them mixtures of Diracs. So
scores, denoisers and densities are closed forms and differentiable in the generator's parameters. An objective's
gradient (`estimate`) is summed over a grid of (z, n) with normal weights; what it should equal (`exact`) is autograd of
the divergence, integrated over x.
"""

import math
from collections.abc import Callable

import torch

from di_refine import objectives

F64 = torch.float64

F = {
    "rkl": lambda r: -r.log(),
    "fkl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "js": lambda r: (r * r.log() - (r + 1) * ((r + 1) / 2).log()) / 2,
    "hellinger": lambda r: (r.sqrt() - 1) ** 2,
    "chi2": lambda r: (r - 1) ** 2,
    "neyman": lambda r: (1 - r) ** 2 / r,
}
"""The divergences' f, written down independently of `di_refine.objectives`."""


def normal_grid(limit: float, step: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Trapezoidal rule for expectations over N(0, 1), exact to rounding for smooth functions: nodes and weights."""
    nodes = torch.arange(-limit, limit + step / 2, step, dtype=F64)
    return nodes, torch.softmax(-(nodes**2) / 2, dim=0)


class Mixture:
    """A mixture of normals on the line: closed-form density and denoiser after adding noise of level s."""

    def __init__(self, weights, means, stds):
        self.weights, self.means, self.stds = (torch.as_tensor(v, dtype=F64) for v in (weights, means, stds))

    def _parts(self, x, s):
        var = self.stds**2 + s**2
        logits = self.weights.log() - (x[..., None] - self.means) ** 2 / (2 * var) - 0.5 * (2 * math.pi * var).log()
        return logits, var

    def log_prob(self, x, s):
        return self._parts(x, s)[0].logsumexp(-1)

    def denoise(self, x, s):
        logits, var = self._parts(x, s)
        return (logits.softmax(-1) * (self.means + self.stds**2 / var * (x[..., None] - self.means))).sum(-1)


Z, Z_WEIGHTS = normal_grid(7, 0.125)
N, N_WEIGHTS = normal_grid(7.5, 0.25)


class Generator:
    """`x0 = G(z; theta)`. The density of its noised samples, `noised`, follows the parameters differentiably."""

    theta: torch.Tensor
    """Where the gradients are compared."""

    def __call__(self, theta):
        raise NotImplementedError

    def noised(self, theta) -> Mixture:
        return Mixture(Z_WEIGHTS, self(theta), torch.zeros_like(Z))


class GaussianGenerator(Generator):
    theta = torch.tensor([0.4, 0.8], dtype=F64)

    def __call__(self, theta):
        return theta[0] + theta[1] * Z

    def noised(self, theta) -> Mixture:
        return Mixture([1.0], theta[:1], theta[1:2])


class WavyGenerator(Generator):
    """Skewed and with shoulders."""

    theta = torch.tensor([-0.2, 0.9, 0.35], dtype=F64)

    def __call__(self, theta):
        return theta[0] + theta[1] * Z + theta[2] * (2 * Z).sin()


class SplitGenerator(Generator):
    """Two separate humps of unequal mass."""

    theta = torch.tensor([0.15, 0.6, 0.7], dtype=F64)

    def __call__(self, theta):
        return theta[0] + theta[1] * Z + theta[2] * (2.5 * (Z - 0.2)).tanh()


TEACHERS = {
    "two": Mixture([0.35, 0.65], [-1.0, 1.1], [0.55, 0.7]),
    "three": Mixture([0.2, 0.5, 0.3], [-1.4, 0.2, 1.6], [0.6, 0.75, 0.65]),
}
GENERATORS = {"gaussian": GaussianGenerator(), "wavy": WavyGenerator(), "split": SplitGenerator()}
SETTINGS = [
    ("two", "gaussian", 0.6),
    ("two", "wavy", 0.6),
    ("two", "split", 0.5),
    ("three", "gaussian", 0.45),
    ("three", "wavy", 0.8),
    ("three", "split", 0.6),
]
"""Teacher, generator and noise level."""


Integrand = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`(p, r, u^2) -> what is integrated over x`, all at the same points."""


def unit(name: str, **settings) -> objectives.Objective:
    """The objective as it estimates an exact gradient at one noise level: w(s) = 1, no normalisation."""
    return objectives.get(name, weight="unit", normalize=False, **settings)


def minimised(name: str, alpha: float | None = None) -> Integrand:
    """What an objective follows the gradient of, as an integrand; `p.detach()` holds the samples fixed.

    sid is half of E_p|u|^2 with the samples held fixed, plus (1 - alpha) times the same with the scores held fixed. The
    first part is the score projection identity, E_p<v, Dp - x0> = 0 for every v, differentiated in the parameters. So
    alpha = 1 (sim) follows the scores alone, 0.5 is the gradient of half of E_p|u|^2, 1.2 opposes the second part.
    """
    family, _, divergence = name.partition("-")
    if family in ("ikl", "dmd"):
        return lambda p, r, u2: -p * r.log()
    if family == "f":
        return lambda p, r, u2: p * F[divergence](r)
    if family in ("sim", "sid"):
        alpha = alpha if alpha is not None else {"sim": 1.0, "sid": 1.2}[family]
        return lambda p, r, u2: p.detach() * u2 / 2 + (1 - alpha) * p * u2.detach()
    if family == "uni":
        return lambda p, r, u2: p * objectives.DIVERGENCES[divergence].h(r) * u2
    raise ValueError(name)


def estimate(
    objective: objectives.Objective, teacher: str, generator: str, s: float, theta: torch.Tensor | None = None
) -> torch.Tensor:
    """The objective's gradient with respect to the generator's parameters, integrated over z and n."""
    gen, q = GENERATORS[generator], TEACHERS[teacher]
    theta = (gen.theta if theta is None else theta).clone().requires_grad_()
    p = gen.noised(theta.detach())  # as in training: the student score does not follow the parameters
    x0 = gen(theta).repeat_interleave(len(N))[:, None]
    x_s = x0 + s * N.repeat(len(Z))[:, None]
    sigma = torch.full([len(x0)], s, dtype=F64)

    def log_ratio(x, sigma):
        return (q.log_prob(x, s) - p.log_prob(x, s)).squeeze(1)

    loss = objective(x0, x_s, sigma, lambda x, _: q.denoise(x, s), lambda x, _: p.denoise(x, s), log_ratio)
    assert loss.shape == sigma.shape and loss.dtype == F64
    weights = (Z_WEIGHTS[:, None] * N_WEIGHTS).reshape(-1)
    return torch.autograd.grad((weights * loss).sum(), theta)[0]


def exact(
    integrand: Integrand, teacher: str, generator: str, s: float, theta: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of `integral integrand(p, r, u^2) dx`, with every place where the parameters enter."""
    gen, q = GENERATORS[generator], TEACHERS[teacher]
    theta = (gen.theta if theta is None else theta).clone().requires_grad_()
    p = gen.noised(theta)
    x = torch.linspace(-16, 16, 1601, dtype=F64)
    log_p, log_q = p.log_prob(x, s), q.log_prob(x, s)
    u = (p.denoise(x, s) - q.denoise(x, s)) / s**2
    value = integrand(log_p.exp(), (log_q - log_p).exp(), u**2).sum() * (x[1] - x[0])
    return torch.autograd.grad(value, theta)[0]


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a - b| / max|b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


def dirac_gradients(name: str, teacher: str, s: float, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """For a generator without randomness, `x0 = theta`: the gradient by `sds` or `ikl`, and that of KL(p || q).

    p is N(theta, s^2), so its entropy is constant and its denoiser theta itself.
    """
    q = TEACHERS[teacher]
    at = torch.tensor(theta, dtype=F64, requires_grad=True)
    x0 = at.expand(len(N), 1)
    student = None if name == "sds" else lambda x, _: at.detach().expand_as(x)
    x_s = x0 + s * N[:, None]
    loss = unit(name)(x0, x_s, torch.tensor(s, dtype=F64), lambda x, _: q.denoise(x, s), student)
    (estimated,) = torch.autograd.grad((N_WEIGHTS * loss).sum(), at)
    (target,) = torch.autograd.grad(-(N_WEIGHTS * q.log_prob(at + s * N, s)).sum(), at)
    return estimated, target


def expansion(name: str) -> tuple[float, float]:
    """D_f(q0 || p0) of two mixtures, and the integral of s E_p[h(r) |u|^2] ds from 0 to infinity."""
    p, q = Mixture([0.5, 0.5], [-0.4, 1.0], [0.7, 0.8]), TEACHERS["two"]
    x = torch.linspace(-14, 14, 1401, dtype=F64)
    log_p, log_q = p.log_prob(x, 0), q.log_prob(x, 0)
    direct = (log_p.exp() * F[name]((log_q - log_p).exp())).sum() * (x[1] - x[0])

    log_s = torch.arange(math.log(1e-4), math.log(1e4), 0.05, dtype=F64)
    total = 0.0
    for s in log_s.exp():
        y = x * (1 + s**2).sqrt()
        log_p, log_q = p.log_prob(y, s), q.log_prob(y, s)
        u = (p.denoise(y, s) - q.denoise(y, s)) / s**2
        inner = (log_p.exp() * objectives.DIVERGENCES[name].h((log_q - log_p).exp()) * u**2).sum() * (y[1] - y[0])
        total += s * inner * s * 0.05  # ds = s d(log s)
    return direct.item(), total.item()
