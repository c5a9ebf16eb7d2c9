"""Checkpoints of rosinality's stylegan2-pytorch (MIT), read as StyleGAN2-ADA networks and written.

A file is a dictionary with `g_ema`. A training adds `g`, `d`, optimizers and settings; its converter of TensorFlow's
networks adds `latent_avg` and perhaps `d`. The networks are those of StyleGAN2 under other names and with more axes of
size 1. They have no labels, clamps or half precision, and their only filter is 1, 3, 3, 1.
"""

import math
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch

from stylegan2_ada.networks import Discriminator, Generator
from torch_utils import misc, persistence
from torch_utils.ops import upfirdn2d
from torch_utils.persistence import Blueprint, NetworkFormatError, printable

FILTER = (1, 3, 3, 1)
_KEYS = {"g": "G", "g_ema": "G_ema", "d": "D"}
_LEFT_OUT = "optimizers, settings of the training, and the strength of its augmentation"
_AVERAGED = 10_000  # latents whose mean w stands in for the average that a training did not keep

Tensors = dict[str, torch.Tensor]


def is_ours(content: Any) -> bool:
    """Return whether the content of a file is such a checkpoint."""
    generator = content.get("g_ema") if isinstance(content, dict) else None
    return isinstance(generator, dict) and {"input.input", "conv1.conv.weight"} <= generator.keys()


