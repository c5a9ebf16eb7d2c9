"""The kinds of metrics: how each is named, what it needs, and how it is computed.

`fid50k_full`, `kid50k_full`, `is50k` and `pr50k3_full` are the names of the StyleGAN family and belong to the 2015
Inception. With any other network the name carries it: `fd2k_full@digits`. `ppl2_wend` (50,000 pairs) belongs to a
perceptual network of LPIPS; with another one, again, the name carries it.

A new metric needs its formula in `distances.py` and its `Kind` in `KINDS`. This module imports neither PyTorch nor
NumPy before the first metric is computed, so that commands can print their help quickly.
"""

import enum
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from di_refine.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch


class Needs(enum.Flag):
    """What a metric is computed from."""

    GAUSSIANS = enum.auto()  # mean and covariance of the features, of the reference and of the generated images
    FEATURES = enum.auto()  # the features themselves, of both
    PROBABILITIES = enum.auto()  # class probabilities of the generated images
    CLASSES = enum.auto()  # the classes that the generated images were asked to be of
    PATHS = enum.auto()  # lengths of paths in the latent space of a StyleGAN2 generator, instead of its images
    REFERENCE = GAUSSIANS | FEATURES


class Inputs(Protocol):
    """What was collected for one metric; only what its kind `needs` is there.

    F is the number of features, N the number of reference images, and M that of the generated ones.
    """

    @property
    def seed(self) -> int:
        """The seed of random subsets."""
        ...

    @property
    def device(self) -> "torch.device":
        """The device for large computations in float64."""
        ...

    def gaussians(self) -> "tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]":
        """Return mean [F] and covariance [F, F] of the reference's features, then of the generated images'."""
        ...

    def features(self) -> "tuple[np.ndarray, np.ndarray]":
        """Return the features of the reference [N, F] and of the generated images [M, F]."""
        ...

    def probabilities(self) -> "np.ndarray":
        """Return the class probabilities [M, K] of the generated images."""
        ...

    def hits(self) -> "np.ndarray":
        """Return whether each generated image is recognised as of the class asked for, bool [M]."""
        ...

    def path_lengths(self) -> "np.ndarray":
        """Return the lengths [M] of paths."""
        ...


@dataclass(frozen=True)
class Kind:
    """A kind of metric.

    Attributes:
        name: the beginning of the names of its metrics.
        what: what it is, in words.
        needs: what it is computed from.
        unit: of its values, in words.
        measure: computes its value, or its values in the order of `parts`.
        tail: what follows the number of images in a name.
        parts: names of the values, where there are several.
        higher_is_better: whether more is better; distances want to be small.
        alone: whether a name without a network is allowed. It stands for the 2015 Inception, or for LPIPS where paths
            are needed.
        elsewhere: the kind to use instead with any other network; None where this one is used with those as well.
        alias: a name in the StyleGAN family for 50,000 images.
        subsets: whether it averages over subsets of a fixed size, which depend on the number of images below that.
    """

    name: str
    what: str
    unit: str
    needs: Needs
    measure: Callable[[Inputs], float | tuple[float, ...]]
    tail: str = ""
    parts: tuple[str, ...] = ()
    higher_is_better: bool = False
    alone: bool = True
    elsewhere: str | None = None
    alias: str | None = None
    subsets: bool = False

    def form(self, network: bool) -> str:
        """Return what its metrics' names look like, with or without a network's name."""
        return f"{self.name}<N>k{self.tail}{'@<net>' if network else ''}"

    @property
    def counted_tail(self) -> str:
        """What follows the number in the name of a metric of single images, not thousands: in pr437_3_full `_3_full`,
        since 4373 would be another number.
        """
        return f"_{self.tail}" if self.tail[:1].isdigit() else self.tail

    @property
    def forms(self) -> list[str]:
        """What its metrics' names look like, in all forms that it has."""
        forms = [self.alias] if self.alias is not None else []
        forms += [self.form(False)] if self.alone else []
        return forms + ([self.form(True)] if self.elsewhere is None else [])


