"""The command `calc_metrics.py`: quality metrics of networks or of folders of generated images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from di_refine import terminal
from di_refine.commands import cli
from di_refine.commands.config import LabelsConfig
from di_refine.commands.options import make, options
from di_refine.errors import InputError
from di_refine.files import hub, registry
from di_refine.files.run_files import RunFiles
from di_refine.metrics.config import ALLOW_CODE_HELP
from di_refine.metrics.kinds import FORMS, KINDS, TEACHER, MetricSpec, Needs, parse_metrics
from torch_utils.settings import FILES, MACHINE, MEASURING, NETWORK, setting

if TYPE_CHECKING:
    import torch

    from di_refine.generators import Sampler
    from di_refine.metrics.evaluate import Evaluator
    from di_refine.metrics.references import ReferenceSource
    from di_refine.metrics.results import MetricResult
    from di_refine.metrics.teacher_net import TeacherReference

# PyTorch is imported inside of the functions that need it, so that --help is quick.

SOURCES = ("--network", "--images")
GRID_IMAGES = 64


class InOrder(cli.Command):
    """A command that remembers the order of its repeatable options; click keeps the values of each apart."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["order"] = [option for word in args if (option := word.split("=")[0]) in SOURCES]
        return super().parse_args(ctx, args)


@dataclass(kw_only=True)
class CalcConfig(LabelsConfig):
    """What is measured and how; None where the registry or the files decide."""

    network: tuple[str, ...] = setting(
        (), "Measure this network, or every snapshot of this run directory; repeatable.", metavar="PATH|URL|NAME"
    )
    images: tuple[str, ...] = setting(
        (), "Measure the images in this folder, zip file, or .npz file with arr_0; repeatable.", metavar="PATH"
    )
    metrics: str | None = setting(
        None,
        "Compute these metrics, separated by commas, as in fd2k_full@digits; none only draws.",
        group=MEASURING,
        metavar="LIST|none",
        default_text="what the registry recommends",
    )
    data: str | None = setting(
        None,
        "Compare with these images: a folder or zip file made by dataset_tool.py.",
        group=MEASURING,
        metavar="PATH|NAME",
    )
    ref: str | None = setting(
        None,
        "Compare with these statistics (.npz).",
        group=MEASURING,
        metavar="PATH|URL|NAME",
        default_text="those of `data`, else what the registry says",
    )
    mirror: bool = setting(False, "Count every image of `data` a second time, mirrored left to right.", group=MEASURING)
    detector: str | None = setting(
        None,
        "Take this feature network.",
        group=MEASURING,
        metavar="PATH|NAME",
        default_text="what `metrics` names, else Inception",
    )
    teacher: str | None = setting(
        None,
        f"Take the features and samples of this diffusion model in metrics such as fd5k@{TEACHER}.",
        group=MEASURING,
        metavar="PATH|NAME",
        default_text="what the registry says belongs to the network",
    )
    allow_code: bool = setting(False, ALLOW_CODE_HELP, group=MEASURING)
    perceptual: str | None = setting(
        None, "Take this LPIPS or other feature network for path lengths.", group=MEASURING, metavar="PATH"
    )
    seed: int = setting(
        0, "Draw the random numbers of the first measurement from this seed.", group=MEASURING, minimum=0
    )
    seeds: int = setting(1, "Measure each network with this many seeds in a row.", group=MEASURING, minimum=1)
    steps: int = setting(18, "Sample diffusion networks with this many steps.", group=NETWORK, minimum=1)
    init_sigma: float | None = setting(
        None,
        "Use EDM networks as one-step generators from this noise level.",
        group=NETWORK,
        above=0,
        default_text="from the file",
    )
    truncation: float = setting(1.0, "Truncate the w of StyleGAN2 networks by this psi; 1 does not.", group=NETWORK)
    cache: bool = setting(
        True, "Keep the statistics of `data` in $DI_REFINE_CACHE, and take them from there.", group=FILES
    )
    jsonl: bool = setting(True, "Append the results to metric-<name>.jsonl beside each network file.", group=FILES)
    grid: str | None = setting(
        None, f"Save the first {GRID_IMAGES} pictures measured of each source.", group=FILES, metavar="FILE.png"
    )
    plot: str | None = setting(
        None, "Draw the metrics of run directories against thousands of images.", group=FILES, metavar="FILE.png"
    )
    run: tuple[str, ...] = setting(
        (), "Draw this run directory, besides those given as `network`; repeatable.", group=FILES, metavar="DIR"
    )
    batch: int = setting(128, "Pass this many images through the networks at once.", group=MACHINE, minimum=1)
    workers: int = setting(2, "Decode images with this many threads.", group=MACHINE, minimum=1)


