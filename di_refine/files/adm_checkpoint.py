"""Weights of guided-diffusion, improved-diffusion and consistency_models (MIT): a state dictionary, and its flags.

The file holds tensors alone. Their shapes say most of the architecture; the rest are flags of the scripts that trained
it, which a JSON file has under their published names, as in

    {"image_size": 64, "noise_schedule": "cosine", "num_head_channels": 64, "use_new_attention_order": true}

Flags that are not given have the defaults of guided-diffusion, and those that contradict the tensors are refused.
"""

import difflib
import math
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from di_refine.ddpm.networks import ADMPrecond
from torch_utils import misc, persistence
from torch_utils.persistence import Blueprint, NetworkFormatError, printable

KEY = "adm_flags"  # of a network file: the flags that came with the weights
_MAX_STEPS = 10_000  # published models have 1,000 and 4,000
_MAX_TENSORS = 5_000  # published models have up to 645
_SCHEDULES = ("linear", "cosine")

# What the tensors do not say, and guided-diffusion's defaults. None: there is no default.
_NEEDED: dict[str, Any] = {
    "image_size": None,
    "num_heads": 4,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_new_attention_order": False,
    "noise_schedule": "linear",
    "diffusion_steps": 1000,
    "rescale_timesteps": False,
    "predict_xstart": False,
    "dropout": 0.0,
    "training_mode": None,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
}
# What they do say.
_KNOWN = (
    "num_channels",
    "num_res_blocks",
    "channel_mult",
    "num_classes",
    "class_cond",
    "learn_sigma",
    "attention_resolutions",
    "resblock_updown",
    "use_scale_shift_norm",
)
# What concerns how they were trained or are sampled, and not what they are.
_IDLE = """
    use_fp16 use_checkpoint timestep_respacing use_kl rescale_learned_sigmas rescale_learned_betas sigma_small
    batch_size num_samples model_path use_ddim clip_denoised weight_schedule lr ema_rate microbatch lr_anneal_steps
    log_interval save_interval schedule_sampler weight_decay fp16_scale_growth data_dir resume_checkpoint
    global_batch_size sampler steps s_churn s_tmin s_tmax s_noise generator seed loss_norm target_ema_mode scale_mode
    start_ema start_scales end_scales total_training_steps distill_steps_per_iter teacher_model_path teacher_dropout
"""


def is_ours(tensors: Any) -> bool:
    """Return whether the content of a file is such a state dictionary."""
    return isinstance(tensors, dict) and {"time_embed.0.weight", "input_blocks.0.0.weight"} <= tensors.keys()


def load(path: str | os.PathLike, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None) -> dict[str, Any]:
    """Make the network of a file.

    Args:
        path: the file, for messages.
        tensors: its content.
        config: the flags; None where none are known.

    Returns:
        What a network pickle would hold: `ema`, an `ADMPrecond`, and `adm_flags`.

    Raises:
        NetworkFormatError: names the file and says why it is not usable.
    """
    with persistence.explained(path):
        return _load(path, tensors, config or {})


def _load(path: str | os.PathLike, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Any]:
    shapes = architecture(tensors)
    flags = read_flags(config, shapes)
    law = _law(flags, shapes)
    unet = {
        name: shapes[name]
        for name in ("model_channels", "widths", "num_blocks", "attention", "kernel_dims", "scale_shift")
    }
    arguments = {
        "img_resolution": flags["image_size"],
        "img_channels": shapes["in_channels"],
        "label_dim": shapes["classes"],
        **{name: value for name, value in law.items() if name != "log_sigmas"},
        "out_channels": shapes["out_channels"],
        **unet,
        "resample_blocks": shapes["resample_blocks"],
        "num_heads": flags["num_heads"],
        "head_channels": flags["num_head_channels"] if flags["num_head_channels"] != -1 else None,
        "num_heads_up": flags["num_heads_upsample"] if flags["num_heads_upsample"] != -1 else None,
        # The attention of consistency_models always is in the new order; its flag is not read.
        "parts_first": flags["use_new_attention_order"] or shapes["kernel_dims"] == 2,
        "dropout": float(flags["dropout"]),
    }
    places = {f"unet.{name}": tensor for name, tensor in tensors.items()}
    if law["steps"]:
        places["log_sigmas"] = law["log_sigmas"]
    net = persistence.assemble(Blueprint("ADMPrecond", (), arguments, places), os.fspath(path))
    return {"ema": net, KEY: dict(config)}


