"""The choice between the two forms of an operator, compiled or in plain PyTorch, and a check of the compiled form.

Every operator in `torch_utils.ops` has a form in plain PyTorch that works everywhere. On CUDA there is also one of our
own, compiled on first use; `python -m torch_utils.custom_ops` tells whether that works here and what it gains. A mode
decides which form runs. `set_mode` sets it, as do the commands for their setting `ops`; before that it is the value of
the environment variable DI_REFINE_OPS, or 'auto':

    auto      on CUDA the compiled form, or one line that says why not and the PyTorch form; on a CPU the compiled form
              where that check has built it and it is the faster one
    cuda      the compiled form; anything in its way is an error
    native    PyTorch's own operators; nothing is compiled or loaded
    compiled  the compiled form on whatever device the tensors are; for tests and benchmarks
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch

MODES = ("auto", "cuda", "native")

_mode = os.environ.get("DI_REFINE_OPS") or "auto"
_libraries: dict[str, str | None] = {}  # device type -> None where its library is loaded, else why it is not


class OpsUnavailable(RuntimeError):
    """The compiled operators were demanded and are not available; the message says why and what to do."""


def mode() -> str:
    """Return the mode in force.

    Raises:
        ValueError: DI_REFINE_OPS is not a mode.
    """
    if _mode not in (*MODES, "compiled"):
        raise ValueError(f"DI_REFINE_OPS must be {', '.join(MODES[:-1])} or {MODES[-1]}, not {_mode!r}")
    return _mode


def set_mode(name: str) -> None:
    """Choose the form of all operators from here on: 'auto', 'cuda', 'native' or 'compiled'."""
    global _mode
    if name not in (*MODES, "compiled"):
        raise ValueError(f"the operators' mode must be {', '.join(MODES[:-1])} or {MODES[-1]}, not {name!r}")
    _mode = name


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Set the mode for the duration of a block."""
    before = _mode
    set_mode(name)
    try:
        yield
    finally:
        set_mode(before)


def pick(
    op: str,
    reference: Callable,
    impl: str,
    device: torch.device,
    problem: str | None = None,
    faster_on_cpu: bool = False,
) -> Callable:
    """Choose the form of an operator.

    Args:
        op: the operator's name, a function of `torch_utils.ops.compiled`.
        reference: its plain PyTorch form.
        impl: 'auto' follows the mode, 'ref' takes the PyTorch form, 'cuda' demands the compiled one on CUDA.
        device: where the operands are.
        problem: why the compiled form cannot do this call, if it cannot.
        faster_on_cpu: whether the compiled form has been measured to be the faster one for this call on a CPU.

    Raises:
        ValueError: `impl` is unknown, or the compiled form was demanded for tensors that it cannot take.
        OpsUnavailable: `impl` or the mode demands the compiled form, and it is not available here.
    """
    if impl not in ("auto", "ref", "cuda"):
        raise ValueError(f"{op}: impl must be 'auto', 'ref' or 'cuda', not {impl!r}")
    wanted = mode() if impl == "auto" else impl
    if wanted in ("ref", "native"):
        return reference
    if wanted == "cuda" and device.type != "cuda":
        if impl == "cuda":
            raise ValueError(f"{op}: impl='cuda' needs tensors on a CUDA device, these are on {device}")
        raise OpsUnavailable(f"{op}: ops=cuda needs tensors on a CUDA device, these are on {device}; use ops=auto")
    if wanted == "auto":
        fit = device.type == "cuda" or (device.type == "cpu" and faster_on_cpu)
        return _compiled_form(op) if fit and problem is None and _available(device.type) else reference
    if problem is not None:
        raise ValueError(f"{op}: the compiled form does not take {problem}; use impl='ref'")
    insist(device.type)
    return _compiled_form(op)


def unfit(dtype: torch.dtype) -> str | None:
    """Return why the compiled operators cannot take tensors of a dtype, or None where they can."""
    fits = dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return None if fits else f"tensors of {dtype}"


def autocast_is_on(device_type: str) -> bool:
    """Return whether autocast is in force for a device type; False for those that have none, such as 'meta'."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def insist(device_type: str) -> None:
    """Load the compiled operators for 'cuda' or 'cpu', building them where they are not built yet.

    Raises:
        OpsUnavailable: they cannot be built or loaded; the message has the reason and the remedy.
    """
    if not _loaded(device_type, build=True):
        raise OpsUnavailable(_libraries[device_type])


def mark_loaded(device_type: str) -> None:
    """Note that the library is loaded already, which the process that builds it knows."""
    _libraries[device_type] = None


def _constant(function: Callable) -> Callable:
    """Mark a function whose result `torch.compile` may take for a constant.

    `torch.compiler.assume_constant_result` does just this, but imports all of torch._dynamo for it, whose two to three
    seconds every command would spend at its start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _available(device_type: str) -> bool:
    """Return whether 'auto' takes the compiled form; a CPU library is used where it exists, but never built for it."""
    known = device_type in _libraries
    available = _loaded(device_type, build=device_type == "cuda")
    if not available and not known and device_type == "cuda" and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{_libraries[device_type]}; using PyTorch's own operators", file=sys.stderr, flush=True)
    return available


@_constant
def _loaded(device_type: str, build: bool) -> bool:
    from torch_utils.ops import building

    if device_type not in _libraries or (build and _libraries[device_type] == building.NOT_BUILT):
        try:
            path = building.ensure(device_type) if build else building.existing(device_type)
            from torch_utils.ops import compiled  # noqa: F401  declares what the library implements

            torch.ops.load_library(str(path))
            _libraries[device_type] = None
        except building.BuildError as error:
            _libraries[device_type] = str(error)
        except OSError as error:
            _libraries[device_type] = f"the compiled operators cannot be loaded ({' '.join(str(error).split())})"
    return _libraries[device_type] is None


def _compiled_form(op: str) -> Callable:
    from torch_utils.ops import compiled

    return getattr(compiled, op)


if __name__ == "__main__":
    from torch_utils.ops.doctor import main

    main()
