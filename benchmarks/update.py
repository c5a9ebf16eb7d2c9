"""Images per second of one full update: student score and generator.

    python benchmarks/update.py                                                  # the demo's networks
    python benchmarks/update.py --distill --objective=sid                        # the demo's teacher, distilled
    python benchmarks/update.py --against=published                              # how much faster than the paper's loop
    python benchmarks/update.py --network=stylegan2-cifar10.pkl --batch=128 --precision=bf16

`--network=cifar10-shape` builds networks of the official CIFAR-10 sizes with random weights, without a download.
"""

import copy
import itertools
import resource
import sys
import time
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from di_refine import start

if "--plain" not in sys.argv:
    start.set_runtime()

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.published import PublishedLoop
from di_refine import objectives, terminal
from di_refine.commands import cli
from di_refine.config import PRECISIONS
from di_refine.edm.networks import EDMPrecond
from di_refine.files import networks, registry
from di_refine.generators import DistilledGenerator, StyleGAN2Generator
from di_refine.trainer import Trainer, TrainerConfig
from stylegan2_ada.networks import Generator
from torch_utils import custom_ops


def load(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A generator and its teacher."""
    if name == "cifar10-shape":
        synthesis = {"channel_base": 32768, "channel_max": 512}
        generator = Generator(512, 10, 512, 32, 3, mapping_kwargs={"num_layers": 2}, synthesis_kwargs=synthesis)
        shape = {"img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_type": "SongUNet", "augment_dim": 9}
        return generator, EDMPrecond(**shape, model_channels=128, channel_mult=[2, 2, 2], dropout=0.13)
    path = registry.resolve(name)
    return networks.load(path).average, networks.load(registry.companion(path, "teacher")).average


def noise(teacher: torch.nn.Module, batch: int, device: torch.device):
    """A reference of images of noise, for objectives that learn a ratio; drawn once, so that it costs nothing."""
    images = torch.randn(batch, teacher.img_channels, teacher.img_resolution, teacher.img_resolution, device=device)
    labels = torch.nn.functional.one_hot(torch.arange(batch, device=device) % max(teacher.label_dim, 1)).float()
    labels = torch.nn.functional.pad(labels, [0, teacher.label_dim - labels.shape[1]])
    return lambda start_nimg: itertools.repeat((images, labels))


def page_faults() -> int:
    """How often the system had to find a page of memory for this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Competitor:
    """What is measured: `step` makes an update; speeds, page faults and memory are of the measured updates."""

    def __init__(self, step, ops: str, device: torch.device):
        self.step, self.ops, self.device = step, ops, device
        self.speeds: list[float] = []
        self.faults = self.steps = 0
        self.gpu_bytes = 0

    def run(self, steps: int, batch: int) -> None:
        """Measure some updates."""
        cuda = self.device.type == "cuda"
        with custom_ops.use(self.ops):
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
                torch.cuda.synchronize()
            faults, start = page_faults(), time.perf_counter()
            for _ in range(steps):
                self.step()
            if cuda:
                torch.cuda.synchronize()
                self.gpu_bytes = torch.cuda.max_memory_allocated(self.device)
            self.speeds.append(steps * batch / (time.perf_counter() - start))
            self.faults += page_faults() - faults
            self.steps += steps


@cli.command()
@click.option("--network", default="stylegan2-digits.pkl", metavar="NAME", help="A registry name, or cifar10-shape.")
@click.option("--batch", type=cli.POSITIVE_INT, default=64, help="Images per update.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", help="Arithmetic of the networks.")
@click.option("--objective", type=click.Choice(objectives.NAMES), default="ikl", help="What pulls the generator.")
@click.option("--distill", is_flag=True, help="Distil the teacher instead of refining the generator.")
@click.option("--steps", type=cli.POSITIVE_INT, default=20, help="Updates per repetition.")
@click.option("--repeats", type=cli.POSITIVE_INT, default=5, help="Repetitions.")
@click.option("--threads", type=cli.POSITIVE_INT, help="CPU threads.  [default: PyTorch's]")
@click.option("--plain", is_flag=True, help="Without what every command sets before PyTorch loads.")
@click.option("--against", type=click.Choice(["published"]), help="Measure the paper's plain loop in turns with ours.")
@click.option("--compile", "compiled", is_flag=True, help="Compile our networks with torch.compile.")
@click.option("--profile", is_flag=True, help="List the operators that take most of an update's time, too.")
@cli.device_option
def main(
    network, batch, precision, objective, distill, steps, repeats, threads, plain, against, compiled, profile, device
):
    """Time full updates and print their images per second: mean and standard deviation over the repetitions."""
    if threads:
        torch.set_num_threads(threads)
    device = cli.pick_device(device)
    generator, teacher = load(network)

    def wrapped(teacher):
        return DistilledGenerator(copy.deepcopy(teacher)) if distill else StyleGAN2Generator(copy.deepcopy(generator))

    competitors = {}
    if against:
        loop = PublishedLoop(wrapped(teacher).to(device), copy.deepcopy(teacher).to(device), batch)
        competitors["published"] = Competitor(loop.step, "native", device)
    teacher = teacher.to(device, memory_format=torch.channels_last)
    config = TrainerConfig(batch=batch, precision=precision, objective=objective, score_warmup=0, compile=compiled)
    trainer = Trainer(wrapped(teacher).to(device), teacher, config, reference=noise(teacher, batch, device))
    competitors["ours"] = Competitor(trainer.step, custom_ops.mode(), device)

    for competitor in competitors.values():
        with custom_ops.use(competitor.ops):
            for _ in range(3):
                competitor.step()
    for _ in range(repeats):
        for competitor in competitors.values():
            competitor.run(steps, batch)

    cuda = device.type == "cuda"
    device_name = torch.cuda.get_device_name(device) if cuda else f"{device}, {torch.get_num_threads()} threads"
    rows, results = [], {}
    for name, competitor in competitors.items():
        ours = name == "ours"
        result = {
            "images_per_sec": np.mean(competitor.speeds),
            "sd": spread(competitor.speeds),
            "page_faults_per_update": competitor.faults / competitor.steps,
            "gpu_gib": competitor.gpu_bytes / 2**30 if cuda else None,
        }
        results[name] = result
        rows.append([name, objective if ours else "ikl", precision if ours else "fp32", *result.values()])
    print(f"{network}, {'distilled' if distill else 'refined'}, batch {batch}, {device_name}")
    terminal.table(rows, ["loop", "objective", "precision", "img/s", "sd", "page faults/update", "GPU GiB"])
    answer = {"network": network, **results["ours"], "device": device_name}
    if against:
        ratios = [a / b for a, b in zip(competitors["ours"].speeds, competitors["published"].speeds)]
        print(f"ours / published: {np.mean(ratios):.2f} +- {spread(ratios):.2f}")
        answer |= {"published": results["published"], "ratio": np.mean(ratios), "ratio_sd": spread(ratios)}
    if profile:
        with FlopCounterMode(display=False) as counter:
            trainer.step()
        counts = {str(name): count / 1e9 for name, count in counter.get_flop_counts()["Global"].items()}
        print(", ".join(f"{name} {count:.1f}" for name, count in counts.items()) + " GFLOP/update")
        terminal.table(operators(trainer.step, device), ["operator", "ms/update", "share", "calls/update"])
    terminal.print_result(answer)


def operators(step, device: torch.device, steps: int = 5) -> list[list]:
    """The operators that an update spends most time in, without the operators that these call."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(steps):
            step()

    def time_of(event) -> float:
        return event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total

    events = sorted(found.key_averages(), key=time_of, reverse=True)
    total = sum(map(time_of, events))
    return [
        [event.key[:50], time_of(event) / steps / 1000, f"{time_of(event) / total:.0%}", event.count / steps]
        for event in events[:12]
    ]


def spread(values: list[float]) -> float:
    """The standard deviation of a sample, 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
