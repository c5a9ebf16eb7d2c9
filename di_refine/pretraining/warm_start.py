"""Training that starts from a network file: what fits is copied, the rest is new."""

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from di_refine.edm.augment import AugmentPipe
from di_refine.edm.networks import DhariwalUNet, EDMPrecond
from di_refine.errors import InputError
from di_refine.files.networks import NetworkFile
from stylegan2_ada.networks import Discriminator, Generator
from torch_utils import misc

_LEVEL = re.compile(r"(?<=\.)(\d+)x\1(?=_)")


@dataclass(frozen=True)
class Copied:
    """What became of a network's tensors.

    Attributes:
        name: of the network.
        copied, new: how many parameters.
        new_names: the parts that are new, without the names of their tensors.
    """

    name: str
    copied: int
    new: int
    new_names: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """For people."""
        if not self.new:
            return f"{self.name}: all {self.copied:,} parameters are copied"
        names = ", ".join(self.new_names[:12]) + (", ..." if len(self.new_names) > 12 else "")
        return f"{self.name}: {self.copied:,} parameters are copied, {self.new:,} are new: {names}"


def copy_fitting(
    name: str, source: torch.nn.Module, target: torch.nn.Module, rename: Callable[[str], str] = str
) -> Copied:
    """Copy the parameters and buffers of one network that another has under the same name and in the same shape.

    Args:
        name: of the network, for the report.
        source, target: the networks.
        rename: gives the name in `source` for a name in `target`.
    """
    theirs = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    parameters = {key for key, _ in target.named_parameters()}
    counts: Counter[bool] = Counter()
    new: dict[str, None] = {}
    with torch.no_grad():
        for key, tensor in (*target.named_parameters(), *target.named_buffers()):
            found = theirs.get(rename(key))
            fits = found is not None and found.shape == tensor.shape
            if fits and found is not None:
                tensor.copy_(found)
            if key in parameters:
                counts[fits] += tensor.numel()
                if not fits:
                    new[key.rpartition(".")[0]] = None
    return Copied(name, counts[True], counts[False], tuple(new))


def gan(
    file: NetworkFile, resolution: int, channels: int, label_dim: int, freeze_d: int, seed: int
) -> tuple[Generator, Discriminator | None, Generator, list[Copied]]:
    """Generator, discriminator and average of a file's architecture, for images of any size and any classes.

    Blocks go by their resolution, so that of a network of another size those of the resolutions that both have are
    copied.

    Args:
        file: holds a StyleGAN2 generator.
        resolution, channels, label_dim: of the images.
        freeze_d: layers of the discriminator that keep their weights, counted from the highest resolution.
        seed: of the new weights.

    Returns:
        The networks, the discriminator None where the file has none, and what was copied.

    Raises:
        InputError: the networks cannot be built for these images.
    """
    torch.manual_seed(misc.derive_seed(seed, "weights"))
    changes = {"c_dim": label_dim, "img_resolution": resolution, "img_channels": channels}
    parts = file.networks
    found = parts["G"] if isinstance(parts.get("G"), Generator) else file.average
    G = _rebuilt(found, changes, file)
    report = [copy_fitting("G", found, G)]
    average = _rebuilt(file.average, changes, file)
    average.load_state_dict(G.state_dict())  # what is new is the same in both
    report.append(copy_fitting("G_ema", file.average, average))
    theirs = parts.get("D")
    if not isinstance(theirs, Discriminator):
        return G, None, average, report
    frozen = {**(arguments_of(theirs).get("block_kwargs") or {}), "freeze_layers": freeze_d}
    D = _rebuilt(theirs, {**changes, "block_kwargs": frozen}, file)
    return G, D, average, [*report, copy_fitting("D", theirs, D)]


