"""The options that `refine.py` and `distill.py` share, and how they become command-line options.

An option is a field of a dataclass, which holds its name, default, type and help in one place:

    kimg: float = option(5000, cli.POSITIVE_NUMBER, "Length, in thousands of images.")

`click_options` turns the fields into `--kimg` and so on; a library user fills in the dataclass.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import click
from click.core import ParameterSource

from di_refine import objectives
from di_refine.commands import cli
from di_refine.commands.presets import PRESETS, preset
from di_refine.noise import WEIGHTS
from di_refine.trainer_config import PRECISIONS


def option(default: Any, type: Any, help: str, *names: str, metavar: str | None = None, multiple: bool = False) -> Any:
    """A dataclass field that is a command-line option.

    Args:
        default: its default; `...` makes it required.
        type: of click; `bool` makes it `--name/--no-name`.
        help: one sentence.
        names: further names.
        metavar: stands for the value in the help.
        multiple: may be repeated; the value is a tuple.
    """
    settings = {"type": type, "help": help, "metavar": metavar, "multiple": multiple, "names": names}
    if default is ...:
        return dataclasses.field(metadata=settings)
    return dataclasses.field(default=default, metadata=settings)


def click_options(options: type) -> Callable[[Callable], Callable]:
    """Decorates a command with the fields of a dataclass, those of its own class before those it inherits."""
    own = options.__dict__.get("__annotations__", {})
    ordered = sorted((field for field in fields(options) if field.metadata), key=lambda field: field.name not in own)

    def add(function):
        for field in reversed(ordered):
            function = _click_option(field)(function)
        return function

    return add


def _click_option(field: dataclasses.Field):
    settings = dict(field.metadata)
    name = field.name.replace("_", "-")
    extra = settings.pop("names")
    required = field.default is dataclasses.MISSING
    if settings["type"] is bool:
        del settings["type"]
        return click.option(f"--{name}/--no-{name}", default=field.default, help=settings["help"])
    settings |= {"required": True} if required else {"default": field.default}
    return click.option(f"--{name}", *extra, field.name, **settings)


LENGTH = cli.Number(above=0, maximum=1e9)


class AutoOrInteger(cli.Integer):
    """'auto', or a positive whole number."""

    name = "auto|integer"

    def __init__(self):
        super().__init__(minimum=1)
        self.wanted = f"'auto' or {self.wanted}"

    def parse(self, text: str) -> int | str:
        return text if text == "auto" else super().parse(text)


@dataclass(kw_only=True)
class Options:
    """What both commands take, under the names of the options; None where registry or networks decide.

    Thousands of images are in `kimg`s, learning rates are Adam's, everything else is as `--help` says.
    """

    teacher: tuple[str, ...] = option(
        (),
        str,
        "The EDM diffusion model; several make a mean score.",
        metavar="FILE|URL|NAME",
        multiple=True,
    )
    teacher_weight: tuple[float, ...] = option(
        (), cli.Number(), "Weights of the teachers, in their order; their sum is 1.  [default: equal]", multiple=True
    )
    preset: str = option("diff-instruct", click.Choice(list(PRESETS)), "Published values of options not given.")
    outdir: str = option("runs", str, "Where the numbered run directory is made.", metavar="DIR")
    desc: str | None = option(None, str, "Words for the run directory's name.  [default: from the network]")
    kimg: float = option(5000, LENGTH, "Length in thousands of images, warm-up included.")
    batch: int = option(128, cli.POSITIVE_INT, "Images per update.")
    batch_gpu: int | str | None = option(
        None,
        AutoOrInteger(),
        "Images per forward pass; must divide --batch. auto: the most that fit into the memory.  [default: --batch]",
        metavar="auto|INTEGER",
    )
    lr: float = option(1e-5, cli.POSITIVE_NUMBER, "Learning rate of the generator.")
    score_lr: float = option(1e-5, cli.POSITIVE_NUMBER, "Learning rate of the student score.")
    beta1: float = option(0.0, cli.Number(0, 0.9999), "First beta of Adam, everywhere; the second is 0.999.")
    score_steps: int = option(1, cli.POSITIVE_INT, "Updates of the student score per update of the generator.")
    score_warmup: float = option(20, cli.NON_NEGATIVE_NUMBER, "Kimg that train the student score alone.")
    ema_kimg: float = option(500, cli.POSITIVE_NUMBER, "Half-life of the generator's average.")
    objective: str = option(
        "ikl", click.Choice([name for name in objectives.NAMES if name != "sds"]), "What pulls the generator."
    )
    weight: str = option("default", click.Choice(["default", *WEIGHTS]), "w(sigma) of the objective.")
    normalize: bool | None = option(None, bool, "Divide each gradient by mean|x0 - Dq|.  [default: objective's]")
    alpha: float | None = option(None, cli.Number(maximum=2, above=0), "Of --objective=sid.  [default: 1.2]")
    detach_ratio: bool = option(
        False, bool, "Of the uni-objectives: no gradient through the ratio; less variance, but an approximation."
    )
    sigma_dist: str = option(
        "lognormal",
        click.Choice(["lognormal", "edm-grid"]),
        "Noise levels of the objective (the score's: lognormal).",
    )
    sigma_mean: float = option(-1.2, cli.Number(), "Mean of ln(sigma).")
    sigma_std: float = option(1.2, cli.NON_NEGATIVE_NUMBER, "Standard deviation of ln(sigma).")
    tmax: float = option(800, cli.Number(maximum=1000, above=0), "Highest level of edm-grid, in thousandths of it.")
    data: str | None = option(
        None,
        str,
        "Samples of the teacher's side for a density ratio, or real images for --adversarial-weight: a data set, or "
        "'teacher' for what python -m di_refine sample-teacher drew.",
        metavar="PATH|teacher",
    )
    ratio_lr: float | None = option(
        None, cli.POSITIVE_NUMBER, "Learning rate of the ratio's head.  [default: --score-lr, at least 1e-4]"
    )
    ratio_weight: float = option(0.01, cli.NON_NEGATIVE_NUMBER, "Weight of the ratio's loss in the score's encoder.")
    ratio_clamp: float = option(10, cli.POSITIVE_NUMBER, "Log ratios are kept within plus and minus this.")
    ratio_r1: float = option(0, cli.NON_NEGATIVE_NUMBER, "Weight of an R1 penalty on the ratio.")
    ratio_spectral_norm: bool = option(False, bool, "Spectral normalisation of the ratio's head.")
    adversarial_weight: float = option(
        0, cli.NON_NEGATIVE_NUMBER, "Weight of an adversarial loss, from the pickle's discriminator or else the ratio."
    )
    gamma: float = option(0.01, cli.NON_NEGATIVE_NUMBER, "R1 penalty of that discriminator.")
    dropout: str = option(
        "off", click.Choice(["off", "matched"]), "Of teacher and student score: none, or shared masks as in the paper."
    )
    augment: float = option(
        0, cli.Number(0, 1), "Probability of EDM's non-leaky augmentations of what the score trains on; 0 for none."
    )
    precision: str = option("fp32", click.Choice(PRECISIONS), "Arithmetic of the networks; weights stay float32.")
    teacher_precision: str | None = option(None, click.Choice(PRECISIONS), "Of the teacher.  [default: --precision]")
    score_precision: str | None = option(
        None, click.Choice(PRECISIONS), "Of the student score.  [default: --precision]"
    )
    generator_precision: str | None = option(
        None, click.Choice(PRECISIONS), "Of the generator.  [default: --precision]"
    )
    checkpoint_score: bool = option(
        False, bool, "Save memory: compute the student score's inner results again in the backward pass."
    )
    max_grad_norm: float | None = option(None, cli.POSITIVE_NUMBER, "Shorten longer gradients to this.")
    class_freq: str | None = option(
        None, str, "Class frequencies: numbers, or a data set's.  [default: uniform]", "--labels", metavar="LIST|DATA"
    )
    metrics: str | None = option(
        None, str, "Measured at each snapshot.  [default: from the registry, else none]", metavar="LIST|none"
    )
    final_metrics: str | None = option(
        None, str, "Measured at the end instead.  [default: from the registry, else --metrics]", metavar="LIST"
    )
    detector: str | None = option(None, str, "Feature network of metrics that are not in the registry.", metavar="FILE")
    ref: str | None = option(
        None, str, "What the metrics compare with.  [default: from the registry]", metavar="FILE.npz|DATA"
    )
    teacher_steps: int = option(18, cli.POSITIVE_INT, "Sampling steps when the teacher is measured.")
    tick: float = option(50, cli.POSITIVE_NUMBER, "Kimg between status lines.")
    snap: int = option(10, cli.POSITIVE_INT, "Ticks between snapshots and measurements.")
    seed: int = option(0, cli.NON_NEGATIVE_INT, "Of everything random.")
    workers: int = option(2, cli.POSITIVE_INT, "Threads that decode data sets.")
    keep: int = option(2, cli.POSITIVE_INT, "Newest snapshots and training states that stay; the best stays as well.")
    max_minutes: float | None = option(None, cli.POSITIVE_NUMBER, "Stop, saving, after this long.")
    stop_if_worse: float | None = option(
        None, cli.Number(above=1), "Stop when the first metric is worse than at the start by this factor."
    )
    resume: str | None = option(
        None, str, "Continue a run directory or training state; auto: the newest of this kind.", metavar="auto|RUN"
    )
    device: str = "auto"


def resolve(
    context: click.Context, values: Mapping[str, Any], recommended: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a command's options, and where those come from that are neither given nor plain defaults.

    What was given counts first, then what is recommended, then the preset.

    Args:
        context: of the command.
        values: as the command received them.
        recommended: by the registry for the network. Names that are no options of the command are passed over.

    Returns:
        The values, and 'preset' or 'registry' for the names that have theirs from there.
    """

    def is_given(name: str) -> bool:
        return context.get_parameter_source(name) != ParameterSource.DEFAULT

    values, sources = dict(values), {}
    published = preset(values["preset"], values["objective"] if is_given("objective") else None)
    for source, layer in (("preset", published), ("registry", recommended)):
        for name, value in layer.items():
            if name in values and not is_given(name):
                values[name], sources[name] = value, source
    return values, sources
