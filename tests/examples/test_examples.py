"""The examples run, at a tiny size, and write what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *arguments):
    result = CliRunner().invoke(load(name).main, [str(argument) for argument in arguments], catch_exceptions=False)
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


def test_flow(tmp_path):
    pytest.importorskip("zuko", reason="zuko is not installed")
    picture = tmp_path / "a.png"
    output = run("flow", "--flow-kimg=0.2", "--kimg=0.2", f"--dest={picture}", "--metrics=fd64_full@digits")
    assert output.count("fd64_full") == output.count("bits/dim") == 2 and Image.open(picture).width > 600


@pytest.mark.parametrize("objective", ["ikl", "sds"])
def test_ambigram3d(tmp_path, objective):
    film = tmp_path / "a.gif"
    output = run("ambigram3d", f"--objective={objective}", "--kimg=0.12", f"--dest={film}")
    assert output.startswith(f"{objective}: 3 0.")
    assert Image.open(film).n_frames > 30 and Image.open(film.with_suffix(".png")).size == (7 * 128, 128)


def test_the_body_of_an_ambigram_becomes_a_mesh(tmp_path):
    trimesh = pytest.importorskip("trimesh", reason="trimesh is not installed")
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    module = load("ambigram3d")
    body = module.Body(3, 8)
    with torch.no_grad():
        body.grids[0][..., 1:3, 1:3, 1:3] = 9  # a block in the middle
    module.save_mesh(body, tmp_path / "a.stl")
    assert trimesh.load(tmp_path / "a.stl").is_watertight


def test_an_ambigram_of_one_digit_is_refused():
    result = CliRunner().invoke(load("ambigram3d").main, ["--front=3", "--side=3"])
    assert result.exit_code == 2 and "name different ones" in result.output
