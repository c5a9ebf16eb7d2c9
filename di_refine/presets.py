"""Values for the settings that are not given, by the names of the settings.

`auto` fits them to a run: `teacher`, `gan` and `teach` are the table, pure functions of what is known of the run. The
other presets are published. They are for CIFAR-10 and networks of its size; where the authors trained another setting
than ours (other data, losses beside the objective), the preset is their objective under the settings of the method that
it builds on, and says so. docs/presets.md explains both.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch_utils.settings import Settings, declared

Part = TypeVar("Part", bound=Settings)

AUTO, PAPER = "auto", "paper-cifar10"

_DIFF_INSTRUCT = {  # arXiv 2305.18455, section 4.1 and appendix
    "objective": "ikl",
    "init_sigma": 1.0,
    "sigma_dist": "lognormal",
    "lr": 1e-5,
    "score_lr": 1e-5,
    "beta1": 0.0,
    "batch": 128,
    "ema_kimg": 500,
}
_SID = {  # arXiv 2404.04057, section 5 and appendix
    **_DIFF_INSTRUCT,
    "objective": "sid",
    "alpha": 1.2,
    "normalize": True,
    "init_sigma": 2.5,
    "sigma_dist": "edm-grid",
    "tmax": 800.0,
    "batch": 256,
}
_UNI = {name: value for name, value in _SID.items() if name != "alpha"}

PRESETS: dict[str, dict[str, Any]] = {
    "diff-instruct": _DIFF_INSTRUCT,
    "dmd": {**_DIFF_INSTRUCT, "objective": "dmd"},  # DMD's gradient; its regression loss needs pairs and is not there
    "f-distill-js": {**_DIFF_INSTRUCT, "objective": "f-js"},  # without f-distill's GAN loss: see --adversarial-weight
    "f-distill-fkl": {**_DIFF_INSTRUCT, "objective": "f-fkl"},
    "sid": _SID,
    "sim": {**_UNI, "objective": "sim"},  # SIM under SiD's settings
    "uni-rkl": {**_UNI, "objective": "uni-rkl"},  # Uni-Instruct builds on SiD's settings (arXiv 2505.20755)
    "uni-fkl": {**_UNI, "objective": "uni-fkl"},
    "uni-js": {**_UNI, "objective": "uni-js"},
}
PRESETS[PAPER] = _DIFF_INSTRUCT


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a run before it starts.

    Attributes:
        resolution: of the images.
        device: 'cpu', or another type of PyTorch's devices.
        kimg: thousands of images that the run is to see; None takes a length that suits the device.
        images: in the data set; None where there is none.
        parameters: of the network that is refined or distilled; None where one is made.
    """

    resolution: int
    device: str
    kimg: float | None = None
    images: int | None = None
    parameters: int | None = None

    @property
    def small(self) -> bool:
        """Whether the networks are to be small, for a CPU."""
        return self.device == "cpu"


