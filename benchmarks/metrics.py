"""Accuracy, speed and memory of the metrics: the commands behind the figures in docs/metrics.md.

    python benchmarks/metrics.py golden                 every golden value: expected, got, relative difference
    python benchmarks/metrics.py speed                  generator + Inception against torch-fidelity's Inception
    python benchmarks/metrics.py memory --count=50000   precision and recall: seconds and peak memory
    python benchmarks/metrics.py ranks RUN --teacher=edm.pkl --metric=fd2k_full@digits
                                                        how fd2k@teacher orders a run's snapshots (made with --keep)

`speed` wants torch-fidelity (`pip install --no-deps torch-fidelity`); without torchvision, an empty stand-in is enough.
"""

import importlib.util
import json
import re
import resource
import statistics
import sys
import tempfile
import time
import types
import zlib
from pathlib import Path

import click
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from di_refine import metrics
from di_refine.commands import cli
from di_refine.files import networks, registry
from di_refine.files.run_files import RunFiles
from di_refine.generators import DiffusionSampler, load_sampler
from di_refine.metrics.detectors import load_detector
from di_refine.metrics.distances import squared_mmd
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.inception import InceptionV3
from di_refine.metrics.kinds import parse_metrics
from di_refine.metrics.statistics import FeatureMoments, moments
from di_refine.metrics.teacher_net import TeacherReference

GOLDEN = ROOT / "tests" / "golden" / "metrics"


@click.group()
def main():
    """Accuracy, speed and memory of the metrics."""


def golden_weights(meta: dict) -> dict[str, torch.Tensor]:
    """Make Inception weights by the golden recipe: each tensor has its own generator, seeded by the name's checksum."""
    state = {}
    for key, shape in meta["state_dict"].items():
        if key.endswith("num_batches_tracked"):
            continue
        rng = np.random.default_rng([zlib.crc32(key.encode()), meta["weight_seed"]])
        if len(shape) >= 2:
            value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif key.endswith((".bn.weight", ".running_var")):
            value = 0.5 + rng.random(shape)
        else:
            value = rng.standard_normal(shape) * (1 if key == "fc.bias" else 0.2)
        state[key] = torch.from_numpy(value.astype(np.float32))
    return state


def _inception_golden() -> tuple[dict[str, np.ndarray], dict]:
    with np.load(GOLDEN / "inception.npz") as archive:
        arrays = dict(archive)
    return arrays, json.loads(str(arrays.pop("meta")[0]))


@main.command()
def golden():
    """Print a Markdown table of golden values, what this project computes, and relative differences."""
    with np.load(GOLDEN / "expected.npz") as archive:
        want = dict(archive)
    with np.load(GOLDEN / "features.npz") as archive:
        real, gen, logits = archive["real"], archive["gen"], archive["is_logits_int8"]
        logits = logits.astype(np.float64) * json.loads(str(archive["meta"][0]))["logit_scale"]
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)

    print("| value | expected | got | relative difference |\n|---|---|---|---|")

    def row(key: str, got: float) -> None:
        expected = float(want[key])
        print(f"| {key} | {expected:.12g} | {got:.12g} | {abs(got - expected) / abs(expected):.1e} |")

    for ddof, makers in [(0, ["nvlabs_ada"]), (1, ["edm", "pytorch_fid", "torch_fidelity"])]:
        whole = metrics.frechet_distance(*moments(real, ddof), *moments(gen, ddof))
        few = metrics.frechet_distance(*moments(real[:40], ddof), *moments(gen[:40], ddof))
        for maker in makers:
            row(f"fid_{maker}", whole)
            row(f"fid_{maker}_rank_deficient", few)
    row("fid_torch_fidelity_float64_features", whole)
    for case in ("kid_subsets", "kid_full"):
        pairs = zip(want[f"{case}_index_real"], want[f"{case}_index_gen"])
        got = float(np.mean([squared_mmd(real[i], gen[j]) for i, j in pairs]))
        row(f"{case}_float64", got)
        row(f"{case}_torch_fidelity_float64", got)
    for k in (3, 5):
        for name, got in zip(("precision", "recall"), metrics.precision_recall(real, gen, k=k)):
            row(f"{name}_k{k}_float64", got)
            row(f"{name}_k{k}_torch_fidelity", got)
    for splits in (1, 10):
        mean, std = metrics.inception_score(probs, splits)
        row(f"is_splits{splits}_mean_float64", mean)
        if splits > 1:
            row(f"is_splits{splits}_std_float64", std)
    row("is_torch_fidelity_shuffle0_mean", mean)
    row("is_torch_fidelity_shuffle0_std", std)

    arrays, meta = _inception_golden()
    net = InceptionV3()
    net.load_state_dict(golden_weights(meta))
    features = torch.cat([net(torch.from_numpy(arrays[name])) for name in ("images_32x32", "images_64x48")])
    for name, got in [
        ("pool3_2048", features),
        ("logits_nobias", net.logits(features)),
        ("logits_bias", net.logits(features, bias=True)),
    ]:
        largest = np.abs(arrays[name]).max()
        difference = np.abs(got.numpy() - arrays[name]).max() / largest
        print(f"| Inception {name}, largest magnitude | {largest:.6g} | {got.abs().max():.6g} | {difference:.1e} |")