def save(networks: dict[str, Any], path: str | os.PathLike) -> None:
    """Write the state dictionary of a network that came from such a file, under its published names, in float32.

    Raises:
        NetworkFormatError: the network is another one.
    """
    net = networks.get("ema")
    if not isinstance(net, ADMPrecond):
        raise NetworkFormatError(f"{path}: only networks that come from such a file can be written as one")
    state = OrderedDict((name, tensor.detach().cpu()) for name, tensor in net.unet.state_dict().items())
    with misc.open_atomic(path) as file:
        torch.save(state, file)


# ---------------------------------------------------------------------------------------------------------------------


def architecture(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return what the names and shapes of the tensors say.

    Raises:
        NetworkFormatError: they are no U-Net that makes images.
    """

    def shape(name: str) -> Sequence[int]:
        if name not in tensors:
            raise NetworkFormatError(f"there is no tensor {name}, so this is no U-Net of ADM's kind")
        return tensors[name].shape

    if len(tensors) > _MAX_TENSORS:
        raise NetworkFormatError(f"it has {len(tensors)} tensors, far more than any published model")
    outputs = _count(tensors, "output_blocks")
    if not outputs:
        raise NetworkFormatError("there are no output_blocks: it is a classifier, and no diffusion model")
    channels, out_channels = shape("input_blocks.0.0.weight")[1], shape("out.2.weight")[0]
    if channels == 6:
        raise NetworkFormatError("it is a super-resolution model, whose U-Net sees a small image, too")
    if channels not in (1, 3) or out_channels not in (channels, 2 * channels):
        raise NetworkFormatError(
            f"its U-Net has {channels} channels in and {out_channels} out; only images can be used"
        )
    lasts: dict[int, int] = {}
    for name in tensors:
        if found := re.match(r"output_blocks\.(\d{1,4})\.(\d{1,2})\.", name):
            lasts[int(found[1])] = max(int(found[2]), lasts.get(int(found[1]), 0))
    places = [f"output_blocks.{i}.{last}" for i, last in sorted(lasts.items()) if last]
    ups = [p for p in places if f"{p}.conv.weight" in tensors or f"{p}.in_layers.0.weight" in tensors]
    levels = len(ups) + 1
    if outputs % levels or outputs // levels < 2:
        raise NetworkFormatError(f"{outputs} output_blocks do not make {levels} levels")
    blocks = outputs // levels - 1
    firsts = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    classes = shape("label_emb.weight")[0] if "label_emb.weight" in tensors else 0
    kernel_dims = len(shape("middle_block.1.qkv.weight")) - 2
    if kernel_dims not in (1, 2):
        raise NetworkFormatError("middle_block.1.qkv.weight is no kernel of a convolution")
    widths = [shape(f"{first}.0.in_layers.2.weight")[0] for first in firsts]
    return {
        "in_channels": channels,
        "out_channels": out_channels,
        "classes": classes,
        "model_channels": shape("time_embed.0.weight")[1],
        "widths": widths,
        "num_blocks": blocks,
        "attention": [f"{first}.1.qkv.weight" in tensors for first in firsts],
        "kernel_dims": kernel_dims,
        "scale_shift": shape(f"{firsts[0]}.0.emb_layers.1.weight")[0] == 2 * widths[0],
        "resample_blocks": not ups or f"{ups[0]}.in_layers.0.weight" in tensors,
    }


def _count(tensors: dict[str, torch.Tensor], stage: str) -> int:
    numbers = {int(found[1]) for name in tensors if (found := re.match(rf"{stage}\.(\d{{1,4}})\.\d{{1,2}}\.", name))}
    return max(numbers, default=-1) + 1


def read_flags(config: dict[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that the tensors do not say, all of them, checked.

    Args:
        config: those that are given.
        shapes: what `architecture` returns.

    Raises:
        NetworkFormatError: some are missing, unknown, malformed, or contradict the tensors.
    """
    given = {name: _value(name, value) for name, value in config.items()}
    _check_names(given)
    if given.get("image_size") is None:
        raise NetworkFormatError(
            "the weights do not say image_size, heads and noise schedule; give the flags of their training as JSON"
        )
    if shapes["kernel_dims"] == 1 and not shapes["resample_blocks"] and "rescale_timesteps" not in given:
        raise NetworkFormatError(
            "rescale_timesteps is needed: guided-diffusion's default is false and improved-diffusion's is true, and "
            "these weights may be of either"
        )
    flags = {**_NEEDED, **{name: value for name, value in given.items() if name in _NEEDED}}
    size = flags["image_size"]
    halvings = len(shapes["widths"]) - 1
    if type(size) is not int or size < 1 or size % 2**halvings:
        raise NetworkFormatError(f"image_size is {printable(size)}, which cannot be halved {halvings} times")
    _check_types(flags)
    _check_heads(flags, shapes)
    _check_agreement(given, shapes, size)
    return flags


def _value(name: str, value: Any) -> Any:
    """Return the value of a flag; those that scripts take as text may be texts here, too."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        if name in ("channel_mult", "attention_resolutions"):
            try:
                return [float(word) if "." in word else int(word) for word in text.split(",") if word.strip()]
            except ValueError:
                raise NetworkFormatError(f"{name} is {printable(value)!r}, which are no numbers") from None
    return value


def _check_names(given: dict[str, Any]) -> None:
    known = [*_NEEDED, *_KNOWN, *_IDLE.split()]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise NetworkFormatError(
                f"the flag {printable(name)} is not known" + (f"; is it {near[0]}?" if near else "")
            )


def _check_types(flags: dict[str, Any]) -> None:
    for name in ("use_new_attention_order", "rescale_timesteps", "predict_xstart"):
        if type(flags[name]) is not bool:
            raise NetworkFormatError(f"{name} is {printable(flags[name])}, neither true nor false")
    for name in ("num_heads", "num_head_channels", "num_heads_upsample"):
        value = flags[name] = -1 if flags[name] is None else flags[name]
        if type(value) is not int or not (value == -1 or 1 <= value <= 4096):
            raise NetworkFormatError(f"{name} is {printable(value)}, which is no number of them")
    for name in ("dropout", "sigma_min", "sigma_max"):
        if type(flags[name]) not in (int, float) or not 0 <= flags[name] < math.inf:
            raise NetworkFormatError(f"{name} is {printable(flags[name])}, which cannot be used")
    if flags["noise_schedule"] not in _SCHEDULES:
        raise NetworkFormatError(
            f"noise_schedule is {printable(flags['noise_schedule'])}; {' and '.join(_SCHEDULES)} are known"
        )
    steps = flags["diffusion_steps"]
    if type(steps) is not int or not 2 <= steps <= _MAX_STEPS:
        raise NetworkFormatError(f"diffusion_steps is {printable(steps)}; 2 to {_MAX_STEPS} can be used")


def _check_heads(flags: dict[str, Any], shapes: dict[str, Any]) -> None:
    widths = {width for width, attends in zip(shapes["widths"], shapes["attention"]) if attends} | {
        shapes["widths"][-1]
    }
    for width in sorted(widths):
        for name in ("num_head_channels",) if flags["num_head_channels"] != -1 else ("num_heads", "num_heads_upsample"):
            if flags[name] != -1 and width % flags[name]:
                raise NetworkFormatError(f"{name} is {flags[name]}, which does not divide its {width} channels")
    if flags["num_head_channels"] == -1 and flags["num_heads"] == -1:
        raise NetworkFormatError("num_heads or num_head_channels is needed")


def _check_agreement(given: dict[str, Any], shapes: dict[str, Any], size: int) -> None:
    """Raise NetworkFormatError where flags contradict the tensors."""
    base = shapes["model_channels"]
    found: dict[str, Any] = {
        "num_channels": base,
        "num_res_blocks": shapes["num_blocks"],
        "channel_mult": [width / base for width in shapes["widths"]],
        "num_classes": shapes["classes"] or None,
        "class_cond": shapes["classes"] > 0,
        "learn_sigma": shapes["out_channels"] == 2 * shapes["in_channels"],
        "use_scale_shift_norm": shapes["scale_shift"],
    }
    if len(shapes["widths"]) > 1:  # else there is nothing to resample
        found["resblock_updown"] = shapes["resample_blocks"]
    for name, value in found.items():
        says = given.get(name, value)
        if name == "channel_mult" and says in ("", [], None):
            continue  # the scripts' word for what belongs to the size
        if says != value:
            raise NetworkFormatError(
                f"the flag {name} is {_shown(says)}, and the tensors are of a network where it is {_shown(value)}"
            )
    resolutions = given.get("attention_resolutions")
    if isinstance(resolutions, list):
        attends = [size >> level in resolutions for level in range(len(shapes["widths"]))]
        if attends != shapes["attention"]:
            real = [size >> level for level, attention in enumerate(shapes["attention"]) if attention]
            raise NetworkFormatError(
                f"attention_resolutions is {_shown(resolutions)}, and the tensors of a network of image_size {size} "
                f"have attention at {real or 'none'}"
            )


def _shown(value: Any) -> str:
    """Return a flag's value as a list of numbers, or as one word of limited length."""
    if isinstance(value, list):
        return f"[{', '.join(printable(item) for item in value[:10])}]"
    return printable(value)


def _law(flags: dict[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `ADMPrecond` that say what the network was trained to predict, and `log_sigmas`."""
    if shapes["kernel_dims"] == 2:
        if flags["training_mode"] != "edm":
            said = "missing" if flags["training_mode"] is None else printable(flags["training_mode"])
            raise NetworkFormatError(
                f"training_mode is {said}: of the networks of consistency_models only those that were trained as "
                "diffusion models (edm) can teach, and consistency models look the same"
            )
        levels = {"sigma_min": float(flags["sigma_min"]), "sigma_max": float(flags["sigma_max"])}
        return {"parameterisation": "edm", "prediction": "epsilon", "steps": 0, "time_scale": 1000.0, **levels}
    steps = flags["diffusion_steps"]
    log_sigmas = _log_sigmas(flags["noise_schedule"], steps)
    if not log_sigmas.isfinite().all():
        raise NetworkFormatError(f"diffusion_steps is {steps}, too few for noise_schedule={flags['noise_schedule']}")
    return {
        "parameterisation": "vp",
        "prediction": "sample" if flags["predict_xstart"] else "epsilon",
        "steps": steps,
        "time_scale": 1000 / steps if flags["rescale_timesteps"] else 1.0,
        "sigma_min": math.exp(log_sigmas[0]),
        "sigma_max": math.exp(log_sigmas[-1]),
        "log_sigmas": log_sigmas.float(),
    }


def _log_sigmas(schedule: str, steps: int) -> torch.Tensor:
    """Return ln(sigma) of each step, float64 [steps].

    Args:
        schedule: 'linear' (arXiv 2006.11239, scaled to the number of steps) or 'cosine' (arXiv 2102.09672, eq. 17).
        steps: their number.
    """
    if schedule == "linear":
        betas = torch.linspace(0.1, 20, steps, dtype=torch.float64) / steps
    else:
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha = ((time + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        betas = (1 - alpha[1:] / alpha[:-1]).clamp(max=0.999)
    kept = (1 - betas).cumprod(dim=0)
    return ((1 - kept) / kept).log() / 2
