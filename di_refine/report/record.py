"""What the files of a run directory tell of a run: its options, statistics, measurements, pictures and result."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from di_refine.errors import InputError
from di_refine.files.run_files import RunFiles, snapshot_kimg
from di_refine.metrics import compare
from di_refine.metrics.kinds import MetricSpec, parse_metric
from di_refine.metrics.results import MAX_BYTES, MetricResult, read_jsonl
from di_refine.runs.directory import is_running
from torch_utils import safe_files

TEACHER = "teacher"  # in `network` of a metric file's records
COMMANDS = {
    "refine": "refine.py",
    "distill": "distill.py",
    "edm": "pretrain.py teacher",
    "stylegan2": "pretrain.py gan",
}
"""`command` in `training_options.json` -> how people call it."""

_VERDICT = re.compile(r"(better|worse|no difference beyond chance): ")

BySeed = dict[int, MetricResult]


@dataclass(frozen=True)
class Course:
    """One metric over the course of a run.

    Attributes:
        spec: the metric.
        snapshots: kimg -> results by seed; 0 is the network at the start.
        teacher: its results by seed; none where they are not recorded.
    """

    spec: MetricSpec
    snapshots: dict[float, BySeed]
    teacher: BySeed


class Run:
    """A run directory, read once.

    Args:
        path: the folder.

    Raises:
        InputError: it is no run directory, or a file in it is damaged.

    Attributes:
        path, files: the folder, and the names of its files.
        options: `training_options.json`.
        ticks: the lines of `stats.jsonl`.
        result: `result.json`; None where the run has not ended.
        pictures: of samples, with their thousands of images, the oldest first.
    """

    def __init__(self, path: Path):
        self.path, self.files = path, RunFiles(path)
        options = _read_object(self.files.options)
        if options is None:
            raise InputError(
                f"{path} is no run directory: it has no {self.files.options.name}; name a folder that refine.py, "
                "distill.py or pretrain.py has written"
            )
        self.options = options
        self.ticks = [tick for tick in read_jsonl(self.files.stats) if is_number(tick.get("kimg"))]
        self.result = _read_object(self.files.result)
        self.pictures = self.files.pictures()
        self._log = _read_text(self.files.log)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.absolute().name

    @property
    def command(self) -> str:
        """What wrote the run, as people call it."""
        return COMMANDS.get(str(self.options.get("command")), str(self.options.get("command")))

    @property
    def start_name(self) -> str:
        """What the network at the start is called."""
        return "original" if self.options.get("command") == "refine" else "start"

    @property
    def kimg(self) -> float:
        """Thousands of images seen."""
        at_end = (self.result or {}).get("kimg")  # a run may be stopped between two ticks
        seen = self.ticks[-1]["kimg"] if self.ticks else 0.0
        return float(at_end) if at_end is not None and is_number(at_end) else seen

    @property
    def seed(self) -> int:
        """Of the measurements in the course of the run."""
        seed = self.options.get("seed")
        return seed if isinstance(seed, int) else 0

    # ------------------------------------------------------------------------------------------------------------------

    def verdict(self) -> list[str]:
        """What came of the run, in sentences; before its end, how far it is."""
        length = self.options.get("kimg")
        so_far = f"{self.kimg:g} of {length:g} kimg" if is_number(length) else f"{self.kimg:g} kimg"
        if self.result is None and is_running(self.path):
            return [f"running: {so_far}", *self._best_value()]
        said = self.result.get("verdict") if self.result is not None else self._logged_verdict()
        sentences = [str(sentence) for sentence in said] if isinstance(said, list) else []
        stopped = self.result.get("stopped") if self.result is not None else None
        if stopped:
            sentences.append(f"stopped by {stopped} at {so_far}; the same command with --resume=auto goes on")
        elif self.result is None and not sentences:
            sentences.append(f"not finished: {so_far}; the same command with --resume=auto goes on")
        return sentences or [f"finished: {so_far}", *self._best_value()]

    def _best_value(self) -> list[str]:
        """The first metric at the best snapshot, as a sentence; none before there is one."""
        for key, course in self.courses.items():
            found = {} if self.best is None else course.snapshots.get(self.best, {})
            if self.seed in found:
                return [f"best at {self.best:g} kimg: {key} {compare.number(found[self.seed].values[key])}"]
            break
        return []

    def _logged_verdict(self) -> list[str]:
        """The verdict in the log, which is all that runs have that were written before there was a `result.json`."""
        lines = self._log.splitlines()
        starts = [number for number, line in enumerate(lines) if _VERDICT.match(line)]
        since = lines[starts[-1] :] if starts else []
        return [] if any(line.startswith("continuing from ") for line in since) else since

    @cached_property
    def courses(self) -> dict[str, Course]:
        """What was measured, by key of the metric files (`fid5k_full`, `pr5k3_full_precision`); those of the run first.

        Raises:
            InputError: a line of a metric file is no measurement of a known metric.
        """
        found: dict[str, Course] = {}
        for path in self.files.metrics():
            for number, record in enumerate(read_jsonl(path), 1):
                try:
                    result = MetricResult.of_record(record)
                    spec = parse_metric(result.name)
                except InputError:
                    raise InputError(
                        f"{path} line {number} is of a metric that is not known; remove the file"
                    ) from None
                except ValueError as error:
                    raise InputError(f"{path} line {number} is damaged: {error}; remove the line") from None
                if set(result.values) != set(spec.result_keys):
                    raise InputError(f"{path} line {number} is damaged: its values are not those of {spec.name}")
                for key in result.values:
                    course = found.setdefault(key, Course(spec, {}, {}))
                    place = self._place(course, record, result.seed)
                    if place is not None:
                        place[result.seed] = result  # a resumed run may have measured it again
        own = self.options.get("metrics")
        names = own.split(",") if isinstance(own, str) else own if isinstance(own, list) else []
        first = {str(name): number for number, name in enumerate(names)}
        order = sorted(found, key=lambda key: first.get(found[key].spec.name, len(first)))
        return {
            key: Course(found[key].spec, dict(sorted(found[key].snapshots.items())), found[key].teacher)
            for key in order
        }

    def _place(self, course: Course, record: dict[str, Any], seed: int) -> BySeed | None:
        """Where a measurement belongs; None where that is not known."""
        kimg = snapshot_kimg(Path(str(record.get("snapshot_pkl"))).name)
        if kimg is not None:
            exact = [tick["kimg"] for tick in self.ticks if int(tick["kimg"]) == kimg and tick["kimg"] > 0]
            return course.snapshots.setdefault(exact[-1] if exact else float(kimg), {})
        if record.get("network") == TEACHER:
            return course.teacher
        # Runs that do not record the network measured the teacher with other seeds than the start.
        return course.snapshots.setdefault(0.0, {}) if "network" in record or seed == self.seed else None

    @cached_property
    def best(self) -> float | None:
        """The kimg of the best snapshot; None before there is one."""
        path = (self.result or {}).get("best_snapshot")
        number = snapshot_kimg(Path(path).name) if isinstance(path, str) else None
        course = next(iter(self.courses.values()), None)
        if course is None:
            return number
        key = next(iter(self.courses))
        found = {
            kimg: seeds[self.seed].values[key]
            for kimg, seeds in course.snapshots.items()
            if kimg and self.seed in seeds
        }
        same = [kimg for kimg in found if int(kimg) == number]
        choose = max if course.spec.higher_is_better else min
        return same[-1] if same else choose(found, key=found.__getitem__, default=number)

    @property
    def last(self) -> float | None:
        """The kimg of the newest snapshot that was measured; None before there is one."""
        return max((kimg for course in self.courses.values() for kimg in course.snapshots if kimg), default=None)

    def rows(self) -> list[tuple[str, float | None]]:
        """What a table compares: name, and kimg, None for the teacher."""
        found: list[tuple[str, float | None]] = [(self.start_name, 0.0)]
        if self.last is not None and self.last != self.best:
            found.append((f"last, {self.last:g} kimg", self.last))
        if self.best is not None:
            also = ", the last" if self.best == self.last else ""
            found.append((f"best, {self.best:g} kimg{also}", self.best))
        return [*found, (TEACHER, None)]

    def summaries(self, rows: list[tuple[str, float | None]]) -> Iterator[dict[str, Any]]:
        """The measurements of some rows, as `compare.summarise` gives them, metric by metric.

        Those with the seed by which the best snapshot was chosen count only where there are no others.
        """
        for key, course in self.courses.items():
            if key != next(iter(course.spec.result_keys)):  # the summary has all values of a metric
                continue
            ends = [course.snapshots.get(kimg, {}) for kimg in (0.0, self.best) if kimg is not None]
            fair = all(seeds.keys() - {self.seed} for seeds in ends)
            for name, kimg in rows:
                seeds = course.teacher if kimg is None else course.snapshots.get(kimg, {})
                chosen = [seeds[seed] for seed in sorted(seeds) if kimg is None or (seed != self.seed) == fair]
                if chosen:
                    steps = self.options.get("teacher_steps") if kimg is None else None
                    yield {**compare.summarise(name, chosen), "steps": steps if isinstance(steps, int) else None}

    def series(self, name: str) -> list[tuple[float, float]]:
        """A statistic over the course of the run, where it is a number: kimg and value."""
        return [(tick["kimg"], tick[name]) for tick in self.ticks if is_number(tick.get(name))]

    def vectors(self, name: str) -> list[tuple[float, list[Any]]]:
        """A statistic that is a list, by noise level: kimg and values, in which None stands for nothing."""
        return [(tick["kimg"], tick[name]) for tick in self.ticks if isinstance(tick.get(name), list)]


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number that arithmetic takes."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None where there is no file.

    Raises:
        InputError: the file holds something else.
    """
    try:
        content = safe_files.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged (it is no JSON object)")
    return content


def _read_text(path: Path) -> str:
    try:
        with safe_files.open_regular(path, MAX_BYTES) as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""
