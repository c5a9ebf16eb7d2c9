"""What PyTorch has to know of the compiled operators: their schemas, and the shapes of results without data.

Importing this module declares the operators of the namespace `di_refine`; what computes them (on CPU or CUDA, with
derivatives of any order) comes with the library that `torch_utils.ops.building` makes from `csrc/`.
"""

import torch

from torch_utils.ops.bias_act import activation_funcs
from torch_utils.ops.upfirdn2d import filter_size

_SETTINGS = "int dim, int act, float alpha, float gain, float clamp"
_SCHEMAS = {
    "bias_act": f"(Tensor x, Tensor? b, {_SETTINGS}) -> Tensor",
    "bias_act_grad": f"(Tensor dy, Tensor? ref, Tensor? b, {_SETTINGS}) -> Tensor",
    "bias_act_grad2": f"(Tensor v, Tensor dy, Tensor ref, Tensor? b, {_SETTINGS}) -> Tensor",
    "upfirdn2d": "(Tensor x, Tensor? f, int[] up, int[] down, SymInt[] padding, bool flip, float gain) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"di_refine::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)

_ACTIVATIONS = {name: index for index, name in enumerate(activation_funcs)}


def bias_act(x, b, dim, act, alpha, gain, clamp):
    """Compute what `torch_utils.ops.bias_act.bias_act` does; here every argument has a value."""
    return torch.ops.di_refine.bias_act(x, b, dim, _ACTIVATIONS[act], alpha, gain, -1.0 if clamp is None else clamp)


def upfirdn2d(x, f, up, down, padding, flip_filter, gain):
    """Compute what `torch_utils.ops.upfirdn2d.upfirdn2d` does; here every argument has a value."""
    return torch.ops.di_refine.upfirdn2d(x, f, up, down, padding, flip_filter, gain)


@torch.library.register_fake("di_refine::bias_act")
def _(x, b, dim, act, alpha, gain, clamp):
    return torch.empty_like(x)


@torch.library.register_fake("di_refine::bias_act_grad")
def _(dy, ref, b, dim, act, alpha, gain, clamp):
    return torch.empty_like(dy if ref is None else ref)


@torch.library.register_fake("di_refine::bias_act_grad2")
def _(v, dy, ref, b, dim, act, alpha, gain, clamp):
    return torch.empty_like(ref)


@torch.library.register_fake("di_refine::upfirdn2d")
def _(x, f, up, down, padding, flip, gain):
    fw, fh = filter_size(f)
    width = (x.shape[3] * up[0] + padding[0] + padding[1] - fw) // down[0] + 1
    height = (x.shape[2] * up[1] + padding[2] + padding[3] - fh) // down[1] + 1
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        [x.shape[0], x.shape[1], height, width], dtype=x.dtype, device=x.device, memory_format=memory_format
    )
