"""The examples run, at a tiny size, and write what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = CliRunner().invoke(module.main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_own_generator(tmp_path):
    """A second call goes on where the first stopped."""
    common = [f"--out={tmp_path}", "--metrics=acc64@digits"]
    output = run("own_generator", "--kimg=0.13", *common)
    assert "acc64@digits" in output and Image.open(tmp_path / "images.png").size == (10 * 48, 6 * 48)
    first = torch.load(tmp_path / "state.pt", weights_only=True)
    run("own_generator", "--kimg=0.2", *common)
    second = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (first["nimg"], second["nimg"]) == (192, 256)


@pytest.mark.parametrize("name", ["digits", "emoji"])
def test_vae(tmp_path, name):
    metrics = f"--metrics=fd64_full@{name}"
    output = run("vae", f"--set={name}", "--vae-kimg=0.2", "--kimg=0.2", f"--dest={tmp_path / 'a.png'}", metrics)
    assert output.count("fd64_full") == 2 and Image.open(tmp_path / "a.png").width > 600
