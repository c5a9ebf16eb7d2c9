"""Experiments: what refines or distils best, each entry with several seeds, and where asked for, equal arithmetic.

    python benchmarks/experiments.py equal-arithmetic --results=docs/results/equal-arithmetic.jsonl
    python benchmarks/experiments.py objectives-refine --results=docs/results/refine-digits.jsonl

The entries of a plan are commands that differ in a few options. Each run is the command itself, in a process of its
own with one thread; what the file has already is not run again, so the work may be stopped, and be split over processes
with `--entries`. In a plan of equal arithmetic the length of each entry is such that it costs as many floating-point
operations as the first entry; they are counted, not guessed from minutes. Images of the warm-up count as all others do.
Prints the table, mean and standard deviation over the seeds; an entry with fewer seeds than three is left out of it.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from di_refine import objectives, terminal
from di_refine.commands import cli
from di_refine.errors import RunError

REFINE = ("refine.py", "--network=stylegan2-digits.pkl", "--teacher-steps=1")
DISTILL = ("distill.py", "--teacher=edm-digits-16x16-cond.pkl", "--teacher-steps=1")
TRAIN_ON = (
    "pretrain.py",
    "gan",
    "--start-from=stylegan2-digits.pkl",
    "--data=digits-16x16.zip",
    "--metrics=fd2k_full@digits",
)
LEAST_SEEDS = 3


@dataclass(frozen=True)
class Plan:
    """Commands to compare.

    Attributes:
        network: that is measured as 'before'.
        metrics: of the last snapshot; the first is the distance that the table is about.
        entries: by name, the command with its options.
        kimg: length of the first entry, to whose arithmetic the others are fitted; None leaves all to their defaults.
    """

    network: str
    metrics: tuple[str, ...]
    entries: dict[str, tuple[str, ...]]
    kimg: float | None = None


_RATIO = ("--data=teacher",)  # made before by `python -m di_refine sample-teacher`, see docs/objectives.md
_METRICS = ("fd2k_full@digits", "pr2k3_full@digits", "acc2k@digits")


def _objectives(command: tuple[str, ...], names: str) -> dict[str, tuple[str, ...]]:
    entries = {}
    for name in names.split(","):
        entries[name] = (*command, f"--objective={name}")
        if objectives.get(name).needs_ratio:
            entries[name] += _RATIO
    return entries


PLANS = {
    "objectives-refine": Plan("stylegan2-digits.pkl", _METRICS, _objectives(REFINE, "ikl,dmd,f-js,sim,sid,uni-fkl")),
    "objectives-distill": Plan("edm-digits-16x16-cond.pkl", _METRICS, _objectives(DISTILL, "ikl,f-js,sim,sid,uni-fkl")),
    "equal-arithmetic": Plan(
        "stylegan2-digits.pkl",
        _METRICS,
        {
            "ikl": REFINE,
            "GAN trained on, with data": TRAIN_ON,
            "ikl, lr falls for 10 kimg": (*REFINE, "--lr-rampdown=10"),
            "dmd": (*REFINE, "--objective=dmd"),
            "sid": (*REFINE, "--objective=sid"),
            "ikl, score lr 1e-3": (*REFINE, "--score-lr=0.001"),
            "ikl, score lr 5e-3": (*REFINE, "--score-lr=0.005"),
            "ikl, two score steps": (*REFINE, "--score-steps=2"),
            "ikl, score adapter of rank 4": (*REFINE, "--score-adapter=4"),
            "ikl, score adapter of rank 16": (*REFINE, "--score-adapter=16"),
            "ikl, generator's data besides": (*REFINE, "--data=digits-16x16.zip", "--adversarial-weight=0.1"),
            "ikl, no warm-up": (*REFINE, "--score-warmup=0"),
        },
        kimg=21,
    ),
}


def run(command: list[str]) -> str:
    """Run a command with one thread to its end, and return the last line that it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RunError(f"{' '.join(command)} ended with status {done.returncode}")
    return done.stdout.splitlines()[-1]


def flop_per_image(command: tuple[str, ...]) -> float:
    """Arithmetic of training per image, without the warm-up: of 64 updates less that of 32, of 32 images each."""
    options = ["--batch=32", "--metrics=none", "--tick=4"]
    options += [] if command[0] == "pretrain.py" else ["--score-warmup=0", "--lr-rampdown=0"]
    totals = []
    for updates in (32, 64):
        with tempfile.TemporaryDirectory() as folder:
            told = ["benchmarks/flop.py", *command, *options, f"--kimg={updates * 0.032}", f"--outdir={folder}"]
            totals.append(int(run(told)))
    return (totals[1] - totals[0]) / (32 * 32)


