"""Names of metrics: what each measures, on how many images, with which feature network.

`fid50k_full`, `kid50k_full`, `is50k` and `pr50k3_full` are the names of the StyleGAN family and belong to the 2015
Inception. With any other network the name carries it: `fd2k_full@digits`. `ppl2_wend` (50,000 pairs) belongs to a
perceptual network of LPIPS; with another one, again, the name carries it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from di_refine.errors import InputError

FORMS = (
    "fid<N>k_full, kid<N>k_full, is<N>k, pr<N>k3_full and dc<N>k3_full with the 2015 Inception; fd<N>k_full@<net>, "
    "kd<N>k_full@<net>, pr<N>k3_full@<net>, dc<N>k3_full@<net>, is<N>k@<net> and acc<N>k@<net> with any other; "
    "ppl2_wend and ppl<N>k_wend with a perceptual network"
)


@dataclass(frozen=True)
class Kind:
    """A kind of metric.

    Attributes:
        tail: what follows the number of images in the name.
        inception, other: whether it exists for the 2015 Inception, and for other networks.
        needs: 'reference', 'reference features', 'features', 'probabilities', 'labels', or 'generator' for what is
            measured on the network itself and not on its images.
        parts: names of the values, () for a single one.
        what: in words.
    """

    tail: str
    inception: bool
    other: bool
    needs: frozenset[str]
    parts: tuple[str, ...]
    what: str


def _kind(tail: str, where: str, needs: Iterable[str], what: str, parts: tuple[str, ...] = ()) -> Kind:
    return Kind(tail, "inception" in where, "other" in where, frozenset(needs), parts, what)


_MOMENTS, _SETS = ("reference",), ("reference", "reference features", "features")

KINDS = {
    "fid": _kind("_full", "inception", _MOMENTS, "Frechet Inception distance"),
    "kid": _kind("_full", "inception", _SETS, "kernel Inception distance"),
    "fd": _kind("_full", "other", _MOMENTS, "Frechet distance"),
    "kd": _kind("_full", "other", _SETS, "kernel distance"),
    "pr": _kind("3_full", "inception other", _SETS, "precision and recall, 3 neighbours", ("precision", "recall")),
    "dc": _kind("3_full", "inception other", _SETS, "density and coverage, 3 neighbours", ("density", "coverage")),
    "is": _kind("", "inception other", ("probabilities",), "inception score, mean and deviation", ("mean", "std")),
    "acc": _kind("", "other", ("probabilities", "labels"), "share of images classified as the class asked for"),
    "ppl": _kind("_wend", "inception other", ("generator",), "perceptual path length in W, at the ends of paths"),
}

PPL2 = "ppl2_wend"  # the StyleGAN family's name, 50,000 pairs


@dataclass(frozen=True)
class MetricSpec:
    """A metric's name, taken apart.

    Attributes:
        name: as given.
        kind: a key of `KINDS`.
        num_images: how many generated images it is measured on.
        detector: name of the feature network, None for the 2015 Inception, and for path lengths for LPIPS.
    """

    name: str
    kind: str
    num_images: int
    detector: str | None

    @property
    def needs(self) -> frozenset[str]:
        return KINDS[self.kind].needs

    @property
    def higher_is_better(self) -> bool:
        """Whether more is better; distances want to be small."""
        return self.kind in ("is", "pr", "dc", "acc")

    @property
    def result_keys(self) -> tuple[str, ...]:
        """Keys of its values in a metric file: the name, or `pr50k3_full_precision` and the like."""
        return tuple(f"{self.name}_{part}" for part in KINDS[self.kind].parts) or (self.name,)


def parse_metric(name: str) -> MetricSpec:
    """Take a metric's name apart.

    Raises:
        InputError: listing the known forms, or saying what the name should be instead.
    """
    counted = re.sub(f"^{PPL2}(@|$)", r"ppl50k_wend\1", name)
    match = re.fullmatch(r"([a-z]+)([0-9]{1,6})k([a-z0-9_]*)(?:@([A-Za-z0-9._-]+))?", counted)
    kind = KINDS.get(match[1]) if match else None
    if kind is None or match[3] != kind.tail:
        raise InputError(f"--metrics: unknown metric {name!r}; known are {FORMS}")
    if int(match[2]) < 1:
        raise InputError(f"--metrics: {name!r} asks for no images; the number counts thousands, as in {match[1]}2k")
    if match[4] is None and not kind.inception:
        raise InputError(f"--metrics: {name!r} must name its feature network, as in {name}@digits")
    if match[4] is not None and not kind.other:
        other = {"fid": "fd", "kid": "kd"}[match[1]]
        raise InputError(
            f"--metrics: {match[1]} belongs to the 2015 Inception network; with another one write "
            f"{other}{name.removeprefix(match[1])}"
        )
    return MetricSpec(name, match[1], 1000 * int(match[2]), match[4])


def parse_metrics(names: str | Iterable[str]) -> list[MetricSpec]:
    """Parse several names, or one comma-separated list; repetitions are dropped.

    Raises:
        InputError: as `parse_metric`, or when there is none.
    """
    if isinstance(names, str):
        names = names.split(",")
    specs = [parse_metric(name) for name in dict.fromkeys(name.strip() for name in names) if name]
    if not specs:
        raise InputError(f"--metrics names no metric; known are {FORMS}")
    return specs
