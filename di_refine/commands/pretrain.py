"""The command `pretrain.py`: the networks that refinement needs, from images."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from di_refine import terminal
from di_refine.commands import cli
from di_refine.commands.config import FeatureFilesConfig, GanLoopConfig, PretrainConfig, TeacherLoopConfig
from di_refine.commands.options import make, options, resolve, warn
from di_refine.errors import InputError
from di_refine.metrics.config import MeasureConfig
from di_refine.presets import Facts
from di_refine.pretraining.config import FeaturesConfig, GanConfig, TeacherConfig, UNetConfig
from di_refine.runs.config import LoopConfig, RunConfig
from stylegan2_ada.config import AdversarialConfig
from torch_utils.settings import Settings

Trained = TypeVar("Trained", bound="Trainable")

if TYPE_CHECKING:
    import torch

    from di_refine.commands.overview import Overview
    from di_refine.files.datasets import ImageDataset, Stream
    from di_refine.files.networks import NetworkFile
    from di_refine.generators import NetworkSampler
    from di_refine.labels import LabelLaw
    from di_refine.metrics.evaluate import Evaluator
    from di_refine.pretraining.warm_start import Copied
    from di_refine.runs.loop import Trainable
    from stylegan2_ada.adversarial import AdversarialTrainer


@cli.group()
def main():
    """Train what `refine.py` starts from: a diffusion teacher, a GAN, or a feature network for metrics."""


@dataclasses.dataclass(frozen=True)
class Material:
    """What the trainings of a teacher and of a GAN have in common, loaded and checked.

    Attributes:
        kind: 'edm' or 'stylegan2'.
        settings: all settings; the dataclasses of the loop, the run and the measurements stand here again.
        loop, run, measure: as above.
        seed: of everything random.
        device: where to compute.
        dataset: the images.
        sources: where settings come from that the user did not give.
        labels: the labels of the network that is trained, as its file keeps them.
        stream: the images as trainers want them.
        evaluator, final_evaluator: measure snapshots, and the last network; None measures nothing.
        start: the file that the networks start from; None for untrained ones.
    """

    kind: str
    settings: tuple[Settings, ...]
    loop: LoopConfig
    run: RunConfig
    measure: MeasureConfig
    seed: int
    device: torch.device
    dataset: ImageDataset
    sources: dict[str, str]
    labels: LabelLaw
    stream: Stream
    evaluator: Evaluator | None
    final_evaluator: Evaluator | None
    start: NetworkFile | None = None

    @property
    def shape(self) -> dict[str, int]:
        """Resolution, channels and classes of the network that is trained."""
        return {
            "resolution": self.dataset.resolution,
            "channels": self.dataset.num_channels,
            "label_dim": self.labels.label_dim,
        }

    @property
    def kept_labels(self) -> dict[str, Any]:
        """What the network's file says of the labels, for commands that draw some."""
        from di_refine.labels import KEY

        return {KEY: self.labels.record()} if self.labels.label_dim else {}

    @property
    def dataset_kwargs(self) -> dict[str, Any]:
        """What the network's file says of the data, as arguments with which the official tools open the same images."""
        copies = 2 if self.dataset.mirror else 1
        return {
            "class_name": "training.dataset.ImageFolderDataset",
            "path": os.path.abspath(self.dataset.path),
            "use_labels": self.labels.label_dim > 0,
            "max_size": len(self.dataset) // copies,
            "xflip": self.dataset.mirror,
            "resolution": self.dataset.resolution,
        }

    def record(self) -> dict[str, Any]:
        """What `training_options.json` says."""
        from di_refine.commands.training import recorded

        return {
            "command": self.kind,
            **recorded(*self.settings),
            "sources": self.sources,
            "device": str(self.device),
            "label_dim": self.labels.label_dim,
            "label_law": self.labels.content,
            "class_names": list(self.labels.names),
            "images": len(self.dataset),
        }


