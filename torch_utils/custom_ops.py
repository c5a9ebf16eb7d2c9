"""Where an operator's native (compiled) form is registered and chosen.

Every operator in `torch_utils.ops` is written in plain PyTorch. A compiled form, when there is one, is added with
`register_native` and taken by `pick`; nothing else in the project knows which of the two runs.
"""

from collections.abc import Callable

import torch

_native: dict[tuple[str, str], Callable] = {}


def register_native(op: str, device_type: str, function: Callable) -> None:
    """Make `function` the native form of operator `op` for tensors on `device_type` ('cuda', 'cpu')."""
    _native[op, device_type] = function


def pick(op: str, reference: Callable, impl: str, device: torch.device) -> Callable:
    """Choose the form of an operator.

    Args:
        op: the operator's name, such as 'upfirdn2d'.
        reference: its plain PyTorch form.
        impl: 'auto' takes the native form where one is registered, 'ref' the PyTorch form, 'cuda' insists on the CUDA
            one.
        device: where the operands are.

    Raises:
        ValueError: unknown `impl`, or 'cuda' for tensors that are elsewhere.
        RuntimeError: 'cuda' was asked for and no CUDA form of `op` is registered.
    """
    if impl == "ref":
        return reference
    if impl == "auto":
        return _native.get((op, device.type), reference)
    if impl != "cuda":
        raise ValueError(f"{op}: impl must be 'auto', 'ref' or 'cuda', not {impl!r}")
    if device.type != "cuda":
        raise ValueError(f"{op}: impl='cuda' needs tensors on a CUDA device, these are on {device}")
    if (op, "cuda") not in _native:
        raise RuntimeError(f"{op}: no CUDA form is registered; use impl='auto' or impl='ref'")
    return _native[op, "cuda"]