def teacher(
    file: NetworkFile, resolution: int, channels: int, label_dim: int, augment: bool, seed: int
) -> tuple[EDMPrecond, list[Copied]]:
    """A diffusion model of a file's architecture, for images of any size and any classes.

    Levels go by their depth, not by their resolution, so that a network of another size is copied whole; attention
    stays at its levels.

    Args:
        file: holds a network with EDM's preconditioning.
        resolution, channels, label_dim: of the images.
        augment: the network is to be told how its training images were transformed.
        seed: of the new weights.

    Raises:
        InputError: the network has another preconditioning, or cannot be built for these images.
    """
    net = file.average
    if not isinstance(net, EDMPrecond):
        raise InputError(
            f"start_from={file.path} holds a {type(net).__name__}, and only networks with EDM's preconditioning are "
            "trained here"
        )
    factor = resolution / net.img_resolution
    if math.log2(factor) % 1:
        raise InputError(
            f"start_from={file.path} makes images of {net.img_resolution} pixels, and those of `data` have "
            f"{resolution}; they must be twice, four times, a half or a quarter as wide"
        )
    torch.manual_seed(misc.derive_seed(seed, "weights"))
    kwargs = arguments_of(net)
    default = [32, 16, 8] if isinstance(net.model, DhariwalUNet) else [16]
    levels = [round(size * factor) for size in kwargs.get("attn_resolutions", default)]
    changes: dict[str, Any] = {
        "img_resolution": resolution,
        "img_channels": channels,
        "label_dim": label_dim,
        "attn_resolutions": levels,
    }
    if augment and not kwargs.get("augment_dim"):
        changes["augment_dim"] = AugmentPipe.edm().label_dim
    made = _rebuilt(net, changes, file)

    def rename(key: str) -> str:
        return _LEVEL.sub(lambda found: "x".join([str(round(int(found[1]) / factor))] * 2), key)

    return made, [copy_fitting("network", net, made, rename)]


def arguments_of(net: Any) -> dict[str, Any]:
    """The arguments that a network was made with, by name."""
    signature = inspect.signature(type(net))
    found = dict(signature.bind(*net.init_args, **net.init_kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind == parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found


def settings_of(file: NetworkFile, resolution: int) -> dict[str, Any]:
    """The settings of `pretrain.py` that say what a file's architecture is, where they can say it.

    Args:
        file: to start from.
        resolution: of the images to train on.
    """
    kwargs = arguments_of(file.average)
    if isinstance(file.average, Generator):
        synthesis, mapping = (kwargs.get(f"{name}_kwargs") or {} for name in ("synthesis", "mapping"))
        theirs = file.networks.get("D")
        other = arguments_of(theirs) if isinstance(theirs, Discriminator) else {}
        found = {
            "z_dim": kwargs.get("z_dim"),
            "channel_base": synthesis.get("channel_base", 32768),
            "channel_max": synthesis.get("channel_max", 512),
            "mapping_layers": mapping.get("num_layers", 8),
            "g_arch": synthesis.get("architecture", "skip"),
            "fp16_res": synthesis.get("num_fp16_res", 0),
        }
        if other:
            found["d_arch"] = other.get("architecture", "resnet")
            group = (other.get("epilogue_kwargs") or {}).get("mbstd_group_size", 4)
            found |= {} if group is None else {"mbstd_group": group}
        return found
    if kwargs.get("model_type") != "SongUNet":
        return {}
    factor = resolution / file.average.img_resolution
    return {
        "width": kwargs.get("model_channels", 128),
        "channel_mult": ",".join(map(str, kwargs.get("channel_mult", (1, 2, 2, 2)))),
        "num_blocks": kwargs.get("num_blocks", 4),
        "attn_resolutions": ",".join(str(round(size * factor)) for size in kwargs.get("attn_resolutions", (16,))),
        "dropout": kwargs.get("dropout", 0.1),
    }


def _rebuilt(net: Any, changes: dict[str, Any], file: NetworkFile) -> Any:
    """An untrained network of the same class and arguments, but for some."""
    try:
        return type(net)(**{**arguments_of(net), **changes})
    except (ValueError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"start_from={file.path} cannot be made to fit the images ({reason})") from None
