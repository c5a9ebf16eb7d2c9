"""What `refine.py` and `distill.py` have in common: from options to a job, in which all is loaded and checked."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from di_refine import denoisers
from di_refine.bridge import Bridge
from di_refine.commands import cli, training
from di_refine.commands.config import TeachConfig
from di_refine.commands.options import make
from di_refine.commands.training import make_evaluator, recorded
from di_refine.config import TrainerConfig
from di_refine.critic import Critic
from di_refine.edm.augment import AugmentPipe
from di_refine.errors import InputError
from di_refine.files import diffusers_folder, hub, label_laws, networks, registry, teacher_samples
from di_refine.files.datasets import ImageDataset, Stream
from di_refine.files.networks import NetworkFile
from di_refine.generators import DiffusionSampler, GeneratorSampler
from di_refine.labels import KEY, LabelLaw
from di_refine.metrics.config import MeasureConfig
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.kinds import TEACHER
from di_refine.metrics.teacher_net import TeacherReference
from di_refine.presets import Facts
from di_refine.runs import directory
from di_refine.runs.config import LoopConfig, RunConfig
from di_refine.trainer import Trainer
from torch_utils.settings import Settings


@dataclass(frozen=True)
class Subject:
    """What is trained: a network, and what makes a generator and a file of it.

    Attributes:
        command: 'refine' or 'distill'.
        config: the settings of that command alone.
        file: where the network comes from; its `average` is the network as it was.
        label_dim: its classes.
        teachers: files of the teachers.
        configs: for each, the JSON file that says what its file does not, or None.
        generator: `(network, noise_mode) -> generator`.
        snapshot: what a snapshot's file holds.
        rows: keys of the JSON result, and the rows of the final table that they belong to.
        facts: what the record says besides.
        discriminator, augment_pipe: what came with the network, if anything.
    """

    command: str
    config: Settings
    file: NetworkFile
    label_dim: int
    teachers: list[Path]
    configs: list[Path | None]
    generator: Callable[[Any, str], torch.nn.Module]
    snapshot: Callable[[Trainer], dict[str, Any]]
    rows: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)
    discriminator: torch.nn.Module | None = None
    augment_pipe: torch.nn.Module | None = None

    @property
    def writes_diffusers(self) -> bool:
        """Whether what is trained came from a diffusers folder, so that the result is written as one, too."""
        return diffusers_folder.KEY in self.file.networks


@dataclass(frozen=True)
class Job:
    """A subject with its settings, and everything that they name, loaded and checked.

    Attributes:
        subject: what is trained.
        teach, trainer, loop, run, measure: the settings.
        sources: where settings come from that the user did not give.
        device: where to compute.
        teacher: one denoiser, or an `Ensemble`.
        labels: what labels are drawn from.
        dataset: what `data` names, if anything.
        evaluator, final_evaluator: what measures snapshots, and the table at the end; None measures nothing.
    """

    subject: Subject
    teach: TeachConfig
    trainer: TrainerConfig
    loop: LoopConfig
    run: RunConfig
    measure: MeasureConfig
    sources: dict[str, str]
    device: torch.device
    teacher: torch.nn.Module
    labels: LabelLaw
    dataset: ImageDataset | None
    evaluator: Evaluator | None
    final_evaluator: Evaluator | None

    @property
    def settings(self) -> tuple[Settings, ...]:
        """All settings, the command's own first."""
        return (self.subject.config, self.teach, self.trainer, self.loop, self.run, self.measure)

    def record(self) -> dict[str, Any]:
        """What `training_options.json` and `--dry-run` say: every setting, and what was looked up."""
        net, final = self.subject.file.average, self.final_evaluator
        return {
            "command": self.subject.command,
            **recorded(*self.settings),
            "sources": self.sources,
            "device": str(self.device),
            "network_file": str(self.subject.file.path),
            "teacher_files": [str(path) for path in self.subject.teachers],
            "data_file": None if self.dataset is None else str(self.dataset.path),
            "metrics": [spec.name for spec in self.evaluator.specs] if self.evaluator else [],
            "final_metrics": [spec.name for spec in final.specs] if final else [],
            "resolution": net.img_resolution,
            "channels": net.img_channels,
            "classes": self.subject.label_dim,
            "labels_from": self.labels.described,
            "label_law": self.labels.content,
            "class_names": list(self.labels.names),
            "generator_parameters": _count(net),
            "teacher_parameters": _count(self.teacher),
            **self.subject.facts,
            "torch": torch.__version__,
        }

    def snapshot(self, trainer: Trainer) -> dict[str, Any]:
        """What a snapshot's file holds. It keeps the law of its training, so that others measure the same network."""
        own = {KEY: self.labels.kept().record()} if self.labels.is_chosen and self.labels.label_dim else {}
        return {**self.subject.snapshot(trainer), **own}

    def sampler(self, net: torch.nn.Module, noise_mode: str = "random") -> GeneratorSampler:
        """A sampler over a network of the subject's kind."""
        generator = self.subject.generator(net, noise_mode)
        return GeneratorSampler(generator, self.device, law=self.labels, name="the generator")

    def teacher_sampler(self) -> DiffusionSampler:
        """A sampler over the teacher, whose images have the size and colour of the generator's."""
        own, theirs = _image(self.subject.file.average), _image(self.teacher)
        bridge = Bridge(*theirs, *own) if own != theirs else None
        steps = self.teach.teacher_steps
        return DiffusionSampler(self.teacher, self.device, steps, law=self.labels, bridge=bridge, name="the teacher")


