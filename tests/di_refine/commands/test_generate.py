"""The generate command: one PNG per seed, a grid, the same pixels for the same seed."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden_io import GOLDEN
from PIL import Image

from di_refine.commands.generate import main
from di_refine.generators import latents, load_sampler

CASES = GOLDEN.parent / "cases"
GAN, EDM = GOLDEN / "stylegan2/sg2ada-cifar-cond.pkl", GOLDEN / "edm/iddpm.pkl"


def generate(*arguments):
    return CliRunner().invoke(main, ["--device=cpu", *(str(argument) for argument in arguments)])


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize(("network", "size"), [(GAN, 32), (EDM, 16)])
def test_pictures_depend_on_the_seed_alone(tmp_path, network, size):
    common = [f"--network={network}", "--steps=2"]
    first = generate(*common, f"--outdir={tmp_path / 'a'}", "--seeds=0-4", "--columns=5")
    assert first.exit_code == 0, first.stderr
    assert json.loads(first.stdout.splitlines()[-1])["images"] == 5
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"grid.png", *(f"seed{i:04d}.png" for i in range(5))}
    assert pixels(tmp_path / "a/grid.png").shape == (32, 5 * 32, 3)  # small pictures are enlarged
    assert np.array_equal(
        pixels(tmp_path / "a/grid.png")[:: 32 // size, 32 : 64 : 32 // size], pixels(tmp_path / "a/seed0001.png")
    )

    second = generate(*common, f"--outdir={tmp_path / 'b'}", "--seeds=3", "--no-grid")
    assert second.exit_code == 0 and [p.name for p in (tmp_path / "b").iterdir()] == ["seed0003.png"]
    # Another batch size may round the last bit of a float differently.
    a, b = (pixels(tmp_path / folder / "seed0003.png").astype(int) for folder in "ab")
    assert np.abs(a - b).max() <= 1


def test_latents_are_those_of_the_family():
    expected = torch.from_numpy(np.random.RandomState(7).randn(1, 64)).float()
    assert torch.equal(latents([7], (64,)), expected)


def test_class_and_truncation_matter(tmp_path):
    for name, options in {"a": ["--class=3"], "b": ["--class=4"], "c": ["--class=3", "--truncation=0.3"]}.items():
        assert generate(f"--network={GAN}", f"--outdir={tmp_path / name}", "--seeds=3", *options).exit_code == 0
    a, b, c = (pixels(tmp_path / name / "seed0003.png") for name in "abc")
    assert not np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.mark.parametrize("network", [GAN, EDM])
def test_sampler_is_a_function_of_the_index(network):
    """Random noise inputs included, whatever part of the sequence is asked for."""
    sampler = load_sampler(network, steps=1)
    sampler.chunk = 4
    images, labels = sampler(0, 10, seed=5)
    for first, count in [(0, 3), (3, 4), (5, 5), (9, 1)]:
        part, part_labels = sampler(first, count, seed=5)
        assert torch.equal(part, images[first : first + count])
        assert torch.equal(part_labels, labels[first : first + count])
    assert not torch.equal(sampler(0, 10, seed=6)[0], images)


def test_sampler_leaves_the_mode_alone():
    sampler = load_sampler(GAN)
    sampler.net.train()
    mapping = sampler.generator.net.mapping
    before = mapping.w_avg.clone()
    sampler.images([0])
    assert sampler.net.training and torch.equal(mapping.w_avg, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([f"--network={GAN}", "--class=10"], "--class=10"),
        ([f"--network={GOLDEN / 'stylegan2/sg2ada-uncond64.pkl'}", "--class=1"], "no classes"),
        ([f"--network={EDM}", "--truncation=0.5"], "--truncation"),
        ([f"--network={GAN}", "--init-sigma=1"], "--init-sigma"),
        ([f"--network={GAN}", "--seeds=5-2"], "--seeds"),
        ([f"--network={GAN}", "--steps=0"], "--steps"),
        (["--network=nothing.pkl"], "--network=nothing.pkl"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, options, words):
    result = generate(f"--outdir={tmp_path / 'new'}", *options)
    assert result.exit_code == 2 and words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_four_channels_are_transparent_pictures(tmp_path):
    result = generate(f"--network={CASES / 'rgba.pkl'}", f"--outdir={tmp_path}", "--seeds=0-3")
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "seed0000.png").mode == Image.open(tmp_path / "grid.png").mode == "RGBA"


def test_the_grid_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("di_refine.commands.generate.GRID_IMAGES", 5)
    result = generate(
        f"--network={CASES / 'rgba.pkl'}", f"--outdir={tmp_path}", "--seeds=0-8", "--batch=2", "--columns=5"
    )
    assert result.exit_code == 0 and "note: the grid shows the first 5 of 9 images" in result.stderr
    assert Image.open(tmp_path / "seed0008.png").size == (8, 8)
    assert Image.open(tmp_path / "grid.png").size == (5 * 32, 32)
