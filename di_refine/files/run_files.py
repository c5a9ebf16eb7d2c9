"""The names of the files in a run directory. They are made here and nowhere else.

They are the names of the StyleGAN family, so that its scripts find what they look for. Thousands of images, rounded
down, number what a run writes more than once. Names are only ever made from such numbers and matched against the
patterns below; none is taken from the content of a file.
"""

import os
import re
from pathlib import Path

_SNAPSHOT = re.compile(r"network-snapshot-(\d+)\.pkl")
_STATE = re.compile(r"training-state-(\d+)\.pt")
_SAMPLES = re.compile(r"fakes(?:_init|(\d+))\.png")
_METRIC = re.compile(r"metric-(.+)\.jsonl")


class RunFiles:
    """The files of one run directory, which need not exist.

    Args:
        path: the directory.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    @property
    def options(self) -> Path:
        """The options that the run was started with."""
        return self.path / "training_options.json"

    @property
    def log(self) -> Path:
        """The lines that were printed. The file is always there and is what a running process locks."""
        return self.path / "log.txt"

    @property
    def stats(self) -> Path:
        """One JSON object per tick."""
        return self.path / "stats.jsonl"

    @property
    def events(self) -> Path:
        """The beginning of the names of TensorBoard's event files."""
        return self.path / "events.out.tfevents"

    def event_files(self) -> list[Path]:
        """All of TensorBoard's event files."""
        return list(self.path.glob(f"{self.events.name}.*"))

    @property
    def reals(self) -> Path:
        """The picture of the images that the run reads."""
        return self.path / "reals.png"

    @property
    def before_after(self) -> Path:
        """The picture that compares the generator at the start and at the end."""
        return self.path / "before_after.png"

    @property
    def result(self) -> Path:
        """The JSON object that the command printed at its end; it is there once the run has ended."""
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        """The page that shows how the run goes, or what came of it."""
        return self.path / "report.html"

    @property
    def diffusers(self) -> Path:
        """The diffusers folder with the last network of a run that began with one."""
        return self.path / "diffusers"

    def metric(self, name: str) -> Path:
        """The results of one metric, one JSON object per measurement."""
        return self.path / f"metric-{name}.jsonl"

    def metrics(self) -> list[Path]:
        """All such files, sorted by name."""
        return sorted(self._matching(_METRIC))

    def samples(self, nimg: int) -> Path:
        """The picture of samples after `nimg` images."""
        return self.path / (f"fakes{nimg // 1000:06d}.png" if nimg else "fakes_init.png")

    def pictures(self) -> list[tuple[int, Path]]:
        """All pictures of samples, the oldest first, each with its thousands of images."""
        found = [
            (int(match[1] or 0), entry) for entry in self.path.iterdir() if (match := _SAMPLES.fullmatch(entry.name))
        ]
        return sorted(found, key=lambda item: (item[0], item[1].name != self.samples(0).name))

    def snapshot(self, nimg: int) -> Path:
        """The network after `nimg` images."""
        return self.path / f"network-snapshot-{nimg // 1000:06d}.pkl"

    def snapshots(self) -> list[Path]:
        """All networks, the oldest first."""
        return sorted(self._matching(_SNAPSHOT), key=lambda path: snapshot_kimg(path.name) or 0)

    def state(self, nimg: int) -> Path:
        """The training state after `nimg` images."""
        return self.path / f"training-state-{nimg // 1000:06d}.pt"

    def states(self) -> list[Path]:
        """All training states, the newest first."""
        return sorted(self._matching(_STATE), key=lambda path: state_kimg(path.name) or 0, reverse=True)

    def half_written(self) -> list[Path]:
        """What a killed process left of files that it was writing."""
        return list(self.path.glob(".*.tmp"))

    def _matching(self, pattern: re.Pattern[str]) -> list[Path]:
        return [entry for entry in self.path.iterdir() if pattern.fullmatch(entry.name)]


def snapshot_kimg(name: str) -> int | None:
    """Thousands of images in the name of a network snapshot; None for any other name."""
    found = _SNAPSHOT.fullmatch(name)
    return int(found[1]) if found else None


def state_kimg(name: str) -> int | None:
    """Thousands of images in the name of a training state; None for any other name."""
    found = _STATE.fullmatch(name)
    return int(found[1]) if found else None
