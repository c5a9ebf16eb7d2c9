"""The way from a trainer to a trained network in a run directory, which all commands that train go."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from di_refine import terminal
from di_refine.commands.overview import Overview
from di_refine.errors import InputError
from di_refine.files.datasets import Stream
from di_refine.generators import NetworkSampler
from di_refine.metrics.config import MeasureConfig
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.kinds import TEACHER, parse_metrics
from di_refine.metrics.results import values
from di_refine.metrics.teacher_net import IMAGES, TeacherReference
from di_refine.runs import checkpoint, stopping
from di_refine.runs.config import LoopConfig, RunConfig
from di_refine.runs.directory import RunDirectory, check_run, open_run
from di_refine.runs.loop import Loop, Trainable, measure
from torch_utils import distributed
from torch_utils.settings import Settings, declared, may_change

T = TypeVar("T")


FACTS = frozenset(
    ["network_file", "teacher_files", "data_file", "labels_from", "sources", "torch", "device", "copied", "new"]
)
"""What `training_options.json` records besides settings, and what may be otherwise when a run is continued."""


def recorded(*parts: Settings) -> dict[str, Any]:
    """The settings of dataclasses by name, for `training_options.json`."""
    return {item.name: getattr(part, item.name) for part in parts for item in declared(type(part))}


def images_per_second(trainer: Trainable, seconds: float = 10) -> float:
    """The speed of a trainer, which takes up to 17 steps, and after two of them none beyond so many seconds."""
    trainer.step()
    trainer.check_finite("none yet")  # waits for the device
    start, seen, steps = time.monotonic(), trainer.nimg, 0
    # Sixteen steps have each of the lazy regularisations of a GAN as often as a long run.
    while steps < 2 or (steps < 16 and not distributed.any_rank(time.monotonic() - start > seconds)):
        trainer.step()
        steps += 1
    trainer.check_finite("none yet")
    return distributed.broadcast_object((trainer.nimg - seen) / (time.monotonic() - start))


def unless_interrupted(loop: Loop, directory: RunDirectory, work: Callable[[], T]) -> T | None:
    """What some work after a loop returns; None where a signal ended the loop, or ends the work."""
    if loop.interrupted:
        return None
    with stopping.StopRequest():
        try:
            return work()
        except stopping.Interrupted as reason:
            loop.stopped = str(reason)
            directory.log(f"{reason}: nothing more is measured or drawn; the networks are saved")
            return None


def write_report(directory: RunDirectory) -> None:
    """Rewrite the page of a run from its files; where that is not possible, say so and go on: it can be made later."""
    if distributed.is_first():
        from di_refine.report import page  # with what only pages need

        try:
            page.write(directory.files.report, [directory.path])
        except (InputError, OSError) as error:
            directory.log(f"warning: {directory.files.report.name} is not written: {error}")


def end(directory: RunDirectory, result: dict[str, Any]) -> None:
    """Write the result of a run, and its page for the last time, close the directory, and print the result."""
    if distributed.is_first():
        if result.get("verdict"):
            directory.text("verdict", "\n\n".join(result["verdict"]), round(result["kimg"] * 1000))
        directory.write_result(terminal.plain(result))
        write_report(directory)
    directory.close()
    if distributed.is_first():
        terminal.print_result(result)


def make_evaluator(
    names: str | None,
    recommended: list[str],
    reference: Any,
    config: MeasureConfig,
    device: Any,
    workers: int = 2,
    teacher: Callable[[int], TeacherReference] | None = None,
) -> Evaluator | None:
    """The metrics that a setting names, with all that they need; None for none.

    Args:
        names: separated by commas; None takes the recommended ones, 'none' takes none.
        recommended: such as those of the registry.
        reference: what they compare with, see `Evaluator`.
        config: its `detector` and `allow_code` count.
        device: where feature networks run.
        workers: threads that decode a data set.
        teacher: makes the reference of so many samples for metrics of the name `@teacher`; None refuses such names.

    Raises:
        InputError: as `Evaluator`.
    """
    wanted = recommended if names is None else [] if names in ("none", "") else names.split(",")
    if not wanted:
        return None
    several = distributed.world_size() > 1
    counts = [spec.num_images for spec in parse_metrics(wanted) if spec.detector == TEACHER]
    return Evaluator(
        wanted,
        reference,
        config.detector,
        device,
        workers=workers,
        distributed=several,
        allow_code=config.allow_code,
        teacher=teacher(max(counts) or IMAGES) if teacher is not None and counts else None,
    )


@dataclass(frozen=True)
class Session:
    """A trainer and what is done around its steps.

    Attributes:
        trainer: what is trained.
        loop, run: when the loop does what, and where.
        settings: the dataclasses whose settings the run has; it may be continued with other values of some.
        description: the part after the number in the run directory's name.
        record: what `training_options.json` says.
        networks: returns what a snapshot's file holds.
        sampler: returns a sampler over the present average.
        picture: writes a picture of samples to a path.
        status: name in the trainer's statistics -> short name, for the status lines.
        evaluator: measures at snapshots; None measures nothing.
        measured: returns everything that will be measured: evaluators, each with a sampler.
        seed: of the measurements.
        overview: what is said before the training begins.
        warmup: images at the start during which nothing visible changes.
        stream: the images that the trainer reads, if it reads any.
        untrained: whether the network is new at the start.
    """

    trainer: Trainable
    loop: LoopConfig
    run: RunConfig
    settings: tuple[type[Settings], ...]
    description: str
    record: Mapping[str, Any]
    networks: Callable[[], dict[str, Any]]
    sampler: Callable[[], NetworkSampler]
    picture: Callable[[Path], None]
    status: dict[str, str]
    evaluator: Evaluator | None
    measured: Callable[[], list[tuple[Evaluator, NetworkSampler]]]
    seed: int
    overview: Overview
    warmup: int = 0
    stream: Stream | None = None
    untrained: bool = False

    def check(self) -> None:
        """Refuse what `open` and `train` would refuse, and write nothing.

        Of the data, this reads as much as the first update does: all that fits into memory, else one batch.

        Raises:
            InputError: as these.
        """
        self._check_measured()
        found = check_run(*self._place())
        if found is not None:
            directory, state = found
            self._loop(directory).restore(state)
        if self.stream is not None:
            next(self.stream(self.trainer.nimg))

    def open(self) -> tuple[RunDirectory, Path | None]:
        """The run directory, locked, and the training state to continue from, if there is one.

        Raises:
            InputError: as `runs.directory.open_run`, or a metric does not suit what is to be measured.
        """
        self._check_measured()
        directory, state = open_run(*self._place())
        directory.log(f"run directory: {directory.path}")
        return directory, state

    def _check_measured(self) -> None:
        for evaluator, sampler in self.measured():
            evaluator.check(sampler)

    def _place(self) -> tuple[str, str | None, str, dict[str, Any], frozenset[str]]:
        """The arguments of `open_run`."""
        changeable = frozenset(may_change(*self.settings)) | FACTS
        return self.run.outdir, self.run.resume, self.description, dict(self.record), changeable

    def train(self, directory: RunDirectory, state: Path | None, begin: Callable[[], None] | None = None) -> Loop:
        """Train to the end, or until a reason to stop comes up; returns the loop with its snapshots.

        Args:
            directory: where to write.
            state: the training state to continue from; None for a new run.
            begin: called before the first step of a new run.

        Raises:
            InputError: the state is damaged, or of other networks.
            RunError, NotFiniteError: as `Loop`.
        """

        loop = self._loop(directory, begin)
        try:
            if state is not None:
                loop.resume(state)
            if distributed.is_first():
                for line in self.overview.lines(self.loop, self.warmup, self.evaluator):
                    directory.log(line)
                with checkpoint.saving(directory.files.reals):
                    self.overview.draw_reals(directory.files.reals)
            loop()
        except InputError:
            if self.trainer.nimg == 0:
                directory.discard()
            raise
        return loop

    def _loop(self, directory: RunDirectory, begin: Callable[[], None] | None = None) -> Loop:
        def evaluate(evaluator: Evaluator) -> dict[str, float]:
            # The untouched network and every later average see the same latents, labels and noise.
            snapshot = directory.files.snapshot(self.trainer.nimg).name if self.trainer.nimg else None
            return values(measure(evaluator, self.sampler(), self.seed, directory, snapshot))

        stream = self.stream
        return Loop(
            directory,
            self.trainer,
            self.loop,
            networks=self.networks,
            evaluate=None if self.evaluator is None else partial(evaluate, self.evaluator),
            higher_is_better=self.evaluator is not None and self.evaluator.specs[0].higher_is_better,
            picture=self.picture,
            status=self.status,
            data_wait=None if stream is None else lambda: stream.seconds,
            warmup=self.warmup,
            begin=begin,
            untrained=self.untrained,
            report=partial(write_report, directory),
        )
