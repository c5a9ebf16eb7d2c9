"""What `refine.py` and `distill.py` do with a job: `run` it, or say by `dry_run` what a run would do."""

import json
import math
from dataclasses import replace

from di_refine import terminal
from di_refine.commands import ending
from di_refine.commands.comparison import Comparison
from di_refine.commands.job import Job, description, make_trainer
from di_refine.commands.overview import Overview
from di_refine.commands.training import Session
from di_refine.files.datasets import Stream
from di_refine.generators import NetworkSampler
from di_refine.metrics.evaluate import Evaluator
from di_refine.runs import memory
from di_refine.trainer import Trainer
from torch_utils import distributed


def dry_run(job: Job) -> int:
    """Print the record, readably and as the JSON result, with the memory and files that a run needs."""
    if not distributed.is_first():
        return 0
    trainer, stream = make_trainer(job)
    _session(job, trainer, stream).check()
    needs: dict[str, float] = {f"{name}_gib": memory.gib(size) for name, size in memory.tensor_sizes(trainer).items()}
    parts = ", ".join(f"{name.removesuffix('_gib')} {size:g} GiB" for name, size in needs.items())
    terminal.say(f"memory per device, besides activations: {parts}")
    ticks = math.ceil(job.loop.kimg / job.loop.tick)
    # The newest, the best snapshot, and the one that is written before an old one goes.
    counts = {
        "network-snapshot": min(job.loop.keep + 2, math.ceil(ticks / job.loop.snap)),
        "training-state": min(job.loop.keep + 1, ticks),
    }
    files = {}
    for name, size in memory.file_sizes(trainer, job.snapshot(trainer)).items():
        files[name] = {"at_most": counts[name], "gib_each": memory.gib(size)}
        terminal.say(f"files: at most {counts[name]} {name} of {memory.gib(size):g} GiB each")
    needs["trained_parameters"] = memory.trained_parameters(trainer)
    record = {**job.record(), "memory": needs, "files": files}
    terminal.show(json.dumps(record, indent=2), err=True)
    terminal.print_result(record)
    return 0


def run(job: Job) -> int:
    """Train, measure, write, print the table and the JSON result; returns the exit status.

    Progress goes to stderr. Of several processes all call it, and the first speaks.
    """
    notes = [job.labels.sentence] if job.labels.sentence else []
    notes += [f"warning: {warning}" for warning in (job.evaluator.warnings if job.evaluator else ())]
    if job.trainer.batch_gpu == "auto":
        share = distributed.share(job.trainer.batch)
        images, how = memory.choose(lambda n: make_trainer(job, n)[0], share.stop - share.start, job.device)
        job = replace(
            job,
            trainer=replace(job.trainer, batch_gpu=images),
            sources={**job.sources, "batch_gpu": "auto"},
        )
        notes.insert(0, f"--batch-gpu=auto: {images} images per forward pass ({how})")
    trainer, stream = make_trainer(job)
    session = _session(job, trainer, stream)
    directory, state = session.open()
    comparison = Comparison(job, directory)
    for note in notes:
        directory.log(note)
    loop = session.train(directory, state, comparison.begin)
    ending.finish(job, loop, trainer, comparison)
    return loop.exit_status


def _session(job: Job, trainer: Trainer, stream: Stream | None) -> Session:
    subject = job.subject
    final = job.final_evaluator

    def measured() -> list[tuple[Evaluator, NetworkSampler]]:
        sampler: NetworkSampler = job.sampler(subject.file.average)
        found = [(evaluator, sampler) for evaluator in (job.evaluator, final) if evaluator is not None]
        return found if final is None else [*found, (final, job.teacher_sampler())]

    return Session(
        trainer=trainer,
        loop=job.loop,
        run=job.run,
        settings=tuple(type(part) for part in job.settings),
        description=description(subject, job.run, job.trainer),
        record=job.record(),
        networks=lambda: job.snapshot(trainer),
        sampler=lambda: job.sampler(trainer.ema.net),
        picture=lambda path: ending.save_class_grid(path, job.sampler(trainer.ema.net, "const")),
        status={"score_loss": "score", "score_gap": "|Dp-Dq|", "ratio_loss": "ratio", "generator_grad_norm": "|g|"},
        evaluator=job.evaluator,
        measured=measured,
        seed=job.trainer.seed,
        overview=Overview(
            {"generator": trainer.generator, "teacher": trainer.teacher},
            job.trainer.batch,
            job.device,
            job.trainer.precision,
            job.dataset,
        ),
        warmup=job.trainer.warmup_nimg,
        stream=stream,
    )
