"""Run directories and the loop around a trainer: ticks, logs, snapshots, metrics, stop and resume.

A trainer here is anything with `nimg` (images seen), `step() -> dict of scalar tensors`, `check_finite(last_good)`,
`state_dict()` and `load_state_dict()`. The loop reports, saves and tests for the end *before* each step, so that the
first and the last state go through the same code as those between.
"""

import contextlib
import json
import os
import pickle
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from di_refine import cli
from di_refine.errors import InputError, RunError
from di_refine.metrics.evaluate import Evaluator, write_jsonl
from torch_utils import misc, persistence

STATE_PATTERN = re.compile(r"training-state-(\d+)\.pt$")


class RunDirectory:
    """A numbered folder of results, `00000-<description>`, with the file names of the StyleGAN family.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._writer = None

    @classmethod
    def create(cls, outdir: str | os.PathLike, description: str, options: dict[str, Any]) -> "RunDirectory":
        """Make the next free number under `outdir` and write `training_options.json` there."""
        outdir = Path(outdir)
        outdir.mkdir(parents=True, exist_ok=True)
        numbers = [int(m[1]) for entry in outdir.iterdir() if (m := re.match(r"(\d{5})(-|$)", entry.name))]
        number = max(numbers, default=-1) + 1
        while True:  # two runs may start at the same moment: whoever makes the folder has the number
            path = outdir / f"{number:05d}-{description}"
            taken = any(entry.name.startswith(f"{number:05d}") for entry in outdir.iterdir())
            with contextlib.suppress(FileExistsError):
                if not taken:
                    path.mkdir()
                    break
            number += 1
        run = cls(path)
        with misc.open_atomic(path / "training_options.json", "w") as file:
            json.dump(options, file, indent=2)
            file.write("\n")
        return run

    def log(self, text: str) -> None:
        """One line on stderr and in `log.txt`."""
        print(text, file=sys.stderr, flush=True)
        self._append("log.txt", text)

    def append(self, name: str, record: dict[str, Any]) -> None:
        """One JSON object as one line of `name`."""
        self._append(name, json.dumps(record))

    def scalars(self, record: dict[str, float], nimg: int) -> None:
        """The same numbers as TensorBoard events, where tensorboard is installed."""
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._writer = SummaryWriter(str(self.path))
        for key, value in record.items():
            self._writer.add_scalar(key, value, global_step=nimg // 1000)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file, if there is one."""
        if self._writer is not None:
            self._writer.close()

    def newest_state(self) -> Path | None:
        """The training state with the most images, or None."""
        states = {int(m[1]): entry for entry in self.path.iterdir() if (m := STATE_PATTERN.search(entry.name))}
        return states[max(states)] if states else None

    def _append(self, name: str, line: str) -> None:
        # One write call, so that a kill between two of them cannot tear a line.
        with open(self.path / name, "ab") as file:
            file.write(line.encode() + b"\n")


@dataclass
class Schedule:
    """When the loop does what.

    Attributes:
        total: images after which it stops.
        tick: images between status lines.
        snap: ticks between snapshots.
        quiet: images at the start during which nothing visible changes: no snapshots, and not counted in the speed.
        max_seconds: stop, saving, after this long; None for never.
    """

    total: int
    tick: int
    snap: int
    quiet: int = 0
    max_seconds: float | None = None


@dataclass
class Snapshot:
    """A saved network and what was measured on it."""

    nimg: int
    path: Path | None
    results: dict[str, float] = field(default_factory=dict)


