"""Measure generators: quality metrics of networks or of folders of generated images, against reference images."""

import sys
from pathlib import Path

import click
import torch

from di_refine import terminal
from di_refine.commands import cli
from di_refine.errors import InputError
from di_refine.files import pictures, registry
from di_refine.files.datasets import ImageDataset
from di_refine.metrics import compare, plots
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.kinds import FORMS, parse_metrics
from di_refine.metrics.parallel import process_group
from di_refine.metrics.results import write_jsonl
from di_refine.metrics.sources import ImageSampler, network_sampler, snapshots

SOURCES = ("--network", "--images")
GRID_IMAGES = 64


class InOrder(cli.Command):
    """A command that remembers the order of its repeatable options; click keeps the values of each apart."""

    def parse_args(self, ctx, args):
        ctx.meta["order"] = [option for word in args if (option := word.split("=")[0]) in SOURCES]
        return super().parse_args(ctx, args)


@click.command(
    cls=InOrder,
    context_settings=cli.CONTEXT,
    epilog=f"Metrics: {FORMS}; <N> counts thousands of images. Under torchrun all processes share the work.",
)
@click.option(
    "--network", "networks", multiple=True, metavar="PATH|URL|NAME", help="Network or run directory; repeatable."
)
@click.option(
    "--images", "folders", multiple=True, metavar="PATH", help="Folder or zip of images to measure; repeatable."
)
@click.option(
    "--metrics", metavar="LIST", help="Metrics, separated by commas, as in fd2k_full@digits.  [default: the registry's]"
)
@click.option("--data", metavar="PATH|NAME", help="Reference images: a folder or zip made by dataset_tool.py.")
@click.option(
    "--ref", metavar="PATH|URL|NAME", help="Reference statistics (.npz).  [default: --data, else the registry's]"
)
@click.option("--mirror/--no-mirror", default=False, help="Also count the images of --data mirrored left to right.")
@click.option(
    "--detector", metavar="PATH|NAME", help="Feature network.  [default: what --metrics names, else Inception]"
)
@click.option("--perceptual", metavar="PATH", help="LPIPS or other feature network, for path lengths.")
@click.option("--seed", type=cli.NON_NEGATIVE_INT, default=0, help="Seed of the first measurement.")
@click.option("--seeds", type=cli.POSITIVE_INT, default=1, help="Measure each network with this many seeds in a row.")
@click.option("--batch", type=cli.POSITIVE_INT, default=128, help="Images per pass.")
@click.option("--steps", type=cli.POSITIVE_INT, default=18, help="Sampling steps of diffusion networks.")
@click.option("--init-sigma", type=cli.POSITIVE_NUMBER, help="Use EDM networks as one-step generators from this level.")
@click.option("--truncation", type=cli.Number(), default=1.0, help="Truncation psi of StyleGAN2 networks.")
@click.option(
    "--labels", default="uniform", metavar="uniform|dataset|CLASS", help="Classes asked of conditional networks."
)
@click.option("--workers", type=cli.POSITIVE_INT, default=2, help="Threads that decode images.")
@click.option("--cache/--no-cache", default=True, help="Keep statistics of --data, in $DI_REFINE_CACHE.")
@click.option("--jsonl/--no-jsonl", default=True, help="Append to metric-<name>.jsonl beside each network file.")
@click.option("--grid", metavar="FILE.png", help=f"Save the first {GRID_IMAGES} pictures measured of each source.")
@click.option("--plot", metavar="FILE.png", help="Draw the metrics of run directories against kimg.")
@click.option(
    "--run", "runs", multiple=True, metavar="DIR", help="Run directory for --plot, besides those in --network."
)
@cli.ops_option
@cli.device_option
@click.pass_context
def main(context, **options):
    """Measure how good generated images are.

    \b
    calc_metrics.py --network=stylegan2-digits.pkl --seeds=3
    calc_metrics.py --network=before.pkl --network=after.pkl --metrics=fid50k_full --ref=cifar10-32x32.npz --seeds=3
    calc_metrics.py --images=out/ --metrics=fid10k_full,pr10k3_full --data=cifar10.zip
    calc_metrics.py --run=runs/00000-mine --plot=fid.png
    torchrun --nproc_per_node=2 calc_metrics.py ...
    """
    with process_group() as distributed:
        _measure(context.meta["order"], distributed, **options)


