"""Sampling from a denoiser: EDM's Heun and Euler solvers, deterministic or stochastic (arXiv 2206.00364, section 3)."""

import math
from collections.abc import Callable

import torch

from di_refine.errors import InputError
from di_refine.noise import edm_level
from torch_utils import misc


def sigma_grid(
    net: torch.nn.Module,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return the falling noise levels of a sampler, ending in 0 (arXiv 2206.00364, equation 5).

    The levels are `noise.edm_level` at equal steps, rounded by `net.round_sigma`.

    Args:
        net: its `sigma_min`, `sigma_max` and `round_sigma`, where present, bound and round the levels.
        num_steps: levels before the final 0; at least 1 (then only sigma_max).
        sigma_min, sigma_max: wanted lowest and highest level.
        rho: spacing; larger values put more steps at low noise.
        dtype, device: of the result. The computation is in float64 on the CPU.

    Returns:
        [num_steps + 1] levels.

    Raises:
        InputError: num_steps is below 1, or the network supports nothing of the wanted range.
    """
    if num_steps < 1:
        raise InputError(f"num_steps is {num_steps}; use at least 1")
    low = max(sigma_min, getattr(net, "sigma_min", 0))
    high = min(sigma_max, getattr(net, "sigma_max", math.inf))
    if not 0 < low <= high:
        raise InputError(
            f"sigma_min {low:g} and sigma_max {high:g} leave no noise levels; use 0 < sigma_min <= sigma_max"
        )
    position = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    t = _round_sigma(net, edm_level(position, low, high, rho))
    t = torch.cat([t, t.new_zeros(1)])
    return t.to(device=device, dtype=dtype)


def _round_sigma(net: torch.nn.Module, sigma: torch.Tensor) -> torch.Tensor:
    round_sigma = getattr(net, "round_sigma", None)
    return sigma if round_sigma is None else round_sigma(sigma)


@torch.no_grad()
def sample(
    net: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor | None = None,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    solver: str = "heun",
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
    randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
    dtype: torch.dtype = torch.float64,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Draw images from a denoiser by integrating its probability-flow ODE from sigma_max down to 0.

    With x' = (x - D(x; t)) / t, each step first raises the noise from t_i to t_hat = t_i (1 + gamma), gamma =
    min(S_churn / num_steps, sqrt(2) - 1) for S_min <= t_i <= S_max and 0 elsewhere, then makes an Euler step to
    t_{i+1}. 'heun' corrects it by the mean of the slopes at both ends, except on the last step: 2 num_steps - 1 network
    evaluations, against num_steps for 'euler'. Nothing waits for the device between the steps.

    Args:
        net: denoiser `net(x, sigma, labels)` taking a 0-d sigma and class labels or None, such as `EDMPrecond`. It is
            called in the mode it is in; sampling wants `net.eval()`.
        latents: [N, C, H, W] unit normals, on the network's device.
        labels: [N, label_dim] class labels, or None.
        num_steps, sigma_min, sigma_max, rho: the noise levels, see `sigma_grid`.
        solver: 'heun' (second order) or 'euler' (first).
        S_churn, S_min, S_max, S_noise: stochastic sampling; off at S_churn 0.
        randn_like: source of its noise, called once at every step unless S_churn is 0.
        dtype: of the states between network calls; float32 is used on MPS, which has no float64.
        progress: called as progress(steps done, num_steps) after each step.

    Returns:
        [N, C, H, W] images in `dtype`, nominally in [-1, 1].

    Raises:
        InputError: the solver is unknown, or `sigma_grid` refuses the levels.
    """
    if solver not in ("heun", "euler"):
        raise InputError(f"solver '{solver}' is unknown; use heun or euler")
    if latents.device.type == "mps" and dtype == torch.float64:
        dtype = torch.float32  # MPS has no float64

    levels = sigma_grid(net, num_steps, sigma_min, sigma_max, rho)
    raised = levels[:-1]
    if S_churn > 0:
        gamma = min(S_churn / num_steps, math.sqrt(2) - 1)
        inside = (raised >= S_min) & (raised <= S_max)
        raised = torch.where(inside, _round_sigma(net, raised * (1 + gamma)), raised)
    added = (raised**2 - levels[:-1] ** 2).clamp(min=0).sqrt() * S_noise
    levels, raised, added = (misc.to_device(t.to(dtype), latents.device) for t in (levels, raised, added))

    def slope(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (x - net(x, t, labels).to(dtype)) / t

    x = latents.to(dtype) * levels[0]
    for i in range(num_steps):
        t, t_next = raised[i], levels[i + 1]
        if S_churn > 0:
            x = x + added[i] * randn_like(x)
        first = slope(x, t)
        x_next = x + (t_next - t) * first
        if solver == "heun" and i < num_steps - 1:
            x_next = x + (t_next - t) * (first + slope(x_next, t_next)) / 2
        x = x_next
        if progress is not None:
            progress(i + 1, num_steps)
    return x