class Loop:
    """Drives a trainer through a schedule, keeping the last and the best snapshot.

    Args:
        run: where to write.
        trainer: see the module's text.
        schedule: when to do what.
        networks: returns the dict that `persistence.save` writes.
        evaluate: `() -> {metric: value}` of the current average, or None; the first is the one 'best' goes by.
        higher_is_better: whether more of that first metric is better.
        picture: `(path) -> None`, draws samples, or None.
        status: name in the trainer's statistics -> short name, for the status lines, in this order.
    """

    def __init__(
        self,
        run: RunDirectory,
        trainer: Any,
        schedule: Schedule,
        networks: Callable[[], dict],
        evaluate: Callable[[], dict[str, float]] | None = None,
        higher_is_better: bool = False,
        picture: Callable[[Path], None] | None = None,
        status: dict[str, str] | None = None,
    ):
        self.run, self.trainer, self.schedule = run, trainer, schedule
        self._networks, self._evaluate, self._picture = networks, evaluate, picture
        self._higher, self._status = higher_is_better, status or {}
        self.first: Snapshot | None = None
        self.best: Snapshot | None = None
        self.last: Snapshot | None = None
        self.train_seconds = 0.0
        self.train_images = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0
        self._ticks = 0

    @property
    def images_per_sec(self) -> float:
        """Training speed so far, without metrics and snapshots."""
        return self.train_images / self.train_seconds if self.train_seconds else 0.0

    def resume(self, path: Path) -> None:
        """Continue from a `training-state-*.pt` of an earlier run.

        Raises:
            InputError: not such a file, or of other networks.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.trainer.load_state_dict(state["trainer"])
            for name in ("first", "best", "last"):
                if state["loop"][name] is not None:
                    nimg, file, results = state["loop"][name]
                    setattr(self, name, Snapshot(nimg, None if file is None else self.run.path / file, results))
            self._ticks = state["loop"]["ticks"]
        except (
            OSError,
            KeyError,
            RuntimeError,
            ValueError,
            TypeError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"--resume: {path} cannot be continued from ({reason})") from None
        self.run.log(f"continuing from {path.name} at {self.trainer.nimg / 1000:.3f} kimg")

    def __call__(self) -> None:
        """Train to the end of the schedule."""
        start = time.monotonic()
        resumed = self.trainer.nimg
        next_tick = resumed if resumed == 0 else resumed + self.schedule.tick
        with cli.progress(self.schedule.total, "training", "img") as bar:
            bar.update(resumed)
            while True:
                nimg = self.trainer.nimg
                over_time = (
                    self.schedule.max_seconds is not None and time.monotonic() - start > self.schedule.max_seconds
                )
                done = nimg >= self.schedule.total or over_time
                if done or nimg >= next_tick:
                    bar.note(self._tick(done))
                    next_tick = nimg + self.schedule.tick
                if done:
                    break
                clock = time.monotonic()
                for name, value in self.trainer.step().items():
                    self._sums[name] = self._sums.get(name, 0) + value.detach()
                self._steps += 1
                bar.update(self.trainer.nimg - nimg)
                if nimg >= self.schedule.quiet:
                    self.train_images += self.trainer.nimg - nimg
                    self.train_seconds += time.monotonic() - clock
        if over_time and nimg < self.schedule.total:
            self.run.log(f"stopped by --max-minutes at {nimg / 1000:.3f} kimg")

    # ------------------------------------------------------------------------------------------------------------------

    def _tick(self, done: bool) -> str:
        nimg = self.trainer.nimg
        clock = time.monotonic()
        # Reading the sums waits for the device, which belongs to the training time.
        stats = {name: (value / self._steps).item() for name, value in self._sums.items()}
        self.trainer.check_finite(self._last_good())
        self.train_seconds += time.monotonic() - clock
        self._sums, self._steps = {}, 0

        record: dict[str, float] = {"kimg": nimg / 1000, **stats, "images_per_sec": self.images_per_sec}
        due = done or self._ticks % self.schedule.snap == 0
        fresh = self.last is None or self.last.nimg != nimg
        results = {}
        if due and fresh and (nimg == 0 or nimg > self.schedule.quiet or done):
            results = self._snapshot()
            record.update(results)
        record["timestamp"] = time.time()
        self.run.append("stats.jsonl", record)
        self.run.scalars({k: v for k, v in record.items() if k not in ("kimg", "timestamp")}, nimg)
        note = "  ".join(f"{short} {stats[name]:.4g}" for name, short in self._status.items() if name in stats)
        measured = "  ".join(f"{name} {value:.4g}" for name, value in results.items())
        speed = f"{self.images_per_sec:7.1f} img/s"
        self.run.log(f"tick {self._ticks:<4d} kimg {nimg / 1000:<9.3f} {speed}  {note}  {measured}".rstrip())
        self._ticks += 1
        return note

    def _snapshot(self) -> dict[str, float]:
        nimg = self.trainer.nimg
        results = self._evaluate() if self._evaluate else {}
        kimg = f"{nimg // 1000:06d}"
        path = None
        if nimg > 0:  # at the start the file would be a copy of what was given
            path = self.run.path / f"network-snapshot-{kimg}.pkl"
            persistence.save(self._networks(), path)
        snapshot = Snapshot(nimg, path, results)
        if self._picture is not None:
            self._picture(self.run.path / (f"fakes{kimg}.png" if nimg else "fakes_init.png"))
        if self.first is None:
            self.first = snapshot
        replaced = [self.last, self.best]
        self.last = snapshot
        if path is not None and (self.best is None or self._is_better(results, self.best.results)):
            self.best = snapshot
        kept = {s.path for s in (self.first, self.best, self.last) if s is not None}
        if nimg > 0:
            self._save_state(kimg)
        for old in replaced:
            if old is not None and old.path is not None and old.path not in kept:
                old.path.unlink(missing_ok=True)
        return results

    def _save_state(self, kimg: str) -> None:
        """Write the new training state, then remove the older ones."""

        def plain(s):
            return None if s is None else [s.nimg, None if s.path is None else s.path.name, s.results]

        loop = {
            "first": plain(self.first),
            "best": plain(self.best),
            "last": plain(self.last),
            "ticks": self._ticks + 1,
        }
        path = self.run.path / f"training-state-{kimg}.pt"
        try:
            with misc.open_atomic(path) as file:
                torch.save({"trainer": self.trainer.state_dict(), "loop": loop}, file)
        except RuntimeError as error:  # what torch.save makes of a failed write
            reason = str(error).splitlines()[0]
            raise RunError(
                f"{path} could not be written ({reason}); free some space, then continue with --resume={self.run.path}"
            ) from None
        for entry in self.run.path.iterdir():
            if STATE_PATTERN.search(entry.name) and entry != path:
                entry.unlink(missing_ok=True)

    def _is_better(self, results: dict[str, float], other: dict[str, float]) -> bool:
        if not results or not other:
            return True  # nothing to compare by: the newest counts
        new, old = next(iter(results.values())), next(iter(other.values()))
        return new > old if self._higher else new < old

    def _last_good(self) -> str:
        return str(self.last.path) if self.last is not None and self.last.path is not None else "none yet"


def find_run_to_resume(path: str | os.PathLike) -> tuple[RunDirectory, Path]:
    """The run directory and its newest training state, from a run directory or a state file.

    Raises:
        InputError: neither, or a run that has saved nothing yet.
    """
    path = Path(path)
    if path.is_dir():
        run = RunDirectory(path)
        state = run.newest_state()
        if state is None:
            raise InputError(f"--resume={path}: no training-state-*.pt there; name a run directory that has one")
        return run, state
    if path.is_file() and STATE_PATTERN.search(path.name):
        return RunDirectory(path.parent), path
    raise InputError(f"--resume={path}: not a run directory and not a training-state-*.pt file")


def measure(
    evaluator: Evaluator, sampler, seed: int, run: RunDirectory, snapshot: str | None, what: str = "measuring"
) -> dict[str, float]:
    """Measure a sampler, append the results to the run's `metric-<name>.jsonl` files, and return them by name."""
    with cli.progress(evaluator.num_images, what, "img") as bar:
        results = evaluator(sampler, seed=seed, progress=bar.update)
    for result in results:
        write_jsonl(run.path, result, snapshot)
    return {name: value for result in results for name, value in result.values.items()}