def open_data(values: dict[str, Any]) -> tuple[ImageDataset, bool]:
    """The images, and whether the network is to be class-conditional.

    Raises:
        InputError: there are none, or labels are wanted that are not there.
    """
    from di_refine.files import registry
    from di_refine.files.datasets import ImageDataset

    own = make(PretrainConfig, values)
    dataset = ImageDataset(registry.resolve(own.data, "data"), mirror=own.mirror)
    if own.cond and not dataset.has_labels:
        raise InputError(f"`cond` needs labels, and data={own.data} has none; add them, or give --no-cond")
    conditional = dataset.has_labels and own.cond in (None, True)
    if conditional:
        note_absent_classes(dataset)
    return dataset, conditional


def description(kind: str, run: RunConfig, dataset: ImageDataset, conditional: bool) -> str:
    """The part after the number in the run directory's name."""
    return run.desc or f"{kind}-{Path(dataset.name).stem}{'-cond' if conditional else ''}"


def fit(
    context: click.Context,
    kind: str,
    parts: tuple[type[Settings], ...],
    values: dict[str, Any],
    device: torch.device,
    build: Callable[[dict[str, Any], Material], Trained],
) -> tuple[Trained, Material]:
    """Choose the values of the options that are not given, and load and check what they name.

    Args:
        context: of the command.
        kind: 'edm' or 'stylegan2'.
        parts: the dataclasses of the settings.
        values: the options.
        device: where to compute.
        build: makes a trainer of values and material.

    Raises:
        InputError, SettingError: an option or file that does not fit; the message names it.
    """
    from di_refine.commands.training import images_per_second
    from di_refine.runs.directory import recorded_options

    dataset, conditional = open_data(values)

    def recorded(chosen: Mapping[str, Any]) -> dict[str, Any]:
        run = make(RunConfig, chosen)
        return recorded_options(run.outdir, run.resume, description(kind, run, dataset, conditional), kind)

    def speed(chosen: Mapping[str, Any]) -> float:
        return images_per_second(build(dict(chosen), material_of(chosen, {})))

    def material_of(chosen: Mapping[str, Any], sources: dict[str, str]) -> Material:
        return load(kind, parts, dict(chosen), sources, device, dataset, conditional, start)

    start = open_start(values["start_from"], kind)
    facts = Facts(resolution=dataset.resolution, device=device.type, images=len(dataset))
    theirs = {} if start is None else architecture(context, start, dataset.resolution)
    values, sources = resolve(context, values, kind, facts, theirs, recorded, speed, "start_from")
    material = material_of(values, sources)
    trainer = build(values, material)
    warn(context, values)
    return trainer, material


def open_start(name: str | None, kind: str) -> NetworkFile | None:
    """The file to start from, where one is named.

    Raises:
        InputError: it holds no network of the kind that is trained.
    """
    from di_refine.files import networks, registry

    if name is None:
        return None
    path = registry.resolve(name, "start_from")
    return networks.load(path, "start_from").require(
        networks.EDM if kind == "edm" else networks.STYLEGAN2, "start_from"
    )


def architecture(context: click.Context, start: NetworkFile, resolution: int) -> dict[str, Any]:
    """The settings of the architecture that a file brings.

    Raises:
        InputError: one of them is given as well.
    """
    from di_refine.pretraining.warm_start import settings_of

    found = settings_of(start, resolution)
    given = [name for name in found if context.get_parameter_source(name) != ParameterSource.DEFAULT]
    if given:
        raise InputError(f"`{given[0]}` comes from start_from={start.path}; leave it out")
    return found


