"""Folders of diffusers with an unconditional or class-conditional diffusion model of pixels, read and written.

    model_index.json                            the pipeline, and [library, class] of each of its parts
    unet/config.json                            the arguments of UNet2DModel
    unet/diffusion_pytorch_model.safetensors    its weights; older folders have a .bin
    scheduler/scheduler_config.json             what the network was trained to predict, and at which noise levels

Some published folders have the two parts' files at the top. What only this project knows, such as the noise levels of a
distilled network, is in di-refine.json. diffusers builds the network and computes the noise levels; the files are read
here: JSON and safetensors, or a .bin without anything but tensors. No program in a folder is ever run.
"""

import importlib
import inspect
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from di_refine import labels
from di_refine.ddpm.networks import DiffusersPrecond
from di_refine.files import hub, torch_file
from torch_utils import persistence, safe_files
from torch_utils.persistence import Blueprint, NetworkFormatError, printable

KEY = "diffusers"  # of a network file: what a folder says besides the network
_INDEX, _OURS = "model_index.json", "di-refine.json"
_KEPT = (labels.KEY, "distilled_sigmas")  # of a network file, in our own JSON
_CONFIGS = ("unet/config.json", "config.json")
_SCHEDULERS = ("scheduler/scheduler_config.json", "scheduler_config.json")
_WEIGHTS = "diffusion_pytorch_model"
_MAX_STEPS = 10_000  # published models have 1,000 to 4,000
_MAX_FILES = 64  # that the weights may be divided into

# Attention layers had other names until the end of 2022.
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# The schedulers that say what a network of discrete steps was trained for. They differ in sampling only.
_DISCRETE = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_PREDICTIONS = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v"}


def is_folder(path: str | os.PathLike) -> bool:
    """Return whether a folder looks like one of diffusers."""
    return any((Path(path) / name).is_file() for name in (_INDEX, *_CONFIGS))


def files(path: str | os.PathLike) -> list[Path]:
    """Return the files of a folder that say which network it holds, in a fixed order."""
    folder = Path(path)
    names = [_INDEX, *_CONFIGS, *_SCHEDULERS, _OURS]
    return [folder / name for name in names if (folder / name).is_file()] + _weights(folder)


