"""Noise levels: the laws that they are drawn from, and the grid of EDM.

Everything uses the variance-exploding convention of EDM (arXiv 2206.00364): `x_s = x0 + s * n` with `n ~ N(0, I)`.
"""

import functools
from dataclasses import dataclass

import torch

from di_refine.config import TrainerConfig

SIGMA_EDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""The noise levels between the bins that statistics are given for."""


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
        """The level at t in [0, 1]: t = 0 is the lowest."""
        return edm_level(1 - t, self.sigma_min, self.sigma_max, self.rho)


Law = LogNormal | EdmGrid
"""What noise levels are drawn from: called as `law(n, rng)`."""


def edm_level(position: torch.Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> torch.Tensor:
    """Noise levels at positions in [0, 1] of EDM's grid, from the highest at 0 to the lowest at 1.

    `s(p) = (smax^(1/rho) + p (smin^(1/rho) - smax^(1/rho)))^rho` (arXiv 2206.00364, equation 5).
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + position * (low - high)) ** rho


def laws(config: TrainerConfig, sigma_min: float, sigma_max: float) -> tuple[Law, Law | None]:
    """The laws of the noise levels that the settings name, within the levels that a teacher knows.

    Args:
        config: its `sigma_dist`, `sigma_mean`, `sigma_std` and `tmax` count.
        sigma_min, sigma_max: the teacher's lowest and highest level.

    Returns:
        The law of the objective, and that of the student score where it is another one.
    """
    lognormal = LogNormal(config.sigma_mean, config.sigma_std, sigma_min, sigma_max)
    if config.sigma_dist == "lognormal":
        return lognormal, None
    return EdmGrid(max(0.002, sigma_min), min(80.0, sigma_max), tmax=config.tmax), lognormal


def expand_as(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One value per sample, `[N]` or `[N, 1, ...]` or a scalar, shaped to broadcast against `x` `[N, ...]`."""
    return torch.as_tensor(values, dtype=x.dtype, device=x.device).reshape([-1] + [1] * (x.ndim - 1))


def by_sigma(sigma: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sums of `values` `[N]` by noise level `[N]`, and how many there are, `[2, len(SIGMA_EDGES) + 1]`."""
    edges, bins = _edges(sigma.device)
    member = (torch.bucketize(sigma, edges)[:, None] == bins).to(values.dtype)
    return torch.stack([values @ member, member.sum(dim=0)])


@functools.cache
def _edges(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The edges of the bins and their numbers, copied to a device once."""
    return torch.tensor(SIGMA_EDGES, device=device), torch.arange(len(SIGMA_EDGES) + 1, device=device)