def teacher(facts: Facts) -> dict[str, Any]:
    """A diffusion model: EDM's settings (arXiv 2206.00364, table 7), and ours for a CPU."""
    fine = facts.resolution >= 64
    kimg = facts.kimg or (400 if facts.small else 200_000)
    most = 64 if facts.small else 256 if fine else 512
    levels = max(int(math.log2(facts.resolution / 8)) if facts.resolution >= 16 else 0, 0)
    if facts.small:  # down to 8 x 8, with attention there
        sizes = {
            "width": 32,
            "channel_mult": ",".join(["1", *["2"] * levels]),
            "num_blocks": 1,
            "attn_resolutions": str(facts.resolution // 2**levels),
            "dropout": 0.1,
        }
    else:
        sizes = {
            "width": 128,
            "channel_mult": "1,2,2,2" if fine else "2,2,2",
            "num_blocks": 4,
            "attn_resolutions": "16",
            "dropout": 0.05 if fine else 0.13,
        }
        if facts.resolution % 4:
            sizes["channel_mult"] = "2"
    # A model that sees an image a few hundred times learns it by heart without augmentation.
    passes = math.inf if not facts.images else kimg * 1000 / facts.images
    return {
        "kimg": kimg,
        **sizes,
        "batch": _batch(kimg, most, 32 if facts.small else 64, updates=4000),
        "lr": 2e-4 if fine and not facts.small else 1e-3,
        "lr_rampup": min(10_000, _round(kimg / 20)),
        "lr_rampdown": _round(kimg / 4) if kimg < 100_000 else 0,
        "ema_kimg": min(500, _round(kimg / 20)),
        "augment": (0.15 if fine else 0.12) if passes > 300 else 0,
        **_schedule(kimg),
    }


def gan(facts: Facts) -> dict[str, Any]:
    """A StyleGAN2-ADA: its configuration `auto` (arXiv 2006.06676, appendix), and ours for a CPU."""
    size = facts.resolution
    kimg = facts.kimg or (300 if facts.small else 25_000)
    most = 32 if facts.small else max(min(4096 // size, 32), 8)
    batch = most if facts.small else max(most, 32)
    if facts.small:
        sizes = {"z_dim": 64, "channel_base": 512, "channel_max": 64}
    else:
        sizes = {"z_dim": 512, "channel_base": 32768 if size >= 512 else 16384, "channel_max": 512}
    return {
        "kimg": kimg,
        **sizes,
        "mapping_layers": 2,
        "d_arch": "resnet",
        "mbstd_group": 4,
        "batch": batch,
        "lr": 2e-3 if size >= 1024 else 2.5e-3,
        "gamma": _round(0.0002 * size**2 / batch),
        "ema_kimg": min(batch * 10 / 32, _round(kimg / 10)),
        "ada_kimg": min(500, _round(kimg / 3)),
        "pl_weight": 2.0 if size >= 64 else 0.0,
        "style_mixing": 0.9 if size >= 64 else 0.0,
        **_schedule(kimg),
    }


def teach(facts: Facts) -> dict[str, Any]:
    """Refining or distilling a network: Diff-Instruct's settings at the paper's length, and ours for shorter runs.

    Adam moves a weight by about `lr` per update, so `lr` times the updates is how far a weight can go: 0.39 in the
    paper. It is kept, up to a rate that falls with the width of the network, that is, with the root of its parameters.
    """
    kimg = facts.kimg or (40 if facts.small else 5000)
    batch = 64 if facts.small else 128
    parameters = facts.parameters or 0
    highest = 1e-3 / math.sqrt(max(parameters, 100_000) / 100_000)
    lr = _round(min(0.39 * batch / (kimg * 1000), highest))
    return {
        "kimg": kimg,
        "batch": batch,
        "lr": lr,
        "score_lr": _round(lr * (2 if parameters < 1_000_000 else 1)),
        "score_warmup": min(20, _round(kimg / 10)),
        "ema_kimg": min(500, _round(kimg / 10)),
        **_schedule(kimg),
    }


TABLE = {"edm": teacher, "stylegan2": gan, "refine": teach, "distill": teach}
"""The values of `auto` for what a command makes."""


def _round(value: float) -> float:
    """Two digits, so that settings can be read and given again."""
    return float(f"{value:.2g}")


def _batch(kimg: float, most: int, least: int, updates: int) -> int:
    """The largest batch, halved from `most` but not below `least`, with which the run has so many updates."""
    batch = most
    while batch // 2 >= least and kimg * 1000 / batch < updates:
        batch //= 2
    return batch


def _schedule(kimg: float) -> dict[str, Any]:
    """Twenty ticks and five snapshots; in long runs a tick at every 50 kimg, and a snapshot at every tenth."""
    tick = min(50, _round(kimg / 20))
    return {"tick": tick, "snap": min(10, max(1, round(kimg / tick / 5)))}


def values_of(command: str, name: str, facts: Facts, objective: str | None = None) -> dict[str, Any]:
    """The values of a preset.

    Args:
        command: what is made, a key of `TABLE`.
        name: of the preset; `paper-cifar10` leaves the settings of `pretrain.py` at their defaults, which are
            published.
        facts: of the run, which `auto` goes by.
        objective: where it is given; values that belong to another objective are left out then.
    """
    if name == AUTO:
        return TABLE[command](facts)
    if command in ("edm", "stylegan2"):
        return {}
    values = PRESETS[name]
    if objective in (None, values["objective"]):
        return values
    return {key: value for key, value in values.items() if key not in ("objective", "alpha", "normalize")}


def settings(part: type[Part], values: Mapping[str, Any]) -> Part:
    """The settings of one part, such as `TrainerConfig`, from values by name; names of other parts are passed over."""
    names = {item.name for item in declared(part)}
    return part(**{name: value for name, value in values.items() if name in names})


def warnings(values: Mapping[str, Any]) -> list[str]:
    """Sentences on settings that cannot work in the run's length; each names a number that can."""
    kimg, found = values["kimg"], []
    shares = {
        "score_warmup": (2, 10, "leaves the generator less than half of the run"),
        "lr_rampup": (2, 20, "reaches the full learning rate late or never"),
        "lr_rampdown": (1, 4, "begins before the run does"),
        "tick": (1, 20, "is longer than the run"),
    }
    # The averages of a teacher and of a GAN are limited to a share of the images seen; that of a generator is not.
    if "score_warmup" in values:
        shares["ema_kimg"] = (4, 10, "lets the average be mostly the generator of the start")
    for name, (most, good, why) in shares.items():
        if values.get(name, 0) > kimg / most:
            found.append(f"{name}={values[name]:g} {why} in kimg={kimg:g}; use {name}={_round(kimg / good):g}")
    return found