def _known_metrics() -> str:
    """Return a list of the metrics for the end of the help."""
    rows = [(", ".join(kind.forms), kind.what) for kind in KINDS.values()]
    width = max(len(forms) for forms, _ in rows)
    lines = [f"  {forms:{width}}  {what}" for forms, what in rows]
    return "\n".join(["\b", "Metrics, of which <N> counts thousands of images:", *lines])


@click.command(
    cls=InOrder,
    context_settings=cli.CONTEXT,
    epilog=f"{_known_metrics()}\n\nUnder torchrun all processes share the work.",
)
@options(CalcConfig)
@cli.ops_option
@cli.device_option
@click.pass_context
def main(context, device, **values):
    """Measure how good generated images are.

    \b
    calc_metrics.py --network=stylegan2-digits.pkl --seeds=3
    calc_metrics.py --network=before.pkl --network=after.pkl --metrics=fid50k_full --ref=cifar10-32x32.npz --seeds=3
    calc_metrics.py --images=out/ --metrics=fid10k_full,pr10k3_full --data=cifar10.zip
    calc_metrics.py --run=runs/00000-mine --plot=fid.png
    torchrun --nproc_per_node=2 calc_metrics.py ...
    """
    from di_refine.metrics import compare, plots
    from torch_utils import distributed

    config = make(CalcConfig, values)
    # Features and moments travel as CPU tensors, a few times in all, so the CPU's group serves every device.
    with distributed.process_group("cpu"):
        runs = [_run_directory(folder) for folder in config.run]
        sources = _sources(context.meta["order"], config.network, config.images)
        runs += dict.fromkeys(source.run for source in sources if source.run is not None)
        if config.plot and runs:
            plots.check_matplotlib()
        _check_outputs(config, bool(sources), runs)
        result = _measure(sources, config, device) if sources else {}
        if not distributed.is_first():
            return
        if config.plot:
            names = [spec.name for spec in parse_metrics(config.metrics)] if config.metrics else []
            Path(config.plot).parent.mkdir(parents=True, exist_ok=True)
            result = {**result, "plot": config.plot, "curves": plots.plot_runs(config.plot, runs, names)}
        if result.get("results"):
            rows, header, legend = compare.table(result["results"])
            terminal.table(rows, header)
            for line in legend:
                terminal.show(line)
        terminal.print_result(result)


@dataclass(frozen=True)
class Source:
    """Something to measure.

    Attributes:
        name: what people call it.
        path: the file of a network, or the folder or zip file of images.
        is_network: which of these it is.
        run: the run directory that was given, for one of its snapshots.
    """

    name: str
    path: Path
    is_network: bool
    run: Path | None = None


def _sources(order: Sequence[str], networks: Sequence[str], folders: Sequence[str]) -> list[Source]:
    """Return what to measure, in the order in which it was given; what was given twice is measured once."""
    from di_refine.files import diffusers_folder

    found: list[Source] = []
    given = {"--network": list(networks), "--images": list(folders)}
    if sorted(order) != sorted(option for option, values in given.items() for _ in values):
        order = [option for option, values in given.items() for _ in values]  # an option's name as another's value
    for option in order:
        name = given[option].pop(0)
        if option == "--images":
            found.append(Source(name, Path(name), False))
            continue
        path = registry.resolve(name, setting="network", kind=("stylegan2", "edm"))
        if not path.is_dir() or diffusers_folder.is_folder(path):
            found.append(Source(name, path, True))
            continue
        snapshots = RunFiles(path).snapshots()
        if not snapshots:
            raise InputError(f"--network={path}: a folder without network snapshots is no run directory")
        found += [Source(str(snapshot), snapshot, True, run=path) for snapshot in snapshots]
    return list({source.name: source for source in found}.values())