def _measure(order, distributed, networks, folders, metrics, data, ref, mirror, detector, perceptual, seed, seeds,
             batch, labels, workers, cache, jsonl, grid, plot, runs, device, **settings):  # fmt: skip
    shown = not distributed or torch.distributed.get_rank() == 0
    runs = [_run_directory(folder) for folder in runs]
    sources = _sources(order, networks, folders, runs)
    _check_outputs(plot, grid, bool(sources), runs)
    result = {}
    if sources:
        device = cli.pick_device(device)
        paths = [path for path, is_network in sources.values() if is_network]
        specs = parse_metrics(metrics if metrics is not None else _registered_metrics(paths))
        if mirror and not data:
            raise InputError("--mirror concerns the images of --data; give --data as well")
        dataset = ImageDataset(registry.resolve(data, option="--data", kind="dataset"), mirror) if data else None
        references = [] if ref is None else [registry.resolve(ref, option="--ref", kind=("statistics", "dataset"))]
        references += [] if dataset is None else [dataset]
        if not references and any("reference" in spec.needs for spec in specs):
            references = _registered_statistics(paths)

        # Everything is loaded and checked before the first image is made: a mistake in the last must not cost an hour.
        samplers = {
            name: network_sampler(path, labels, dataset, device=device, **settings)
            if is_network
            else ImageSampler(ImageDataset(path, option="--images"), workers)
            for name, (path, is_network) in sources.items()
        }
        evaluator = Evaluator(
            [spec.name for spec in specs],
            references or None,
            detector,
            device,
            batch,
            perceptual,
            cache,
            workers,
            distributed,
        )
        for sampler in samplers.values():
            evaluator.check(sampler)
        for warning in evaluator.warnings if shown else ():
            print(f"note: {warning}", file=sys.stderr)
        evaluator.prepare()
        summaries = []
        for name, (path, is_network) in sources.items():
            repeats = range(seed, seed + (seeds if is_network else 1))
            results = _measure_one(evaluator, samplers[name], path, repeats, shown)
            if shown and jsonl and is_network:
                _record(path, results)
            summaries += [compare.summarise(name, list(of_metric)) for of_metric in zip(*results)]
        compare.add_differences(summaries)
        result = {"results": summaries, "warnings": evaluator.warnings}
        if shown and grid:
            _save_grid(grid, samplers, seed)
            result["grid"] = grid
    if not shown:
        return
    if plot:
        names = [spec.name for spec in parse_metrics(metrics)] if metrics else []
        Path(plot).parent.mkdir(parents=True, exist_ok=True)
        result = {**result, "plot": plot, "curves": plots.plot_runs(plot, runs, names)}
    if "results" in result:
        terminal.table(*compare.rows(result["results"]))
    terminal.print_result(result)


def _sources(order: list[str], networks, folders, runs: list[Path]) -> dict[str, tuple[Path, bool]]:
    """What to measure, by its name for people, in the order given: file and whether it is a network."""
    found: dict[str, tuple[Path, bool]] = {}
    given = {"--network": list(networks), "--images": list(folders)}
    if sorted(order) != sorted(option for option, values in given.items() for _ in values):
        order = [option for option, values in given.items() for _ in values]  # an option's name as another's value
    for option in order:
        name = given[option].pop(0)
        if option == "--images":
            found[name] = (Path(name), False)
            continue
        path = registry.resolve(name, kind=("stylegan2", "edm"))
        if path.is_dir():
            found.update({str(snapshot): (snapshot, True) for snapshot in snapshots(path)})
            runs.append(path)
        else:
            found[name] = (path, True)
    return found


def _run_directory(folder: str) -> Path:
    if not Path(folder).is_dir():
        raise InputError(f"--run={folder} is not a run directory")
    return Path(folder)


def _check_outputs(plot: str | None, grid: str | None, measuring: bool, runs: list[Path]) -> None:
    if not measuring and not (plot and runs):
        raise InputError("nothing to measure: give --network or --images, or --run with --plot")
    if plot:
        if not runs:
            raise InputError("--plot draws run directories; give --run, or a run directory as --network")
        plots.check_matplotlib()
        cli.check_outfile(plot, "--plot")
    elif runs and not measuring:
        raise InputError("--run is for --plot; give --plot as well")
    if grid:
        if not measuring:
            raise InputError("--grid shows what is measured; give --network or --images")
        cli.check_outfile(grid, "--grid")


def _registered_metrics(paths: list[Path]) -> list[str]:
    """The metrics that the registry recommends for the first network."""
    entry = registry.entry_for_path(paths[0]) if paths else None
    if not entry or not entry.get("metrics"):
        raise InputError(f"--metrics is needed: the registry recommends none; known are {FORMS}")
    return entry["metrics"]


def _registered_statistics(paths: list[Path]) -> list[Path]:
    """The statistics that the registry says belong to the networks, if it says one and the same for all."""
    known = {registry.companion(path, "statistics") for path in paths} - {None}
    if len(known) > 1:
        raise InputError("the networks have different references; measure them apart, or give --ref or --data")
    return list(known)


def _measure_one(evaluator: Evaluator, sampler, path: Path, seeds: range, shown: bool) -> list[list]:
    """The evaluator's results, for each seed."""
    with terminal.progress(evaluator.num_images * len(seeds), f"measuring {path.name}", "img", enabled=shown) as bar:
        return [evaluator(sampler, seed=seed, progress=bar.update) for seed in seeds]


def _record(path: Path, results: list[list]) -> None:
    """Append to the metric files beside a network, unless that is where shipped and downloaded networks are."""
    folder = path.resolve().parent
    if folder in (registry.pretrained_folder().resolve(), registry.cache_folder().resolve()):
        return
    try:
        for of_seed in results:
            for result in of_seed:
                write_jsonl(folder, result, path.name)
    except OSError as error:
        print(f"note: cannot write metric files into {folder} ({error.strerror or error})", file=sys.stderr)


def _save_grid(grid: str, samplers: dict, seed: int) -> None:
    Path(grid).parent.mkdir(parents=True, exist_ok=True)
    panels = []
    for name, sampler in samplers.items():
        count = min(GRID_IMAGES, getattr(sampler, "num_images", GRID_IMAGES))
        panels.append((Path(name).name, sampler(0, count, seed)[0]))
    if len(panels) == 1:
        pictures.save_grid(grid, panels[0][1])
    else:
        pictures.save_side_by_side(grid, panels)


if __name__ == "__main__":
    main()
