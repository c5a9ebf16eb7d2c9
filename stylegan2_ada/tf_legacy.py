"""Networks from TensorFlow-era StyleGAN2 pickles: their variables and settings under the names of this package."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from torch_utils import persistence
from torch_utils.ops import upfirdn2d
from torch_utils.persistence import TENSORFLOW_NETWORK, Blueprint, NetworkFormatError, Record, printable

_DEFAULT_FILTER = (1, 3, 3, 1)
_MAX_COMPONENT_DEPTH = 3
_MAX_TAPS = 64

# How a variable's axes change. TensorFlow has convolution weights as [kh, kw, in, out] and dense ones as [in, out].
Change = Callable[[np.ndarray], np.ndarray]


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _conv(a: np.ndarray) -> np.ndarray:
    return a.transpose(3, 2, 0, 1)


def _conv_reversed(a: np.ndarray) -> np.ndarray:
    return a[::-1, ::-1].transpose(3, 2, 0, 1)


def _dense(a: np.ndarray) -> np.ndarray:
    return a.transpose(1, 0)


def _plus_one(a: np.ndarray) -> np.ndarray:
    return a + np.float32(1)  # TensorFlow adds it at run time


def _noise(a: np.ndarray) -> np.ndarray:
    return a.reshape(a.shape[2:])


def _const(a: np.ndarray) -> np.ndarray:
    return a.reshape(a.shape[1:])


def translate(record: Record) -> Blueprint:
    """Return the blueprint of a TensorFlow-era generator or discriminator.

    Raises:
        NetworkFormatError: for other networks, unknown settings, or malformed variables.
    """
    if not isinstance(record.state.get("version"), int) or record.state["version"] < 4:
        raise NetworkFormatError(
            f"TensorFlow network of version {printable(record.state.get('version'))}; 4 is the first"
        )
    static = record.state.get("static_kwargs")
    if not isinstance(static, dict):
        raise NetworkFormatError("a TensorFlow network without settings")
    is_generator = isinstance(record.state.get("components"), dict) and "synthesis" in record.state["components"]
    settings = _Settings(static)
    variables = dict(_variables(record))
    lod = "ToRGB_lod" if is_generator else "FromRGB_lod"
    if any(lod in name for name in variables):  # a leftover of progressive growing
        settings.values["architecture"] = "orig"
    kwargs = _generator_kwargs(settings) if is_generator else _discriminator_kwargs(settings)
    settings.finish()

    find = _find_generator_place if is_generator else _find_discriminator_place
    tensors: dict[str, torch.Tensor] = {}
    for name, value in variables.items():
        place = find(name, kwargs["img_resolution"])
        if place is None:
            continue
        target, change = place
        if target in tensors:
            raise NetworkFormatError(f"two TensorFlow variables hold '{target}'")
        tensors[target] = _tensor(name, value, change)
    resample_filter = (kwargs["synthesis_kwargs"] if is_generator else kwargs["block_kwargs"])["resample_filter"]
    tensors |= dict(_filters(list(tensors), resample_filter, kwargs["img_resolution"]))
    return Blueprint("Generator" if is_generator else "Discriminator", (), kwargs, tensors)


persistence.register_translator(TENSORFLOW_NETWORK, translate)


def _variables(record: Record, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Return all variables of a network and its components, by their full names."""
    own, components = record.state.get("variables"), record.state.get("components", {})
    if not isinstance(own, list) or not isinstance(components, dict) or depth > _MAX_COMPONENT_DEPTH:
        raise NetworkFormatError("a malformed TensorFlow network")
    for item in own:
        if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], str):
            raise NetworkFormatError("a malformed TensorFlow variable")
        yield path + item[0], item[1]
    for name, component in components.items():
        if not isinstance(component, Record) or component.class_name != TENSORFLOW_NETWORK:
            raise NetworkFormatError(f"the TensorFlow component '{printable(name)}' is no network")
        yield from _variables(component, f"{path}{name}/", depth + 1)


