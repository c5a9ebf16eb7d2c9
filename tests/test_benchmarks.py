"""Every benchmark can be imported: what it measures still exists under that name."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "published")


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_is_imported(path):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)


@pytest.mark.parametrize("kind", [[], ["--distill"]], ids=["refine", "distill"])
def test_ours_is_timed_in_turns_with_the_published_loop(kind):
    command = [sys.executable, "benchmarks/update.py", "--against=published", "--batch=4", "--steps=1", "--repeats=2"]
    done = subprocess.run([*command, "--device=cpu", *kind], cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ratio"] > 0 and result["published"]["images_per_sec"] > 0


def counted(*command):
    return subprocess.run(
        [sys.executable, "benchmarks/flop.py", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_arithmetic_of_a_command_grows_with_what_it_draws(tmp_path):
    draw = ["generate.py", "--network=stylegan2-digits.pkl", "--device=cpu"]
    one, two = (counted(*draw, f"--seeds={seeds}", f"--outdir={tmp_path / seeds}") for seeds in ("0-7", "0-15"))
    assert one.returncode == two.returncode == 0
    assert 1.5 < int(two.stdout.splitlines()[-1]) / int(one.stdout.splitlines()[-1]) <= 2


def test_counting_keeps_the_status_of_a_command_that_fails():
    assert counted("generate.py", "--network=/nowhere.pkl").returncode == 2


def test_a_table_has_the_entries_of_three_seeds_and_no_others(tmp_path):
    run = {"before": 0.8, "best": 0.4, "kimg": 21.0, "images_per_sec": 100.0}
    lines = [{"entry": "ikl", "seed": seed, "after": 0.4 + seed / 10, **run} for seed in range(3)]
    lines += [{"entry": "dmd", "seed": seed, "after": 0.5, **run} for seed in range(2)]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["benchmarks/experiments.py", "equal-arithmetic", "--table-only", f"--results={results}"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ") and "entry" not in line]
    assert len(rows) == 1 and rows[0].startswith("| ikl | 21.0 |") and "| 0.500 +- 0.100 |" in rows[0]
