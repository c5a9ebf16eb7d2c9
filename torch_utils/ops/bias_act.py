"""Bias, activation, gain and clamp in one operator (Karras et al. 2020, arXiv 2006.06676, section 3 of its code
release).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from torch_utils import custom_ops


@dataclass(frozen=True)
class Activation:
    """An activation function `func(x, alpha)` with the values that `bias_act` uses where none are given."""

    func: Callable[[torch.Tensor, float], torch.Tensor]
    def_alpha: float
    def_gain: float  # keeps the variance of a unit normal near one


activation_funcs = {
    "linear": Activation(lambda x, alpha: x, 0, 1),
    "relu": Activation(lambda x, alpha: F.relu(x), 0, math.sqrt(2)),
    "lrelu": Activation(lambda x, alpha: F.leaky_relu(x, alpha), 0.2, math.sqrt(2)),
    "tanh": Activation(lambda x, alpha: torch.tanh(x), 0, 1),
    "sigmoid": Activation(lambda x, alpha: torch.sigmoid(x), 0, 1),
    "elu": Activation(lambda x, alpha: F.elu(x), 0, 1),
    "selu": Activation(lambda x, alpha: F.selu(x), 0, 1),
    "softplus": Activation(lambda x, alpha: F.softplus(x), 0, 1),
    "swish": Activation(lambda x, alpha: F.silu(x), 0, math.sqrt(2)),
}

FASTER_ON_CPU = ("relu", "lrelu")  # the other functions PyTorch has vectorised better, see docs/ops.md


def bias_act(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Compute `clamp(gain * act(x + b))`, which is differentiable any number of times.

    Args:
        x: any shape and floating dtype.
        b: `[x.shape[dim]]`, same dtype as `x`; None adds nothing.
        dim: the axis of `x` the bias runs along.
        act: a key of `activation_funcs`.
        alpha: negative slope of 'lrelu' (default 0.2); the others ignore it.
        gain: factor after the activation (default: the activation's own).
        clamp: limit the result to [-clamp, clamp], after the gain; None does not limit.
        impl: 'auto', 'ref' or 'cuda', see `torch_utils.custom_ops.pick`.

    Returns:
        A tensor like `x`.

    Raises:
        ValueError: the activation is unknown, the bias has an unfit shape, dtype or device, or the clamp is negative.
    """
    if act not in activation_funcs:
        raise ValueError(f"bias_act: act must be one of {', '.join(activation_funcs)}, not {act!r}")
    spec = activation_funcs[act]
    if b is not None and (b.ndim != 1 or not 0 <= dim < x.ndim or b.shape[0] != x.shape[dim]):
        raise ValueError(f"bias_act: a bias of shape {list(b.shape)} does not fit axis {dim} of {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"bias_act: x must have a floating dtype, not {x.dtype}")
    if b is not None and b.device != x.device:
        raise ValueError(f"bias_act: the bias is on {b.device}, x on {x.device}; move one of them")
    if b is not None and b.dtype != x.dtype:
        if not custom_ops.autocast_is_on(x.device.type):
            raise ValueError(f"bias_act: the bias is {b.dtype}, x is {x.dtype}; cast one of them")
        wide = torch.promote_types(x.dtype, b.dtype)  # what autocast does with sums
        x, b = x.to(wide), b.to(wide)
    if clamp is not None and clamp < 0:
        raise ValueError(f"bias_act: clamp must not be negative, got {clamp}")
    alpha = float(spec.def_alpha if alpha is None else alpha)
    gain = float(spec.def_gain if gain is None else gain)
    problem = custom_ops.unfit(x.dtype) or ("a negative alpha" if act == "lrelu" and alpha < 0 else None)
    run = custom_ops.pick("bias_act", _bias_act_ref, impl, x.device, problem, faster_on_cpu=act in FASTER_ON_CPU)
    return run(x, b, dim, act, alpha, gain, None if clamp is None else float(clamp))


def _bias_act_ref(x, b, dim, act, alpha, gain, clamp):
    if b is not None:
        x = x + b.reshape([-1 if axis == dim else 1 for axis in range(x.ndim)])
    x = activation_funcs[act].func(x, alpha)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)