def load(path: str | os.PathLike, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a folder.

    Args:
        path: the folder.
        config: the scheduler's settings, in place of the folder's.

    Returns:
        What a network pickle would hold: `ema`, a `DiffusersPrecond`; `diffusers`, the scheduler's settings and the
        name of the pipeline; and what di-refine.json says.

    Raises:
        NetworkFormatError: names the folder and says why it is not usable.
    """
    with persistence.explained(path):
        return _load(Path(path), config)


def _load(folder: Path, config: dict[str, Any] | None) -> dict[str, Any]:
    index = _json(folder / _INDEX) if (folder / _INDEX).is_file() else {}
    _check_parts(index, folder)
    unet_file = next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)
    if unet_file is None:
        raise NetworkFormatError(f"{folder} has no unet/config.json, so it holds no diffusion model of pixels")
    unet = _json(unet_file)
    _check_unet(unet, unet_file)
    scheduler = config
    if scheduler is None:
        file = next((folder / name for name in _SCHEDULERS if (folder / name).is_file()), None)
        if file is None:
            raise NetworkFormatError(
                f"{folder} has no scheduler/scheduler_config.json, which says what the network was trained to predict"
            )
        scheduler = _json(file)
    diffusers = _library(folder)
    law = _law(scheduler, diffusers, folder)
    unet = {name: value for name, value in unet.items() if not name.startswith("_")}
    arguments = {
        "img_resolution": _size(unet, unet_file),
        "img_channels": unet.get("in_channels", 3),
        "label_dim": unet.get("num_class_embeds") or 0,
        **{name: value for name, value in law.items() if name != "log_sigmas"},
        "unet": unet,
    }
    tensors = {f"unet.{name}": tensor for name, tensor in _tensors(folder).items()}
    if law["steps"]:
        tensors["log_sigmas"] = law["log_sigmas"]
    net = persistence.assemble(Blueprint("DiffusersPrecond", (), arguments, tensors), str(folder))
    kept = {"scheduler": scheduler, "pipeline": index.get("_class_name", "DDPMPipeline")}
    ours = _json(folder / _OURS) if (folder / _OURS).is_file() else {}
    return {"ema": net, KEY: kept, **{name: ours[name] for name in _KEPT if name in ours}}


def save(networks: dict[str, Any], path: str | os.PathLike) -> None:
    """Write the network that came from a folder of diffusers as such a folder, whole or not at all.

    diffusers opens it: `UNet2DModel.from_pretrained(path, subfolder="unet")`, or the whole by its pipeline.

    Args:
        networks: what `load` returned, with the weights of now.
        path: the folder; there must be nothing, or a folder that this function wrote.

    Raises:
        NetworkFormatError: the network is none of diffusers, or something else is at `path`.
    """
    folder, net, kept = Path(path), networks.get("ema"), networks.get(KEY)
    if not isinstance(net, DiffusersPrecond) or not isinstance(kept, dict):
        raise NetworkFormatError(f"{folder}: only networks that come from a diffusers folder can be written as one")
    if folder.exists() and not (folder / _INDEX).is_file():
        raise NetworkFormatError(f"{folder} is there, and no diffusers folder that could be replaced")
    diffusers = _library(folder)
    scheduler = kept["scheduler"]
    index = {
        "_class_name": kept["pipeline"],
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    arguments: Any = net.init_kwargs
    unet = {"_class_name": "UNet2DModel", "_diffusers_version": diffusers.__version__, **arguments["unet"]}
    ours = {name: networks[name] for name in _KEPT if name in networks}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.unet.state_dict().items()}
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        for content, name in ((index, _INDEX), (scheduler, _SCHEDULERS[0]), (unet, _CONFIGS[0]), (ours, _OURS)):
            if content:
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        file = new / "unet" / f"{_WEIGHTS}.safetensors"
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
        old = Path(temporary) / "old"
        if folder.exists():
            folder.rename(old)  # and not removed before there is another: a kill between leaves both
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def _library(folder: Path) -> Any:
    try:
        return importlib.import_module("diffusers")
    except ImportError:
        raise NetworkFormatError(f"{folder} is a diffusers folder, which needs the library: {hub.INSTALL}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = safe_files.read_json(path)
    except OSError as error:
        raise NetworkFormatError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise NetworkFormatError(f"{path}: no JSON that can be read ({printable(error)})") from None
    if not isinstance(content, dict):
        raise NetworkFormatError(f"{path} holds no settings")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# What is refused.


def _check_parts(index: dict[str, Any], folder: Path) -> None:
    """Raise NetworkFormatError where a pipeline has parts that make its network none of pixels and classes alone."""
    parts = {
        name: str(entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }
    if any(name in parts for name in ("vae", "vqvae", "movq")):
        raise NetworkFormatError(
            f"{folder} is a latent-space model: its network sees what an autoencoder makes of images; only models of "
            "pixels can be used"
        )
    conditions = [name for name in parts if name.startswith(("text_encoder", "tokenizer", "image_encoder", "bert"))]
    if conditions or parts.get("unet") == "UNet2DConditionModel":
        raise NetworkFormatError(
            f"{folder} is a text-conditional model; only unconditional and class-conditional ones can be used"
        )
    if parts and parts.get("unet") != "UNet2DModel":
        network = parts.get("unet") or parts.get("transformer") or "no U-Net"
        raise NetworkFormatError(f"{folder} holds {printable(network)}; only UNet2DModel can be used")


def _check_unet(unet: dict[str, Any], path: Path) -> None:
    """Raise NetworkFormatError where the settings are none of a network that a `Denoiser` can be made of."""
    name = unet.get("_class_name")
    if name == "UNet2DConditionModel":
        raise NetworkFormatError(
            f"{path} is of a text-conditional model (UNet2DConditionModel); only UNet2DModel can be used"
        )
    if name != "UNet2DModel":
        raise NetworkFormatError(f"{path} is of a {printable(name)}; only UNet2DModel can be used")
    if unet.get("class_embed_type") is not None:
        raise NetworkFormatError(
            f"{path}: its classes are given as {printable(unet['class_embed_type'])}; only num_class_embeds can be used"
        )
    channels, out = unet.get("in_channels", 3), unet.get("out_channels", 3)
    if channels == 4:
        raise NetworkFormatError(
            f"{path}: in_channels is 4, as of latent-space models, whose network sees what an autoencoder makes of "
            "images; only models of pixels can be used"
        )
    if channels not in (1, 3):
        raise NetworkFormatError(f"{path}: in_channels is {printable(channels)}; only 1 (grey) and 3 (RGB) can be used")
    if out not in (channels, 2 * channels):
        raise NetworkFormatError(f"{path}: out_channels is {printable(out)}, neither in_channels nor its double")


def _size(unet: dict[str, Any], path: Path) -> int:
    size = unet.get("sample_size")
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if type(size) is not int or size < 1:
        raise NetworkFormatError(f"{path}: sample_size is {printable(size)}; only square images of a known size")
    halvings = len(unet.get("down_block_types", "1234")) - 1
    if size % 2**halvings:
        raise NetworkFormatError(f"{path}: sample_size {size} cannot be halved {halvings} times, as its blocks ask for")
    return size


# ---------------------------------------------------------------------------------------------------------------------
# What the scheduler says.


def _law(config: dict[str, Any], diffusers: Any, folder: Path) -> dict[str, Any]:
    """Return the arguments of `DiffusersPrecond` that follow from a scheduler's settings, and `log_sigmas`.

    Raises:
        NetworkFormatError: names the folder and the setting that cannot be used.
    """
    name = config.get("_class_name")
    if name == "CMStochasticIterativeScheduler":
        raise NetworkFormatError(f"{folder} is a consistency model, which is no diffusion model any more")
    if name not in (*_DISCRETE, *_EDM, "ScoreSdeVeScheduler"):
        raise NetworkFormatError(
            f"{folder}: its scheduler is {printable(name)}; those of DDPM, DDIM, EDM (EDMEulerScheduler) and score SDE "
            "(ScoreSdeVeScheduler) can be used"
        )
    steps = config.get("num_train_timesteps", 1000)
    betas = config.get("trained_betas")
    if type(steps) is not int or not 2 <= steps <= _MAX_STEPS:
        raise NetworkFormatError(f"{folder}: num_train_timesteps is {printable(steps)}; 2 to {_MAX_STEPS} can be used")
    if betas is not None and not (isinstance(betas, list) and len(betas) == steps):
        raise NetworkFormatError(f"{folder}: trained_betas is no list of {steps} numbers, as num_train_timesteps says")
    if config.get("timestep_type", "discrete") != "discrete":
        raise NetworkFormatError(f"{folder}: timestep_type is {printable(config['timestep_type'])}, not discrete")
    kind = getattr(diffusers, str(name))
    known = {key: value for key, value in config.items() if key in inspect.signature(kind.__init__).parameters}
    try:
        scheduler = kind(**known)
        found = {key: float(scheduler.config[key]) for key in ("sigma_min", "sigma_max") if key in scheduler.config}
    except Exception as error:  # whatever it makes of settings that make no sense
        raise NetworkFormatError(f"{folder}: the scheduler does not accept its settings: {printable(error)}") from None
    asked = scheduler.config.get("prediction_type", "epsilon")
    if config.get("predict_epsilon") is False:  # as releases of 2022 said it
        asked = "sample"
    prediction = _PREDICTIONS.get(asked)
    if prediction is None or (prediction == "sample" and name in _EDM):
        raise NetworkFormatError(f"{folder}: prediction_type is {printable(asked)}, which cannot be used")
    if name in _EDM:
        data = float(scheduler.config["sigma_data"])
        return {"parameterisation": "edm", "prediction": prediction, "steps": 0, "sigma_data": data, **found}
    if name == "ScoreSdeVeScheduler":
        doubled = {key: 2 * value for key, value in found.items()}  # from images in [0, 1] to images in [-1, 1]
        return {"parameterisation": "ve", "prediction": "epsilon", "steps": 0, "sigma_data": 0.5, **doubled}
    alphas = scheduler.alphas_cumprod.double()
    alphas = alphas[: int((alphas > 0).sum())]  # the last step may have no signal at all, which is beyond every sigma
    log_sigmas = ((1 - alphas).log() - alphas.log()) / 2
    if len(alphas) < 2 or not log_sigmas.isfinite().all() or not (log_sigmas.diff() > 0).all():
        raise NetworkFormatError(f"{folder}: the noise levels of its scheduler do not rise from step to step")
    return {
        "parameterisation": "vp",
        "prediction": prediction,
        "steps": len(alphas),
        "sigma_data": 0.5,
        "sigma_min": math.exp(log_sigmas[0]),
        "sigma_max": math.exp(log_sigmas[-1]),
        "log_sigmas": log_sigmas.float(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Weights.


def _weights(folder: Path) -> list[Path]:
    """Return the files with the weights; of several forms the first of safetensors, their parts or variants, .bin."""
    place = folder / "unet" if (folder / "unet").is_dir() else folder
    for pattern in ("{}.safetensors", "{}-*-of-*.safetensors", "{}.*.safetensors", "{}.bin", "{}.*.bin"):
        found = sorted(path for path in place.glob(pattern.format(_WEIGHTS)) if path.is_file())
        if found:
            return found if "-of-" in pattern else found[:1]
    return []


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = _weights(folder)
    if not found or len(found) > _MAX_FILES:
        raise NetworkFormatError(f"{folder} has no unet/{_WEIGHTS}.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    for path in found:
        if path.suffix == ".bin":
            tensors |= torch_file.tensors(path)
            continue
        try:
            safe_files.check_safetensors(path)
            tensors |= safetensors.torch.load_file(path)
        except OSError as error:
            raise NetworkFormatError(f"{path}: {error.strerror or error}") from None
        except safetensors.SafetensorError as error:
            raise NetworkFormatError(f"{path}: {printable(error)}") from None
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        above, _, last = layer.rpartition(".")
        if last in _RENAMED and ".attentions." in name:
            name = f"{above}.{_RENAMED[last]}.{leaf}"
        if name != "time_proj.W" or "time_proj.weight" not in tensors:  # two names of one tensor
            renamed[name] = tensor
    return renamed
