"""The settings that belong to commands alone; see `torch_utils.settings`."""

from dataclasses import dataclass

from di_refine.presets import AUTO, PAPER, PRESETS
from di_refine.runs.config import LoopConfig
from torch_utils.settings import FILES, MACHINE, MEASURING, NETWORK, OBJECTIVE, WHAT, Settings, setting


@dataclass(kw_only=True)
class RefineConfig(Settings):
    """What only `refine.py` can be told."""

    network: str = setting(..., "Refine this StyleGAN2 generator.", metavar="FILE|URL|NAME")


@dataclass(kw_only=True)
class DistillConfig(Settings):
    """What only `distill.py` can be told."""

    init_sigma: float = setting(1.0, "Let the generator start from this noise level.", above=0)
    student_steps: int = setting(1, "Give the generator this many steps.", minimum=1)
    student_sigmas: str | None = setting(
        None,
        "Give the steps these noise levels, which must fall, in place of `init_sigma`.",
        metavar="LIST",
        default_text="EDM's spacing",
    )


@dataclass(kw_only=True)
class LabelsConfig(Settings):
    """What all commands that draw from a network can be told; `di_refine.files.label_laws` reads it."""

    labels: str | None = setting(
        None,
        "Draw labels from this: all classes equally often (uniform); as often as in training (dataset), by `data` or "
        "else by the network's file; one class; as often as numbers such as 1,1,2 say; or as in a labelled data set or "
        "a JSON file.",
        metavar="uniform|dataset|CLASS|LIST|FILE",
        names=("--class-freq",),
        group=NETWORK,
        default_text="what the network's file says, else uniform",
    )


@dataclass(kw_only=True)
class TeachConfig(LabelsConfig):
    """What `refine.py` and `distill.py` can be told besides the settings of the parts that they run."""

    teacher: tuple[str, ...] = setting(
        (),
        "Learn from this diffusion model (docs/teachers.md says which can be read); several make a mean score.",
        metavar="FILE|FOLDER|URL|NAME|hf:ORG/NAME",
        group=WHAT,
    )
    teacher_config: tuple[str, ...] = setting(
        (),
        "Take from this JSON file what the teacher's file does not say: the flags of a .pt file's training, or a "
        "scheduler's settings; several belong to the teachers in their order.",
        metavar="FILE.json",
        group=WHAT,
        default_text="the JSON file that has the .pt file's name",
    )
    teacher_weight: tuple[float, ...] = setting(
        (),
        "Weigh the teachers by these, in their order; the sum is 1, and a negative one guides away.",
        group=WHAT,
        default_text="equal",
    )
    preset: str = setting(
        AUTO,
        "Fit the options that are not given to the run (auto), or take published values; docs/presets.md has both.",
        choices=(AUTO, *PRESETS),
        group=WHAT,
    )
    data: str | None = setting(
        None,
        "Take these images as samples of the teacher's side for a density ratio, or as real images for "
        "`adversarial_weight`; 'teacher' takes what python -m di_refine sample-teacher drew.",
        metavar="PATH|teacher",
        group=OBJECTIVE,
    )
    teacher_steps: int = setting(
        18, "Measure the teacher with this many sampling steps.", minimum=1, group=MEASURING, may_change=True
    )
    workers: int = setting(2, "Decode data sets with this many threads.", minimum=1, group=MACHINE, may_change=True)


@dataclass(kw_only=True)
class PretrainConfig(Settings):
    """What `pretrain.py teacher` and `pretrain.py gan` can be told besides the settings of the parts that they run."""

    data: str = setting(..., "Train on these images: a zip or folder made by dataset_tool.py.", metavar="PATH")
    preset: str = setting(
        AUTO,
        "Fit the options that are not given to the run (auto), or take published values; docs/presets.md has both.",
        choices=(AUTO, PAPER),
        group=WHAT,
    )
    start_from: str | None = setting(
        None,
        "Start from the networks in this file, of any size and classes: what fits is copied, the rest is new.",
        metavar="FILE|URL|NAME",
        names=("--from",),
        group=WHAT,
        default_text="untrained networks",
    )
    cond: bool | None = setting(
        None, "Train a class-conditional network.", group=WHAT, default_text="if the data have labels"
    )
    mirror: bool = setting(False, "Train on images that are flipped left to right, too.", group=WHAT)
    workers: int = setting(
        2, "Decode images with this many threads or processes.", minimum=1, group=MACHINE, may_change=True
    )


@dataclass(kw_only=True)
class TeacherLoopConfig(LoopConfig):
    """The length of a diffusion model's training that EDM has for CIFAR-10."""

    kimg: float = 200_000
    tick: float = 10


@dataclass(kw_only=True)
class GanLoopConfig(LoopConfig):
    """The length of a GAN's training that StyleGAN2-ADA has for CIFAR-10."""

    kimg: float = 100_000
    tick: float = 10


@dataclass(kw_only=True)
class FeatureFilesConfig(Settings):
    """The files of `pretrain.py features`."""

    data: str = setting(..., "Train on these labelled images, made by dataset_tool.py.", metavar="PATH")
    dest: str = setting(..., "Write the feature network to this file.", metavar="FILE.safetensors", group=FILES)
    stats: str = setting(
        ..., "Write its statistics of the images, to measure against, to this file.", metavar="FILE.npz", group=FILES
    )
    name: str | None = setting(
        None, "Call the network this in metrics, as in fd2k_full@NAME.", group=FILES, default_text="from `dest`"
    )
    held_out: str | None = setting(
        None,
        "Judge the network by these images, and train on all of `data`.",
        metavar="PATH",
        default_text="a tenth of `data`",
    )
    max_minutes: float | None = setting(
        None,
        "Stop, saving, after the epoch in which this many minutes are over; the same command goes on.",
        above=0,
        group="How long",
    )
    half: bool = setting(False, "Store the weights in float16.", group=FILES)