# ----------------------------------------------------------------------------------------------------------------------
# Computations


def _formulas() -> ModuleType:
    from di_refine.metrics import distances  # imports PyTorch, which takes seconds

    return distances


def _frechet(inputs: Inputs) -> float:
    return _formulas().frechet_distance(*inputs.gaussians())


def _kernel(inputs: Inputs) -> float:
    return _formulas().kernel_distance(*inputs.features(), seed=inputs.seed)


def _precision_recall(inputs: Inputs) -> tuple[float, float]:
    return _formulas().precision_recall(*inputs.features(), device=inputs.device)


def _density_coverage(inputs: Inputs) -> tuple[float, float]:
    return _formulas().density_coverage(*inputs.features(), device=inputs.device)


def _inception_score(inputs: Inputs) -> tuple[float, float]:
    return _formulas().inception_score(inputs.probabilities())


def _accuracy(inputs: Inputs) -> float:
    return float(inputs.hits().mean())


def _path_length(inputs: Inputs) -> float:
    from di_refine.metrics.path_length import perceptual_path_length  # imports PyTorch, too

    return perceptual_path_length(inputs.path_lengths())


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "fid",
            "Frechet Inception distance",
            "squared feature units",
            Needs.GAUSSIANS,
            _frechet,
            "_full",
            elsewhere="fd",
        ),
        Kind(
            "kid",
            "kernel Inception distance",
            "squared distance, no unit",
            Needs.FEATURES,
            _kernel,
            "_full",
            elsewhere="kd",
            subsets=True,
        ),
        Kind("fd", "Frechet distance", "squared feature units", Needs.GAUSSIANS, _frechet, "_full", alone=False),
        Kind(
            "kd",
            "kernel distance",
            "squared distance, no unit",
            Needs.FEATURES,
            _kernel,
            "_full",
            alone=False,
            subsets=True,
        ),
        Kind(
            "is",
            "Inception score, mean and standard deviation",
            "number of classes",
            Needs.PROBABILITIES,
            _inception_score,
            parts=("mean", "std"),
            higher_is_better=True,
        ),
        Kind(
            "pr",
            "precision and recall, 3 neighbours",
            "share, 0 to 1",
            Needs.FEATURES,
            _precision_recall,
            tail="3_full",
            parts=("precision", "recall"),
            higher_is_better=True,
        ),
        Kind(
            "dc",
            "density and coverage, 3 neighbours",
            "ratio and share",
            Needs.FEATURES,
            _density_coverage,
            tail="3_full",
            parts=("density", "coverage"),
            higher_is_better=True,
        ),
        Kind(
            "acc",
            "share of images recognised as the class asked for",
            "share, 0 to 1",
            Needs.PROBABILITIES | Needs.CLASSES,
            _accuracy,
            higher_is_better=True,
            alone=False,
        ),
        Kind(
            "ppl",
            "perceptual path length in W, at the ends of paths",
            "squared perceptual distance per squared step",
            Needs.PATHS,
            _path_length,
            "_wend",
            alias="ppl2_wend",
        ),
    )
}


# ----------------------------------------------------------------------------------------------------------------------
# Names


ALL_IMAGES = "_all"
TEACHER = "teacher"  # the feature network that is the teacher's own encoder, see `metrics.teacher_net`


def _forms() -> str:
    """Return the forms of all names, in words."""
    of_images = [kind for kind in KINDS.values() if not kind.needs & Needs.PATHS]
    of_paths = [name for kind in KINDS.values() if kind.needs & Needs.PATHS for name in (kind.alias, kind.form(False))]
    inception = _listed([kind.form(False) for kind in of_images if kind.alone])
    others = _listed([kind.form(True) for kind in of_images if kind.elsewhere is None])
    paths = _listed([name for name in of_paths if name is not None])
    return (
        f"{inception} with the 2015 Inception; {others} with any other; {paths} with a perceptual network; <N> without "
        f"k counts single images, as in fd437_full@net, and {ALL_IMAGES} in its place takes all, as in fd_all@net; "
        f"fd<N>k@{TEACHER} goes by the teacher's own features and samples"
    )


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