# ----------------------------------------------------------------------------------------------------------------------
# Building


def facts(subject: Subject, device: torch.device) -> Facts:
    """What presets go by."""
    net = subject.file.average
    return Facts(resolution=net.img_resolution, device=device.type, parameters=_count(net))


def teacher_configs(names: Sequence[str], teachers: Sequence[Path]) -> list[Path | None]:
    """For each teacher the JSON file that was given for it, or None.

    Raises:
        InputError: their number differs from that of the teachers.
    """
    if names and len(names) != len(teachers):
        raise InputError(
            f"`teacher_config` is given {len(names)} times and `teacher` {len(teachers)} times; give one per teacher, "
            "or none for JSON files that have the .pt files' names"
        )
    return [Path(name) for name in names] or [None] * len(teachers)


def description(subject: Subject, run: RunConfig, trainer: TrainerConfig) -> str:
    """The part after the number in the run directory's name."""
    return run.desc or f"{hub.short_name(subject.file.path)}-{trainer.objective}-batch{trainer.batch}"


def recorded_options(subject: Subject, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the run has recorded that would go on with these options; nothing for a new run."""
    run = make(RunConfig, values)
    name = description(subject, run, make(TrainerConfig, values))
    return directory.recorded_options(run.outdir, run.resume, name, subject.command)


def images_per_second(subject: Subject, values: Mapping[str, Any], device: torch.device) -> float:
    """The speed of full updates with these options."""
    job = build(subject, {**values, "score_warmup": 0}, {}, device)
    return training.images_per_second(make_trainer(job)[0])


def build(subject: Subject, values: dict[str, Any], sources: dict[str, str], device: torch.device) -> Job:
    """Load and check everything that the options name.

    Args:
        subject: what is trained.
        values: the options.
        sources: where those come from that the user did not give.
        device: where to compute.

    Raises:
        InputError, SettingError: an option or file that does not fit; the message names it.
    """
    teach, loop, run = make(TeachConfig, values), make(LoopConfig, values), make(RunConfig, values)
    trainer, measure = make(TrainerConfig, values), make(MeasureConfig, values)
    if not trainer.divergence().needs_student:
        raise InputError(f"objective={trainer.objective} is for generators without randomness; choose another one")
    if loop.kimg <= trainer.score_warmup:
        raise InputError(
            f"kimg={loop.kimg:g} ends before the generator moves, which is after score_warmup={trainer.score_warmup:g}"
        )
    cli.check_outdir(run.outdir)
    files = [
        networks.load(path, "teacher", config).require(networks.EDM, "teacher")
        for path, config in zip(subject.teachers, subject.configs)
    ]
    for file in files:
        subject.file.labels.check_order(file.labels.names, f"teacher={file.path}")
    teachers = [file.average for file in files]
    ensemble = denoisers.Ensemble(teachers, teach.teacher_weight or None)
    teacher = ensemble if len(teachers) > 1 else teachers[0]
    _check_teacher(subject, teacher, trainer)
    dataset = _dataset(subject, teacher, teach, trainer)
    labels = label_laws.choose(teach.labels, subject.file.labels, dataset)
    for model in teachers:
        if model.label_dim:
            denoisers.check_labels(model, labels)
    if dataset is not None:
        _check_labels(labels, dataset, trainer)
    entry = registry.entry_for_path(subject.file.path) or {}

    def of_teacher(num_images: int) -> TeacherReference:
        if len(teachers) > 1:
            raise InputError(f"`metrics`: @{TEACHER} goes by the features of one teacher, and there are several")
        net = teachers[0].requires_grad_(False)
        return TeacherReference(net, subject.teachers[0], num_images, labels, device, subject.configs[0])

    def evaluator(names: str | None, recommended: list[str]) -> Evaluator | None:
        reference = measure.ref or registry.companion(subject.file.path, "statistics")
        return make_evaluator(names, recommended, reference, measure, device, teach.workers, of_teacher)

    if measure.ref and measure.metrics is None and measure.final_metrics is None and not entry.get("metrics"):
        raise InputError("`ref` is what metrics compare with, and none is named; give `metrics`, such as fid5k_full")
    # Where nobody knows better, the teacher judges.
    default = [] if len(teachers) > 1 or not denoisers.has_encoder(teachers[0]) else [_teacher_metric(device)]
    at_snapshots = evaluator(measure.metrics, entry.get("metrics", default))
    recommended = entry.get("final_metrics", []) if measure.metrics != "none" else []
    at_end = evaluator(measure.final_metrics, recommended)
    if at_end is None and measure.final_metrics != "none":
        at_end = at_snapshots
    if loop.stop_if_worse and at_snapshots is None:
        raise InputError("`stop_if_worse` goes by the first metric, and there is none; give `metrics`")
    return Job(
        subject,
        teach,
        trainer,
        loop,
        run,
        measure,
        sources,
        device,
        teacher,
        labels,
        dataset,
        at_snapshots,
        at_end,
    )


def _teacher_metric(device: torch.device) -> str:
    """The metric for networks that the registry does not know; a CPU makes fewer images in the same time."""
    return f"fd1k@{TEACHER}" if device.type == "cpu" else f"fd5k@{TEACHER}"


def _check_teacher(subject: Subject, teacher: torch.nn.Module, config: TrainerConfig) -> None:
    """Check that the teacher has the network's classes and what the settings want of it; sizes are the bridge's."""
    own, theirs = subject.label_dim, teacher.label_dim
    if own != theirs:
        wanted = f"a teacher with {own} classes" if own else "an unconditional teacher"
        raise InputError(
            f"`teacher` does not fit the network: it has {theirs or 'no'} classes and the generator {own or 'none'}; "
            f"use {wanted}"
        )
    Bridge(*_image(subject.file.average), *_image(teacher))
    names = ", ".join(path.name for path in subject.teachers)
    if config.dropout == "matched" and not denoisers.has_dropout(teacher):
        raise InputError(f"dropout=matched has no effect: the teacher {names} was built without dropout")
    needed, found = AugmentPipe.edm().label_dim, denoisers.augment_dim(teacher)
    if config.augment and found != needed:
        raise InputError(
            f"`augment` needs a teacher with {needed} augmentation labels, and {names} has {found or 'none'}; leave it "
            "out"
        )


def _dataset(
    subject: Subject,
    teacher: torch.nn.Module,
    teach: TeachConfig,
    config: TrainerConfig,
) -> ImageDataset | None:
    """What `data` names, checked against the generator, or where it may be, the teacher."""
    if teach.data is None and config.needs_reference:
        what = f"objective={config.objective}" if config.divergence().needs_ratio else "`adversarial_weight`"
        raise InputError(
            f"{what} needs `data`: real images, or samples of the teacher from python -m di_refine sample-teacher"
        )
    if teach.data is None:
        return None
    if not config.needs_reference:
        raise InputError(
            f"`data` has no part in objective={config.objective}, which needs none; leave it out, or give "
            "`adversarial_weight`, too"
        )
    path = Path(teach.data)
    if teach.data == "teacher":
        if len(subject.teachers) > 1:
            raise InputError("data=teacher has samples of one teacher, not of several together; give real images")
        samples = teacher_samples.cached_samples(subject.teachers[0], subject.configs[0])
        if samples is None:
            raise InputError(
                "data=teacher: nothing has been sampled from this teacher yet; run python -m di_refine sample-teacher "
                f"--teacher={subject.teachers[0]}"
            )
        path = samples
    dataset = ImageDataset(registry.resolve(path, "data"))
    critic = config.adversarial_weight > 0 and subject.discriminator is not None
    if critic or (dataset.num_channels, dataset.resolution) != _image(teacher):
        channels, resolution = _image(subject.file.average)
        dataset.check_compatible(resolution, channels, what="generator")
    classes = subject.label_dim
    if classes and dataset.label_dim != classes:
        raise InputError(
            f"data={teach.data} has {dataset.label_dim} classes, but the generator is conditional on {classes}"
        )
    subject.file.labels.check_order(dataset.class_names, f"data={teach.data}")
    return dataset


def _check_labels(labels: LabelLaw, dataset: ImageDataset, config: TrainerConfig) -> None:
    """Check that there are teacher-side images for all labels that the generator draws."""
    if not labels.label_dim:
        return
    theirs = dataset.label_law()
    if labels.has_classes and theirs.class_frequencies is not None:
        absent = [number for number in labels.present if number not in set(theirs.present)]
        if absent:
            raise InputError(
                f"data={dataset.path} has no image of class {absent[0]}, which the generator draws; give other `labels`"
            )
    elif config.needs_reference and labels.content != theirs.content:
        raise InputError(
            f"data={dataset.path} has other label vectors than the generator draws; give labels=dataset, which draws "
            "them as often as the data have them"
        )


def make_trainer(job: Job, batch_gpu: int | None = None) -> tuple[Trainer, Stream | None]:
    """A trainer on copies of the networks, and the stream of images that it reads, if it reads one.

    Args:
        job: what to train.
        batch_gpu: goes before the setting.
    """
    config, subject, device = job.trainer, job.subject, job.device
    if batch_gpu is not None or config.batch_gpu == "auto":
        config = replace(config, batch_gpu=batch_gpu)
    generator = subject.generator(copy.deepcopy(subject.file.average), "random").to(device)
    teacher = copy.deepcopy(job.teacher).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    own, theirs = _image(subject.file.average), _image(job.teacher)
    stream = critic = None
    if job.dataset is not None:
        stream = Stream(job.dataset, config.batch, config.seed, device, job.teach.workers, subject.label_dim > 0)
    if config.adversarial_weight > 0 and subject.discriminator is not None:
        pipe = copy.deepcopy(subject.augment_pipe)
        pipe = None if pipe is None else pipe.to(device)
        critic = Critic(copy.deepcopy(subject.discriminator).to(device), config.gamma, pipe)
    bridge = Bridge(*own, *theirs) if own != theirs else None
    trainer = Trainer(
        generator,
        teacher,
        config,
        bridge=bridge,
        reference=stream,
        critic=critic,
        labels=job.labels,
        total=job.loop.total_nimg,
    )
    return trainer, stream


def _image(net: Any) -> tuple[int, int]:
    return net.img_channels, net.img_resolution


def _count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
