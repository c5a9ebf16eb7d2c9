"""Which objective is best for what: every one on the shipped digits, over several seeds.

    python -m di_refine sample-teacher --teacher=edm-digits-16x16-cond.pkl --num=3000 --steps=10     # for the ratios
    python benchmarks/objectives.py refine --results=docs/results/refine-digits.jsonl
    python benchmarks/objectives.py distill --results=docs/results/distill-digits.jsonl

Each run is the command itself, in a process of its own with one thread; what the file has already is not run again, so
the work may be stopped, and be split over processes with `--objectives`. Prints the table, mean and standard deviation.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from di_refine import objectives, terminal
from di_refine.commands import cli
from di_refine.errors import RunError

COMMANDS = {
    "refine": ["refine.py", "--network=stylegan2-digits.pkl"],
    "distill": ["distill.py", "--teacher=edm-digits-16x16-cond.pkl"],
}
OBJECTIVES = {
    "refine": "ikl,dmd,f-js,sim,sid,uni-fkl",
    "distill": "ikl,f-js,sim,sid,uni-fkl",
}
# Recommended values in the registry are for ikl; this is what the others were given beside them.
EXTRA = {"sid": ["--alpha=1.2"]}


def measure(what: str, objective: str, seed: int) -> dict:
    """Run the command once and keep what the table needs."""
    command = [sys.executable, *COMMANDS[what], f"--objective={objective}", f"--seed={seed}", "--teacher-steps=1"]
    command += EXTRA.get(objective, [])
    if objectives.get(objective).needs_ratio:
        command.append("--data=teacher")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, f"--outdir={folder}"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
    if done.returncode:
        raise RunError(f"{' '.join(command[1:])} ended with status {done.returncode}")
    report = json.loads(done.stdout.splitlines()[-1])
    rows = list(report["all"].values())  # original, last, best, teacher
    distance, accuracy = rows[0]
    return {
        "objective": objective,
        "seed": seed,
        "before": rows[0][distance],
        "after": rows[1][distance],
        "best": rows[2][distance],
        "accuracy": rows[1][accuracy],
        "kimg": report["kimg"],
        "images_per_sec": report["images_per_sec"],
        "minutes": report["kimg"] * 1000 / report["images_per_sec"] / 60,
        "machine": platform.processor() or platform.machine(),
        "date": date.today().isoformat(),
    }


def spread(values: np.ndarray, digits: int) -> str:
    """Mean and standard deviation; of one run there is only the value."""
    mean = f"{values.mean():.{digits}f}"
    return f"{mean} +- {values.std():.{digits}f}" if len(values) > 1 else mean


@cli.command()
@click.argument("what", type=click.Choice(list(COMMANDS)))
@click.option("--objectives", "names", metavar="LIST", help="Which.  [default: those of the table in docs/]")
@click.option("--seeds", type=cli.INT_LIST, default="0-2", metavar="LIST", help="Seeds.")
@click.option("--results", required=True, metavar="FILE.jsonl", help="Where results are kept, one line per run.")
@click.option("--table-only", is_flag=True, help="Run nothing.")
def main(what, names, seeds, results, table_only):
    """Run objectives on the digits and print a table of what they reach."""
    path = Path(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = (names or OBJECTIVES[what]).split(",")
    for seed in [] if table_only else seeds:
        for name in names:
            if any(run["objective"] == name and run["seed"] == seed for run in found):
                continue
            found.append(measure(what, name, seed))
            with path.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
    print("| objective | distance before | after | class accuracy | images/s | minutes | seeds |")
    print("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(run["objective"] for run in found):
        runs = [run for run in found if run["objective"] == name]
        column = {key: np.array([run[key] for run in runs]) for key in runs[0] if isinstance(runs[0][key], float)}
        cells = [
            f"`{name}`",
            f"{column['before'].mean():.3f}",
            spread(column["after"], 3),
            spread(column["accuracy"], 4),
            f"{column['images_per_sec'].mean():.0f}",
            f"{column['minutes'].mean():.1f}",
            str(len(runs)),
        ]
        print(f"| {' | '.join(cells)} |")
    terminal.print_result({"command": what, "runs": len(found), "results": str(path)})


if __name__ == "__main__":
    main()
