"""Network files: what kind of network a file holds, and which of its networks is the one to use."""

import functools
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from di_refine import terminal
from di_refine.ddpm.networks import ADMPrecond, DiffusersPrecond
from di_refine.edm.networks import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from di_refine.edm2.networks import Precond as EDM2Precond
from di_refine.errors import InputError
from di_refine.files import (
    adm_checkpoint,
    diffusers_folder,
    foreign,
    registry,
    rosinality,
    safetensors_pair,
    torch_file,
)
from di_refine.files.download import sha256_of
from di_refine.files.run_files import RunFiles
from di_refine.labels import KEY, LabelLaw
from stylegan2_ada.networks import Generator
from torch_utils import distributed, persistence, safe_files

STYLEGAN2, EDM, DISTILLED, ONE_STEP = "stylegan2", "edm", "distilled", "one-step"
"""Kinds of network files: a StyleGAN2 generator, a diffusion model, one that was distilled to few steps, and one that
another project distilled to one step, from a noise level that the file does not say."""

NAMES = {
    STYLEGAN2: "a StyleGAN2 generator",
    EDM: "a diffusion model",
    DISTILLED: "a generator that was distilled from a diffusion model, so it is no diffusion model any more",
    ONE_STEP: "a one-step generator of another project (it holds `Sg`, the score network of its training), so it is no "
    "diffusion model any more",
}
MAX_STEPS = 1000  # of a distilled generator
DENOISERS = (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond, EDM2Precond, ADMPrecond, DiffusersPrecond)


@dataclass(frozen=True)
class NetworkFile:
    """A network file that was read.

    Attributes:
        path: where it was read from.
        kind: `STYLEGAN2`, `EDM`, `DISTILLED` or `ONE_STEP`.
        average: the averaged network, a module, which is the one to use.
        networks: all that the file holds, by its keys; what is not needed and of no use here as the file has it.
        sigmas: the noise levels of a distilled generator, one per step; None for other kinds.
        labels: what its labels are drawn from: what the file says, or where it says nothing, all classes equally often.
        config: what was given besides the file.
    """

    path: Path
    kind: str
    average: Any
    networks: dict[str, Any]
    labels: LabelLaw
    sigmas: list[float] | None = None
    config: "Config | None" = None

    @property
    def digest(self) -> str:
        """The SHA-256 of all that says which network this is, see `networks.digest`."""
        return digest(self.path, self.config)

    def require(self, kind: str, setting: str) -> "NetworkFile":
        """This file, if it is of a kind.

        Raises:
            InputError: naming the setting that the file was given for, when it is of another kind.
        """
        if self.kind != kind:
            raise InputError(f"{setting}={self.path} is {NAMES[self.kind]}, and {NAMES[kind]} is needed")
        return self


Config = dict[str, Any] | str | os.PathLike
"""What a network file does not say itself: the settings, or a JSON file with them."""


def load(path: str | os.PathLike, setting: str = "network", config: Config | None = None) -> NetworkFile:
    """Read a network file.

    Args:
        path: a pickle, either file of our pair of safetensors and JSON, a diffusers folder, weights of an OpenAI
            diffusion model (.pt), or a run directory, of which the newest snapshot is taken.
        setting: what the file was given for, for messages.
        config: for a diffusers folder, the scheduler's settings in place of its own; for a .pt file, the flags of its
            training, which a JSON file of the same name beside it or the registry may hold as well.

    Raises:
        InputError: naming the setting and the file, when it is no network file or holds neither kind of network.
    """
    path, given = newest(path), path
    if path != Path(given):
        say(f"of the run directory {path.parent} the newest snapshot is taken, {path.name}")
    networks = read(path, setting, config)
    average = networks.get("G_ema")
    if isinstance(average, Generator):
        _check_room(average, path, setting)
        labels = _labels(networks, average.c_dim, path, setting)
        return NetworkFile(Path(path), STYLEGAN2, average, networks, labels)
    # Some tools call the average of a diffusion model G_ema, as StyleGAN2 does.
    average = networks.get("ema", average)
    if isinstance(average, DENOISERS):
        _check_room(average, path, setting)
        _check_pictures(networks, path, setting)
        _check_levels(average, path, setting)
        sigmas = networks.get("distilled_sigmas")
        if sigmas is not None and not (isinstance(sigmas, list) and 0 < len(sigmas) <= MAX_STEPS and _falling(sigmas)):
            raise InputError(
                f"`{setting}`: the distilled_sigmas in {path} are no list of 1 to {MAX_STEPS} falling noise levels"
            )
        kind = DISTILLED if sigmas is not None else ONE_STEP if "Sg" in networks else EDM
        labels = _labels(networks, average.label_dim, path, setting)
        return NetworkFile(Path(path), kind, average, networks, labels, sigmas, config)
    neither = f"{path} holds neither a StyleGAN2 generator (G_ema) nor a diffusion model (ema)"
    raise InputError(f"`{setting}`: {foreign.explained(neither, path)}")


def newest(path: str | os.PathLike) -> Path:
    """The newest snapshot of a run directory; any other path as it is."""
    path = Path(path)
    snapshots = RunFiles(path).snapshots() if path.is_dir() else []
    return snapshots[-1] if snapshots else path


