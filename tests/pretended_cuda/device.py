"""A CUDA device that is not there: its tensors say `cuda:0` and hold their values on the CPU.

PyTorch treats them as it treats tensors of a GPU (autograd, autocast, gradient scalers, fused optimizers, generators of
the device). Operators that mix devices are errors, as on a GPU, and what would make the host wait for the device is
counted under the line that asks for it. Kernels, streams, memory and graphs are not shown.

`guard.cpp` has to be loaded before PyTorch is imported.
"""

import collections
import contextlib
import traceback

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
waits: collections.Counter[str] = collections.Counter()
"""How often each line made the host wait for the device."""

# What reads a value of the device on the host.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal"}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
NOT_OURS = ("/torch/", "pretended_cuda/device.py", "<frozen", "contextlib.py", "/click/")

_Generator, _pin = torch.Generator, torch.Tensor.pin_memory
_default_state = _Generator().manual_seed(0).get_state()  # of the device's own generator


class MixedDevices(RuntimeError):
    """An operator was given tensors, or a generator, of different devices."""


def where(frames: int = 20) -> str:
    """The innermost lines of the project in the present call, innermost first."""
    stack = [f for f in traceback.extract_stack() if not any(part in f.filename for part in NOT_OURS)]
    return " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.name}" for f in reversed(stack[-frames:]))


class Tensor(torch.Tensor):
    """A tensor of the device; `value` holds what it is on the CPU."""

    value: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value):
        shape = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, value.size(), device=CUDA, layout=value.layout, **shape)
        self.value = value
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})

    def __repr__(self):
        return f"{self.value!r} on {CUDA}"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch.no_grad():
                copied = Tensor(self.value.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return self.value.detach().__reduce_ex__(protocol)

    def untyped_storage(self):
        return self.value.untyped_storage()

    def data_ptr(self):
        return self.value.data_ptr()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self):
        waits[f"tolist {where()}"] += 1
        return self.value.tolist()


class Generator(_Generator):
    """A generator of any device, on the CPU."""


class _GeneratorType(type):
    def __instancecheck__(cls, x):
        return isinstance(x, _Generator)


class _MadeGenerator(metaclass=_GeneratorType):
    """What `torch.Generator` is replaced with: it remembers the device that it was made for."""

    def __new__(cls, device="cpu"):
        made = Generator()
        made.named = CUDA if torch.device(device).type == "cuda" else torch.device(device)
        return made


Generator.device = property(lambda self: self.named)  # type: ignore[assignment]


@contextlib.contextmanager
def default_generator():
    """The device draws from a default generator of its own."""
    global _default_state
    kept = torch._C.default_generator.get_state()
    torch._C.default_generator.set_state(_default_state)
    try:
        yield
    finally:
        _default_state = torch._C.default_generator.get_state()
        torch._C.default_generator.set_state(kept)


def call(func, args, kwargs):
    """Run an operator on the values, and say which device its results are on."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    ours = [t for t in leaves if isinstance(t, Tensor)]
    others = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, Tensor)]
    name = func._schema.name.partition("::")[2]
    device = kwargs.get("device")
    on_cuda = bool(ours) if device is None else torch.device(device).type == "cuda"
    if name in ("copy_", "copy"):
        on_cuda = isinstance(args[0], Tensor)
    if name in ("_to_copy", "copy_", "copy"):
        _note_copy(
            args[1] if name != "_to_copy" else args[0], on_cuda, kwargs.get("non_blocking") or args[2:3] == (True,)
        )
    elif device is None and ours and others:
        _check_devices(func, name, args, ours, others)
    if ours and name in READS:
        waits[f"{name} {where()}"] += 1
    if ours and name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        waits[f"index by mask {where()}"] += 1
    for generator in (g for g in leaves if isinstance(g, Generator)):
        if (generator.named.type == "cuda") != on_cuda:
            raise MixedDevices(f"{func} has a generator of {generator.named} at {where()}")

    values, named = pytree.tree_unflatten([t.value if isinstance(t, Tensor) else t for t in leaves], structure)
    if on_cuda and device is not None:
        named["device"] = torch.device("cpu")
    own = torch.Tag.nondeterministic_seeded in func.tags and not any(isinstance(g, _Generator) for g in leaves)
    with default_generator() if on_cuda and own else contextlib.nullcontext():
        result = func(*values, **named)
    if not on_cuda or name == "_local_scalar_dense":
        return result
    known = {id(t.value): t for t in ours}  # an operator in place returns its operand
    return pytree.tree_map(
        lambda t: known.get(id(t), t if isinstance(t, Tensor) else Tensor(t)) if isinstance(t, torch.Tensor) else t,
        result,
    )


def _note_copy(source, to_cuda, non_blocking):
    if isinstance(source, Tensor) and not to_cuda:
        waits[f"to the CPU {where()}"] += 1
    elif not isinstance(source, Tensor) and to_cuda and not (non_blocking and getattr(source, "pinned", False)):
        waits[f"from the CPU, not pinned or blocking {where()}"] += 1


def _check_devices(func, name, args, ours, others):
    """Raise MixedDevices unless a GPU would take these operands of the CPU: scalars, and indices."""
    scalars = all(t.ndim == 0 for t in others)
    if torch.Tag.pointwise in func.tags or name.startswith("_foreach"):
        fit = scalars
    elif name in INDEXING:
        fit = isinstance(args[0], Tensor) and ("put" not in name or isinstance(args[2], Tensor) or args[2].ndim == 0)
        if fit:
            waits[f"index of the CPU {where()}"] += 1
    else:
        fit = name in ("set_", "resize_")
    if not fit:
        shapes = [list(t.shape) for t in others]
        raise MixedDevices(f"{func} has tensors of the CPU {shapes} beside those of {CUDA} at {where()}")


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


class _Device:
    """What `torch.cuda.device` is replaced with."""

    def __init__(self, device):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def install() -> None:
    """Pretend from here on, in this process, that there is a GPU of compute capability 9.0."""

    def pin(tensor, *args):
        pinned = tensor.detach()
        pinned.pinned = True
        return pinned

    def seed(number):
        global _default_state
        _default_state = _Generator().manual_seed(int(number) % 2**63).get_state()

    def set_state(state, *args):
        global _default_state
        _default_state = state.clone()

    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "set_device": None,
        "get_device_capability": (9, 0), "get_device_name": "a pretended GPU", "mem_get_info": (70 * 2**30, 80 * 2**30),
        "max_memory_allocated": 2**30, "reset_peak_memory_stats": None, "empty_cache": None, "ipc_collect": None,
        "is_bf16_supported": True, "is_current_stream_capturing": False, "_lazy_init": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.graphs.is_current_stream_capturing = lambda: False
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.synchronize = lambda *args: waits.update([f"synchronize {where()}"])
    torch.cuda.device = _Device  # type: ignore[misc, assignment]
    torch.cuda.manual_seed = torch.cuda.manual_seed_all = torch.cuda.random.manual_seed_all = seed
    torch.cuda.get_rng_state = lambda *args: _default_state.clone()
    torch.cuda.set_rng_state = set_state
    torch.Generator = _MadeGenerator  # type: ignore[misc, assignment]
    torch.Tensor.pin_memory = pin  # type: ignore[method-assign]
    torch.inference_mode = lambda *args: torch.no_grad()  # type: ignore[misc, assignment]
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _Mode().__enter__()
