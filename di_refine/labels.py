"""The law of labels: what the images of a conditional network are asked to show, and how often.

A network is trained on the labels of a data set; whoever draws from it later has to draw labels likewise, or gets other
images and other metrics. `LabelLaw` is the one home of that: training, refining, sampling and measuring all draw from
one, the pickles of `pretrain.py` carry it (`KEY`), and `di_refine.files.label_laws.choose` makes one of an option.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from di_refine import terminal
from di_refine.errors import InputError
from torch_utils import misc

KEY = "label_law"
"""The key under which network files keep a law, as `LabelLaw.record` makes it. It stands beside `training_set_kwargs`:
the official tools hand all of those to their data set class, which takes no others, and pass over keys that they do not
know."""

UNKNOWN, UNIFORM, NETWORK, DATASET, FILE, LIST, CLASS = (
    "unknown",
    "uniform",
    "network",
    "dataset",
    "file",
    "list",
    "class",
)
"""Where a law comes from: nobody said (so all classes are equally frequent), somebody said that they are, the network's
file, the data set of the command, a file that was named, numbers that were given, one class that was asked for."""

MAX_ROWS = 10_000
MAX_NUMBERS = 1 << 20
"""How many label vectors, and numbers in them, a network file keeps."""

MAX_NAMED = 20  # classes that a message lists
MAX_SHOWN = 10  # classes whose frequencies a record spells out


@dataclass(frozen=True, eq=False)
class LabelLaw:
    """How labels are drawn: one of some rows, each as often as its count says.

    Attributes:
        label_dim: length of a label; 0 without labels, which are then drawn all the same, as `[n, 0]`.
        counts: how often each row is drawn, relative to each other, float64 `[K]`: for a data set the number of images.
            None draws all equally often.
        rows: label vectors, float32 `[K, label_dim]`; None stands for the one-hot vectors of `label_dim` classes.
        names: of the classes, or of the numbers in a vector; empty where they have none.
        origin: where the law comes from, such as `NETWORK`.
        where: the path of that, or the number of the class, where there is one.

    Raises:
        InputError: numbers that make no law.
    """

    label_dim: int
    counts: np.ndarray | None = None
    rows: np.ndarray | None = None
    names: tuple[str, ...] = ()
    origin: str = UNKNOWN
    where: str = ""

    def __post_init__(self) -> None:
        length = self.label_dim if self.rows is None else len(self.rows)
        if self.rows is not None and self.rows.shape != (length, self.label_dim):
            raise InputError(f"label vectors must have {self.label_dim} numbers each")
        if self.rows is not None and not (length and np.isfinite(self.rows).all()):
            raise InputError("there must be label vectors, of finite numbers")
        if self.names and len(self.names) != self.label_dim:
            raise InputError(f"there are {len(self.names)} names for {self.label_dim} classes")
        if self.counts is None or not length:
            return
        if len(self.counts) != length:
            raise InputError(f"there must be {length} frequencies, one per {self._unit}, not {len(self.counts)}")
        with np.errstate(over="ignore"):
            total = self.counts.sum()
        if not np.isfinite(total) or (self.counts < 0).any() or total <= 0:
            raise InputError("frequencies must not be negative, and one must be positive")

    @property
    def _unit(self) -> str:
        return "class of the network" if self.rows is None else "label vector"

    @property
    def has_classes(self) -> bool:
        """Whether labels are one-hot."""
        return self.rows is None

    @functools.cached_property
    def frequencies(self) -> np.ndarray | None:
        """The share of each row, float64 `[K]` with sum 1; None where all are equally frequent."""
        return None if self.counts is None else self.counts / self.counts.sum()

    @property
    def class_frequencies(self) -> np.ndarray | None:
        """The share of each class, float64 `[label_dim]`; None for label vectors."""
        if self.rows is not None:
            return None
        return np.full(self.label_dim, 1 / max(self.label_dim, 1)) if self.frequencies is None else self.frequencies

    @property
    def present(self) -> list[int]:
        """Numbers of the rows that are ever drawn."""
        length = self.label_dim if self.rows is None else len(self.rows)
        return list(range(length)) if self.counts is None else np.flatnonzero(self.counts).tolist()

    # Drawing ----------------------------------------------------------------------------------------------------------

    def weights(self, device: torch.device | str) -> torch.Tensor:
        """What `torch.multinomial` draws rows by, float32 `[K]`."""
        if self.frequencies is None:
            return torch.ones(self.label_dim if self.rows is None else len(self.rows), device=device)
        return torch.as_tensor(self.frequencies, dtype=torch.float32, device=device)

    @functools.cached_property
    def _on(self) -> dict[torch.device, tuple[torch.Tensor, torch.Tensor | None]]:
        """Weights and rows by the device that they are kept on."""
        return {}

    def draw(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Labels `[n, label_dim]` on the device of the random generator."""
        if not self.label_dim:
            return torch.zeros([n, 0], device=rng.device)
        if rng.device not in self._on:
            rows = None if self.rows is None else torch.as_tensor(self.rows, device=rng.device)
            self._on[rng.device] = self.weights(rng.device), rows
        weights, rows = self._on[rng.device]
        index = torch.multinomial(weights, n, replacement=True, generator=rng)
        if rows is not None:
            return rows[index]
        return torch.zeros([n, self.label_dim], device=rng.device).scatter_(1, index[:, None], 1)

    def of_seeds(self, seeds: Sequence[int]) -> torch.Tensor:
        """Labels `[len(seeds), label_dim]` on the CPU; label i depends on `seeds[i]` alone."""
        if not self.label_dim:
            return torch.zeros(len(seeds), 0)
        length = self.label_dim if self.rows is None else len(self.rows)
        draws = (np.random.RandomState(misc.derive_seed(seed, "label") % 2**32) for seed in seeds)
        return self._labels([int(draw.choice(length, p=self.frequencies)) for draw in draws])

    def in_turn(self, seeds: Sequence[int]) -> torch.Tensor:
        """As `of_seeds`, but where all classes are equally frequent, seed modulo classes."""
        equal = self.counts is None or len(set(self.counts.tolist())) == 1
        if not (self.label_dim and self.has_classes and equal):
            return self.of_seeds(seeds)
        return self._labels([seed % self.label_dim for seed in seeds])

    def _labels(self, index: list[int]) -> torch.Tensor:
        if self.rows is not None:
            return torch.from_numpy(self.rows[index])
        labels = torch.zeros(len(index), self.label_dim)
        labels[range(len(index)), index] = 1
        return labels

    # Classes and their names ------------------------------------------------------------------------------------------

    def find(self, text: str) -> int | None:
        """The number of a class, given as a number or a name; None where there is no such class, or more than one.

        Case does not matter where no name differs by it alone, and the beginning of a name is enough where no other
        name begins so.
        """
        if not self.has_classes or not text:
            return None
        if text.isdecimal() and len(text) < 10 and int(text) < self.label_dim:
            number = int(text)
            if text in self.names and self.names[number] != text:
                terminal.say(
                    f"note: {text} is taken as a number, that of class {self.title(number)!r}; the class that is "
                    f"called {text!r} has the number {self.names.index(text)}"
                )
            return number
        folded = text.casefold()
        for fits in (
            lambda name: name == text,
            lambda name: name.casefold() == folded,
            lambda name: name.casefold().startswith(folded),
        ):
            found = [number for number, name in enumerate(self.names) if fits(name)]
            if found:
                return found[0] if len(found) == 1 else None
        return None

    def only(self, text: str, setting: str = "label") -> "LabelLaw":
        """The law that draws one class.

        Args:
            text: its number or name, see `find`.
            setting: what the text was given for, for messages.

        Raises:
            InputError: there is no such class, or a name fits several.
        """
        number = self.find(text)
        if number is None:
            raise InputError(f"{setting}={text} is not a class of this network, {self._choices(text)}")
        counts = np.eye(1, self.label_dim, number)[0]
        return replace(self, counts=counts, origin=CLASS, where=str(number))

    def _choices(self, text: str) -> str:
        """What there is to choose from, for a message that refuses `text`."""
        if not self.has_classes:
            return "which has label vectors instead"
        if not self.label_dim:
            return "which has no classes"
        if not self.names:
            return f"which has 0 to {self.label_dim - 1} and knows no names of classes"
        several = [name for name in self.names if text and name.casefold().startswith(text.casefold())]
        names = several or self.names
        shown = ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
        return f"as several begin so: {shown}" if several else f"which has 0 to {self.label_dim - 1}: {shown}"

    def title(self, number: int) -> str:
        """A class's name, or its number where it has none."""
        return self.names[number] if self.names and self.names[number].strip() else str(number)

    def check_order(self, names: Sequence[str], whose: str) -> None:
        """Check that classes of the same names have the same numbers elsewhere.

        Args:
            names: the names there; any that are not all the same as here are taken for another way to call the classes.
            whose: what has them, for the message.

        Raises:
            InputError: the order is another one.
        """
        if tuple(names) != self.names and sorted(names) == sorted(self.names):
            number = next(i for i, (here, there) in enumerate(zip(self.names, names)) if here != there)
            raise InputError(
                f"{whose} has the classes in another order than the network: class {number} is {names[number]!r} there "
                f"and {self.names[number]!r} here"
            )

    def titles(
        self, labels: torch.Tensor, columns: int, drawable: Callable[[str], bool] = bool
    ) -> tuple[list[str], list[str]]:
        """Names for the columns and for the rows of a grid of images; [] where they have none, or differ within one.

        Args:
            labels: one-hot, `[n, label_dim]`, of the images, row by row.
            columns: images per row.
            drawable: whether a name can be drawn; others are replaced by the number of their class.
        """
        if not (self.names and self.has_classes and len(labels)):
            return [], []
        classes = labels.argmax(dim=1).tolist()
        for across, lines in (
            (True, [set(classes[i::columns]) for i in range(columns)]),
            (False, [set(classes[i : i + columns]) for i in range(0, len(classes), columns)]),
        ):
            if all(len(line) == 1 for line in lines):
                names = [self.title(number) if drawable(self.title(number)) else str(number) for (number,) in lines]
                return (names, []) if across else ([], names)
        return [], []

    @staticmethod
    def of_rows(vectors: np.ndarray, **about: Any) -> "LabelLaw":
        """The law of label vectors `[N, label_dim]`: each that there is, as often as it is there.

        Args:
            vectors: of images, float32.
            about: further attributes.
        """
        rows, counts = np.unique(vectors, axis=0, return_counts=True)
        return LabelLaw(vectors.shape[1], counts.astype(np.float64), rows, **about)

    # Records ----------------------------------------------------------------------------------------------------------

    @property
    def described(self) -> str | None:
        """Where the law comes from, for JSON, as in 'uniform', 'dataset:PATH' or 'class:3'; None without labels."""
        if not self.label_dim:
            return None
        origin = UNIFORM if self.origin == UNKNOWN else self.origin
        return f"{origin}:{self.where}" if self.where else origin

    @property
    def sentence(self) -> str | None:
        """Where the law comes from, for people; None without labels."""
        if not self.label_dim:
            return None
        if self.origin == CLASS:
            name = self.title(int(self.where))
            return f"labels: class {self.where} alone" + (f", {name}" if name != self.where else "")
        return "labels: " + {
            UNKNOWN: "all classes equally often, as the network's file does not say how often training had them",
            UNIFORM: "all classes equally often",
            NETWORK: "as often as the network's file says that training had them",
            LIST: "as often as the numbers given say",
        }.get(self.origin, f"as often as in {self.where}")

    @property
    def content(self) -> str:
        """What is drawn, as a short text; two laws with the same text draw the same labels."""
        if self.rows is None and (self.frequencies is None or self.label_dim <= MAX_SHOWN):
            return UNIFORM if self.frequencies is None else ",".join(f"{share:.17g}" for share in self.frequencies)
        parts = [part for part in (self.frequencies, self.rows) if part is not None]
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
        return f"sha256:{digest.hexdigest()[:16]}"

    @property
    def is_chosen(self) -> bool:
        """Whether the law is another one than what the network's file says, or leaves open."""
        return self.origin not in (UNKNOWN, NETWORK)

    def kept(self) -> "LabelLaw":
        """The law that a network file keeps: this one, or of too many rows, a random but fixed sample."""
        if self.rows is None:
            return self
        most = min(MAX_ROWS, max(MAX_NUMBERS // self.label_dim, 1))
        if len(self.rows) <= most:
            return self
        drawn = np.random.default_rng(0).choice(len(self.rows), most, p=self.frequencies)
        index, counts = np.unique(drawn, return_counts=True)
        return replace(self, counts=counts.astype(np.float64), rows=self.rows[index])

    def record(self) -> dict[str, Any]:
        """What `from_record` makes the same law of: lists, and for label vectors a tensor."""
        counts = None if self.counts is None else [_number(count) for count in self.counts.tolist()]
        found: dict[str, Any] = {"classes": list(self.names) or None, "counts": counts}
        return found if self.rows is None else {**found, "rows": torch.from_numpy(self.rows.copy())}

    @staticmethod
    def from_record(content: Any, label_dim: int) -> "LabelLaw":
        """The law that a network file keeps.

        Args:
            content: of the file, which may hold anything.
            label_dim: of the network.

        Raises:
            InputError: it is no law for that network.
        """
        if not isinstance(content, dict):
            raise InputError(f"there is a {type(content).__name__} instead of classes and counts")
        names, counts, rows = (content.get(key) for key in ("classes", "counts", "rows"))
        if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
            raise InputError("the names of classes must be a list of texts")
        if rows is not None and not (isinstance(rows, torch.Tensor) and rows.dtype == torch.float32 and rows.ndim == 2):
            raise InputError("label vectors must be a table of numbers")
        vectors = None if rows is None else rows.detach().numpy()
        return LabelLaw(label_dim, None if counts is None else numbers(counts), vectors, tuple(names or ()), NETWORK)


def numbers(values: Any) -> np.ndarray:
    """A list of numbers from a file, float64 `[K]`.

    Raises:
        InputError: it is something else.
    """
    if isinstance(values, list) and all(type(value) in (int, float) for value in values):
        with contextlib.suppress(OverflowError):
            return np.array(values, np.float64)
    raise InputError("frequencies must be a list of numbers")


def _number(value: float) -> int | float:
    return int(value) if value == math.floor(value) and abs(value) < 2**53 else value
