"""Noise levels: the laws they are drawn from, and how much each one counts.

Everything uses the variance-exploding convention of EDM (arXiv 2206.00364): `x_s = x0 + s * n` with `n ~ N(0, I)`.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LogNormal:
    """`ln s ~ N(mean, std^2)`, the training law of EDM (arXiv 2206.00364, table 1) and of Diff-Instruct.

    Args:
        mean: mean of ln(sigma).
        std: standard deviation of ln(sigma), not negative.
        sigma_min: draws below are raised to it.
        sigma_max: draws above are lowered to it.
    """

    mean: float = -1.2
    std: float = 1.2
    sigma_min: float = 0.0
    sigma_max: float = float("inf")

    def __call__(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draw `n` noise levels, float32 `[n]`, on the generator's device."""
        normal = torch.randn(n, generator=rng, device=rng.device)
        return (normal * self.std + self.mean).exp().clamp(self.sigma_min, self.sigma_max)


@dataclass(frozen=True)
class EdmGrid:
    """Levels spaced like EDM's sampling grid (arXiv 2206.00364, equation 5), drawn as SiD does (arXiv 2404.04057).

    `t ~ U(0, tmax / 1000)`, then `level(t)`.

    Args:
        sigma_min: the level at t = 0.
        sigma_max: the level at t = 1.
        rho: larger values put more levels near `sigma_min`.
        tmax: in thousandths; below 1000 the highest levels are left out.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    tmax: float = 800.0

    def __call__(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draw `n` noise levels, float32 `[n]`, on the generator's device."""
        return self.level(torch.rand(n, generator=rng, device=rng.device) * (self.tmax / 1000))

    def level(self, t: torch.Tensor) -> torch.Tensor:
        """`s(t) = (smax^(1/rho) + (1 - t) (smin^(1/rho) - smax^(1/rho)))^rho` for t in [0, 1]: t = 0 is the lowest."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (high + (1 - t) * (low - high)) ** self.rho


WEIGHTS = {
    "unit": lambda sigma: torch.ones_like(sigma),
    "sigma": lambda sigma: sigma,
    "sigma2": lambda sigma: sigma**2,
    "sigma4": lambda sigma: sigma**4,
}
"""Weightings w(s) of a divergence at noise level s, by name."""


def expand_as(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One value per sample, `[N]` or `[N, 1, ...]` or a scalar, shaped to broadcast against `x` `[N, ...]`."""
    return torch.as_tensor(values, dtype=x.dtype, device=x.device).reshape([-1] + [1] * (x.ndim - 1))
