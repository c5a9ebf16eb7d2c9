"""Measure generators: quality metrics of networks or of folders of generated images, against reference images."""

import statistics as stats
from pathlib import Path

import click
import torch

from di_refine import cli, zoo
from di_refine.data import ImageDataset
from di_refine.errors import InputError
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.names import FORMS, parse_metrics
from di_refine.metrics.results import MetricResult


class ImageSampler:
    """Images that exist already, as a sampler: image i of the data set for index i, whatever the seed."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset
        self.num_images = len(dataset)
        self.resolution, self.num_channels, self.label_dim = dataset.resolution, dataset.num_channels, dataset.label_dim

    def __call__(self, first_index: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """uint8 images [count, C, H, W] and one-hot labels [count, L], or None without labels."""
        indices = range(first_index, first_index + count)
        labels = torch.from_numpy(self.dataset.labels(indices)) if self.label_dim else None
        return torch.from_numpy(self.dataset.images(indices)), labels


@cli.command(epilog=f"Metrics: {FORMS}; <N> counts thousands of images.")
@click.option("--network", "networks", multiple=True, metavar="PATH|URL|NAME", help="Network to measure; repeatable.")
@click.option(
    "--images", "folders", multiple=True, metavar="PATH", help="Folder or zip of images to measure; repeatable."
)
@click.option("--metrics", required=True, metavar="LIST", help="Metrics, separated by commas, as in fd2k_full@digits.")
@click.option("--data", metavar="PATH|NAME", help="Reference images: a folder or zip made by dataset_tool.py.")
@click.option(
    "--ref", metavar="PATH|URL|NAME", help="Reference statistics (.npz).  [default: --data, else the registry's]"
)
@click.option("--mirror/--no-mirror", default=False, help="Also count the images of --data mirrored left to right.")
@click.option(
    "--detector", metavar="PATH|NAME", help="Feature network.  [default: what --metrics names, else Inception]"
)
@click.option("--seed", type=cli.NON_NEGATIVE_INT, default=0, help="Seed of the first measurement.")
@click.option("--seeds", type=cli.POSITIVE_INT, default=1, help="Measure each network with this many seeds in a row.")
@click.option("--batch", type=cli.POSITIVE_INT, default=128, help="Images per pass.")
@click.option("--steps", type=cli.POSITIVE_INT, default=18, help="Sampling steps of diffusion networks.")
@click.option("--init-sigma", type=cli.POSITIVE_NUMBER, help="Use EDM networks as one-step generators from this level.")
@click.option("--truncation", type=cli.Number(), default=1.0, help="Truncation psi of StyleGAN2 networks.")
@click.option(
    "--labels", default="uniform", metavar="uniform|dataset|CLASS", help="Classes asked of conditional networks."
)
@cli.device_option
def main(
    networks,
    folders,
    metrics,
    data,
    ref,
    mirror,
    detector,
    seed,
    seeds,
    batch,
    steps,
    init_sigma,
    truncation,
    labels,
    device,
):
    """Measure how good generated images are.

    \b
    calc_metrics.py --network=stylegan2-digits.pkl --metrics=fd2k_full@digits,acc2k@digits --seeds=3
    calc_metrics.py --network=cifar.pkl --metrics=fid50k_full --ref=cifar10-32x32.npz
    calc_metrics.py --images=out/ --metrics=fid10k_full --data=cifar10.zip
    """
    if not networks and not folders:
        raise InputError("nothing to measure: give --network or --images")
    device = cli.pick_device(device)
    specs = parse_metrics(metrics)
    if mirror and not data:
        raise InputError("--mirror concerns the images of --data; give --data as well")
    dataset = ImageDataset(zoo.resolve(data, option="--data", kind="dataset"), mirror) if data else None
    network_paths = [zoo.resolve(name, kind=("stylegan2", "edm")) for name in networks]
    image_samplers = [ImageSampler(ImageDataset(folder, option="--images")) for folder in folders]
    references = [] if ref is None else [zoo.resolve(ref, option="--ref", kind=("statistics", "dataset"))]
    references += [] if dataset is None else [dataset]
    if not references and any("reference" in spec.needs for spec in specs):
        references = _registered(network_paths)
    evaluator = Evaluator([spec.name for spec in specs], references or None, detector, device, batch)

    # Everything is loaded and checked before the first image is made: a mistake in the last must not cost an hour.
    settings = {"truncation": truncation, "steps": steps, "init_sigma": init_sigma, "device": device}
    samplers = [_network_sampler(path, labels, dataset, **settings) for path in network_paths]
    jobs = [*zip(networks, samplers, [seeds] * len(samplers)), *zip(folders, image_samplers, [1] * len(folders))]
    for _, sampler, _ in jobs:
        evaluator.check(sampler)

    summaries = []
    for source, sampler, repeats in jobs:
        with cli.progress(evaluator.num_images * repeats, f"measuring {Path(source).name}", "img") as bar:
            runs = [evaluator(sampler, seed=seed + i, progress=bar.update) for i in range(repeats)]
        summaries += [_summary(source, [run[i] for run in runs]) for i in range(len(specs))]
    header = ["source", "metric", "value"] + (["sd", "min"] if seeds > 1 else [])
    rows = []
    for summary in summaries:
        for key, mean in summary["results"].items():
            rows.append([summary["source"], key, mean, summary["sd"].get(key), summary["min"][key]][: len(header)])
    cli.table(rows, header)
    cli.print_result({"results": summaries})


def _registered(networks: list[Path]) -> list[Path]:
    """The statistics that the registry says belong to the networks, if it says one and the same for all."""
    known = {zoo.companion(path, "statistics") for path in networks} - {None}
    if len(known) > 1:
        raise InputError("the networks have different references; measure them apart, or give --ref or --data")
    return list(known)


def _network_sampler(path: Path, labels: str, dataset: ImageDataset | None, truncation: float, **settings):
    """A sampler over a network that asks for classes as --labels says."""
    from di_refine.generators import load_sampler  # builds networks: not needed for images alone

    sampler = load_sampler(path, truncation=truncation, **settings)
    if truncation != 1 and sampler.is_diffusion:
        raise InputError(f"--truncation is for StyleGAN2 generators, and {path} is a diffusion network")
    if labels == "dataset":
        if dataset is None or not dataset.has_labels:
            raise InputError("--labels=dataset needs --data with labels")
        if dataset.label_dim != sampler.label_dim:
            raise InputError(f"--labels=dataset: --data has {dataset.label_dim} classes, {path} {sampler.label_dim}")
        sampler.class_probs = dataset.class_frequencies()
    elif labels != "uniform":
        if not labels.isdecimal():
            raise InputError(f"--labels must be uniform, dataset or a class number, not {labels!r}")
        if int(labels) >= sampler.label_dim:
            raise InputError(f"--labels={labels}: {path} has {sampler.label_dim} classes, counted from 0")
        sampler.label = int(labels)
    return sampler


def _summary(source: str, results: list[MetricResult]) -> dict:
    """One metric of one network over all seeds."""
    first = results[0]
    series = {key: [result.values[key] for result in results] for key in first.values}
    return {
        "source": str(source),
        "metric": first.name,
        "results": {key: stats.fmean(values) for key, values in series.items()},
        "sd": {key: stats.stdev(values) for key, values in series.items() if len(values) > 1},
        "min": {key: min(values) for key, values in series.items()},
        "values": series,
        "seeds": [result.seed for result in results],
        "num_images": first.num_images,
        "resolution": first.resolution,
        "detector": first.detector.as_dict(),
        "reference": first.reference,
        "seconds": sum(result.seconds for result in results),
    }


if __name__ == "__main__":
    main()
