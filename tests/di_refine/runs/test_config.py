"""The settings of the loop: their ranges, what a resumed run may change, and that they are quick to import."""

import subprocess
import sys
from pathlib import Path

import pytest

from di_refine.runs.config import LoopConfig, RunConfig
from torch_utils import settings

ROOT = Path(__file__).resolve().parents[3]


def test_defaults():
    assert LoopConfig() == LoopConfig(kimg=5000, tick=50, snap=10, keep=2, max_minutes=None, stop_if_worse=None)
    assert RunConfig() == RunConfig(outdir="runs", desc=None, resume=None)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kimg": 0}, "kimg=0 is not possible; it must be a number .greater than 0 and at most 1e.09"),
        ({"tick": -1}, "tick=-1 is not possible; it must be a number .greater than 0"),
        ({"snap": 0}, "snap=0 .* a whole number .at least 1"),
        ({"keep": 1.5}, "keep=1.5 .* a whole number .at least 1"),
        ({"max_minutes": 0}, "max_minutes=0 .* .greater than 0"),
        ({"stop_if_worse": 1}, "stop_if_worse=1 .* .greater than 1"),
    ],
)
def test_ranges(wrong, words):
    with pytest.raises(settings.SettingError, match=words):
        LoopConfig(**wrong)


def test_a_resumed_run_may_change_all_of_it():
    names = {item.name for part in (LoopConfig, RunConfig) for item in settings.declared(part)}
    assert settings.may_change(LoopConfig, RunConfig) == names and len(names) == 10


def test_importing_the_settings_imports_no_torch():
    code = "import sys, di_refine.runs.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
