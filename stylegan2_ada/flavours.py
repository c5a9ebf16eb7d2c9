"""StyleGAN2 networks as the two public code bases store them, turned into arguments of `stylegan2_ada.networks`.

stylegan2-ada-pytorch nests the generator's synthesis arguments; the StyleGAN3 repository has them flat and assumes
other defaults (float16 in four resolutions, clamping at 256, a slower running mean of w). Files record only what was
passed, but every layer also states what it works with, so what the arguments leave open is read from there.
"""

import dataclasses
import math
import re
from typing import Any

from torch_utils import persistence
from torch_utils.persistence import Blueprint, NetworkFormatError, Record, printable

_GENERATOR_ARGUMENTS = (
    "z_dim",
    "c_dim",
    "w_dim",
    "img_resolution",
    "img_channels",
    "mapping_kwargs",
    "synthesis_kwargs",
)
_SPEED_ONLY = ("fused_modconv_default",)


def translate_generator(record: Record) -> Blueprint:
    """Return the blueprint of a stored `Generator`.

    Raises:
        NetworkFormatError: for a StyleGAN3 generator, which has the same class name.
    """
    plan = persistence.blueprint(record)
    children = plan.layers["synthesis"].state["_modules"] if "synthesis" in plan.layers else {}
    if "input" in children or any(re.fullmatch(r"L\d+_\d+_\d+", name) for name in children):
        raise NetworkFormatError("this is an alias-free StyleGAN3 generator; only StyleGAN2 generators are supported")
    if len(plan.args) > 5:  # nested arguments passed by position: certainly not the flat kind
        return plan
    flat = {key: value for key, value in plan.kwargs.items() if key not in _GENERATOR_ARGUMENTS + _SPEED_ONLY}
    kwargs = {key: value for key, value in plan.kwargs.items() if key in _GENERATOR_ARGUMENTS}
    synthesis = {**flat, **_dictionary(kwargs, "synthesis_kwargs")}
    _resolve(synthesis, "num_fp16_res", _num_fp16_res(plan.layers, "synthesis."), 0)
    _resolve(synthesis, "conv_clamp", _attribute(plan.layers, "synthesis.b4.conv1", "conv_clamp"), None)
    mapping = _dictionary(kwargs, "mapping_kwargs")
    _resolve(mapping, "w_avg_beta", _attribute(plan.layers, "mapping", "w_avg_beta", 0.995), 0.995)
    for key, value in (("synthesis_kwargs", synthesis), ("mapping_kwargs", mapping)):
        if value or key in kwargs:
            kwargs[key] = value
    return dataclasses.replace(plan, kwargs=kwargs)


def translate_discriminator(record: Record) -> Blueprint:
    """Return the blueprint of a stored `Discriminator`, whose arguments are flat in both code bases."""
    plan = persistence.blueprint(record)
    kwargs = dict(plan.kwargs)
    if len(plan.args) <= 3:
        _resolve(kwargs, "num_fp16_res", _num_fp16_res(plan.layers, ""), 0)
        _resolve(kwargs, "conv_clamp", _attribute(plan.layers, "b4.conv", "conv_clamp"), None)
    return dataclasses.replace(plan, kwargs=kwargs)


def _dictionary(kwargs: dict[str, Any], key: str) -> dict[str, Any]:
    value = kwargs.get(key) or {}
    if not isinstance(value, dict):
        raise NetworkFormatError(f"the constructor argument {key} is a {type(value).__name__}, not a dictionary")
    return dict(value)


def _attribute(layers: dict[str, Record], path: str, name: str, default: Any = None) -> Any:
    return layers[path].state.get(name, default) if path in layers else default


def _num_fp16_res(layers: dict[str, Record], prefix: str) -> int:
    """Return how many resolutions compute in float16, by the network's own number or else by counting such blocks."""
    stated = _attribute(layers, prefix.rstrip("."), "num_fp16_res")
    if type(stated) is int:
        return stated
    blocks = [layer for path, layer in layers.items() if re.fullmatch(re.escape(prefix) + r"b\d+", path)]
    return sum(layer.state.get("use_fp16") is True for layer in blocks)


def _resolve(kwargs: dict[str, Any], key: str, stated: Any, default: Any) -> None:
    """Add what the layers state where the arguments leave it open and it is not the default here."""
    if stated is not None and not (type(stated) in (int, float) and 0 <= stated < math.inf):
        raise NetworkFormatError(f"the attribute '{key}' is {printable(stated)}; it is None or a number from 0 on")
    if key not in kwargs and stated != default:
        kwargs[key] = stated


persistence.register_translator("Generator", translate_generator)
persistence.register_translator("Discriminator", translate_discriminator)
