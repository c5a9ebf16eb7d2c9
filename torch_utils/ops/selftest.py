"""A quick check that compiled operators compute what the PyTorch form computes, on the device they were built for."""

from collections.abc import Callable, Iterator

import torch

from torch_utils import custom_ops
from torch_utils.ops import bias_act, upfirdn2d

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def calls(device: torch.device | str) -> Iterator[tuple[str, Callable]]:
    """Yield names and functions `op(x, b, impl)` that reach every kernel; x is [2, 16, h, w], b its bias."""
    filters = {
        "4x4": upfirdn2d.setup_filter([1, 3, 3, 1], device=device),
        "3x2": upfirdn2d.setup_filter([[1, 2], [3, 1], [0, 1]], device=device),
        "12": upfirdn2d.setup_filter(range(1, 13), device=device),
    }
    for taps, f in filters.items():
        for op in (upfirdn2d.upsample2d, upfirdn2d.downsample2d, upfirdn2d.filter2d):
            yield f"{op.__name__} {taps}", lambda x, b, impl, op=op, f=f: op(x, f, impl=impl)
    for act in bias_act.activation_funcs:
        yield f"bias_act {act}", lambda x, b, impl, act=act: bias_act.bias_act(x, b, act=act, gain=1.3, impl=impl)
    yield "bias_act clamp", lambda x, b, impl: bias_act.bias_act(x, b, act="lrelu", clamp=2.0**0.5, impl=impl)


def run(device: torch.device | str) -> list[tuple[str, float]]:
    """Compare values and first derivatives with the PyTorch form in float64.

    Returns:
        What was compared, and the largest difference relative to the largest value.

    Raises:
        ArithmeticError: a call, which the message names, differs by more than the rounding of its dtype explains.
    """
    results = []
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in TOLERANCES.items():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 16, 18, 22, generator=generator).to(device, dtype, memory_format=memory_format)
            b = torch.randn(16, generator=generator).to(device, dtype)
            for name, op in calls(device):
                if name == "bias_act clamp" and dtype != torch.float32:
                    continue  # rounding decides which elements are clamped
                error = _difference(op, x, b)
                name = f"{name} {str(dtype)[6:]}"
                if not error <= tolerance:
                    raise ArithmeticError(
                        f"{name} on {device} differs from the PyTorch form by {error:.1e} (allowed: {tolerance:.0e})"
                    )
                results.append((name, error))
    return results


def _difference(op: Callable, x: torch.Tensor, b: torch.Tensor) -> float:
    x, b = x.detach().requires_grad_(), b.detach().requires_grad_()
    exact_x, exact_b = x.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    with custom_ops.use("compiled"):
        y = op(x, b, "auto")
        dy = torch.linspace(0, 50, y.numel(), device=y.device).cos().reshape(y.shape)
        got = [y, *torch.autograd.grad(y, [x, b], dy.to(y.dtype), allow_unused=True)]
    y = op(exact_x, exact_b, "ref")
    want = [y, *torch.autograd.grad(y, [exact_x, exact_b], dy.to(got[0].dtype).double(), allow_unused=True)]
    errors = [
        (g.double() - w).detach().abs().max() / w.detach().abs().max() for g, w in zip(got, want) if w is not None
    ]
    return max(float(error) for error in errors)
