"""The loop around a trainer: ticks, logs, snapshots, metrics, stop and resume.

The loop reports, saves and tests for the end *before* each step, so that the first and the last state go through the
same code as those between. A run that was stopped and goes on does what it would have done without the stop, logs
included: the training state holds the loop's counters and the sums of the tick that has begun.

Of several processes all step and measure; the first alone writes.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from di_refine import terminal
from di_refine.errors import InputError
from di_refine.generators import Sampler
from di_refine.metrics import kept
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.results import MetricResult, write_jsonl
from di_refine.runs import checkpoint, stopping
from di_refine.runs.config import LoopConfig
from di_refine.runs.directory import RunDirectory
from di_refine.runs.means import Means, peak_memory
from torch_utils import distributed, persistence

__all__ = ["Loop", "Snapshot", "Trainable", "measure"]


class Trainable(Protocol):
    """What the loop drives."""

    @property
    def nimg(self) -> int:
        """How many images all processes together have seen."""

    @property
    def by_sigma(self) -> Mapping[str, torch.Tensor]:
        """Small 1-D tensors, of the last step, in which NaN means that nothing was there; may be empty."""

    def step(self) -> Mapping[str, torch.Tensor | float]:
        """Make one update; returns scalars, of the whole batch and the same on all processes."""

    def check_finite(self, last_good: str) -> None:
        """Raise an error if a loss or gradient was not finite, naming the snapshot to go back to."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes and is no function of `nimg`, as `torch.load(weights_only=True)` reads it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from such a state."""


@dataclass
class Snapshot:
    """A saved network and what was measured on it.

    Attributes:
        nimg: images seen by then.
        path: the file; None at the start, when it would be a copy of what was given.
        results: metric -> value.
    """

    nimg: int
    path: Path | None
    results: dict[str, float] = field(default_factory=dict)