def load(
    kind: str,
    parts: tuple[type[Settings], ...],
    values: dict[str, Any],
    sources: dict[str, str],
    device: torch.device,
    dataset: ImageDataset,
    conditional: bool,
    start: NetworkFile | None = None,
) -> Material:
    """Load and check what the options of a training name.

    Args:
        kind: 'edm' or 'stylegan2'.
        parts: the dataclasses of the settings.
        values: the options.
        sources: where those come from that the user did not give.
        device: where to compute.
        dataset: the images.
        conditional: train a class-conditional network.
        start: the file that the networks start from.

    Raises:
        InputError, SettingError: an option or file that does not fit; the message names it.
    """
    from di_refine.commands.training import make_evaluator
    from di_refine.files.datasets import Stream
    from torch_utils import distributed

    settings = tuple(make(part, values) for part in parts)
    own, measure = make(PretrainConfig, values), make(MeasureConfig, values)
    loop, run = make(LoopConfig, values), make(RunConfig, values)
    cli.check_outdir(run.outdir)
    batch, seed = values["batch"], values["seed"]
    stream = Stream(dataset, batch, seed, device, own.workers, conditional, as_float=False)
    kept = stream.labels.kept()
    if kept is not stream.labels and distributed.is_first():
        num, most = len(kept.present), len(stream.labels.present)
        terminal.say(f"note: the network's file keeps {num} of {most} label vectors; metrics draw from those")
    evaluator, final = (
        make_evaluator(names, [], measure.ref or dataset, measure, device, own.workers)
        for names in (measure.metrics, measure.final_metrics)
    )
    if evaluator is None and loop.stop_if_worse:
        raise InputError("`stop_if_worse` goes by the first metric, and there is none; give `metrics`")
    return Material(
        kind, settings, loop, run, measure, seed, device, dataset, sources, kept, stream, evaluator, final, start
    )


def note_absent_classes(dataset: ImageDataset) -> None:
    """Say on stderr which classes have no image."""
    from di_refine.files.datasets import absent_classes
    from torch_utils import distributed

    absent = absent_classes(dataset.class_counts(), dataset.class_names) if dataset.has_classes else None
    if absent and distributed.is_first():
        terminal.say(f"note: {dataset.setting}={dataset.path}: {absent}")


def train(
    material: Material,
    trainer: Trainable,
    sampler: Callable[[torch.nn.Module], NetworkSampler],
    net: torch.nn.Module,
    networks: Callable[[], dict[str, Any]],
    status: dict[str, str],
    overview: Overview,
    copied: Sequence[Copied],
    dry_run: bool,
) -> int:
    """Train, print the JSON result, and return the exit status.

    Args:
        material: as loaded.
        trainer: of the networks.
        sampler: makes a sampler of a network.
        net: the average that is the result.
        networks: returns what a snapshot's file holds.
        status: name in the trainer's statistics -> short name, for the status lines.
        overview: what is said before the training begins.
        copied: what was taken from the file that the networks start from; nothing for untrained networks.
        dry_run: check everything and print the record instead.
    """
    from di_refine.commands import ending
    from di_refine.commands.training import Session, end, unless_interrupted
    from di_refine.metrics.results import values as values_of
    from di_refine.runs.loop import Snapshot, measure
    from torch_utils import distributed

    dataset, seed = material.dataset, material.seed
    final = material.final_evaluator
    evaluators = [evaluator for evaluator in (material.evaluator, final) if evaluator is not None]

    facts = {"copied": {item.name: item.copied for item in copied}, "new": {item.name: item.new for item in copied}}
    record = {**material.record(), **facts} if copied else material.record()
    session = Session(
        trainer=trainer,
        loop=material.loop,
        run=material.run,
        settings=tuple(type(part) for part in material.settings),
        description=description(material.kind, material.run, dataset, material.labels.label_dim > 0),
        record=record,
        networks=networks,
        sampler=lambda: sampler(net),
        picture=lambda path: ending.save_class_grid(path, sampler(net)),
        status=status,
        evaluator=material.evaluator,
        measured=lambda: [(evaluator, sampler(net)) for evaluator in evaluators],
        seed=seed,
        overview=overview,
        stream=material.stream,
        untrained=not copied,
    )
    if dry_run:
        session.check()
        if distributed.is_first():
            terminal.show(json.dumps(record, indent=2), err=True)
            terminal.print_result(record)
        return 0
    directory, state = session.open()
    loop = session.train(directory, state)
    last = loop.last or Snapshot(0, None)  # a signal may come before there is any
    results = dict(last.results)
    if final is not None:
        name = None if last.path is None else last.path.name
        measured = unless_interrupted(loop, directory, lambda: measure(final, sampler(net), seed, directory, name))
        results |= values_of(measured or [])
    result = {
        "run_dir": str(directory.path),
        "snapshot": last.path,
        "kimg": trainer.nimg / 1000,
        "stopped": loop.stopped,
        "parameters": sum(p.numel() for p in net.parameters()),
        "images_per_sec": loop.images_per_sec,
        "minutes": loop.train_seconds / 60,
        "labels": material.labels.described,
        **results,
    }
    if loop.best is not None:
        result["best_snapshot"] = loop.best.path
    end(directory, result)
    return loop.exit_status


