"""Interrupts while a command starts: at whatever moment Ctrl-C comes, one line and status 130."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