def _run_directory(folder: str) -> Path:
    if not Path(folder).is_dir():
        raise InputError(f"--run={folder} is not a run directory")
    return Path(folder)


def _check_outputs(config: CalcConfig, measuring: bool, runs: Sequence[Path]) -> None:
    """Raise InputError where what is to be written does not suit what was given, or cannot be written."""
    plot, grid = config.plot, config.grid
    if not measuring and not (plot and runs):
        raise InputError("nothing to measure: give --network or --images, or --run with --plot")
    if measuring and config.metrics == "none" and not (grid or plot):
        raise InputError("--metrics=none measures nothing; give --grid to look at the images, or name metrics")
    if plot:
        if not runs:
            raise InputError("--plot draws run directories; give --run, or a run directory as --network")
        cli.check_outfile(plot, "--plot")
    elif runs and not measuring:
        raise InputError("--run is for --plot; give --plot as well")
    if grid:
        if not measuring:
            raise InputError("--grid shows what is measured; give --network or --images")
        cli.check_outfile(grid, "--grid")


def _measure(sources: Sequence[Source], config: CalcConfig, device: str) -> dict[str, Any]:
    """Measure all sources, write the files that belong to the results, and return the JSON result."""
    from di_refine.files.datasets import ImageDataset
    from di_refine.generators import DiffusionSampler, load_sampler
    from di_refine.metrics import compare
    from di_refine.metrics.evaluate import Evaluator
    from di_refine.metrics.sources import ImageSampler
    from torch_utils import distributed

    place, shown = cli.pick_device(device), distributed.is_first()
    paths = [source.path for source in sources if source.is_network]
    wanted = _registered_metrics(paths) if config.metrics is None else config.metrics
    specs = [] if wanted == "none" else parse_metrics(wanted)
    if config.mirror and not config.data:
        raise InputError("--mirror concerns the images of --data; give --data as well")
    dataset: ImageDataset | None = None
    references: list[ReferenceSource] = []
    if config.ref is not None:
        references.append(registry.resolve(config.ref, setting="ref", kind=("statistics", "dataset")))
    if config.data:
        dataset = ImageDataset(registry.resolve(config.data, setting="data", kind="dataset"), config.mirror)
        references.append(dataset)
    if not references and any(spec.needs & Needs.REFERENCE for spec in specs):
        references += _registered_statistics(paths)

    # Everything is loaded and checked before the first image is made: a mistake in the last must not cost an hour.
    def sampler_of(source: Source) -> Sampler:
        if not source.is_network:
            return ImageSampler(ImageDataset(source.path, setting="images"), config.workers)
        return load_sampler(
            source.path,
            config.steps,
            config.truncation,
            place,
            init_sigma=config.init_sigma,
            labels=config.labels,
            dataset=dataset,
        )

    samplers = [sampler_of(source) for source in sources]
    if not specs:
        return {"results": [], "warnings": [], **_grid(config, sources, samplers, [])}
    evaluator = Evaluator(
        [spec.name for spec in specs],
        references or None,
        config.detector,
        place,
        config.batch,
        config.perceptual,
        config.cache,
        config.workers,
        distributed=distributed.world_size() > 1,
        allow_code=config.allow_code,
        teacher=_teacher_reference(config, specs, paths, place),
    )
    for sampler in samplers:
        evaluator.check(sampler)
    for warning in evaluator.warnings if shown else ():
        terminal.say(f"note: {warning}")
    for source, sampler in zip(sources, samplers) if shown else ():
        if sampler.law is not None and sampler.law.sentence:
            terminal.say(f"note: {source.name}: {sampler.law.sentence}")
    evaluator.prepare()
    summaries = []
    for source, sampler in zip(sources, samplers):
        repeats = range(config.seed, config.seed + (config.seeds if source.is_network else 1))
        results = _measure_one(evaluator, sampler, source.path.name, repeats, shown)
        if shown and config.jsonl and source.is_network and not source.name.startswith(hub.PREFIX):
            _record(source.path, results)
        steps = sampler.num_steps if isinstance(sampler, DiffusionSampler) else None
        of_source = [compare.summarise(source.name, list(of_metric)) for of_metric in zip(*results)]
        summaries += [{**summary, "steps": steps} for summary in of_source]
    compare.add_differences(summaries)
    return {"results": summaries, "warnings": evaluator.warnings, **_grid(config, sources, samplers, summaries)}