def load(path: str | os.PathLike, content: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Make the networks of a checkpoint.

    Args:
        path: the file, for messages.
        content: what is in it.
        notes: a sentence is added for what is not carried over, and for what is made up.

    Returns:
        What a network pickle would hold: `G_ema`, and `G` and `D` where the file has them.

    Raises:
        NetworkFormatError: names the file and says why it is not usable.
    """
    with persistence.explained(path):
        networks = _networks(path, content)
        if content.get("latent_avg") is None:
            notes.append(f"it has no average latent; the mean w of {_AVERAGED} latents is taken, for truncation")
            for net in (networks[ours] for ours in ("G", "G_ema") if ours in networks):
                _average_latent(net)
    if content.keys() - {*_KEYS, "latent_avg"}:
        notes.append(f"{_LEFT_OUT} are not carried over")
    return networks


def _networks(path: str | os.PathLike, content: dict[str, Any]) -> dict[str, Any]:
    networks: dict[str, Any] = {}
    for key, ours in _KEYS.items():
        if key in content:
            given = _state(content[key], key)
            plan = _discriminator(given) if key == "d" else _generator(given, content.get("latent_avg"))
            networks[ours] = persistence.assemble(plan, f"{os.fspath(path)}: '{key}'")
    return networks


def save(networks: dict[str, Any], path: str | os.PathLike) -> list[str]:
    """Write a checkpoint in the form of the converter: `g_ema`, `latent_avg`, and `d` where it fits.

    Args:
        networks: a StyleGAN2 generator `G_ema`, and perhaps a discriminator `D`.
        path: the file.

    Returns:
        A sentence for each thing that is left out.

    Raises:
        NetworkFormatError: the generator is none that this form can hold.
    """
    net, critic, notes = networks.get("G_ema"), networks.get("D"), []
    if not isinstance(net, Generator):
        raise NetworkFormatError(f"{path}: only StyleGAN2 generators can be written as such a checkpoint")
    problem = _why_not(net)
    if problem:
        raise NetworkFormatError(f"{path}: such a checkpoint has no place for {problem}")
    content: dict[str, Any] = {"g_ema": _written(net, _generator_names), "latent_avg": _cpu(net.mapping.w_avg)}
    problem = "it is no discriminator of this project"
    if isinstance(critic, Discriminator):
        problem = _why_not(critic)
    if not problem:
        content["d"] = _written(critic, _discriminator_names)
    elif critic is not None:
        notes.append(f"the discriminator is left out, since such a checkpoint has no place for it ({problem})")
    attributes = [vars(layer) for layer in net.modules()]
    if any(layer.get("conv_clamp") is not None or layer.get("use_fp16") for layer in attributes):
        notes.append("clamps and half precision are left out, so images may differ by rounding")
    others = sorted(printable(key) for key in networks.keys() - {"G_ema", "D", "G"})
    if others:
        notes.append(f"{', '.join(others)} are left out")
    with misc.open_atomic(path) as file:
        torch.save(content, file)
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Names.


def _generator_names(resolution: int, layers: int) -> Iterator[tuple[str, str]]:
    """Give their name and ours of each tensor of a generator that both have."""
    for i in range(layers):
        for leaf in ("weight", "bias"):
            yield f"style.{i + 1}.{leaf}", f"mapping.fc{i}.{leaf}"
    yield "input.input", "synthesis.b4.const"
    for level in range(int(math.log2(resolution)) - 1):
        block, k = f"synthesis.b{4 << level}", level - 1
        convs = {"conv1": "conv1"} if level == 0 else {f"convs.{2 * k}": "conv0", f"convs.{2 * k + 1}": "conv1"}
        for number, (theirs, ours) in enumerate(convs.items()):
            yield f"{theirs}.conv.weight", f"{block}.{ours}.weight"
            for leaf in ("weight", "bias"):
                yield f"{theirs}.conv.modulation.{leaf}", f"{block}.{ours}.affine.{leaf}"
            yield f"{theirs}.noise.weight", f"{block}.{ours}.noise_strength"
            yield f"{theirs}.activate.bias", f"{block}.{ours}.bias"
            yield f"noises.noise_{2 * k + 1 + number if level else 0}", f"{block}.{ours}.noise_const"
        rgb = "to_rgb1" if level == 0 else f"to_rgbs.{k}"
        yield f"{rgb}.conv.weight", f"{block}.torgb.weight"
        for leaf in ("weight", "bias"):
            yield f"{rgb}.conv.modulation.{leaf}", f"{block}.torgb.affine.{leaf}"
        yield f"{rgb}.bias", f"{block}.torgb.bias"


def _discriminator_names(resolution: int, layers: int = 0) -> Iterator[tuple[str, str]]:
    """Give their name and ours of each tensor of a discriminator that both have."""
    yield "convs.0.0.weight", f"b{resolution}.fromrgb.weight"
    yield "convs.0.1.bias", f"b{resolution}.fromrgb.bias"
    for k in range(1, int(math.log2(resolution)) - 1):
        block = f"b{resolution >> (k - 1)}"
        yield f"convs.{k}.conv1.0.weight", f"{block}.conv0.weight"
        yield f"convs.{k}.conv1.1.bias", f"{block}.conv0.bias"
        yield f"convs.{k}.conv2.1.weight", f"{block}.conv1.weight"
        yield f"convs.{k}.conv2.2.bias", f"{block}.conv1.bias"
        yield f"convs.{k}.skip.1.weight", f"{block}.skip.weight"
    yield "final_conv.0.weight", "b4.conv.weight"
    yield "final_conv.1.bias", "b4.conv.bias"
    for i, ours in enumerate(("fc", "out")):
        for leaf in ("weight", "bias"):
            yield f"final_linear.{i}.{leaf}", f"b4.{ours}.{leaf}"


def _kernels(resolution: int, generator: bool) -> Iterator[tuple[str, float]]:
    """Give their name and the gain of each filter, which are constants there and here."""
    for k in range(int(math.log2(resolution)) - 2):
        if generator:
            yield f"convs.{2 * k}.conv.blur.kernel", 4.0
            yield f"to_rgbs.{k}.upsample.kernel", 4.0
        else:
            yield f"convs.{k + 1}.conv2.0.kernel", 1.0
            yield f"convs.{k + 1}.skip.0.kernel", 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


def _state(value: Any, key: str) -> Tensors:
    if not isinstance(value, dict):
        raise NetworkFormatError(f"'{key}' is a {type(value).__name__}, no state dictionary")
    for name, tensor in value.items():
        if type(name) is not str or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise NetworkFormatError(f"'{printable(name)}' in '{key}' is no tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise NetworkFormatError(f"less is stored of '{printable(name)}' than its shape says")
    return value


def _shape(tensors: Tensors, name: str, axes: int) -> torch.Size:
    if name not in tensors or tensors[name].ndim != axes:
        raise NetworkFormatError(f"there is no tensor {name} of {axes} axes")
    return tensors[name].shape


def _generator(tensors: Tensors, average: Any) -> Blueprint:
    noises = sum(1 for name in tensors if re.fullmatch(r"noises\.noise_\d+", name))
    layers = sum(1 for name in tensors if re.fullmatch(r"style\.\d+\.weight", name))
    if noises % 2 == 0 or not 3 <= noises <= 19:
        raise NetworkFormatError(f"it has {noises} noise inputs, which belong to no resolution from 8 to 2048")
    resolution = 4 << (noises // 2)
    w_dim = _shape(tensors, "style.1.weight", 2)[0]
    widths = {4: _shape(tensors, "input.input", 4)[1]}
    for level in range(1, noises // 2 + 1):
        widths[4 << level] = _shape(tensors, f"convs.{2 * level - 1}.conv.weight", 5)[1]
    arguments = {
        "z_dim": _shape(tensors, "style.1.weight", 2)[1],
        "c_dim": 0,
        "w_dim": w_dim,
        "img_resolution": resolution,
        "img_channels": 3,
        "mapping_kwargs": {"num_layers": layers},
        "synthesis_kwargs": _widths(widths),
    }
    pairs = dict(_generator_names(resolution, layers))
    taken = _renamed(tensors, pairs, dict(_kernels(resolution, True)))
    if isinstance(average, torch.Tensor) and average.shape == (w_dim,):
        taken["mapping.w_avg"] = average.clone()
    elif average is None:
        taken["mapping.w_avg"] = torch.zeros(w_dim)
    else:
        raise NetworkFormatError(f"'latent_avg' is no tensor of {w_dim} numbers")
    blocks: dict[str, tuple[str, ...]] = {f"synthesis.b{size}": ("conv0", "conv1") for size in widths}
    blocks["synthesis.b4"] = ("conv1",)
    return Blueprint("Generator", (), arguments, {**taken, **_filters(blocks)})


def _discriminator(tensors: Tensors) -> Blueprint:
    levels = sum(1 for name in tensors if re.fullmatch(r"convs\.\d+\.skip\.1\.weight", name))
    if not 1 <= levels <= 9:
        raise NetworkFormatError(f"its discriminator has {levels} levels, which belong to no resolution from 8 to 2048")
    resolution = 4 << levels
    widths = {resolution: _shape(tensors, "convs.0.0.weight", 4)[0]}
    for k in range(1, levels + 1):
        widths[resolution >> k] = _shape(tensors, f"convs.{k}.skip.1.weight", 4)[0]
    arguments = {"c_dim": 0, "img_resolution": resolution, "img_channels": 3, **_widths(widths)}
    taken = _renamed(tensors, dict(_discriminator_names(resolution)), dict(_kernels(resolution, False)))
    blocks: dict[str, tuple[str, ...]] = {
        f"b{size}": ("conv0", "conv1", "skip") for size in sorted(widths, reverse=True) if size > 4
    }
    blocks[f"b{resolution}"] = ("fromrgb", *blocks[f"b{resolution}"])
    filters = _filters(blocks)
    filters["b4.conv.resample_filter"] = upfirdn2d.setup_filter(FILTER)
    return Blueprint("Discriminator", (), arguments, {**taken, **filters})


def _widths(widths: dict[int, int]) -> dict[str, int]:
    """Return channel_base and channel_max of widths by resolution: width = min(channel_base / resolution, max)."""
    most = max(widths.values())
    narrow = {size: width for size, width in widths.items() if width < most}
    # Where all are as wide as the widest, any base that allows for it would do.
    base = narrow[min(narrow)] * min(narrow) if narrow else most * max(widths)
    if any(width != min(base // size, most) for size, width in widths.items()):
        found = ", ".join(map(str, widths.values()))
        raise NetworkFormatError(f"its widths are {found}, which are no min(channel_base / resolution, channel_max)")
    return {"channel_base": base, "channel_max": most}


def _renamed(tensors: Tensors, pairs: dict[str, str], kernels: dict[str, float]) -> Tensors:
    """Return the tensors under our names and in our shapes; all have to be there, and none besides the filters."""
    missing = [name for name in (*pairs, *kernels) if name not in tensors]
    surplus = [printable(name) for name in tensors if name not in pairs and name not in kernels]
    if missing or surplus:
        parts = [f"missing: {', '.join(missing)}"] if missing else []
        parts += [f"unexpected: {', '.join(surplus[:100])}"] if surplus else []
        raise NetworkFormatError(f"the tensors do not fit; {'; '.join(parts)}")
    for name, gain in kernels.items():
        if tensors[name].shape != (4, 4) or not torch.allclose(tensors[name].float(), _kernel(gain), atol=1e-3):
            raise NetworkFormatError(f"{name} is another filter than 1, 3, 3, 1")
    return {ours: _ours(tensors[theirs].float(), theirs) for theirs, ours in pairs.items()}


def _ours(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return a tensor without the axes of size 1 that theirs has more."""
    if name.startswith("noises."):
        return tensor.reshape(tensor.shape[2:])
    if name.endswith("noise.weight"):
        return tensor.reshape(())
    if name.endswith(".conv.weight") or name == "input.input":
        return tensor.reshape(tensor.shape[1:])
    if name.startswith("to_rgb") and name.endswith(".bias") and tensor.ndim == 4:
        return tensor.reshape(-1)
    return tensor


def _filters(blocks: dict[str, tuple[str, ...]]) -> Tensors:
    names = [f"{block}.resample_filter" for block in blocks]
    names += [f"{block}.{layer}.resample_filter" for block, layers in blocks.items() for layer in layers]
    return {name: upfirdn2d.setup_filter(FILTER) for name in names}


def _average_latent(net: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        z = torch.randn([_AVERAGED, net.z_dim], generator=rng)
        net.mapping.w_avg.copy_(net.mapping(z, None)[:, 0].mean(dim=0))


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


def _why_not(net: Any) -> str:
    """Say what a network has that such a checkpoint cannot hold; nothing for one that fits."""
    if net.c_dim:
        return f"labels of {net.c_dim} classes"
    if net.img_channels != 3:
        return f"images of {net.img_channels} channels"
    filters = [buffer for name, buffer in net.named_buffers() if name.endswith("resample_filter")]
    if not all(buffer.shape == (4, 4) and torch.allclose(buffer.cpu(), _kernel(1.0)) for buffer in filters):
        return "another resampling filter than 1, 3, 3, 1"
    names = _discriminator_names(net.img_resolution)
    if isinstance(net, Generator):
        if net.z_dim != net.w_dim:
            return f"latents of {net.z_dim} numbers beside w of {net.w_dim}"
        if net.mapping.num_layers and net.mapping.fc0.weight_gain != 0.01 / math.sqrt(net.z_dim):
            return "another learning rate of the mapping network than 0.01"
        names = _generator_names(net.img_resolution, net.mapping.num_layers)
    have = {name for name in net.state_dict() if not name.endswith(("resample_filter", "w_avg"))}
    return "" if {ours for _, ours in names} == have else "another architecture than skip and resnet"


def _written(net: Any, names: Any) -> "OrderedDict[str, torch.Tensor]":
    generator = isinstance(net, Generator)
    tensors = net.state_dict()
    pairs = names(net.img_resolution, net.mapping.num_layers if generator else 0)
    state = OrderedDict((theirs, _theirs(_cpu(tensors[ours]), theirs)) for theirs, ours in pairs)
    state.update((name, _kernel(gain)) for name, gain in _kernels(net.img_resolution, generator))
    return state


def _theirs(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if name.startswith("noises."):
        return tensor[None, None]
    if name.endswith("noise.weight"):
        return tensor[None]
    if name == "input.input" or (name.endswith(".conv.weight") and tensor.ndim == 4):
        return tensor[None]
    if name.startswith("to_rgb") and name.endswith(".bias") and "modulation" not in name:
        return tensor[None, :, None, None]
    return tensor


def _kernel(gain: float) -> torch.Tensor:
    return upfirdn2d.setup_filter(FILTER) * gain


def _cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().float().clone()
