"""Interrupts while a command starts: at whatever moment Ctrl-C comes, one line and status 130."""

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from di_refine import start

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "refine": ["refine.py", "--network=stylegan2-digits.pkl", "--dry-run"],
    "inspect": ["-m", "di_refine", "inspect", "pretrained/stylegan2-digits.pkl"],
}
HOLD = """
import os, sys
class Held:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.write(1, b"here")
            os.read(0, 1)
sys.meta_path.insert(0, Held())
"""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["click", "numpy", "torch", "torch._C", "PIL"])
def test_an_interrupt_during_an_import_is_one_line(tmp_path, command, name):
    (tmp_path / "sitecustomize.py").write_text(HOLD.format(name=name))
    process = subprocess.Popen(
        [sys.executable, *COMMANDS[command]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.read(4) == b"here"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"interrupted\n")


def runtime(code, **variables):
    """What a process prints that sets the runtime as every command does, and then runs `code`."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    return subprocess.run(
        [sys.executable, "-c", f"from di_refine import start; start.set_runtime()\n{code}"],
        cwd=ROOT,
        env=kept | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize(
    "variables, want",
    [({}, start.SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_idle_threads_soon_sleep_unless_the_user_says_otherwise(variables, want):
    assert runtime("import os; print(os.environ.get('GOMP_SPINCOUNT'))", **variables) == want


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("variables, kept", [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "131072"}, False)])
def test_memory_is_kept_from_step_to_step_unless_the_user_says_otherwise(variables, kept):
    code = """
import resource, torch
def step():
    return [torch.ones(2**22) for _ in range(4)]  # 64 MiB
for _ in range(8):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    assert (int(runtime(code, **variables)) < 100) == kept  # each 64 MiB are 16384 pages, or 32 where pages are huge