def _teacher_reference(
    config: CalcConfig, specs: Sequence[MetricSpec], paths: Sequence[Path], device: torch.device
) -> TeacherReference | None:
    """What metrics of the name `@teacher` go by; None where there are none of these, or no teacher is known."""
    from di_refine.files import label_laws, networks
    from di_refine.metrics.teacher_net import IMAGES, TeacherReference

    counts = [spec.num_images for spec in specs if spec.detector == TEACHER]
    if not counts and config.teacher is not None:
        raise InputError(f"--teacher is for metrics such as fd5k@{TEACHER}, and --metrics names none of them")
    if not counts:
        return None
    if config.teacher is not None:
        path: Path | None = registry.resolve(config.teacher, setting="teacher", kind="edm")
    else:
        path = registry.companion(paths[0], "teacher") if paths else None
    if path is None:
        return None
    file = networks.load(path, "teacher").require(networks.EDM, "teacher")
    law = label_laws.choose(config.labels, file.labels)
    return TeacherReference(file.average.requires_grad_(False), path, max(counts) or IMAGES, law, device)


def _registered_metrics(paths: Sequence[Path]) -> list[str]:
    """Return the metrics that the registry recommends for the first network."""
    entry = registry.entry_for_path(paths[0]) if paths else None
    if not entry or not entry.get("metrics"):
        raise InputError(f"--metrics is needed: the registry recommends none; known are {FORMS}")
    return entry["metrics"]


def _registered_statistics(paths: Sequence[Path]) -> list[Path]:
    """Return the statistics that the registry says belong to the networks, if it says one and the same for all."""
    companions = (registry.companion(path, "statistics") for path in paths)
    known = {companion for companion in companions if companion is not None}
    if len(known) > 1:
        raise InputError("the networks have different references; measure them apart, or give --ref or --data")
    return list(known)


def _measure_one(
    evaluator: Evaluator, sampler: Sampler, name: str, seeds: range, shown: bool
) -> list[list[MetricResult]]:
    """Return the evaluator's results for each seed."""
    with terminal.progress(
        evaluator.num_images(sampler) * len(seeds), f"measuring {name}", "img", enabled=shown
    ) as bar:
        return [evaluator(sampler, seed=seed, progress=bar.update) for seed in seeds]


def _record(path: Path, results: Sequence[Sequence[MetricResult]]) -> None:
    """Append to the metric files beside a network, unless that is where shipped and downloaded networks are."""
    from di_refine.metrics.results import write_jsonl

    folder = path.resolve().parent
    if folder in (registry.pretrained_folder().resolve(), registry.cache_folder().resolve()):
        return
    try:
        for of_seed in results:
            for result in of_seed:
                write_jsonl(folder, result, path.name)
    except OSError as error:
        terminal.say(f"note: cannot write metric files into {folder} ({error.strerror or error})")


def _grid(
    config: CalcConfig, sources: Sequence[Source], samplers: Sequence[Sampler], summaries: Sequence[dict[str, Any]]
) -> dict[str, str]:
    """Write the first pictures of each source, several side by side with their first values, if they are asked for."""
    from di_refine.files import pictures
    from di_refine.metrics import compare
    from torch_utils import distributed

    grid = config.grid
    if grid is None or not distributed.is_first():
        return {}
    Path(grid).parent.mkdir(parents=True, exist_ok=True)
    titles, panels = compare.short_names([source.name for source in sources]), []
    for source, title, sampler in zip(sources, titles, samplers):
        count = GRID_IMAGES if sampler.num_images is None else min(GRID_IMAGES, sampler.num_images)
        found = next((summary for summary in summaries if summary["source"] == source.name), None)
        if found is not None:
            key, mean = next(iter(found["results"].items()))
            title += f"\n{key} {compare.number(mean, found['sd'].get(key))}"
        panels.append((title, sampler(0, count, config.seed)[0]))
    if len(panels) == 1:
        images = panels[0][1]
        pictures.save_grid(grid, images, scale=pictures.enlargement(images.shape[-1]))
    else:
        pictures.save_side_by_side(grid, panels)
    return {"grid": grid}


if __name__ == "__main__":
    main()