class Loop:
    """Drive a trainer to its end, keeping the newest and the best snapshot.

    Args:
        run: where to write.
        trainer: what is trained.
        config: when to stop, write and measure.
        networks: returns the dict that `persistence.save` writes.
        evaluate: measures the present average and returns metric -> value, of which the first decides what is best;
            None measures nothing.
        higher_is_better: whether more of that first metric is better.
        picture: draws samples into a file; None draws nothing.
        status: name in the trainer's statistics -> short name, for the status lines, in this order.
        data_wait: returns the seconds that the trainer has waited for data so far; None where that is not known.
        warmup: images at the start during which nothing visible changes. There are no snapshots then, and the speed
            does not count them.
        begin: called before the first step of a new run; signals interrupt it.
        untrained: whether the network is new at the start, so that there is nothing to measure or draw yet.
        report: called after each snapshot, once all its files are there.

    Attributes:
        first, best, last: the snapshots of the start (where that is not measured, the first that is), the best so far,
            and the newest; None before there is one.
        stopped: why the loop stopped before its end: 'SIGTERM', 'SIGUSR1', 'SIGINT', 'max_minutes', 'stop_if_worse';
            None if it did not.
        train_seconds, train_images: how long training took for how many images, over all sessions of the run.
    """

    def __init__(
        self,
        run: RunDirectory,
        trainer: Trainable,
        config: LoopConfig,
        networks: Callable[[], dict],
        evaluate: Callable[[], dict[str, float]] | None = None,
        higher_is_better: bool = False,
        picture: Callable[[Path], None] | None = None,
        status: dict[str, str] | None = None,
        data_wait: Callable[[], float] | None = None,
        warmup: int = 0,
        begin: Callable[[], None] | None = None,
        untrained: bool = False,
        report: Callable[[], None] | None = None,
    ):
        self.run, self.trainer, self.config = run, trainer, config
        self._warmup, self._begin, self._untrained = warmup, begin, untrained
        self._report = report
        self._networks, self._evaluate, self._picture = networks, evaluate, picture
        self._higher, self._status, self._data_wait = higher_is_better, status or {}, data_wait
        self._waited = 0.0
        self.first: Snapshot | None = None
        self.best: Snapshot | None = None
        self.last: Snapshot | None = None
        self.stopped: str | None = None
        self.train_seconds = 0.0
        self.train_images = 0
        self._warming = 0, 0.0  # images and seconds of the warm-up
        self._means = Means()
        self._tick_images, self._tick_seconds = 0, 0.0
        self._ticks = 0
        self._next_tick = 0
        self._recorded = -1  # images at the newest line of stats.jsonl
        self._saved: list[int] = []  # images of the snapshots in the folder, oldest first
        self._bests: list[int] = []  # images of the best snapshot, 0 for none, at each of the newest states
        self._resumed = False

    @property
    def images_per_sec(self) -> float:
        """The training speed so far, without metrics and snapshots; of a warm-up only where there is nothing else."""
        images, seconds = (self.train_images, self.train_seconds) if self.train_images else self._warming
        return images / seconds if seconds else 0.0

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended it."""
        return self.stopped is not None and self.stopped.startswith("SIG")

    @property
    def exit_status(self) -> int:
        """The status with which a command that ran this should exit: 130 after SIGINT, else 0."""
        return 130 if self.stopped == "SIGINT" else 0

    def restore(self, path: Path) -> None:
        """Take over a training state, writing nothing.

        Raises:
            InputError: the file is damaged, or a state of other networks.
        """
        self._restore(checkpoint.load(path), path)

    def resume(self, path: Path) -> None:
        """Continue from a training state of this run.

        Raises:
            InputError: as `restore`.
        """
        self.run.lock()
        try:
            self.restore(path)
        except BaseException:
            self.run.close()
            raise
        self.run.rewind(self.trainer.nimg)
        self.run.log(f"continuing from {path.name} at {self.trainer.nimg / 1000:.3f} kimg")
        self._resumed = True

    def __call__(self) -> None:
        """Train to the end, or until a reason to stop (see `stopped`) comes up.

        Raises:
            RunError: something could not be written; the newest training state and snapshot before that stay.
            RuntimeError: `check_finite` of the trainer found numbers that are not finite; the same holds.
        """
        try:
            self.run.lock()
            if not self._resumed:
                self.run.rewind(-1)
            limit = self.config.max_minutes and self.config.max_minutes * 60
            with (
                stopping.StopRequest(limit) as request,
                terminal.progress(
                    self.config.total_nimg,
                    "training",
                    "img",
                    enabled=distributed.is_first(),
                    done=min(self.trainer.nimg, self.config.total_nimg),
                    max_seconds=limit,
                ) as bar,
            ):
                self._train(request, bar)
        except BaseException:
            self.run.close()
            raise
        if self.stopped:
            self.run.log(f"stopped by {self.stopped} at {self.trainer.nimg / 1000:.3f} kimg")

    @property
    def _is_untrained(self) -> bool:
        return self._untrained and self.trainer.nimg == 0

    # ------------------------------------------------------------------------------------------------------------------

    def _train(self, request: stopping.StopRequest, bar: terminal.progress) -> None:
        if self._begin is not None and self.trainer.nimg == 0:
            try:
                with bar.pause():
                    self._begin()
            except stopping.Interrupted as interrupt:
                self.stopped = str(interrupt)
                return
        while True:
            nimg = self.trainer.nimg
            done = nimg >= self.config.total_nimg
            if not done:
                self.stopped = request.reason()
            try:
                if self.stopped is not None and self.interrupted:
                    raise stopping.Interrupted(self.stopped)
                if done or self.stopped or nimg >= self._next_tick:
                    with bar.pause():
                        note = self._tick(final=done or self.stopped is not None)
                    bar.note(note)
            except stopping.Interrupted as interrupt:
                self.stopped = str(interrupt)
                self._save_interrupted()
            if done or self.stopped:
                return
            clock = time.monotonic()
            self._means.add({**self.trainer.step(), **self.trainer.by_sigma})
            bar.update(self.trainer.nimg - nimg)
            self._count(self.trainer.nimg - nimg, time.monotonic() - clock, counts=nimg >= self._warmup)

    def _count(self, images: int, seconds: float, counts: bool = True) -> None:
        self._tick_images += images
        self._tick_seconds += seconds
        if counts:
            self.train_images += images
            self.train_seconds += seconds
        else:
            self._warming = self._warming[0] + images, self._warming[1] + seconds

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
        due = final or self._ticks % self.config.snap == 0
        fresh = self.last is None or self.last.nimg != nimg
        results = {}
        if due and fresh and (nimg == 0 or nimg > self._warmup or final):
            results = self._snapshot()
            record.update(results)
        elif nimg > self._warmup >= self._recorded:  # soon after the start, to be seen rather than measured
            self._draw()
        # The line comes before the state: whoever continues from a state finds the lines up to it complete.
        record["timestamp"] = time.time()
        self.run.append_stats(record)
        self.run.scalars({k: v for k, v in record.items() if k not in ("kimg", "timestamp")}, nimg)
        note = "  ".join(f"{short} {stats[name]:.4g}" for name, short in self._status.items() if name in stats)
        measured = "  ".join(f"{name} {value:.4g}" for name, value in results.items())
        self.run.log(f"tick {self._ticks:<4d} kimg {nimg / 1000:<9.3f} {speed:7.1f} img/s  {note}  {measured}".rstrip())
        self._means = Means()
        self._tick_images, self._tick_seconds = 0, 0.0
        if nimg >= self._next_tick:  # a stop between two ticks moves neither of them
            self._ticks += 1
            self._next_tick = nimg + self.config.tick_nimg
        self._recorded = nimg
        if nimg > 0:
            self._save_state()
        if due and self._report is not None:
            self._report()
        if not final and self._is_much_worse(results):
            self.stopped = "stop_if_worse"
        return note

    def _snapshot(self) -> dict[str, float]:
        nimg = self.trainer.nimg
        evaluate = None if self._is_untrained else self._evaluate
        results = {} if evaluate is None else distributed.broadcast_object(evaluate())
        path = self._save_network() if nimg > 0 else None  # at the start the file would be a copy of what was given
        snapshot = Snapshot(nimg, path, results)
        self._draw()
        if self.first is None or (results and not self.first.results):
            self.first = snapshot
        self.last = snapshot
        if path is not None and (self.best is None or self._is_better(results, self.best.results)):
            self.best = snapshot
        return results

    def _draw(self) -> None:
        if self._picture is not None and distributed.is_first() and not self._is_untrained:
            image = self.run.files.samples(self.trainer.nimg)
            with checkpoint.saving(image):
                self._picture(image)
            self.run.picture("samples", image, self.trainer.nimg)

    def _save_network(self) -> Path:
        nimg = self.trainer.nimg
        path = self.run.files.snapshot(nimg)
        if distributed.is_first():
            with checkpoint.saving(path):
                persistence.save(self._networks(), path)
        self._saved = [other for other in self._saved if self.run.files.snapshot(other) != path] + [nimg]
        return path

    def _save_state(self) -> None:
        """Write a training state, then remove what is too old; what an older state needs stays as long as that does."""
        keep = self.config.keep
        self._bests = (self._bests + [self.best.nimg if self.best else 0])[-keep:]
        wanted = self._paths([*self._saved[-keep:], *self._bests, self.last.nimg if self.last else 0])
        old = self._paths(self._saved) - wanted
        self._saved = [nimg for nimg in self._saved if self.run.files.snapshot(nimg) in wanted]
        if not distributed.is_first():
            return
        state = {"trainer": self.trainer.state_dict(), "loop": self._state()}
        checkpoint.save(self.run.files.state(self.trainer.nimg), state)
        checkpoint.prune(self.run.path, keep)
        for path in old:
            path.unlink(missing_ok=True)

    def _save_interrupted(self) -> None:
        """Save between two ticks: the state first, as there may be little time.

        The loop's counters stay as they are, so that the run goes on as if nothing had happened.
        """
        nimg = self.trainer.nimg
        if nimg == 0:
            return
        self.trainer.check_finite(self._last_good())
        path = self.run.files.snapshot(nimg)
        # Files are named by whole thousands: the snapshot of this moment must not replace one that was measured.
        replaceable = path not in self._paths([*self._saved, *self._bests])
        if replaceable:
            self._saved.append(nimg)
        self._save_state()
        if replaceable:
            self._save_network()
            self.last = Snapshot(nimg, path)

    def _paths(self, images: Iterable[int]) -> set[Path]:
        """Return the snapshots after so many images; there is none of the start."""
        return {self.run.files.snapshot(nimg) for nimg in images if nimg}

    def _state(self) -> dict[str, Any]:
        """Return the loop's part of a training state, which names snapshots by their images."""

        def plain(snapshot: Snapshot | None) -> list | None:
            return None if snapshot is None else [snapshot.nimg, snapshot.results]

        return {
            "first": plain(self.first),
            "best": plain(self.best),
            "last": plain(self.last),
            "saved": self._saved,
            "bests": self._bests,
            "ticks": self._ticks,
            "next_tick": self._next_tick,
            "recorded": self._recorded,
            "means": self._means.state_dict(),
            "train": [self.train_images, self.train_seconds],
            "tick": [self._tick_images, self._tick_seconds],
        }

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        parts = state.get("loop") if isinstance(state, dict) and state.keys() == {"trainer", "loop"} else None
        if not isinstance(parts, dict) or parts.keys() != self._state().keys():
            raise InputError(
                f"resume={path} cannot be continued from: another version of this program wrote it, whose states have "
                "another layout; start a new run"
            )
        try:
            _count(state["trainer"]["nimg"])
            self.trainer.load_state_dict(state["trainer"])
            self._load(parts)
        except (LookupError, ArithmeticError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"resume={path} cannot be continued from ({reason})") from None

    def _load(self, state: dict[str, Any]) -> None:
        """Take over the loop's part of a state.

        Raises:
            ValueError, TypeError: a value is not of the type and range that this loop writes.
        """

        def snapshot(value: list | None) -> Snapshot | None:
            if value is None:
                return None
            nimg, results = value
            path = self.run.files.snapshot(_count(nimg)) if nimg else None
            return Snapshot(nimg, path, {str(name): float(number) for name, number in results.items()})

        self.first, self.best, self.last = (snapshot(state[name]) for name in ("first", "best", "last"))
        if self.best is not None and self.best.path is not None and not self.best.path.is_file():
            self.run.log(f"warning: {self.best.path} is missing; the next snapshot counts as the best")
            self.best = None
        self._saved, self._bests = [[_count(nimg) for nimg in state[name]] for name in ("saved", "bests")]
        self._ticks, self._recorded = _count(state["ticks"]), _count(state["recorded"], least=-1)
        self._next_tick = min(_count(state["next_tick"]), self.trainer.nimg + self.config.tick_nimg)
        self._means.load_state_dict(state["means"])
        self.train_images, self.train_seconds = _speed(state["train"])
        self._tick_images, self._tick_seconds = _speed(state["tick"])

    # ------------------------------------------------------------------------------------------------------------------

    def _is_better(self, results: dict[str, float], other: dict[str, float]) -> bool:
        if not results or not other:
            return True  # nothing to compare by: the newest counts
        new, old = next(iter(results.values())), next(iter(other.values()))
        return math.isnan(old) or (new > old if self._higher else new < old)

    def _is_much_worse(self, results: dict[str, float]) -> bool:
        """Return whether the first metric is worse than at the start by more than the allowed factor."""
        factor = self.config.stop_if_worse
        if not factor or not results or self.first is None or not self.first.results:
            return False
        now, start = next(iter(results.values())), next(iter(self.first.results.values()))
        if start <= 0:  # as a kernel distance can be: a multiple of it says nothing
            return False
        return not (now >= start / factor if self._higher else now <= start * factor)  # NaN is worse

    def _last_good(self) -> str:
        return str(self.last.path) if self.last is not None and self.last.path is not None else "none yet"