def measure(plan: Plan, entry: str, seed: int, kimg: float | None) -> dict:
    """Run an entry once and keep what the table needs."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [*plan.entries[entry], f"--seed={seed}", f"--outdir={folder}"]
        command += [] if kimg is None else [f"--kimg={kimg:.4g}"]
        report = json.loads(run(command))
        last, best = report["snapshot"], report["best_snapshot"]
        networks = [f"--network={name}" for name in dict.fromkeys((plan.network, last, best))]
        told = ["calc_metrics.py", *networks, f"--metrics={','.join(plan.metrics)}", f"--seed={seed}"]
        found = json.loads(run(told))["results"]
    values: dict[str, dict] = {}
    for result in found:
        values.setdefault(result["source"], {}).update(result["results"])
    distance = plan.metrics[0]
    return {
        "entry": entry,
        "seed": seed,
        "before": values[plan.network][distance],
        "after": values[last][distance],
        "best": values[best][distance],
        "values": values[last],
        "kimg": report["kimg"],
        "images_per_sec": report["images_per_sec"],
        "minutes": (time.monotonic() - started) / 60,
        "machine": platform.processor() or platform.machine(),
        "date": date.today().isoformat(),
    }


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation of a sample."""
    return f"{np.mean(values):.{digits}f} +- {np.std(values, ddof=1):.{digits}f}"


@cli.command()
@click.argument("name", metavar="PLAN", type=click.Choice(list(PLANS)))
@click.option("--entries", "names", metavar="LIST", help="Run these, separated by semicolons.  [default: all]")
@click.option("--seeds", type=cli.INT_LIST, default="0-2", metavar="LIST", help="Seeds.")
@click.option("--results", required=True, metavar="FILE.jsonl", help="Where results are kept, one line per run.")
@click.option("--table-only", is_flag=True, help="Run nothing.")
def main(name, names, seeds, results, table_only):
    """Run the entries of a plan and print a table of what they reach."""
    plan, path = PLANS[name], Path(results)
    path.parent.mkdir(parents=True, exist_ok=True)

    def known() -> list[dict]:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def keep(line: dict) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def arithmetic(entry: str) -> float:
        for line in known():
            if line["entry"] == entry and "flop_per_image" in line:
                return line["flop_per_image"]
        count = flop_per_image(plan.entries[entry])
        keep({"entry": entry, "flop_per_image": count})
        return count

    chosen = names.split(";") if names else list(plan.entries)
    unknown = [entry for entry in chosen if entry not in plan.entries]
    if unknown:
        raise click.UsageError(f"--entries={unknown[0]} is none of the plan's: {'; '.join(plan.entries)}")
    for entry in [] if table_only else chosen:
        for seed in seeds:
            if any(line["entry"] == entry and line.get("seed") == seed for line in known()):
                continue
            kimg = plan.kimg
            if kimg is not None:
                kimg *= arithmetic(next(iter(plan.entries))) / arithmetic(entry)
            keep(measure(plan, entry, seed, kimg))

    found = known()
    print("| entry | kimg | before | after | best snapshot | precision | recall | accuracy | images/s | seeds |")
    print("|---|---:|---|---|---|---|---|---|---:|---:|")
    for entry in plan.entries:
        runs = [line for line in found if line["entry"] == entry and "seed" in line]
        if len(runs) < LEAST_SEEDS:
            continue

        def column(key: str, runs=runs) -> str:
            values = [line.get(key, line.get("values", {}).get(key)) for line in runs]
            return "" if None in values else spread(values)

        cells = [entry, f"{np.mean([line['kimg'] for line in runs]):.1f}"]
        cells += [column("before"), column("after"), column("best")]
        cells += [column("pr2k3_full@digits_precision"), column("pr2k3_full@digits_recall"), column("acc2k@digits")]
        cells += [f"{np.mean([line['images_per_sec'] for line in runs]):.0f}", str(len(runs))]
        print(f"| {' | '.join(cells)} |")
    terminal.print_result({"plan": name, "runs": sum("seed" in line for line in found), "results": str(path)})


if __name__ == "__main__":
    main()
