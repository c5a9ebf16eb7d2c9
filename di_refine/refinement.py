"""Refining a StyleGAN2 generator with a diffusion teacher, from files to files: what `refine.py` runs."""

import copy
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from di_refine import cli, data, images, noise, zoo
from di_refine.errors import InputError
from di_refine.generators import NetworkSampler, StyleGAN2Generator, load_networks
from di_refine.metrics.evaluate import Evaluator
from di_refine.run import Loop, RunDirectory, Schedule, find_run_to_resume, measure
from di_refine.trainer import Trainer, TrainerConfig
from torch_utils.persistence import NetworkFormatError


@dataclass
class RefineOptions:
    """The options of `refine.py`, under their names there; None where the registry or the networks decide.

    Thousands of images are in `kimg`s, learning rates are Adam's, everything else is as `--help` says.
    """

    network: str
    teacher: str | None = None
    outdir: str = "runs"
    desc: str | None = None
    kimg: float = 5000
    batch: int = 128
    batch_gpu: int | None = None
    lr: float = 1e-5
    score_lr: float = 1e-5
    score_warmup: float = 20
    ema_kimg: float = 500
    objective: str = "ikl"
    weight: str = "default"
    normalize: bool | None = None
    alpha: float | None = None
    sigma_mean: float = -1.2
    sigma_std: float = 1.2
    dropout: str = "off"
    precision: str = "fp32"
    class_freq: str | None = None
    metrics: str | None = None
    final_metrics: str | None = None
    detector: str | None = None
    ref: str | None = None
    teacher_steps: int = 18
    tick: float = 50
    snap: int = 10
    seed: int = 0
    device: str = "auto"
    workers: int = 2
    resume: str | None = None


RECOMMENDED = tuple(
    f.name for f in fields(RefineOptions) if f.name not in ("network", "outdir", "seed", "device", "resume")
)
"""Options that a registry entry may recommend values for, in its `refine` field."""


