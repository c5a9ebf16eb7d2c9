"""The estimated peak of an update's memory beside the measured one.

    python benchmarks/memory.py                                                  # the demo's networks
    python benchmarks/memory.py --distill --objective=sid --checkpoint-score     # the demo's teacher, distilled
    python benchmarks/memory.py --network=cifar10-shape --distill --batch=8      # sizes of CIFAR-10, random weights

On a CPU the profiler says what was allocated and freed, on a GPU PyTorch's allocator does.
"""

import copy
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.update import load, noise
from di_refine import objectives, terminal
from di_refine.commands import cli
from di_refine.generators import DistilledGenerator, StyleGAN2Generator
from di_refine.runs import memory
from di_refine.trainer import Trainer, TrainerConfig
from di_refine.trainer_config import PRECISIONS


def measured_peak(trainer: Trainer) -> int:
    """Bytes at the peak of the trainer's second step, which meets Adam's states; with all regularisation."""
    trainer.step()
    trainer.nimg = 0
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        trainer.step()
        return torch.cuda.max_memory_allocated()
    there = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(trainer)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return sum(there.values()) + max(itertools.accumulate(changes))


def _tensors(trainer: Trainer) -> list[torch.Tensor]:
    """All that is there between two steps."""
    found, values = [], [trainer.state_dict(), trainer.teacher.state_dict()]
    while values:
        value = values.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (dict, list)):
            values += value.values() if isinstance(value, dict) else value
    return found


@cli.command()
@click.option("--network", default="stylegan2-digits.pkl", metavar="NAME", help="A registry name, or cifar10-shape.")
@click.option("--batch", type=cli.POSITIVE_INT, default=64, help="Images per update.")
@click.option("--batch-gpu", type=cli.POSITIVE_INT, help="Images per forward pass.  [default: --batch]")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", help="Arithmetic of the networks.")
@click.option("--objective", type=click.Choice(objectives.NAMES), default="ikl", help="What pulls the generator.")
@click.option("--checkpoint-score", is_flag=True, help="Compute the student's inner results again.")
@click.option("--distill", is_flag=True, help="Distil the teacher instead of refining the generator.")
@cli.device_option
def main(network, batch, batch_gpu, precision, objective, checkpoint_score, distill, device):
    """Print the estimated and the measured peak of one update."""
    device = cli.pick_device(device)
    net, teacher = (part.to(device) for part in load(network))
    teacher = teacher.to(memory_format=torch.channels_last)
    generator = DistilledGenerator(copy.deepcopy(teacher)) if distill else StyleGAN2Generator(net)
    settings = {"batch": batch, "batch_gpu": batch_gpu, "precision": precision, "objective": objective}
    config = TrainerConfig(**settings, checkpoint_score=checkpoint_score)
    reference = noise(teacher, batch, device) if objectives.get(objective).needs_ratio else None
    trainer = Trainer(generator, teacher, config, reference=reference)
    clock = time.monotonic()
    estimate = memory.Estimator(trainer)()
    seconds = time.monotonic() - clock
    measured = measured_peak(trainer)
    click.echo(f"estimated in {seconds:.1f} s: {estimate}", err=True)
    click.echo(f"measured: {memory.gib(measured):g} GiB", err=True)
    terminal.print_result({"estimated_gib": memory.gib(estimate.peak), "measured_gib": memory.gib(measured)})


if __name__ == "__main__":
    main()
