"""Updates per second of the demo's training by how long idle threads spin, on a machine that does other things or not.

    python benchmarks/threads.py

The threads of OpenMP wait for work by spinning. While another process needs their core, the one that has work
waits for it. `GOMP_SPINCOUNT` says how long they spin before they sleep. Each setting runs in a process of its own, all
of them in turn, and again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from di_refine import terminal

BUSY = "while True: pass"
DEFAULT = "default"


def measure(spin: str, threads: int, steps: int) -> float:
    """Images per second of `benchmarks/update.py` with a spin count."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    environment["OMP_NUM_THREADS"] = str(threads)
    if spin != DEFAULT:
        environment["GOMP_SPINCOUNT"] = spin
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "update.py"),
        f"--steps={steps}",
        "--repeats=1",
        "--device=cpu",
        "--plain",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["images_per_sec"]


@click.command()
@click.option("--spins", default=f"{DEFAULT},0,1000,10000,30000,100000", help="Compare these spin counts.")
@click.option("--repeats", default=3, help="Run each so often.")
@click.option("--steps", default=20, help="Make so many updates of 64 images.")
def main(spins, repeats, steps):
    """Print a table: rows are spin counts, columns are how many other processes are busy."""
    cores = len(os.sched_getaffinity(0))
    settings = [(spin, cores) for spin in spins.split(",")] + [(DEFAULT, 1)]
    rows = [[f"{spin}, {threads} threads"] for spin, threads in settings]
    for others in range(cores + 1):
        burners = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(others)]
        try:
            speeds = [[measure(spin, threads, steps) for spin, threads in settings] for _ in range(repeats)]
        finally:
            for burner in burners:
                burner.kill()
        for row, values in zip(rows, zip(*speeds)):
            row.append(f"{np.mean(values):.1f} +- {np.std(values, ddof=1) if repeats > 1 else 0:.1f}")
    terminal.table(rows, ["img/s", *(f"{others} busy" for others in range(cores + 1))])


if __name__ == "__main__":
    main()
