"""Every objective in the plane, where what it minimises can be computed: the table of docs/objectives.md.

python benchmarks/playground.py
"""

import platform
import sys
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from di_refine import objectives, terminal
from di_refine.commands import cli, plane


@cli.command()
@click.option("--objectives", "names", default=",".join(objectives.NAMES), metavar="LIST", help="Which.")
@click.option("--seeds", type=cli.INT_LIST, default="0-2", metavar="LIST", help="Seeds.")
@click.option("--steps", type=cli.POSITIVE_INT, default=1500, help="Generator updates, of 512 samples each.")
def main(names, seeds, steps):
    """Print, for every objective, the divergences before and after; the smallest reduction over the seeds counts."""
    print("| objective | its own divergence | before | after | reduction, at least | KL after | JS after | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    worst = 1.0
    for name in names.split(","):
        runs = [plane.play(name, steps, seed) for seed in seeds]
        after = torch.tensor([[run.after[key] for key in ("own", "kl", "js")] for run in runs])
        reduction = 1 - max(run.after["own"] / run.before["own"] for run in runs)
        worst = min(worst, reduction)
        cells = [f"`{name}`", plane.own_divergence(name), f"{runs[0].before['own']:.3g}"]
        spread = after.std(dim=0, correction=0)
        shown = [
            f"{mean:.3g} +- {std:.1g}" if len(runs) > 1 else f"{mean:.3g}"
            for mean, std in zip(after.mean(dim=0).tolist(), spread.tolist())
        ]
        cells += [
            shown[0],
            f"{100 * reduction:.1f}%",
            *shown[1:],
            f"{sum(run.seconds for run in runs) / len(runs):.0f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    terminal.print_result({"seeds": seeds, "steps": steps, "smallest_reduction": worst, "machine": platform.machine()})


if __name__ == "__main__":
    main()
