"""What refining a generator and distilling a diffusion model have in common, from files to files.

`refinement.Refinement` and `distillation.Distillation` say what is trained; everything else is here: checks, the
teacher, the trainer, the loop, measurements, the report.
"""

import copy
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from di_refine import noise, objectives, terminal
from di_refine.bridge import Bridge
from di_refine.commands import cli, sample_teacher
from di_refine.commands.options import Options, resolve
from di_refine.critic import Critic
from di_refine.denoisers import Ensemble
from di_refine.edm.augment import AugmentPipe
from di_refine.errors import InputError
from di_refine.files import datasets, pictures, registry
from di_refine.generators import NetworkSampler, averaged, load_kind, load_networks
from di_refine.metrics.evaluate import Evaluator
from di_refine.runs import memory
from di_refine.runs.loop import Loop, RunDirectory, Schedule, Snapshot, measure, open_run
from di_refine.trainer import Trainer, TrainerConfig
from torch_utils import distributed


class Experiment(ABC):
    """Loads and checks everything on creation, before anything runs or is written; then `run()`.

    Args:
        options: of the subclass's kind.
        sources: where options come from that the user did not give, for the record.

    Raises:
        InputError: any option or file that does not fit; the message names it.

    Attributes:
        original: the network that is trained, as it was; `label_dim` are its classes.
        networks: what its file holds.
        teacher: one denoiser, or an `Ensemble`.
    """

    COMMAND = "refine"

    ROWS = {"original": "original", "refined": "refined (last)", "best": "refined (best)", "teacher": "teacher"}
    """Keys of the JSON result and the rows of the table they belong to."""

    original: torch.nn.Module
    networks: dict[str, Any]
    network_path: Path
    label_dim: int

    def __init__(self, options: Options, sources: dict[str, str] | None = None):
        self.options = o = options
        self.sources = sources or {}
        self._check_numbers()
        self.device = cli.pick_device(o.device)
        cli.check_outdir(o.outdir)
        self.teacher_paths: list[Path] = []
        self._load()
        self.teacher = self._load_teachers()
        self._check_pair()
        self.class_probs = sample_teacher.class_probs(o.class_freq, self.label_dim)
        self.dataset = self._dataset()
        self.evaluator = self._evaluator("metrics")
        self.final_evaluator = self._evaluator("final_metrics") or self.evaluator
        names = ", ".join(path.name for path in self.teacher_paths)
        if o.dropout == "matched" and not any(getattr(module, "dropout", 0) for module in self.teacher.modules()):
            raise InputError(f"--dropout=matched has no effect: the teacher {names} was built without dropout")
        wanted, found = AugmentPipe.edm().label_dim, self._augment_dim()
        if o.augment and found != wanted:
            raise InputError(
                f"--augment needs a teacher with {wanted} augmentation labels, and {names} has {found or 'none'}; "
                "leave it out"
            )
        if o.stop_if_worse and not self.evaluator:
            raise InputError("--stop-if-worse goes by the first metric, and there is none; give --metrics")

    # What subclasses say ----------------------------------------------------------------------------------------------

    @abstractmethod
    def _load(self) -> None:
        """Set `original`, `networks`, `network_path`, `label_dim` and `teacher_paths`."""

    @abstractmethod
    def _generator(self, net: torch.nn.Module) -> torch.nn.Module:
        """A network with the trainer's face; has the network as its attribute `net`."""

    @abstractmethod
    def _sampler(self, net: torch.nn.Module) -> NetworkSampler:
        """A network with the metrics' face."""

    @abstractmethod
    def _snapshot(self, trainer: Trainer) -> dict[str, Any]:
        """What a snapshot's file holds."""

    def _critic_networks(self) -> tuple[torch.nn.Module, Any] | None:
        """The discriminator that came with the network and its augmentation, if any."""
        return None

    # ------------------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What `training_options.json` and `--dry-run` say: every option, and what was looked up."""
        net = self.original
        return {
            "command": self.COMMAND,
            **asdict(self.options),
            "sources": self.sources,
            "device": str(self.device),
            "network_file": str(self.network_path),
            "teacher_files": [str(path) for path in self.teacher_paths],
            "data_file": None if self.dataset is None else str(self.dataset.path),
            "metrics": [spec.name for spec in self.evaluator.specs] if self.evaluator else [],
            "final_metrics": [spec.name for spec in self.final_evaluator.specs] if self.final_evaluator else [],
            "resolution": net.img_resolution,
            "channels": net.img_channels,
            "classes": self.label_dim,
            "generator_parameters": _count(net),
            "teacher_parameters": _count(self.teacher),
            "torch": torch.__version__,
        }

    def print_record(self) -> int:
        """What `--dry-run` does: print the record, readably and as the JSON result, with memory and files."""
        if distributed.is_first():
            record = {**self.record(), **self._needs()}
            click.echo(json.dumps(record, indent=2), err=True)
            terminal.print_result(record)
        return 0

    def _needs(self) -> dict[str, Any]:
        """What a run will need: memory at the peak of an update, and room for its files."""
        o = self.options
        free = memory.free_memory(self.device)
        trainer = self._trainer()
        estimator = memory.Estimator(trainer)
        images = None
        if o.batch_gpu == "auto" and free is not None:
            images = estimator.largest_within(memory.SAFETY * free)
        estimate = estimator(images)
        click.echo(f"memory: {estimate}", err=True)
        ticks = math.ceil(o.kimg / o.tick)
        # The newest, the best snapshot, and the one that is written before an old one goes.
        counts = {
            "network-snapshot": min(o.keep + 2, math.ceil(ticks / o.snap)),
            "training-state": min(o.keep + 1, ticks),
        }
        files = {}
        for name, size in memory.file_sizes(trainer, self._snapshot(trainer)).items():
            files[name] = {"at_most": counts[name], "gib_each": memory.gib(size)}
            click.echo(f"files: at most {counts[name]} {name} of {memory.gib(size):g} GiB each", err=True)
        return {"memory": estimate.record(), "files": files}

    def run(self) -> int:
        """Train, measure, write, print the table and the JSON result; returns the exit status.

        Progress goes to stderr. Of several processes all call it, and the first speaks.
        """
        o = self.options
        note = self._choose_batch_gpu()
        trainer = self._trainer()
        desc = o.desc or f"{self.network_path.stem}-{o.objective}-batch{o.batch}"
        directory, state = open_run(o.outdir, o.resume, desc, self.record())
        directory.log(f"run directory: {directory.path}")
        if note is not None:
            directory.log(note)
        for warning in self.evaluator.warnings if self.evaluator else ():
            directory.log(f"warning: {warning}")

        def evaluate():
            # The untouched generator and every later average see the same latents, labels and noise.
            name = f"network-snapshot-{trainer.nimg // 1000:06d}.pkl" if trainer.nimg else None
            return self._measure(self.evaluator, self._sampler(trainer.ema.net), directory, name)

        loop = Loop(
            directory,
            trainer,
            Schedule(
                total=max(round(o.kimg * 1000), 1),
                tick=round(o.tick * 1000),
                snap=o.snap,
                quiet=round(o.score_warmup * 1000),
                max_seconds=o.max_minutes and o.max_minutes * 60,
                keep=o.keep,
                stop_if_worse=o.stop_if_worse,
            ),
            networks=lambda: self._snapshot(trainer),
            evaluate=evaluate if self.evaluator else None,
            higher_is_better=bool(self.evaluator) and self.evaluator.specs[0].higher_is_better,
            picture=lambda path: pictures.save_grid(
                path, self._class_grid(trainer.ema.net), columns=10, scale=self._scale()
            ),
            status={
                "score_loss": "score",
                "score_gap": "|Dp-Dq|",
                "ratio_loss": "ratio",
                "generator_grad_norm": "|g|",
            },
            data_wait=self.reference and (lambda: self.reference.seconds),
        )
        if state is not None:
            loop.resume(state)
        loop()

        rows = {}
        if not interrupted(loop):  # who sends a signal does not want to wait for measurements
            rows = self._final_rows(loop, trainer.ema.net, directory) if self.final_evaluator else {}
            if distributed.is_first():
                self._before_after(directory.path / "before_after.png", rows, trainer.ema.net)
        directory.close()
        if distributed.is_first():
            self._report(loop, rows, directory)
        return loop.exit_status

    # Checks and files -------------------------------------------------------------------------------------------------

    def _check_numbers(self) -> None:
        o = self.options
        if isinstance(o.batch_gpu, str) and o.batch_gpu != "auto":
            raise InputError(f"--batch-gpu must be 'auto' or a whole number, not {o.batch_gpu!r}")
        if o.batch_gpu and o.batch_gpu != "auto" and o.batch % o.batch_gpu:
            raise InputError(f"--batch={o.batch} is not divisible by --batch-gpu={o.batch_gpu}")
        if o.kimg <= o.score_warmup:
            raise InputError(
                f"--kimg={o.kimg:g} ends before the generator moves, which is after --score-warmup={o.score_warmup:g}"
            )
        if o.alpha is not None and o.objective != "sid":
            raise InputError(f"--alpha belongs to --objective=sid, not to --objective={o.objective}")
        known = objectives.get(o.objective)
        if o.detach_ratio and not (o.objective.startswith("uni-") and known.needs_ratio):
            raise InputError(f"--detach-ratio belongs to objectives such as uni-fkl, not to --objective={o.objective}")
        if o.tmax != 800 and o.sigma_dist != "edm-grid":
            raise InputError(f"--tmax={o.tmax:g} belongs to --sigma-dist=edm-grid; give both, or leave it out")
        if o.data is not None and not (known.needs_ratio or o.adversarial_weight):
            raise InputError(
                f"--data has no part in --objective={o.objective}, which needs none; leave it out, or give "
                "--adversarial-weight, too"
            )
        if o.data is None and (known.needs_ratio or o.adversarial_weight):
            what = f"--objective={o.objective}" if known.needs_ratio else "--adversarial-weight"
            raise InputError(
                f"{what} needs --data: real images, or samples of the teacher from python -m di_refine sample-teacher"
            )

    def _load_teachers(self) -> torch.nn.Module:
        """The denoiser of the first teacher, or the ensemble of all."""
        loaded = []
        for path in self.teacher_paths:
            loaded.append(averaged(load_kind(path, "edm", "--teacher")))
        ensemble = Ensemble(loaded, self.options.teacher_weight or None)
        return ensemble if len(loaded) > 1 else loaded[0]

    def _check_pair(self) -> None:
        """Check that network and teacher speak of the same classes; sizes are the bridge's business."""
        own, theirs = self.label_dim, self.teacher.label_dim
        if own != theirs:
            wanted = f"a teacher with {own} classes" if own else "an unconditional teacher"
            raise InputError(
                f"--teacher does not fit --network: it has {theirs or 'no'} classes and the generator "
                f"{own or 'none'}; use {wanted}"
            )
        Bridge(*self._image(self.original), *self._image(self.teacher))

    def _dataset(self) -> datasets.ImageDataset | None:
        """What `--data` names, checked against the generator, or where it may be, the teacher."""
        o = self.options
        if o.data is None:
            return None
        path = Path(o.data)
        if o.data == "teacher":
            if len(self.teacher_paths) > 1:
                raise InputError("--data=teacher has samples of one teacher, not of several together; give real images")
            path = sample_teacher.cached_samples(self.teacher_paths[0])
            if path is None:
                raise InputError(
                    "--data=teacher: nothing has been sampled from this teacher yet; run "
                    f"python -m di_refine sample-teacher --teacher={self.teacher_paths[0]}"
                )
        dataset = datasets.ImageDataset(registry.resolve(path, option="--data"))
        fits_teacher = (dataset.num_channels, dataset.resolution) == self._image(self.teacher)
        if not fits_teacher or self._uses_critic():
            channels, resolution = self._image(self.original)
            dataset.check_compatible(resolution, channels, what="generator")
        if self.label_dim and dataset.label_dim != self.label_dim:
            raise InputError(
                f"--data={o.data} has {dataset.label_dim} classes, but the generator is conditional on {self.label_dim}"
            )
        drawn = np.ones(self.label_dim) if self.class_probs is None else self.class_probs
        if self.label_dim and (missing := np.flatnonzero((dataset.class_frequencies() == 0) & (drawn > 0))).size:
            raise InputError(f"--data={o.data} has no image of class {missing[0]}, which the generator draws")
        return dataset

    def _evaluator(self, option: str) -> Evaluator | None:
        """The metrics of `--metrics` or `--final-metrics`, or those the registry recommends for the network."""
        o = self.options
        given = getattr(o, option)
        names = [] if given in (None, "none", "") else given.split(",")
        if given is None and o.metrics != "none":
            names = (registry.entry_for_path(self.network_path) or {}).get(option, [])
        if not names:
            return None
        reference = o.ref or registry.companion(self.network_path, "statistics")
        several = distributed.world_size() > 1
        return Evaluator(names, reference, o.detector, self.device, workers=o.workers, distributed=several)

    # Training ---------------------------------------------------------------------------------------------------------

    def _choose_batch_gpu(self) -> str | None:
        """Replace `--batch-gpu=auto` by a number; returns what to log."""
        o = self.options
        if o.batch_gpu != "auto":
            return None
        share = distributed.share(o.batch)
        number, how = memory.choose(self._trainer, share.stop - share.start, self.device)
        self.options, self.sources = replace(o, batch_gpu=number), {**self.sources, "batch_gpu": "auto"}
        return f"--batch-gpu=auto: {number} images per forward pass ({how})"

    def _trainer(self, batch_gpu: int | None = None) -> Trainer:
        """A trainer on copies of the networks; `batch_gpu` goes before the option."""
        o = self.options
        if batch_gpu is None and o.batch_gpu != "auto":
            batch_gpu = o.batch_gpu
        generator = self._generator(copy.deepcopy(self.original)).to(self.device)
        teacher = copy.deepcopy(self.teacher).to(self.device, memory_format=torch.channels_last)
        student = copy.deepcopy(teacher.teachers[0]) if isinstance(teacher, Ensemble) else None
        low, high = self.teacher.sigma_min, self.teacher.sigma_max
        lognormal = noise.LogNormal(o.sigma_mean, o.sigma_std, low, high)
        grid = noise.EdmGrid(max(0.002, low), min(80.0, high), tmax=o.tmax)
        config = TrainerConfig(
            objective=o.objective,
            weight=o.weight,
            normalize=o.normalize,
            alpha=o.alpha,
            detach_ratio=o.detach_ratio,
            lr=o.lr,
            score_lr=o.score_lr,
            ratio_lr=o.ratio_lr,
            betas=(o.beta1, 0.999),
            batch=o.batch,
            batch_gpu=batch_gpu,
            sigma=grid if o.sigma_dist == "edm-grid" else lognormal,
            score_sigma=lognormal if o.sigma_dist == "edm-grid" else None,
            score_steps=o.score_steps,
            score_warmup=round(o.score_warmup * 1000),
            ratio_weight=o.ratio_weight,
            ratio_clamp=o.ratio_clamp,
            ratio_r1=o.ratio_r1,
            ratio_spectral_norm=o.ratio_spectral_norm,
            adversarial_weight=o.adversarial_weight,
            ema_nimg=o.ema_kimg * 1000,
            dropout=o.dropout,
            precision=o.precision,
            teacher_precision=o.teacher_precision,
            score_precision=o.score_precision,
            generator_precision=o.generator_precision,
            max_grad_norm=o.max_grad_norm,
            checkpoint_score=o.checkpoint_score,
            class_probs=self.class_probs,
            sigma_data=getattr(self.teacher, "sigma_data", 0.5),
            seed=o.seed,
        )
        self.reference = None
        if self.dataset is not None:
            labels = self.label_dim > 0
            self.reference = datasets.Stream(self.dataset, o.batch, o.seed, self.device, o.workers, labels)
        own, theirs = self._image(self.original), self._image(self.teacher)
        return Trainer(
            generator,
            teacher,
            config,
            student,
            bridge=Bridge(*own, *theirs) if own != theirs else None,
            reference=self.reference,
            critic=self._critic(),
            augment=AugmentPipe.edm(o.augment) if o.augment else None,
        )

    def _uses_critic(self) -> bool:
        return self.options.adversarial_weight > 0 and self._critic_networks() is not None

    def _critic(self) -> Critic | None:
        if not self._uses_critic():
            return None
        net, augment = copy.deepcopy(self._critic_networks())
        if augment is not None:
            augment = augment.to(self.device)
        return Critic(net.to(self.device), self.options.gamma, augment)

    def _augment_dim(self) -> int:
        first = self.teacher.teachers[0] if isinstance(self.teacher, Ensemble) else self.teacher
        layer = getattr(first.model, "map_augment", None)
        return layer.in_features if layer is not None else 0

    @staticmethod
    def _image(net: torch.nn.Module) -> tuple[int, int]:
        return net.img_channels, net.img_resolution

    # Measuring --------------------------------------------------------------------------------------------------------

    def _teacher_sampler(self) -> NetworkSampler:
        own, theirs = self._image(self.original), self._image(self.teacher)
        return NetworkSampler(
            self.teacher,
            self.device,
            self.options.teacher_steps,
            class_probs=self.class_probs,
            bridge=Bridge(*theirs, *own) if own != theirs else None,
        )

    def _measure(
        self, evaluator: Evaluator, sampler: NetworkSampler, directory: RunDirectory, snapshot: str | None
    ) -> dict[str, float]:
        return measure(evaluator, sampler, self.options.seed, directory, snapshot)

    def _final_rows(self, loop: Loop, net: torch.nn.Module, directory: RunDirectory) -> dict[str, dict[str, float]]:
        """What the table says: final metrics of the original, the last, the best and the teacher."""
        snapshots = dict(zip(self.ROWS.values(), (loop.first, loop.last, loop.best)))
        if self.final_evaluator is self.evaluator:
            rows = {row: snapshot.results for row, snapshot in snapshots.items()}
        else:
            nets = {loop.first.path: self.original, loop.last.path: net}
            by_path: dict[Path | None, dict[str, float]] = {}
            for path in (snapshot.path for snapshot in snapshots.values()):
                if path not in by_path:
                    which = nets[path] if path in nets else averaged(load_networks(path)[1])
                    sampler = self._sampler(which)
                    by_path[path] = self._measure(self.final_evaluator, sampler, directory, path and path.name)
            rows = {row: by_path[snapshot.path] for row, snapshot in snapshots.items()}
        directory.log("measuring the teacher")
        rows["teacher"] = self._measure(self.final_evaluator, self._teacher_sampler(), directory, None)
        return rows

    def _class_grid(self, net: torch.nn.Module, rows: int = 8) -> torch.Tensor:
        """Ten columns of samples from fixed latents; the columns are classes where there are any."""
        seeds = list(range(10 * rows))
        sampler = self._sampler(net)
        labels = torch.zeros(len(seeds), sampler.label_dim)
        if sampler.label_dim:
            columns = (
                torch.arange(10) * sampler.label_dim // 10
                if sampler.label_dim > 10
                else torch.arange(10) % sampler.label_dim
            )
            labels[torch.arange(len(seeds)), columns.repeat(rows)] = 1
        return pictures.to_uint8(sampler.images(seeds, labels, noise_mode="const"))

    def _scale(self) -> int:
        return max(1, 32 // self.original.img_resolution)

    def _before_after(self, path: Path, rows: dict[str, dict[str, float]], net: torch.nn.Module) -> None:
        panels = []
        for row, which in zip(self.ROWS.values(), (self.original, net)):
            values = "  ".join(f"{name} {value:.3g}" for name, value in list(rows.get(row, {}).items())[:1])
            title = row.removesuffix(" (last)")
            panels.append((f"{title}\n{values}" if values else title, self._class_grid(which)))
        pictures.save_side_by_side(path, panels, columns=10)

    def _report(self, loop: Loop, rows: dict[str, dict[str, float]], directory: RunDirectory) -> None:
        last, best = (snapshot or Snapshot(0, None) for snapshot in (loop.last, loop.best))  # none yet: an early signal
        result: dict[str, Any] = {
            "run_dir": directory.path,
            "snapshot": last.path,
            "best_snapshot": best.path,
            "images_per_sec": loop.images_per_sec,
            "kimg": loop.trainer.nimg / 1000,
            "stopped": loop.stopped,
        }
        if rows:
            names = list(next(iter(rows.values())))
            terminal.table([[row, *map(results.get, names)] for row, results in rows.items()], ["network", *names])
            values = {key: rows[row][names[0]] for key, row in self.ROWS.items()}
            result = {"metric": names[0], **values, **result, "all": rows}
        terminal.print_result(result)


def launch(
    kind: type[Experiment],
    options: type[Options],
    context: click.Context,
    values: dict[str, Any],
    recommended: Mapping[str, Any],
    dry_run: bool,
) -> int:
    """What a command does with the options it was given; returns its exit status.

    Args:
        kind: of experiment.
        options: the class of its options.
        context: of the command.
        values: as the command received them.
        recommended: by the registry, see `options.resolve`.
        dry_run: only print what would be done.
    """
    values, sources = resolve(context, values, recommended)
    with distributed.process_group(cli.pick_device(values["device"])) as device:
        experiment = kind(options(**{**values, "device": str(device)}), sources)
        return experiment.print_record() if dry_run else experiment.run()


def interrupted(loop: Loop) -> bool:
    """Whether a signal ended it."""
    return loop.stopped is not None and loop.stopped.startswith("SIG")


def _count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