FORMS = _forms()


@dataclass(frozen=True)
class MetricSpec:
    """A metric's name, taken apart.

    Attributes:
        name: the name as it was given.
        kind: what it asks for.
        num_images: how many generated images it is measured on, or how many paths; 0 for all that there are, or of a
            source without a limit as many as the reference has.
        detector: name of the feature network; None for the 2015 Inception, and for path lengths for LPIPS.
    """

    name: str
    kind: Kind
    num_images: int
    detector: str | None

    @property
    def needs(self) -> Needs:
        """What it is computed from."""
        return self.kind.needs

    @property
    def higher_is_better(self) -> bool:
        """Whether more is better; distances want to be small."""
        return self.kind.higher_is_better

    def is_better(self, value: float, other: float) -> bool:
        """Whether one value of it is better than another."""
        return value > other if self.higher_is_better else value < other

    @property
    def result_keys(self) -> tuple[str, ...]:
        """The keys of its values in a metric file: the name, or `pr50k3_full_precision` and the like."""
        return tuple(f"{self.name}_{part}" for part in self.kind.parts) or (self.name,)


def parse_metric(name: str) -> MetricSpec:
    """Take a metric's name apart.

    Raises:
        InputError: there is no such metric; the message lists the known forms, or says what the name should be.
    """
    counted = name
    for known in KINDS.values():
        if known.alias is not None:
            counted = re.sub(f"^{known.alias}(@|$)", rf"{known.name}50k{known.tail}\1", counted)
    match = re.fullmatch(r"([a-z]+?)(?:(_all)|([0-9]{1,9})(k?)([a-z0-9_]*))(?:@([A-Za-z0-9._-]+))?", counted)
    kind = KINDS.get(match[1]) if match else None
    tails = () if match is None or kind is None else _tails(kind, bool(match[4]), match[6])
    if match is None or kind is None or (not match[2] and match[5] not in tails):
        raise InputError(f"`metrics`: unknown metric {name!r}; known are {FORMS}")
    num_images, detector = 0 if match[2] else int(match[3]) * (1000 if match[4] else 1), match[6]
    if match[2] and kind.needs & Needs.PATHS:
        raise InputError(f"`metrics`: there is no end of paths, so {name!r} needs a number, as in {kind.form(False)}")
    if num_images < 2 and not match[2]:
        raise InputError(f"`metrics`: {name!r} asks for {num_images or 'no'} images, and takes at least 2")
    if detector is None and not kind.alone:
        raise InputError(f"`metrics`: {name!r} must name its feature network, as in {name}@digits")
    if detector is not None and kind.elsewhere is not None:
        raise InputError(
            f"`metrics`: {kind.name} belongs to the 2015 Inception network; with another one write "
            f"{kind.elsewhere}{name.removeprefix(kind.name)}"
        )
    return MetricSpec(name, kind, num_images, detector)


def _tails(kind: Kind, thousands: bool, detector: str | None) -> tuple[str, ...]:
    """What may follow the number of images. `_full`, all images of the reference, says nothing of a teacher's samples,
    of which there are as many as of the generator's.
    """
    tail = kind.tail if thousands else kind.counted_tail
    return (tail, tail.removesuffix("_full")) if detector == TEACHER else (tail,)


def parse_metrics(names: str | Iterable[str]) -> list[MetricSpec]:
    """Take several names apart, or one comma-separated list; repetitions are dropped.

    Raises:
        InputError: there is no name, or `parse_metric` refuses one.
    """
    if isinstance(names, str):
        names = names.split(",")
    specs = [parse_metric(name) for name in dict.fromkeys(name.strip() for name in names) if name]
    if not specs:
        raise InputError(f"`metrics` names no metric; known are {FORMS}")
    return specs