TEACHER = (PretrainConfig, TeacherLoopConfig, UNetConfig, TeacherConfig, MeasureConfig, RunConfig)


@main.command()
@options(*TEACHER)
@cli.dry_run_option
@cli.ops_option
@cli.device_option
@click.pass_context
def teacher(context, dry_run, device, **values):
    """Train an EDM diffusion model (DDPM++ U-Net).

    Options that are not given are fitted to the images, the device and the length; --dry-run shows what results.
    """
    # PyTorch is imported here and not above, so that --help is quick.
    import torch

    from di_refine.commands.overview import Overview
    from di_refine.generators import DiffusionSampler
    from di_refine.pretraining import warm_start
    from di_refine.pretraining.teacher import TeacherTrainer, build
    from torch_utils import distributed

    copied: list[Copied] = []

    def trainer_of(values: dict[str, Any], material: Material) -> TeacherTrainer:
        config = make(TeacherConfig, values)
        augment, seed = config.augment > 0, config.seed
        if material.start is None:
            net = build(make(UNetConfig, values), **material.shape, augment=augment, seed=seed)
        else:
            net, copied[:] = warm_start.teacher(material.start, **material.shape, augment=augment, seed=seed)
        net = net.to(material.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return TeacherTrainer(net, material.stream, config, material.loop.total_nimg)

    with distributed.process_group(cli.pick_device(device)) as place:
        trainer, material = fit(context, "edm", TEACHER, values, place, trainer_of)
        return train(
            material,
            trainer,
            lambda average: DiffusionSampler(average, place, law=material.labels),
            trainer.ema,
            networks=lambda: {
                "ema": trainer.ema,
                "loss_fn": None,
                "augment_pipe": None,
                "dataset_kwargs": material.dataset_kwargs,
                **material.kept_labels,
            },
            status={"loss": "loss", "grad_norm": "|g|"},
            overview=Overview(
                {"network": trainer.net},
                trainer.config.batch,
                place,
                trainer.config.precision,
                material.dataset,
                [item.sentence for item in copied],
            ),
            copied=copied,
            dry_run=dry_run,
        )


GAN = (PretrainConfig, GanLoopConfig, GanConfig, AdversarialConfig, MeasureConfig, RunConfig)


@main.command()
@options(*GAN)
@cli.dry_run_option
@cli.ops_option
@cli.device_option
@click.pass_context
def gan(context, dry_run, device, **values):
    """Train StyleGAN2 with adaptive discriminator augmentation.

    Options that are not given are fitted to the images, the device and the length; --dry-run shows what results.
    """
    # PyTorch is imported here and not above, so that --help is quick.
    from di_refine.commands.overview import Overview
    from di_refine.generators import GeneratorSampler, StyleGAN2Generator
    from di_refine.pretraining import gan as adversarial
    from torch_utils import distributed

    copied: list[Copied] = []

    def trainer_of(values: dict[str, Any], material: Material) -> AdversarialTrainer:
        config, sizes = make(AdversarialConfig, values), make(GanConfig, values)
        made, copied[:] = adversarial.build(
            sizes, config, **material.shape, data=material.stream, device=material.device, start=material.start
        )
        return made

    with distributed.process_group(cli.pick_device(device)) as place:
        trainer, material = fit(context, "stylegan2", GAN, values, place, trainer_of)
        fp16 = trainer.G.synthesis.num_fp16_res > 0
        return train(
            material,
            trainer,
            lambda average: GeneratorSampler(StyleGAN2Generator(average), place, law=material.labels),
            trainer.G_ema,
            networks=lambda: {
                "training_set_kwargs": material.dataset_kwargs,
                **material.kept_labels,
                "G": trainer.G,
                "D": trainer.D,
                "G_ema": trainer.G_ema,
                "augment_pipe": trainer.augment_pipe,
            },
            status={"loss_G": "G", "loss_D": "D", "r1_penalty": "R1", "augment_p": "p"},
            overview=Overview(
                {"G": trainer.G, "D": trainer.D},
                trainer.config.batch,
                place,
                "fp16 at high resolutions" if fp16 and place.type == "cuda" else "fp32",
                material.dataset,
                [item.sentence for item in copied],
            ),
            copied=copied,
            dry_run=dry_run,
        )


@main.command()
@options(FeatureFilesConfig, FeaturesConfig)
@cli.dry_run_option
@cli.ops_option
@cli.device_option
def features(dry_run, device, **values):
    """Train a small classifier whose features metrics can use, and measure its statistics of the images."""
    # PyTorch is imported here and not above, so that --help is quick.
    import numpy as np

    from di_refine.commands.training import recorded
    from di_refine.files import registry
    from di_refine.files.datasets import ImageDataset
    from di_refine.metrics.detectors import load_detector
    from di_refine.metrics.references import reference_statistics
    from di_refine.metrics.small import save_small
    from di_refine.pretraining.features import train_features

    files, config = make(FeatureFilesConfig, values), make(FeaturesConfig, values)
    place = cli.pick_device(device)
    dest, stats = cli.check_outfile(files.dest, "--dest"), cli.check_outfile(files.stats, "--stats")
    dataset = ImageDataset(registry.resolve(files.data, "data"))
    test = None
    if files.held_out is not None:
        test = ImageDataset(registry.resolve(files.held_out, "held_out"), setting="held_out")
    for part in filter(None, (dataset, test)):
        if not part.has_labels:
            raise InputError(f"{part.setting}={part.path} has no labels, which a classifier needs; see dataset_tool.py")
        if not part.has_classes:
            raise InputError(f"{part.setting}={part.path} has label vectors, and a classifier needs one class an image")
        note_absent_classes(part)
    if test is not None:
        test.check_compatible(dataset.resolution, dataset.num_channels, what="data set of --data")
        if test.label_dim > dataset.label_dim:
            raise InputError(f"held_out={files.held_out} has classes that data={files.data} lacks; give both the same")

    def images_and_classes(part: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
        return part.decode_all(), part.class_numbers()

    training, held_out = images_and_classes(dataset), None if test is None else images_and_classes(test)
    if dry_run:
        record = {"command": "features", **recorded(files, config), "device": str(place), "images": len(dataset)}
        terminal.show(json.dumps(record, indent=2), err=True)
        terminal.print_result(record)
        return
    for path in (dest, stats):
        path.parent.mkdir(parents=True, exist_ok=True)
    with terminal.progress(config.epochs, "training features", "epoch") as bar:

        def progress(done, total, loss):
            bar.note(f"loss {loss:.4f}")
            bar.update(done - bar.count)

        net, result = train_features(
            *training,
            held_out=held_out,
            state=dest.with_suffix(".state.pt") if files.max_minutes else None,
            max_seconds=files.max_minutes and 60 * files.max_minutes,
            device=place,
            progress=progress,
            **dataclasses.asdict(config),
        )
    if net is None:
        terminal.print_result({"dest": None, "stats": None, **result})
        return
    save_small(net, dest, files.name or dest.stem.removeprefix("features-"), result, files.half)
    reference_statistics(dataset, load_detector(dest, device=place), device=place).save(stats)
    terminal.print_result({"dest": str(dest), "stats": str(stats), **result})


if __name__ == "__main__":
    main()
