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