def _tensor(name: str, value: Any, change: Change) -> torch.Tensor:
    array = np.float32(value) if isinstance(value, float) else getattr(value, "value", None)
    if not isinstance(array, (np.ndarray, np.float32)) or array.dtype != np.float32:
        raise NetworkFormatError(f"the TensorFlow variable '{printable(name)}' is not a float32 array")
    try:
        return torch.from_numpy(np.array(change(np.asarray(array)), order="C"))
    except ValueError:
        raise NetworkFormatError(
            f"the TensorFlow variable '{printable(name)}' has the shape {list(array.shape)}"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Names.

_STYLED = {  # what a modulated layer holds besides its weight
    "bias": ("bias", _same),
    "noise_strength": ("noise_strength", _same),
    "mod_weight": ("affine.weight", _dense),
    "mod_bias": ("affine.bias", _plus_one),
}
_SYNTHESIS_LAYERS: dict[str, tuple[str, Change]] = {
    "Conv": ("conv1", _conv),
    "Conv1": ("conv1", _conv),
    "Conv0_up": ("conv0", _conv_reversed),
    "Skip": ("skip", _conv_reversed),
    "ToRGB": ("torgb", _conv),
}
_DISCRIMINATOR_LAYERS: dict[str, tuple[str, Change]] = {
    "FromRGB": ("fromrgb", _conv),
    "Conv0": ("conv0", _conv),
    "Conv1_down": ("conv1", _conv),
    "Skip": ("skip", _conv),
    "Conv": ("conv", _conv),
    "Dense0": ("fc", _dense),
}


def _find_generator_place(name: str, resolution: int) -> tuple[str, Change] | None:
    """Return where a generator's variable goes and how it changes, or None for a variable that has no place."""
    if name == "dlatent_avg":
        return "mapping.w_avg", _same
    if name == "synthesis/4x4/Const/const":
        return "synthesis.b4.const", _const
    if match := re.fullmatch(r"mapping/(LabelEmbed|Dense(\d{1,3}))/(weight|bias)", name):
        layer = "embed" if match[2] is None else f"fc{int(match[2])}"
        return f"mapping.{layer}.{match[3]}", _dense if match[3] == "weight" else _same
    if match := re.fullmatch(r"synthesis/noise(\d{1,2})", name):
        index = int(match[1])  # 4x4 has one, every other resolution two
        return f"synthesis.b{2 ** ((index + 5) // 2)}.conv{1 - index % 2}.noise_const", _noise
    place = _find_layer(name.removeprefix("synthesis/"), resolution, "ToRGB", _SYNTHESIS_LAYERS)
    if not name.startswith("synthesis/") or place is None:
        return None
    block, layer, leaf, weight_change = place
    if leaf != "weight" and leaf not in _STYLED:
        return None
    leaf, change = ("weight", weight_change) if leaf == "weight" else _STYLED[leaf]
    return f"synthesis.{block}.{layer}.{leaf}", change


def _find_discriminator_place(name: str, resolution: int) -> tuple[str, Change] | None:
    """Return where a discriminator's variable goes and how it changes, or None for a variable that has no place."""
    if match := re.fullmatch(r"(LabelEmbed|Output|Mapping(\d{1,3}))/(weight|bias)", name):
        layer = {"LabelEmbed": "mapping.embed", "Output": "b4.out"}.get(match[1], f"mapping.fc{match[2]}")
        return f"{layer}.{match[3]}", _dense if match[3] == "weight" else _same
    place = _find_layer(name, resolution, "FromRGB", _DISCRIMINATOR_LAYERS)
    if place is None or place[2] not in ("weight", "bias"):
        return None
    block, layer, leaf, weight_change = place
    return f"{block}.{layer}.{leaf}", weight_change if leaf == "weight" else _same


def _find_layer(
    name: str, resolution: int, rgb_layer: str, layers: dict[str, tuple[str, Change]]
) -> tuple[str, str, str, Change] | None:
    """Return block, layer and leaf of a variable in a block, and how the layer's weight changes."""
    if match := re.fullmatch(rf"{rgb_layer}_lod(\d{{1,2}})/(\w+)", name):
        size, layer, leaf = resolution >> int(match[1]), rgb_layer, match[2]
    elif match := re.fullmatch(r"(\d{1,5})x(\d{1,5})/(\w+)/(\w+)", name):
        size, layer, leaf = int(match[1]), match[3], match[4]
        if match[1] != match[2] or (layer == "Conv") != (size == 4 and layer.startswith("Conv")):
            return None
    else:
        return None
    return (f"b{size}", layers[layer][0], leaf, layers[layer][1]) if layer in layers else None


def _filters(names: list[str], taps: Any, resolution: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Return the filters, which TensorFlow did not store: as configured where a layer resamples, and once per block.

    Only blocks that a network of this resolution can have are looked at.
    """
    if not isinstance(taps, (list, tuple)) or len(taps) > _MAX_TAPS:
        raise NetworkFormatError(f"the TensorFlow setting resample_kernel is {printable(taps)}")
    sizes = [2**level for level in range(2, resolution.bit_length())]
    configured, default = upfirdn2d.setup_filter(taps), upfirdn2d.setup_filter(_DEFAULT_FILTER)
    blocks = set()
    for name in names:
        match = re.fullmatch(r"((synthesis\.)?b(\d+))\.(conv0|conv1|skip|conv|fromrgb)\.weight", name)
        if match and int(match[3]) in sizes:
            block, is_generator, _, layer = match.groups()
            resamples = layer == "skip" or layer == ("conv0" if is_generator else "conv1")
            yield f"{block}.{layer}.resample_filter", (configured if resamples else default).clone()
            if is_generator or block != "b4":
                blocks.add(block)
    for block in blocks:
        yield f"{block}.resample_filter", configured.clone()


# ---------------------------------------------------------------------------------------------------------------------
# Settings.


class _Settings:
    """The settings of a TensorFlow network; in the end every one of them has to have been asked for."""

    def __init__(self, values: dict[str, Any]):
        self.values = dict(values)

    def take(self, name: str, default: Any) -> Any:
        return self.values.pop(name, default)

    def whole(self, name: str, default: int) -> int:
        value = self.take(name, default)
        if type(value) is not int or not 0 <= value < 2**17:
            raise NetworkFormatError(f"the TensorFlow setting {name} is {printable(value)}")
        return value

    def finish(self) -> None:
        if self.values:
            raise NetworkFormatError(f"unknown TensorFlow settings: {', '.join(map(printable, self.values))}")


def _ignore(settings: _Settings, *names: str) -> None:
    for name in names:
        settings.take(name, None)


def _generator_kwargs(settings: _Settings) -> dict[str, Any]:
    _ignore(settings, "structure", "conditioning", "fused_modconv")
    _ignore(settings, "truncation_psi", "truncation_cutoff", "style_mixing_prob")  # matters of use and training
    w_avg_beta = settings.take("w_avg_beta", 0.995)
    return {
        "z_dim": settings.whole("latent_size", 512),
        "c_dim": settings.whole("label_size", 0),
        "w_dim": settings.whole("dlatent_size", 512),
        "img_resolution": settings.whole("resolution", 1024),
        "img_channels": settings.whole("num_channels", 3),
        "mapping_kwargs": {
            "num_layers": settings.whole("mapping_layers", 8),
            "embed_features": settings.take("label_fmaps", None),
            "layer_features": settings.take("mapping_fmaps", None),
            "activation": settings.take("mapping_nonlinearity", "lrelu"),
            "lr_multiplier": settings.take("mapping_lrmul", 0.01),
            "w_avg_beta": 1 if w_avg_beta is None else w_avg_beta,
        },
        "synthesis_kwargs": {
            "channel_base": 2 * settings.whole("fmap_base", 16384),
            "channel_max": settings.whole("fmap_max", 512),
            "num_fp16_res": settings.whole("num_fp16_res", 0),
            "conv_clamp": settings.take("conv_clamp", None),
            "architecture": settings.take("architecture", "skip"),
            "resample_filter": settings.take("resample_kernel", list(_DEFAULT_FILTER)),
            "use_noise": settings.take("use_noise", True),
            "activation": settings.take("nonlinearity", "lrelu"),
        },
    }


def _discriminator_kwargs(settings: _Settings) -> dict[str, Any]:
    _ignore(settings, "structure", "conditioning")
    mapping_features = settings.take("mapping_fmaps", None)
    activation = settings.take("nonlinearity", "lrelu")
    return {
        "c_dim": settings.whole("label_size", 0),
        "img_resolution": settings.whole("resolution", 1024),
        "img_channels": settings.whole("num_channels", 3),
        "architecture": settings.take("architecture", "resnet"),
        "channel_base": 2 * settings.whole("fmap_base", 16384),
        "channel_max": settings.whole("fmap_max", 512),
        "num_fp16_res": settings.whole("num_fp16_res", 0),
        "conv_clamp": settings.take("conv_clamp", None),
        "cmap_dim": mapping_features,
        "block_kwargs": {
            "activation": activation,
            "resample_filter": settings.take("resample_kernel", list(_DEFAULT_FILTER)),
            "freeze_layers": settings.whole("freeze_layers", 0),
        },
        "mapping_kwargs": {
            "num_layers": settings.whole("mapping_layers", 0),
            "embed_features": mapping_features,
            "layer_features": mapping_features,
            "activation": activation,
            "lr_multiplier": settings.take("mapping_lrmul", 0.1),
        },
        "epilogue_kwargs": {
            "mbstd_group_size": settings.take("mbstd_group_size", None),
            "mbstd_num_channels": settings.whole("mbstd_num_features", 1),
            "activation": activation,
        },
    }
