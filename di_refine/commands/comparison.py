"""Whether refining or distilling a network has helped: what is measured before and after, and what that says."""

import statistics
from typing import Any

import torch

from di_refine.commands.job import Job
from di_refine.files import networks
from di_refine.generators import NetworkSampler
from di_refine.metrics import compare, kept
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.kinds import MetricSpec
from di_refine.metrics.results import MetricResult
from di_refine.runs.directory import RunDirectory
from di_refine.runs.loop import Loop, measure

TEACHER = "teacher"  # its row
LAG = 1.2  # growth of the student score's margin, from the first to the second half of a run, that tells that it lags


class Comparison:
    """Original, last and best network and teacher, measured alike.

    The original and the teacher are measured before the training, and kept for other runs. The seeds are others than
    those by which the best snapshot was chosen, so that the choice makes it look no better than it is. The teacher,
    which takes long, has one seed.

    Args:
        job: what is trained.
        directory: of the run.
    """

    def __init__(self, job: Job, directory: RunDirectory):
        self.job, self.directory, self.evaluator = job, directory, job.final_evaluator
        self.seeds = [job.trainer.seed + 1 + i for i in range(job.measure.final_seeds)]
        self.original, self.last, self.best, _ = job.subject.rows.values()
        self._measured: dict[str, list[list[MetricResult]]] = {}  # row -> results by seed

    def begin(self) -> None:
        """Measure original and teacher, and say where the teacher has nothing to teach."""
        if self.evaluator is None:
            return
        self._measure_ends(self.evaluator)
        spec, key = self.evaluator.specs[0], self.evaluator.specs[0].result_keys[0]
        found = {summary["source"]: summary for summary in self.summaries() if key in summary["results"]}
        values = {row: summary["results"][key] for row, summary in found.items()}
        shown = [f"{row} {compare.number(values[row], found[row]['sd'].get(key))}" for row in found]
        self.directory.log(f"{key} before: {', '.join(shown)}")
        if not spec.is_better(values[TEACHER], values[self.original]):
            self.directory.log(f"warning: by {key} the teacher is no better than the generator; it has little to teach")

    def finish(self, loop: Loop, net: torch.nn.Module) -> None:
        """Measure what has come out, and what is not measured yet.

        Args:
            loop: which has ended.
            net: the last average.
        """
        if self.evaluator is None:
            return
        self._measure_ends(self.evaluator)
        done = {0: self._measured[self.original]}
        for row, snapshot in ((self.last, loop.last), (self.best, loop.best)):
            nimg, path = (0, None) if snapshot is None else (snapshot.nimg, snapshot.path)
            if nimg not in done:
                which = net if path is None or snapshot is loop.last else networks.load(path).average
                name = None if path is None else path.name
                done[nimg] = self._measure(self.evaluator, row, self.job.sampler(which), self.seeds, name)
            self._measured[row] = done[nimg]

    def _measure_ends(self, evaluator: Evaluator) -> None:
        if self._measured:
            return
        job, device, net = self.job, self.job.device.type, self.job.subject.file.average
        shared = {"labels": job.labels.content, "device": device, "image": (net.img_channels, net.img_resolution)}
        original = {**shared, "file": job.subject.file.digest, **job.subject.facts}
        teacher = {
            **shared,
            "files": [networks.digest(*named) for named in zip(job.subject.teachers, job.subject.configs)],
            "weights": job.teach.teacher_weight,
            "steps": job.teach.teacher_steps,
        }
        sampler, ends = job.sampler(job.subject.file.average), job.teacher_sampler()
        self._measured[self.original] = self._measure(evaluator, self.original, sampler, self.seeds, facts=original)
        self._measured[TEACHER] = self._measure(evaluator, TEACHER, ends, self.seeds[:1], facts=teacher)

    def _measure(
        self,
        evaluator: Evaluator,
        row: str,
        sampler: NetworkSampler,
        seeds: list[int],
        snapshot: str | None = None,
        facts: dict[str, Any] | None = None,
    ) -> list[list[MetricResult]]:
        """The results for each seed; those with `facts` about the sampler are kept for other runs."""
        names = [None if facts is None else kept.key(evaluator, facts, seed) for seed in seeds]
        return [
            measure(evaluator, sampler, seed, self.directory, snapshot, f"measuring {row}", name, row)
            for seed, name in zip(seeds, names)
        ]

    def summaries(self) -> list[dict[str, Any]]:
        """The means over the seeds, and the differences from the original, row by row and metric by metric."""
        rows = [row for row in (self.original, self.last, self.best, TEACHER) if row in self._measured]
        found = [compare.summarise(row, list(metric)) for row in rows for metric in zip(*self._measured[row])]
        compare.add_differences(found)
        steps = self.job.teach.teacher_steps
        return [{**summary, "steps": steps} if summary["source"] == TEACHER else summary for summary in found]


def verdict(job: Job, loop: Loop, summaries: list[dict[str, Any]], margins: list[float]) -> list[str]:
    """Whether the training has helped, in sentences.

    Args:
        job: what was trained.
        loop: which has ended.
        summaries: of a `Comparison`.
        margins: `score_margin` at each tick.
    """
    original, last, best, _ = job.subject.rows.values()
    spec = job.final_evaluator.specs[0] if job.final_evaluator is not None else None
    if spec is None or loop.best is None or loop.last is None:
        return []
    key = spec.result_keys[0]
    rows = {summary["source"]: summary for summary in summaries if key in summary["results"]}
    value = {row: summary["results"][key] for row, summary in rows.items()}
    bounds, kimg = rows[best]["delta_interval"].get(key), f"{loop.best.nimg / 1000:g} kimg"
    change = f"{key} went from {value[original]:.4g} to {value[best]:.4g} in {kimg}"
    if bounds is not None:
        low, high = bounds
        change += f" (change {low:+.3g} to {high:+.3g}, 95% interval over {len(rows[best]['seeds'])} seeds)"
    helped = spec.is_better(value[best], value[original])
    if bounds is not None and not compare.differs(rows[best], key):
        helped, found = False, [f"no difference beyond chance: {change}"]
    elif helped:
        found = [f"better: {change}", f"use {loop.best.path}"]
    else:
        found = [f"worse: {change}; keep the original network"]
    if spec.is_better(value[best], value[last]):
        found.append(f"it was best at {kimg} and is {value[last]:.4g} at the end: shorten --kimg, or lower --lr")
    if not helped:
        found.append(_remedy(spec, value, original, best, margins))
    elif not spec.is_better(value[TEACHER], value[best]):
        found.append("the result is as good as the teacher by this metric; a better teacher could teach more")
    return found


def _remedy(spec: MetricSpec, value: dict[str, float], original: str, best: str, margins: list[float]) -> str:
    """What to try where a training has not helped."""
    if not spec.is_better(value[TEACHER], value[original]):
        return "by this metric the teacher is no better than the original: give a better --teacher"
    half = len(margins) // 2
    if half and statistics.fmean(margins[half:]) > LAG * statistics.fmean(margins[:half]):
        return (
            "the student score lags behind the generator (score_margin still grows): raise --score-lr, "
            "--score-steps or --score-warmup"
        )
    if spec.is_better(value[best], value[original]):
        return "train longer with --kimg"
    return "lower --lr, or raise --score-lr"