@main.command()
@click.option("--count", type=cli.POSITIVE_INT, default=128, help="Measure with this many images.")
@click.option("--batch", type=cli.POSITIVE_INT, default=32, help="Pass this many images through the networks at once.")
@click.option("--repeats", type=cli.POSITIVE_INT, default=3, help="Measure each this often, in turns.")
@cli.device_option
def speed(count, batch, repeats, device):
    """Print images per second of generator, Inception and moments, beside torch-fidelity's on the same images."""
    theirs = _torch_fidelity()
    from di_refine.generators import GeneratorSampler, StyleGAN2Generator
    from stylegan2_ada.networks import Generator

    device = cli.pick_device(device)
    torch.manual_seed(0)
    net = Generator(512, 0, 512, 32, 3, {"num_layers": 2}).requires_grad_(False)
    sampler = GeneratorSampler(StyleGAN2Generator(net), device, chunk=batch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(golden_weights(_inception_golden()[1]), path)
        ours = load_detector(path, device)
        if theirs is not None:
            theirs = theirs("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)).to(device)
    images = sampler(0, count, 0)[0]

    def run_all():
        stream = FeatureMoments()
        for first in range(0, count, batch):
            stream.append(ours(sampler(first, batch, 0)[0], probabilities=False)[0])
        stream.moments()

    def run_ours():
        return torch.cat([ours(part, probabilities=False)[0].cpu() for part in images.split(batch)])

    def run_theirs():
        with torch.no_grad():
            return torch.cat([theirs(part.to(device))[0].cpu() for part in images.split(batch)])

    def run_all_theirs():
        stream = FeatureMoments()
        for first in range(0, count, batch):
            with torch.no_grad():
                stream.append(theirs(sampler(first, batch, 0)[0].to(device))[0])
        stream.moments()

    runs = {"generator, our Inception, moments": run_all, "our Inception alone": run_ours}
    if theirs is not None:
        runs["generator, torch-fidelity's, moments"] = run_all_theirs
        runs["torch-fidelity's alone"] = run_theirs
        got, want = run_ours(), run_theirs()
        print(f"largest difference of features, relative: {float((got - want).abs().max() / want.abs().max()):.1e}")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, function in runs.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    base = median.get("torch-fidelity's alone")
    for name, value in median.items():
        ratio = "" if base is None else f"{base / value:6.2f} x torch-fidelity's alone"
        print(f"{name:40s} {count / value:8.2f} img/s {ratio}".rstrip())
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} thread(s), batch {batch}, {count} images")


def _torch_fidelity():
    """Return torch-fidelity's extractor class, or None.

    The package imports torchvision, but its Inception needs nothing of that.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        print("torch-fidelity is not installed: no comparison", file=sys.stderr)
        return None
    if importlib.util.find_spec("torchvision") is None:
        sys.modules["torchvision"] = _Hollow("torchvision")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3


class _Hollow(types.ModuleType):
    """A module from which everything can be imported and nothing works."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__ = []
        for child in {
            "torchvision": ["datasets", "transforms", "models"],
            "torchvision.transforms": ["functional"],
        }.get(name, []):
            setattr(self, child, _Hollow(f"{name}.{child}"))
            sys.modules[f"{name}.{child}"] = getattr(self, child)

    def __getattr__(self, attribute: str):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return type(attribute, (), {})


@main.command()
@click.option("--count", type=cli.POSITIVE_INT, default=5000, help="Compare sets of this many images.")
@click.option("--features", type=cli.POSITIVE_INT, default=2048, help="Give each image this many features.")
@cli.device_option
def memory(count, features, device):
    """Print seconds and peak memory of precision and recall between two sets of random features."""
    rng = np.random.default_rng(0)
    real, fake = (np.empty([count, features], np.float32) for _ in range(2))
    for values, mean in ((real, 0), (fake, 0.05)):
        for i in range(0, count, 1000):
            values[i : i + 1000] = rng.standard_normal([min(1000, count - i), features], dtype=np.float32) + mean
    peak = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]
    start = time.perf_counter()
    precision, recall = metrics.precision_recall(real, fake, device=cli.pick_device(device))
    seconds = time.perf_counter() - start
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    print(f"{count} x {count} x {features}: precision {precision:.4f}, recall {recall:.4f}, {seconds:.0f} s")
    print(f"peak memory of the process: {peak[1]:.0f} MiB, of which {peak[0]:.0f} MiB before the distances")


@main.command()
@click.argument("run", type=Path)
@click.option("--teacher", required=True, help="The diffusion model that judges.")
@click.option("--metric", required=True, help="What it is compared with, as many thousands of images.")
@click.option("--seed", default=1, help="Of the images.")
def ranks(run, teacher, metric, seed):
    """Spearman's rank correlation of `@teacher` and another metric over the snapshots of a run."""
    from scipy.stats import spearmanr

    name = f"{re.match(r'fd[0-9]+k?', metric)[0]}@teacher"
    path = registry.resolve(teacher)
    net = networks.load(path).average.requires_grad_(False)
    known, device = parse_metrics([name])[0], torch.device("cpu")
    snapshots = RunFiles(run).snapshots()
    samplers = [load_sampler(snapshot) for snapshot in snapshots]
    reference = TeacherReference(net, path, known.num_images, samplers[0].law, device)
    evaluator = Evaluator([name, metric], teacher=reference)
    found = []
    for snapshot, sampler in zip(snapshots, samplers):
        found.append([result.value for result in evaluator(sampler, seed=seed)])
        print(snapshot.name, *(f"{value:.4g}" for value in found[-1]), flush=True)
    own = [result.value for result in evaluator(DiffusionSampler(net, law=samplers[0].law), seed=seed)]
    print("teacher", *(f"{value:.4g}" for value in own))
    print(f"rank correlation of {name} and {metric} over {len(found)} snapshots: {spearmanr(*zip(*found))[0]:.3f}")


if __name__ == "__main__":
    main()
