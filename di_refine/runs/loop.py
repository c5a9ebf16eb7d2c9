"""The loop around a trainer: ticks, logs, snapshots, metrics, stop and resume.

A trainer here is anything with

* `nimg`, images seen by all processes together;
* `step() -> dict` of scalars (tensors or numbers), of the whole batch, the same on all processes;
* `by_sigma`, where it has that: a dict of small 1-D tensors, of the last step, in which NaN means "nothing there this
  time", as for noise levels that were not drawn;
* `check_finite(last_good)`, which raises RunError if a step went wrong;
* `state_dict()` and `load_state_dict(state)`, of everything that changes and is no function of `nimg`.

The loop reports, saves and tests for the end *before* each step, so that the first and the last state go through the
same code as those between. A run that was stopped and goes on does what it would have done without the stop, logs
included: the training state holds the loop's counters and the sums of the tick that has begun.

Of several processes all step and measure; the first alone writes.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from di_refine import terminal
from di_refine.errors import InputError
from di_refine.metrics.evaluate import Evaluator, write_jsonl
from di_refine.runs import checkpoint, stopping
from di_refine.runs.directory import RunDirectory
from di_refine.runs.means import Means, peak_memory
from di_refine.runs.resuming import MAY_CHANGE, find_run_to_resume, open_run
from torch_utils import distributed, persistence

__all__ = [
    "MAY_CHANGE",
    "Loop",
    "RunDirectory",
    "Schedule",
    "Snapshot",
    "find_run_to_resume",
    "measure",
    "open_run",
]


@dataclass
class Schedule:
    """When the loop does what.

    Attributes:
        total: images after which it stops.
        tick: images between status lines, each with a training state.
        snap: ticks between snapshots.
        quiet: images at the start during which nothing visible changes: no snapshots, and not counted in the speed.
        max_seconds: stop, saving, after this long; None for never.
        keep: how many of the newest training states and of the newest snapshots stay.
        stop_if_worse: stop when the first metric is worse than that of the beginning by this factor; None for never.
    """

    total: int
    tick: int
    snap: int
    quiet: int = 0
    max_seconds: float | None = None
    keep: int = 2
    stop_if_worse: float | None = None


@dataclass
class Snapshot:
    """A saved network and what was measured on it."""

    nimg: int
    path: Path | None
    results: dict[str, float] = field(default_factory=dict)


class Loop:
    """Drives a trainer through a schedule, keeping the newest and the best snapshot.

    Args:
        run: where to write.
        trainer: see the module's text.
        schedule: when to do what.
        networks: returns the dict that `persistence.save` writes.
        evaluate: `() -> {metric: value}` of the current average, or None; the first is the one 'best' goes by.
        higher_is_better: whether more of that first metric is better.
        picture: `(path) -> None`, draws samples, or None.
        status: name in the trainer's statistics -> short name, for the status lines, in this order.
        data_wait: the seconds that the trainer has waited for data so far, or None.

    Attributes:
        first, best, last: snapshots: of the start (without a file), the best so far, the newest.
        stopped: why the loop stopped before its end: 'SIGTERM', 'SIGUSR1', 'SIGINT', 'max_minutes', 'stop_if_worse';
            None if it did not.
        train_seconds, train_images: what the speed is made of, over all sessions of the run.
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
        data_wait: Callable[[], float] | None = None,
    ):
        self.run, self.trainer, self.schedule = run, trainer, schedule
        self._networks, self._evaluate, self._picture = networks, evaluate, picture
        self._higher, self._status, self._data_wait = higher_is_better, status or {}, data_wait
        self._waited = 0.0
        self.first: Snapshot | None = None
        self.best: Snapshot | None = None
        self.last: Snapshot | None = None
        self.stopped: str | None = None
        self.train_seconds = 0.0
        self.train_images = 0
        self._means = Means()
        self._tick_images, self._tick_seconds = 0, 0.0
        self._ticks = 0
        self._next_tick = 0
        self._recorded = -1  # images at the newest line of stats.jsonl
        self._files: list[str] = []  # snapshots in the folder, oldest first
        self._bests: list[str] = []  # what was best, for each of the newest states
        self._resumed = False

    @property
    def images_per_sec(self) -> float:
        """Training speed so far, without metrics and snapshots."""
        return self.train_images / self.train_seconds if self.train_seconds else 0.0

    @property
    def exit_status(self) -> int:
        """What a command that ran this should exit with: 130 after SIGINT, else 0."""
        return 130 if self.stopped == "SIGINT" else 0

    def resume(self, path: Path) -> None:
        """Continue from a `training-state-*.pt` of an earlier run.

        Raises:
            InputError: the file is damaged, or of other networks.
        """
        self.run.lock()
        try:
            self._restore(checkpoint.load(path), path)
        except BaseException:
            self.run.close()
            raise
        self.run.rewind(self.trainer.nimg)
        self.run.log(f"continuing from {path.name} at {self.trainer.nimg / 1000:.3f} kimg")
        self._resumed = True

    def __call__(self) -> None:
        """Train to the end of the schedule, or until a reason to stop (see `stopped`) comes up.

        Raises:
            RunError: the trainer's numbers are not finite, or something could not be written. The newest training state
                and snapshot before that are still there.
        """
        try:
            self.run.lock()
            if not self._resumed:
                self.run.rewind(-1)
            with (
                stopping.StopRequest(self.schedule.max_seconds) as request,
                terminal.progress(self.schedule.total, "training", "img", enabled=distributed.is_first()) as bar,
            ):
                self._train(request, bar)
        except BaseException:
            self.run.close()
            raise
        if self.stopped:
            option = self.stopped if self.stopped.startswith("SIG") else f"--{self.stopped.replace('_', '-')}"
            self.run.log(f"stopped by {option} at {self.trainer.nimg / 1000:.3f} kimg")

    # ------------------------------------------------------------------------------------------------------------------

    def _train(self, request: stopping.StopRequest, bar: terminal.progress) -> None:
        bar.update(self.trainer.nimg)
        while True:
            nimg = self.trainer.nimg
            done = nimg >= self.schedule.total
            if not done:
                self.stopped = request.reason()
            try:
                if self.stopped and self.stopped.startswith("SIG"):
                    raise stopping.Interrupted(self.stopped)
                if done or self.stopped or nimg >= self._next_tick:
                    bar.note(self._tick(final=done or self.stopped is not None))
            except stopping.Interrupted as interrupt:
                self.stopped = str(interrupt)
                self._save_interrupted()
            if done or self.stopped:
                return
            clock = time.monotonic()
            self._means.add({**self.trainer.step(), **getattr(self.trainer, "by_sigma", {})})
            bar.update(self.trainer.nimg - nimg)
            self._count(self.trainer.nimg - nimg, time.monotonic() - clock, counts=nimg >= self.schedule.quiet)

    def _count(self, images: int, seconds: float, counts: bool = True) -> None:
        self._tick_images += images
        self._tick_seconds += seconds
        if counts:
            self.train_images += images
            self.train_seconds += seconds

    def _tick(self, final: bool) -> str:
        nimg = self.trainer.nimg
        if nimg == self._recorded:  # a finished run that is started again
            return ""
        clock = time.monotonic()
        # Reading the sums waits for the device, which belongs to the training time.
        stats = self._means.read()
        self.trainer.check_finite(self._last_good())
        self._count(0, time.monotonic() - clock)

        speed = self._tick_images / self._tick_seconds if self._tick_seconds else 0.0
        record: dict[str, Any] = {"kimg": nimg / 1000, **stats, "images_per_sec": speed, **peak_memory()}
        if self._data_wait is not None:
            waited = self._data_wait()
            record["data_wait_sec"], self._waited = waited - self._waited, waited
        due = final or self._ticks % self.schedule.snap == 0
        fresh = self.last is None or self.last.nimg != nimg
        results = {}
        if due and fresh and (nimg == 0 or nimg > self.schedule.quiet or final):
            results = self._snapshot()
            record.update(results)
        # The line comes before the state: whoever continues from a state finds the lines up to it complete.
        record["timestamp"] = time.time()
        self.run.append("stats.jsonl", record)
        self.run.scalars({k: v for k, v in record.items() if k not in ("kimg", "timestamp")}, nimg)
        note = "  ".join(f"{short} {stats[name]:.4g}" for name, short in self._status.items() if name in stats)
        measured = "  ".join(f"{name} {value:.4g}" for name, value in results.items())
        self.run.log(f"tick {self._ticks:<4d} kimg {nimg / 1000:<9.3f} {speed:7.1f} img/s  {note}  {measured}".rstrip())
        self._means = Means()
        self._tick_images, self._tick_seconds = 0, 0.0
        if nimg >= self._next_tick:  # a stop between two ticks moves neither of them
            self._ticks += 1
            self._next_tick = nimg + self.schedule.tick
        self._recorded = nimg
        if nimg > 0:
            self._save_state()
        if not final and self._is_much_worse(results):
            self.stopped = "stop_if_worse"
        return note

    def _snapshot(self) -> dict[str, float]:
        nimg = self.trainer.nimg
        results = distributed.broadcast_object(self._evaluate()) if self._evaluate else {}
        path = self._save_network() if nimg > 0 else None  # at the start the file would be a copy of what was given
        snapshot = Snapshot(nimg, path, results)
        if self._picture is not None and distributed.is_first():
            image = self.run.path / (f"fakes{nimg // 1000:06d}.png" if nimg else "fakes_init.png")
            with checkpoint.saving(image):
                self._picture(image)
        if self.first is None:
            self.first = snapshot
        self.last = snapshot
        if path is not None and (self.best is None or self._is_better(results, self.best.results)):
            self.best = snapshot
        return results

    def _save_network(self) -> Path:
        path = self.run.path / f"network-snapshot-{self.trainer.nimg // 1000:06d}.pkl"
        if distributed.is_first():
            with checkpoint.saving(path):
                persistence.save(self._networks(), path)
        self._files = [name for name in self._files if name != path.name] + [path.name]
        return path

    def _save_state(self) -> None:
        """Write a training state, then remove what is too old; also before that, nothing that an older state needs."""
        keep = self.schedule.keep
        self._bests = (self._bests + [_name(self.best)])[-keep:]
        wanted = {*self._files[-keep:], *self._bests, _name(self.last)}
        old = [name for name in self._files if name not in wanted]
        self._files = [name for name in self._files if name in wanted]
        if not distributed.is_first():
            return
        state = {"trainer": self.trainer.state_dict(), "loop": self._state()}
        checkpoint.save(checkpoint.path_of(self.run.path, self.trainer.nimg), state)
        checkpoint.prune(self.run.path, keep)
        for name in old:
            (self.run.path / name).unlink(missing_ok=True)

    def _save_interrupted(self) -> None:
        """Save between two ticks, the state first: there may be little time.

        The loop's counters stay as they are, so that the run goes on as if nothing had happened.
        """
        nimg = self.trainer.nimg
        if nimg == 0:
            return
        self.trainer.check_finite(self._last_good())
        path = self.run.path / f"network-snapshot-{nimg // 1000:06d}.pkl"
        # Files are named by whole thousands: the snapshot of this moment must not replace one that was measured.
        replaceable = path.name not in {*self._files, *self._bests}
        if replaceable:
            self._files.append(path.name)
        self._save_state()
        if replaceable:
            self._save_network()
            self.last = Snapshot(nimg, path)

    def _state(self) -> dict[str, Any]:
        def plain(s: Snapshot | None):
            return None if s is None else [s.nimg, None if s.path is None else s.path.name, s.results]

        return {
            "first": plain(self.first),
            "best": plain(self.best),
            "last": plain(self.last),
            "files": self._files,
            "bests": self._bests,
            "ticks": self._ticks,
            "next_tick": self._next_tick,
            "recorded": self._recorded,
            "means": self._means.state_dict(),
            "train": [self.train_images, self.train_seconds],
            "tick": [self._tick_images, self._tick_seconds],
        }

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        try:
            self.trainer.load_state_dict(state["trainer"])
            self._load(state["loop"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"--resume: {path} cannot be continued from ({reason})") from None

    def _load(self, state: dict[str, Any]) -> None:
        def snapshot(value) -> Snapshot | None:
            if value is None:
                return None
            nimg, name, results = value
            return Snapshot(nimg, None if name is None else self.run.path / name, results)

        self.first, self.best, self.last = (snapshot(state[name]) for name in ("first", "best", "last"))
        if self.best is not None and not self.best.path.is_file():
            self.run.log(f"warning: {self.best.path} is missing; the next snapshot counts as the best")
            self.best = None
        self._files, self._bests = list(state["files"]), list(state["bests"])
        self._ticks, self._recorded = state["ticks"], state["recorded"]
        self._next_tick = min(state["next_tick"], self.trainer.nimg + self.schedule.tick)
        self._means.load_state_dict(state["means"])
        self.train_images, self.train_seconds = state["train"]
        self._tick_images, self._tick_seconds = state["tick"]

    # ------------------------------------------------------------------------------------------------------------------

    def _is_better(self, results: dict[str, float], other: dict[str, float]) -> bool:
        if not results or not other:
            return True  # nothing to compare by: the newest counts
        new, old = next(iter(results.values())), next(iter(other.values()))
        return math.isnan(old) or (new > old if self._higher else new < old)

    def _is_much_worse(self, results: dict[str, float]) -> bool:
        """Whether the first metric went from that of the start to the worse by more than the allowed factor."""
        factor = self.schedule.stop_if_worse
        if not factor or not results or self.first is None or not self.first.results:
            return False
        now, start = next(iter(results.values())), next(iter(self.first.results.values()))
        if start <= 0:  # as a kernel distance can be: a multiple of it says nothing
            return False
        return not (now >= start / factor if self._higher else now <= start * factor)  # NaN is worse

    def _last_good(self) -> str:
        return str(self.last.path) if self.last is not None and self.last.path is not None else "none yet"


def _name(snapshot: Snapshot | None) -> str | None:
    return None if snapshot is None or snapshot.path is None else snapshot.path.name


def measure(
    evaluator: Evaluator, sampler, seed: int, run: RunDirectory, snapshot: str | None, what: str = "measuring"
) -> dict[str, float]:
    """Measure a sampler, append the results to the run's `metric-<name>.jsonl` files, and return them by name.

    Raises:
        stopping.Interrupted: inside a loop, when a signal asks it to stop.
    """

    total = evaluator.num_images

    def progress(count: int) -> None:  # of this process; the others are about as far
        bar.update(min(count * distributed.world_size(), total - bar.count))
        stopping.check()

    with terminal.progress(total, what, "img", enabled=distributed.is_first()) as bar:
        results = evaluator(sampler, seed=seed, progress=progress)
        bar.update(total - bar.count)
    if distributed.is_first():
        for result in results:
            write_jsonl(run.path, result, snapshot)
    return {name: value for result in results for name, value in result.values.items()}
