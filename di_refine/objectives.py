"""What the generator minimises: divergences between its noised samples and the teacher's distribution.

Notation, at one noise level s: `x_s = x0 + s n`; p is the density of noised generator samples, q of the noised teacher
distribution; `Dp`, `Dq` are their denoisers `E[x0 | x_s]` (the student score and the teacher), so that
`u = (Dp - Dq) / s^2` is the score of p minus the score of q; `r = q / p`; `w` weighs the noise levels.

Every objective returns a surrogate per sample whose *gradient* with respect to the generator is the estimator; its
value is not a distance. Those marked "detached" need no gradient through any denoiser.

    name       source                                    surrogate
    ikl        Diff-Instruct, arXiv 2305.18455, eq. 9    w/s^2 <sg[Dp - Dq], x0>
    sds        DreamFusion, arXiv 2209.14988, eq. 3      ikl for a generator without randomness: exactly Dp = x0
    dmd        DMD, arXiv 2311.18828, eq. 7 and 8        ikl, divided per sample by mean|x0 - Dq|
    f-<div>    f-distill, arXiv 2502.15681               w/s^2 <sg[h(r) (Dp - Dq)], x0>
    sim        SIM, arXiv 2410.16794                     w/s^4 <Dq - Dp, Dp - x0>
    sid        SiD, arXiv 2404.04057, eq. 23             w/s^4 <Dq - Dp, (Dq - x0) - alpha (Dq - Dp)>
    uni-<div>  Uni-Instruct, arXiv 2505.20755            w/s^4 (2 h(r) <Dq - Dp, Dp - x0> + (h - r h')(r) |Dq - Dp|^2)

With `w = 1`, exact denoisers and no normalisation, the expected gradients at one noise level are exactly those of
KL(p || q) (ikl), of D_f(q || p) (f-<div>) and of E_p[h(r) |u|^2] (uni-<div>), whose integral over s ds is D_f of the
clean densities. For sid it is that of E_p|u|^2 / 2 with the samples held fixed, plus (1 - alpha) times that of E_p|u|^2
with the scores held fixed: alpha = 1 (sim) follows the scores alone, 0.5 is the whole gradient of E_p|u|^2 / 2.

Everything here is arithmetic on tensors that are given; no network is called. PyTorch itself is imported only inside
the call of an objective with networks, so that `--help` can list the names without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Network = Callable[[Tensor, Tensor], Tensor]

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "unit": lambda sigma: _ones(sigma),
    "sigma": lambda sigma: sigma,
    "sigma2": lambda sigma: sigma**2,
    "sigma4": lambda sigma: sigma**4,
}
"""Weightings w(s) of a divergence at noise level s, by name."""


def _ones(x: Tensor) -> Tensor:
    return x.new_ones(x.shape)


def _zeros(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape)


@dataclass(frozen=True)
class Divergence:
    """An f-divergence `D_f(q || p) = E_p[f(r)]`, r = q / p: its definition and what its gradients need."""

    f: Callable[[Tensor], Tensor]
    h: Callable[[Tensor], Tensor]  # r^2 f''(r)
    c: Callable[[Tensor], Tensor]  # h(r) - r h'(r)


DIVERGENCES = {
    "rkl": Divergence(lambda r: -r.log(), lambda r: _ones(r), lambda r: _ones(r)),
    "fkl": Divergence(lambda r: r * r.log(), lambda r: r, lambda r: _zeros(r)),
    "jeffreys": Divergence(lambda r: (r - 1) * r.log(), lambda r: 1 + r, lambda r: _ones(r)),
    "js": Divergence(
        lambda r: (r * r.log() - (r + 1) * ((r + 1) / 2).log()) / 2,
        lambda r: r / (2 * (1 + r)),
        lambda r: r**2 / (2 * (1 + r) ** 2),
    ),
    "hellinger": Divergence(lambda r: (r.sqrt() - 1) ** 2, lambda r: r.sqrt() / 2, lambda r: r.sqrt() / 4),
    "chi2": Divergence(lambda r: (r - 1) ** 2, lambda r: 2 * r**2, lambda r: -2 * r**2),
    "neyman": Divergence(lambda r: (1 - r) ** 2 / r, lambda r: 2 / r, lambda r: 4 / r),
}
"""By name: reverse KL, forward KL, Jeffreys, Jensen-Shannon, squared Hellinger, Pearson and Neyman chi-squared."""


@dataclass(frozen=True)
class Objective:
    """One objective with its settings; made by `get`.

    Attributes:
        name: as in `NAMES`.
        weight: key of `WEIGHTS`.
        normalize: divide each sample's surrogate by a detached mean|x0 - Dq|, at least 1e-5.
        detached: nothing flows through the denoisers, so they may run without autograd.
        surrogate: the formula, `(objective, x0, s, w, dp, dq, r) -> [N, ...]`.
        needs_student: the formula has a student score in it.
        needs_ratio: the formula has the density ratio in it.
        alpha: of `sid`.
        detach_ratio: nothing flows through the density ratio.
        divergence: of `f-<div>` and `uni-<div>`.
    """

    name: str
    weight: str
    normalize: bool
    detached: bool
    surrogate: Callable[..., Tensor]
    needs_student: bool = True
    needs_ratio: bool = False
    alpha: float = 1.0
    detach_ratio: bool = False
    divergence: Divergence | None = None

    def loss(self, x0: Tensor, sigma: Tensor, dq: Tensor, dp: Tensor | None, log_ratio: Tensor | None = None) -> Tensor:
        """Surrogate per sample.

        Args:
            x0: generator samples `[N, ...]` with their graph.
            sigma: noise levels `[N]`.
            dq: the teacher's denoised samples, like `x0`. Unless the objective is `detached`, they and `dp` have the
                graph through `x0`.
            dp: the student score's; None for `sds`, which has none.
            log_ratio: log of q / p at the noised samples, `[N]`, for objectives with `needs_ratio`.

        Returns:
            `[N]`, in the dtype of `x0`.

        Raises:
            ValueError: `log_ratio` is needed and was not given.
        """
        if self.needs_ratio and log_ratio is None:
            raise ValueError(f"objective={self.name} needs log_ratio, the log of the density ratio teacher / generator")
        shape = [-1] + [1] * (x0.ndim - 1)
        s = sigma.reshape(shape)
        weight = WEIGHTS[self.weight](s)
        r = None
        if self.needs_ratio and log_ratio is not None:
            r = (log_ratio.detach() if self.detached or self.detach_ratio else log_ratio).exp().reshape(shape)
        if self.normalize:
            size = (x0 - dq).detach().abs().reshape(len(x0), -1).mean(dim=1).clamp_min(1e-5)
            weight = weight / size.reshape(shape)
        dp = dp if self.needs_student else x0.detach()
        return self.surrogate(self, x0, s, weight, dp, dq, r).reshape(len(x0), -1).sum(dim=1)

    def __call__(
        self,
        x0: Tensor,
        x_s: Tensor,
        sigma: Tensor,
        teacher: Network,
        student_score: Network | None,
        log_ratio: Network | None = None,
    ) -> Tensor:
        """Run the networks that the objective needs, and return `loss`.

        Args:
            x0: generator samples `[N, ...]` with their graph.
            x_s: `x0 + sigma * n`, same shape, with the graph through x0 unless the objective is `detached`.
            sigma: noise levels, `[N]` or `[N, 1, ...]`, or one number.
            teacher: `(x, sigma) -> denoised`, like `x`; its parameters should not require gradients.
            student_score: likewise; may be None for `sds`.
            log_ratio: `(x, sigma) -> [N]`, log of q / p; only for objectives with `needs_ratio`.

        Returns:
            `[N]`, in the dtype of `x0`.

        Raises:
            ValueError: a network is needed and was not given.
        """
        import torch  # see the module's text

        if self.needs_student and student_score is None:
            raise ValueError(f"objective={self.name} needs a student score")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            dq = teacher(x_s, sigma)
            dp = student_score(x_s, sigma) if self.needs_student and student_score is not None else None
            ratio = log_ratio(x_s, sigma) if self.needs_ratio and log_ratio is not None else None
        levels = torch.as_tensor(sigma, dtype=x0.dtype, device=x0.device).reshape(-1)
        return self.loss(x0, levels, dq, dp, ratio)


def _ikl(o, x0, s, w, dp, dq, r):
    return (w / s**2 * (dp - dq)).detach() * x0


def _f(o, x0, s, w, dp, dq, r):
    return (w / s**2 * o.divergence.h(r) * (dp - dq)).detach() * x0


def _sid(o, x0, s, w, dp, dq, r):
    return w / s**4 * (dq - dp) * ((dq - x0) - o.alpha * (dq - dp))


def _uni(o, x0, s, w, dp, dq, r):
    r = _ones(s) if r is None else r
    h, c = o.divergence.h(r), o.divergence.c(r)
    return w / s**4 * (2 * h * (dq - dp) * (dp - x0) + c * (dq - dp) ** 2)


_OBJECTIVES = {
    "ikl": Objective("ikl", "sigma2", False, True, _ikl),
    "sds": Objective("sds", "sigma2", False, True, _ikl, needs_student=False),
    "dmd": Objective("dmd", "sigma2", True, True, _ikl),
    "sim": Objective("sim", "sigma4", True, False, _sid, alpha=1.0),
    "sid": Objective("sid", "sigma4", True, False, _sid, alpha=1.2),
}
for _name, _div in DIVERGENCES.items():
    # The reverse KL's h and c are constants, so it alone needs no ratio.
    _common: dict[str, Any] = {"needs_ratio": _name != "rkl", "divergence": _div}
    if _name != "rkl":
        _OBJECTIVES[f"f-{_name}"] = Objective(f"f-{_name}", "sigma2", False, True, _f, **_common)
    else:
        _OBJECTIVES["f-rkl"] = Objective("f-rkl", "sigma2", False, True, _ikl)
    _OBJECTIVES[f"uni-{_name}"] = Objective(f"uni-{_name}", "sigma4", True, False, _uni, **_common)

NAMES = tuple(_OBJECTIVES)
"""All objective names."""


def get(
    name: str,
    weight: str = "default",
    normalize: bool | None = None,
    detach_ratio: bool = False,
    alpha: float | None = None,
) -> Objective:
    """Look up an objective.

    Args:
        name: one of `NAMES`.
        weight: w(s), a key of `WEIGHTS`; 'unit' is the exact gradient at one noise level; 'default' is what the
            objective's authors use.
        normalize: overrides the objective's own choice of per-sample normalisation.
        detach_ratio: for `uni-<div>`, stop the gradient through the ratio: less variance, but biased.
        alpha: for `sid`; 1 is `sim`, 0.5 the exact gradient of half the squared score difference.

    Raises:
        ValueError: unknown name or weight, or a setting the objective does not have.
    """
    if name not in _OBJECTIVES:
        raise ValueError(f"objective={name} is unknown; known are {', '.join(NAMES)}")
    if weight != "default" and weight not in WEIGHTS:
        raise ValueError(f"weight={weight} is unknown; known are default, {', '.join(WEIGHTS)}")
    objective = _OBJECTIVES[name]
    if alpha is not None and name != "sid":
        raise ValueError(f"alpha={alpha:g} belongs to objective=sid, not to objective={name}")
    if detach_ratio and not (name.startswith("uni-") and objective.needs_ratio):
        raise ValueError(f"`detach_ratio` belongs to objectives such as uni-fkl, not to objective={name}")
    changes: dict[str, Any] = {"detach_ratio": detach_ratio}
    if weight != "default":
        changes["weight"] = weight
    if normalize is not None:
        changes["normalize"] = normalize
    if alpha is not None:
        changes["alpha"] = alpha
    return replace(objective, **changes)
