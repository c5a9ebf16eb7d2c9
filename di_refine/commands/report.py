"""What `refine.py` and `distill.py` say at the end: a table of original, result and teacher, and a picture of both."""

import time
from pathlib import Path
from typing import Any

import torch

from di_refine import terminal
from di_refine.commands.job import Job
from di_refine.files import networks, pictures
from di_refine.generators import NetworkSampler
from di_refine.metrics.evaluate import Evaluator
from di_refine.runs import stopping
from di_refine.runs.directory import RunDirectory
from di_refine.runs.loop import Loop, Snapshot, measure
from torch_utils import distributed

DRAWING_SECONDS = 15.0  # after which a picture in the course of a training gets no further row

COLUMNS = 10
"""Of the picture that compares before and after; they are classes where there are any."""


def finish(job: Job, loop: Loop, net: torch.nn.Module, directory: RunDirectory) -> None:
    """Measure what the table compares, draw the picture, close the directory, and print table and JSON result.

    Args:
        job: what was trained.
        loop: which has ended.
        net: the last average.
        directory: of the run.
    """
    rows: dict[str, dict[str, float]] = {}
    if not loop.interrupted:  # who sends a signal does not want to wait for measurements
        if job.final_evaluator is not None:
            rows = _final_rows(job, job.final_evaluator, loop, net, directory)
        if distributed.is_first():
            _before_after(job, directory.files.before_after, rows, net)
    directory.close()
    if distributed.is_first():
        _print(job, loop, rows, directory)


def class_grid(
    sampler: NetworkSampler, rows: int = 8, seconds: float | None = None
) -> tuple[torch.Tensor, pictures.Titles]:
    """Samples from fixed latents, uint8 `[10 rows, C, R, R]`, and titles of the ten columns.

    The columns are classes where there are any; those that are never drawn are left out.

    Args:
        sampler: makes them.
        rows: how many.
        seconds: begin no further row after so long, as a large diffusion model takes minutes for all; None for no
            limit.

    Raises:
        stopping.Interrupted: inside a loop, when a signal asks it to stop.
    """
    start, law, parts = time.monotonic(), sampler.law, []
    with terminal.progress(rows, "drawing", "rows", check=stopping.check) as bar:
        for row in range(rows):
            if row and seconds is not None and time.monotonic() - start > seconds:
                break
            seeds = list(range(COLUMNS * row, COLUMNS * (row + 1)))
            labels = law.of_seeds(seeds)
            if law.label_dim and law.has_classes:
                present = torch.tensor(law.present)
                columns = torch.arange(COLUMNS)
                columns = columns * len(present) // COLUMNS if len(present) > COLUMNS else columns % len(present)
                labels = torch.eye(law.label_dim)[present[columns]]
            parts.append((pictures.to_uint8(sampler.images(seeds, labels)), labels))
            bar.update()
    images, all_labels = (torch.cat(part) for part in zip(*parts))
    return images, law.titles(all_labels, COLUMNS, pictures.is_drawable)


def _final_rows(
    job: Job, evaluator: Evaluator, loop: Loop, net: torch.nn.Module, directory: RunDirectory
) -> dict[str, dict[str, float]]:
    """What the table says: final metrics of the original, the last, the best and the teacher."""
    seed = job.trainer.seed
    ends = (loop.first or Snapshot(0, None), loop.last or Snapshot(0, None), loop.best or Snapshot(0, None))
    snapshots = dict(zip(job.subject.rows.values(), ends))
    if evaluator is job.evaluator:
        rows = {row: snapshot.results for row, snapshot in snapshots.items()}
    else:
        nets = {ends[0].path: job.subject.file.average, ends[1].path: net}
        measured: dict[Path | None, dict[str, float]] = {}
        for path in (snapshot.path for snapshot in ends):
            if path not in measured:
                which = nets[path] if path is None or path in nets else networks.load(path).average
                name = None if path is None else path.name
                measured[path] = measure(evaluator, job.sampler(which), seed, directory, name)
        rows = {row: measured[snapshot.path] for row, snapshot in snapshots.items()}
    directory.log("measuring the teacher")
    rows["teacher"] = measure(evaluator, job.teacher_sampler(), seed, directory, None)
    return rows


def save_class_grid(path: Path, sampler: NetworkSampler) -> None:
    """Write `class_grid` as a picture in which small images are enlarged; what is slow has fewer rows."""
    samples, titles = class_grid(sampler, seconds=DRAWING_SECONDS)
    pictures.save_grid(path, samples, COLUMNS, scale=max(1, 32 // sampler.resolution), titles=titles)


def _before_after(job: Job, path: Path, rows: dict[str, dict[str, float]], net: torch.nn.Module) -> None:
    panels = []
    for row, which in zip(job.subject.rows.values(), (job.subject.file.average, net)):
        values = "  ".join(f"{name} {value:.3g}" for name, value in list(rows.get(row, {}).items())[:1])
        title = row.removesuffix(" (last)")
        samples, titles = class_grid(job.sampler(which, "const"))
        panels.append((f"{title}\n{values}" if values else title, samples))
    pictures.save_side_by_side(path, panels, columns=COLUMNS, titles=titles)


def _print(job: Job, loop: Loop, rows: dict[str, dict[str, float]], directory: RunDirectory) -> None:
    last, best = (snapshot or Snapshot(0, None) for snapshot in (loop.last, loop.best))  # none yet: an early signal
    result: dict[str, Any] = {
        "run_dir": directory.path,
        "snapshot": last.path,
        "best_snapshot": best.path,
        "images_per_sec": loop.images_per_sec,
        "kimg": loop.trainer.nimg / 1000,
        "stopped": loop.stopped,
        "labels": job.labels.described,
    }
    if rows:
        names = list(next(iter(rows.values())))
        terminal.table([[row, *map(results.get, names)] for row, results in rows.items()], ["network", *names])
        values = {key: rows[row][names[0]] for key, row in job.subject.rows.items()}
        result = {"metric": names[0], **values, **result, "all": rows}
    terminal.print_result(result)