def read(path: str | os.PathLike, setting: str = "network", config: Config | None = None) -> dict[str, Any]:
    """What a network file or diffusers folder holds, as `persistence.load` returns it.

    Args, raises: as of `load`; a file may hold anything that is well-formed.
    """
    notes: list[str] = []
    try:
        if Path(path).is_dir() and diffusers_folder.is_folder(path):
            return diffusers_folder.load(path, _settings(config, setting))
        tensors = torch_file.load(path, with_settings=True) if torch_file.is_torch_file(path) else None
        if adm_checkpoint.is_ours(tensors):
            flags = _settings(_beside(path, config), setting)
            return adm_checkpoint.load(path, torch_file.checked(tensors, path), flags)
        if tensors is not None and rosinality.is_ours(tensors) and config is None:
            return _with_notes(path, rosinality.load(path, tensors, notes), notes)
    except persistence.NetworkFormatError as error:
        raise InputError(f"`{setting}`: {error}") from None
    if config is not None:
        raise InputError(f"`{setting}_config` is for diffusers folders and .pt files; {path} says all of itself")
    try:
        networks = safetensors_pair.load_either(path, notes)
    except persistence.NetworkFormatError as error:
        raise InputError(f"`{setting}`: {foreign.explained(error, path)}") from None
    return _with_notes(path, networks, notes)


def _with_notes(path: str | os.PathLike, networks: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    for note in notes:
        say(f"{path}: {note}")
    return networks


def digest(path: str | os.PathLike, config: Config | None = None) -> str:
    """The SHA-256 of all files that say which network `load` would return; of a single file, its own."""
    path = newest(path)
    if path.is_dir():
        parts = [sha256_of(file) for file in diffusers_folder.files(path)]
    else:
        parts = [sha256_of(path)]
        config = _beside(path, config) if torch_file.is_torch_file(path) else config
    if config is not None:
        text = json.dumps(_settings(config, "network"), sort_keys=True)
        parts.append(hashlib.sha256(text.encode()).hexdigest())
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def _beside(path: str | os.PathLike, config: Config | None) -> Config | None:
    """The settings of a file: those given, or else the JSON file of the same name, or what the registry says."""
    beside = Path(path).with_suffix(".json")
    if config is None:
        return beside if beside.is_file() else (registry.entry_for_path(path) or {}).get("flags")
    return config


def _settings(config: Config | None, setting: str) -> dict[str, Any] | None:
    """The settings in a JSON file, or as they are.

    Raises:
        InputError: the file holds no settings.
    """
    if config is None or isinstance(config, dict):
        return config
    problem = "holds no settings, which would be one JSON object"
    try:
        content = safe_files.read_json(config)
        if isinstance(content, dict):
            return content
    except OSError as error:
        problem = error.strerror or str(error)
    except ValueError as error:
        problem = f"no JSON that can be read ({persistence.printable(error)})"
    raise InputError(f"`{setting}_config`: {config}: {problem}")


def _check_pictures(networks: dict[str, Any], path: str | os.PathLike, setting: str) -> None:
    """Raise InputError where EDM2's record of an encoder says that the network sees latents, not pictures."""
    encoder = networks.get("encoder")
    if isinstance(encoder, persistence.Record) and encoder.class_name == "StabilityVAEEncoder":
        raise InputError(
            f"`{setting}`: {path} is a latent-space model: its network sees what an autoencoder makes of images; only "
            "models of pixels can be used"
        )


def _check_levels(net: Any, path: str | os.PathLike, setting: str) -> None:
    """Raise InputError where the noise levels of a diffusion model leave nothing to do."""
    low, high, deviation = net.sigma_min, net.sigma_max, getattr(net, "sigma_data", 1.0)
    if not 0 <= low < high or not 0 < deviation < math.inf:
        raise InputError(
            f"`{setting}`: {path} is no diffusion model that works: its noise levels are {low:g} to {high:g}, and the "
            f"standard deviation of its data {deviation:g}"
        )


def _falling(sigmas: list[Any]) -> bool:
    numbers = all(type(sigma) in (int, float) and 0 < sigma < math.inf for sigma in sigmas)
    return numbers and all(high > low for high, low in zip(sigmas, sigmas[1:]))


def _labels(networks: dict[str, Any], label_dim: int, path: str | os.PathLike, setting: str) -> LabelLaw:
    """The law of labels that a file keeps.

    Raises:
        InputError: what it keeps is no law for the network.
    """
    if networks.get(KEY) is None:
        return LabelLaw(label_dim)
    try:
        return LabelLaw.from_record(networks[KEY], label_dim)
    except InputError as error:
        raise InputError(f"`{setting}`: the {KEY} in {path} cannot be used: {error}") from None


def _check_room(net: Any, path: str | os.PathLike, setting: str) -> None:
    """Raise InputError where one picture of a network, whose weights may be few, would not fit into memory.

    The estimate is of what has to be there at once at full resolution: the picture, and what enters and leaves a layer.
    """
    size, channels = net.img_resolution, net.img_channels
    others = r"unet\.(input_blocks\.[01]\.|conv_in|down_blocks\.0\.)"
    layers = re.compile(rf"(.*\b(b{size}\.|{size}x{size}_)|{others}).*")
    weights = [p for name, p in net.named_parameters() if p.ndim == 4 and layers.fullmatch(name)]
    width = max((max(weight.shape[:2]) for weight in weights), default=0)
    needed = 4 * size**2 * (channels + 2 * width)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 35
    if needed > there / 2:
        raise InputError(
            f"`{setting}`: one picture of {path}, {size}x{size} with {channels} channel(s), takes {needed / 2**30:.3g} "
            f"GiB to make, and this machine has {there / 2**30:.3g}"
        )


@functools.cache
def say(note: str) -> None:
    """Write a note on stderr, once however often the file is read, and of several processes only in the first."""
    if distributed.is_first():
        terminal.say(f"note: {note}")