def _count(value: Any, least: int = 0) -> int:
    """Return a number of images or ticks that was read from a state."""
    if type(value) is not int or not least <= value < 2**53:
        raise ValueError(f"{str(value)[:40]!r} stands where a number of images should be")
    return value


def _speed(value: Any) -> tuple[int, float]:
    """Return a number of images and the seconds that they took, which were read from a state."""
    images, seconds = value
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
        raise ValueError(f"{str(seconds)[:40]!r} stands where a duration should be")
    return _count(images), float(seconds)


def measure(
    evaluator: Evaluator,
    sampler: Sampler,
    seed: int,
    run: RunDirectory,
    snapshot: str | None,
    what: str = "measuring",
    name: str | None = None,
    network: str | None = None,
) -> list[MetricResult]:
    """Measure a sampler, append the results to the run's files of metrics, and return them.

    Args:
        evaluator: measures.
        sampler: makes the images.
        seed: of the images and of random subsets.
        run: where the results are written.
        snapshot: the name of the file with the network, where it has one in the run directory.
        what: what the progress bar says.
        name: of the measurement, where it is kept for other runs (`metrics.kept.key`).
        network: what is measured, in words, where that is not the network that the run trains.

    Raises:
        stopping.Interrupted: inside a loop, when a signal asks it to stop.
    """
    results = distributed.broadcast_object(kept.load(name) if name is not None and distributed.is_first() else None)
    if results is None:
        total = evaluator.num_images(sampler)

        def progress(count: int) -> None:  # of this process; the others are about as far
            bar.update(count * distributed.world_size())

        with terminal.progress(total, what, "img", enabled=distributed.is_first(), check=stopping.check) as bar:
            results = evaluator(sampler, seed=seed, progress=progress)
        if name is not None and distributed.is_first():
            kept.store(name, results)
    if distributed.is_first():
        for result in results:
            write_jsonl(run.path, result, snapshot, network)
    return results