class Refinement:
    """Loads and checks everything on creation, before anything runs or is written; then `run()`.

    Args:
        options: see `RefineOptions`.

    Raises:
        InputError: any option or file that does not fit; the message names it.
        NetworkFormatError: a file that is not a network.
    """

    def __init__(self, options: RefineOptions):
        self.options = o = options
        if o.batch_gpu and o.batch % o.batch_gpu:
            raise InputError(f"--batch={o.batch} is not divisible by --batch-gpu={o.batch_gpu}")
        if o.kimg <= o.score_warmup:
            raise InputError(
                f"--kimg={o.kimg:g} ends before the generator moves, which is after --score-warmup={o.score_warmup:g}"
            )
        if o.alpha is not None and o.objective != "sid":
            raise InputError(f"--alpha belongs to --objective=sid, not to --objective={o.objective}")
        self.device = cli.pick_device(o.device)
        cli.check_outdir(o.outdir)
        self.resumed = find_run_to_resume(o.resume) if o.resume else None

        self.network_path = zoo.resolve(o.network, option="--network")
        self.networks = _load(self.network_path, "stylegan2", "--network")
        self.original: torch.nn.Module = self.networks["G_ema"]
        teacher_path = self._teacher_path()
        teacher_networks = _load(teacher_path, "edm", "--teacher")
        self.teacher = teacher_networks.get("ema", teacher_networks.get("G_ema"))
        self.teacher_path = teacher_path
        check_pair(self.original, self.teacher)
        self.class_probs = self._class_probs()
        self.evaluator = self._evaluator("metrics")
        self.final_evaluator = self._evaluator("final_metrics") or self.evaluator
        if o.dropout == "matched" and not _has_dropout(self.teacher):
            raise InputError(
                f"--dropout=matched has no effect: the teacher {teacher_path.name} was built without dropout"
            )

    def record(self) -> dict[str, Any]:
        """What `training_options.json` and `--dry-run` say: every option, and what was looked up."""
        net = self.original
        return {
            **asdict(self.options),
            "device": str(self.device),
            "network_file": str(self.network_path),
            "teacher_file": str(self.teacher_path),
            "metrics": [spec.name for spec in self.evaluator.specs] if self.evaluator else [],
            "final_metrics": [spec.name for spec in self.final_evaluator.specs] if self.final_evaluator else [],
            "resolution": net.img_resolution,
            "channels": net.img_channels,
            "classes": net.c_dim,
            "generator_parameters": sum(p.numel() for p in net.parameters()),
            "teacher_parameters": sum(p.numel() for p in self.teacher.parameters()),
            "torch": torch.__version__,
        }

    def run(self) -> dict[str, Any]:
        """Train, measure, write; returns the JSON result. Progress goes to stderr, the table to stdout."""
        o = self.options
        trainer = self._trainer()
        if self.resumed:
            directory, state = self.resumed
        else:
            desc = o.desc or f"{self.network_path.stem}-{o.objective}-batch{o.batch}"
            directory, state = RunDirectory.create(o.outdir, desc, self.record()), None
        directory.log(f"run directory: {directory.path}")
        for warning in self.evaluator.warnings if self.evaluator else ():
            directory.log(f"warning: {warning}")

        def evaluate():
            # The untouched generator and every later average see the same latents, labels and noise.
            name = f"network-snapshot-{trainer.nimg // 1000:06d}.pkl" if trainer.nimg else None
            return self._measure(self.evaluator, trainer.ema.net, directory, name)

        loop = Loop(
            directory,
            trainer,
            Schedule(max(round(o.kimg * 1000), 1), round(o.tick * 1000), o.snap, quiet=round(o.score_warmup * 1000)),
            networks=lambda: {**self.networks, "G": trainer.generator.net, "G_ema": trainer.ema.net},
            evaluate=evaluate if self.evaluator else None,
            higher_is_better=bool(self.evaluator) and self.evaluator.specs[0].higher_is_better,
            picture=lambda path: images.save_grid(
                path, self._class_grid(trainer.ema.net), columns=10, scale=self._scale()
            ),
            status={"score_loss": "score", "score_gap": "|Dp-Dq|", "generator_grad_norm": "|g|"},
        )
        if state is not None:
            loop.resume(state)
        loop()

        rows = self._final_rows(loop, trainer.ema.net, directory) if self.final_evaluator else {}
        self._before_after(directory.path / "before_after.png", rows, trainer.ema.net)
        directory.close()
        return self._report(loop, rows, directory)

    # ------------------------------------------------------------------------------------------------------------------

    def _teacher_path(self) -> Path:
        if self.options.teacher is not None:
            return zoo.resolve(self.options.teacher, option="--teacher")
        path = zoo.companion(self.network_path, "teacher")
        if path is None:
            raise InputError(
                f"--teacher is needed: the registry knows no diffusion model for {self.network_path.name}; "
                "name an EDM pickle of the same resolution, channels and classes"
            )
        return path

    def _class_probs(self) -> np.ndarray | None:
        """Label frequencies: uniform, a list of numbers, or those of a data set."""
        text, classes = self.options.class_freq, self.original.c_dim
        if text is None or text == "uniform":
            return None
        if not classes:
            raise InputError(f"--class-freq={text}: the generator has no classes")
        try:
            freq = np.array([float(word) for word in text.split(",")])
        except ValueError:
            freq = data.ImageDataset(
                zoo.resolve(text, option="--class-freq"), option="--class-freq"
            ).class_frequencies()
        if len(freq) != classes or (freq < 0).any() or not freq.sum() > 0:
            raise InputError(
                f"--class-freq must give {classes} frequencies, one per class of the generator, not {len(freq)}"
            )
        return freq / freq.sum()

    def _evaluator(self, option: str) -> Evaluator | None:
        """The metrics of `--metrics` or `--final-metrics`, or those the registry recommends for the network."""
        o = self.options
        given = getattr(o, option)
        names = [] if given in (None, "none", "") else given.split(",")
        if given is None and o.metrics != "none":
            names = (zoo.entry_for_path(self.network_path) or {}).get(option, [])
        if not names:
            return None
        reference = o.ref or zoo.companion(self.network_path, "statistics")
        return Evaluator(names, reference, o.detector, self.device, workers=o.workers)

    def _trainer(self) -> Trainer:
        o = self.options
        generator = StyleGAN2Generator(copy.deepcopy(self.original)).to(self.device)
        teacher = copy.deepcopy(self.teacher).to(self.device, memory_format=torch.channels_last)
        config = TrainerConfig(
            objective=o.objective,
            weight=o.weight,
            normalize=o.normalize,
            alpha=o.alpha,
            lr=o.lr,
            score_lr=o.score_lr,
            batch=o.batch,
            batch_gpu=o.batch_gpu,
            sigma=noise.LogNormal(o.sigma_mean, o.sigma_std, self.teacher.sigma_min, self.teacher.sigma_max),
            score_warmup=round(o.score_warmup * 1000),
            ema_nimg=o.ema_kimg * 1000,
            dropout=o.dropout,
            precision=o.precision,
            class_probs=self.class_probs,
            sigma_data=getattr(self.teacher, "sigma_data", 0.5),
            seed=o.seed,
        )
        return Trainer(generator, teacher, config)

    def _sampler(self, net: torch.nn.Module) -> NetworkSampler:
        return NetworkSampler(net, self.device, num_steps=self.options.teacher_steps, class_probs=self.class_probs)

    def _measure(
        self, evaluator: Evaluator, net: torch.nn.Module, directory: RunDirectory, snapshot: str | None
    ) -> dict[str, float]:
        return measure(evaluator, self._sampler(net), self.options.seed, directory, snapshot)

    def _final_rows(self, loop: Loop, net: torch.nn.Module, directory: RunDirectory) -> dict[str, dict[str, float]]:
        """What the table says: final metrics of the original, the last, the best and the teacher."""
        snapshots = {"original": loop.first, "refined (last)": loop.last, "refined (best)": loop.best}
        if self.final_evaluator is self.evaluator:
            rows = {row: snapshot.results for row, snapshot in snapshots.items()}
        else:
            nets = {loop.first.path: self.original, loop.last.path: net}
            by_path: dict[Path | None, dict[str, float]] = {}
            for path in (snapshot.path for snapshot in snapshots.values()):
                if path not in by_path:
                    which = nets[path] if path in nets else load_networks(path)[1]["G_ema"]
                    by_path[path] = self._measure(self.final_evaluator, which, directory, path and path.name)
            rows = {row: by_path[snapshot.path] for row, snapshot in snapshots.items()}
        directory.log("measuring the teacher")
        rows["teacher"] = self._measure(self.final_evaluator, self.teacher, directory, None)
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
        return images.to_uint8(sampler.images(seeds, labels, noise_mode="const"))

    def _scale(self) -> int:
        return max(1, 32 // self.original.img_resolution)

    def _before_after(self, path: Path, rows: dict[str, dict[str, float]], net: torch.nn.Module) -> None:
        panels = []
        for title, row, which in [("original", "original", self.original), ("refined", "refined (last)", net)]:
            values = "  ".join(f"{name} {value:.3g}" for name, value in list(rows.get(row, {}).items())[:1])
            panels.append((f"{title}\n{values}" if values else title, self._class_grid(which)))
        images.save_side_by_side(path, panels, columns=10)

    def _report(self, loop: Loop, rows: dict[str, dict[str, float]], directory: RunDirectory) -> dict[str, Any]:
        result: dict[str, Any] = {
            "run_dir": str(directory.path),
            "snapshot": str(loop.last.path),
            "best_snapshot": str(loop.best.path),
            "images_per_sec": loop.images_per_sec,
            "kimg": loop.trainer.nimg / 1000,
        }
        if not rows:
            return result
        names = list(rows["original"])
        cli.table([[row, *map(results.get, names)] for row, results in rows.items()], ["network", *names])
        short = {"original": "original", "refined": "refined (last)", "best": "refined (best)", "teacher": "teacher"}
        values = {key: rows[row][names[0]] for key, row in short.items()}
        return {"metric": names[0], **values, **result, "all": rows}


def check_pair(generator: torch.nn.Module, teacher: torch.nn.Module) -> None:
    """Check that a StyleGAN2 generator and a denoiser speak of the same images and classes.

    Raises:
        InputError: naming both values of the first thing that differs.
    """
    for what, own, theirs in [
        ("resolution", generator.img_resolution, teacher.img_resolution),
        ("number of channels", generator.img_channels, teacher.img_channels),
    ]:
        if own != theirs:
            raise InputError(f"--teacher does not fit --network: {what} is {theirs} there and {own} in the generator")
    own, theirs = generator.c_dim, teacher.label_dim
    if own != theirs:
        wanted = f"a teacher with {own} classes" if own else "an unconditional teacher"
        raise InputError(
            f"--teacher does not fit --network: it has {theirs or 'no'} classes and the generator {own or 'none'}; "
            f"use {wanted}"
        )


def _load(path: Path, kind: str, option: str) -> dict:
    try:
        found, networks = load_networks(path)
    except NetworkFormatError as error:
        raise InputError(f"{option}: {error}") from None
    if found != kind:
        names = {"stylegan2": "a StyleGAN2 generator", "edm": "an EDM diffusion model"}
        hint = "--teacher" if option == "--network" else "--network"
        raise InputError(f"{option}={os.fspath(path)} is {names[found]}, not {names[kind]}; did you mean {hint}?")
    return networks


def _has_dropout(net: torch.nn.Module) -> bool:
    return any(getattr(module, "dropout", 0) for module in net.modules())
