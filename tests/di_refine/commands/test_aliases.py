"""The spellings of neighbouring projects."""

import importlib
import json
import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from di_refine.commands import aliases
from di_refine.commands.generate import main as generate
from di_refine.edm.sampler import sample
from di_refine.errors import InputError
from di_refine.files import registry
from di_refine.files.pictures import to_uint8
from di_refine.generators import edm_latents
from torch_utils import persistence

DOC = Path(__file__).resolve().parents[3] / "docs" / "coming-from.md"
COMMANDS = [line.strip() for line in DOC.read_text().splitlines() if line.startswith("    python ")]
OPTIONS = {"--truncation", "--mirror", "--no-mirror", "--resolution", "--sigma-min", "--labels", "--lr", "--width"}
FLAGS = {"--mirror"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--trunc=0.7"], ["--truncation=0.7"]),
        (["--trunc", "-0.7"], ["--truncation", "-0.7"]),
        (["--sigma_min=0.1"], ["--sigma-min=0.1"]),
        (["--mirror=1", "--mirror=False", "--mirror"], ["--mirror", "--no-mirror", "--mirror"]),
        (["--mirror", "1", "x"], ["--mirror", "x"]),
        (["--labels", "--trunc=1"], ["--labels", "--trunc=1"]),  # the value of another option
        (["--", "--trunc=1"], ["--", "--trunc=1"]),
        (["--verbose", "--gpus=1", "--gpus", "1", "--bench=True", "a"], ["a"]),
        (["--width=32"], ["--width=32"]),
        (["--glr=1"], ["--lr=1"]),
        (["--unknown_thing=3"], ["--unknown_thing=3"]),
    ],
)
def test_words(words, expected):
    assert aliases.ours(words, OPTIONS, FLAGS) == expected


def test_width_and_height_are_the_resolution_where_there_is_no_width():
    options = OPTIONS - {"--width"}
    given = ["--width=32", "--height", "32"]
    assert aliases.ours(given, options, FLAGS) == ["--resolution=32", "--resolution=32"]
    with pytest.raises(InputError, match="--width=32 and --height=64 differ"):
        aliases.ours(["--width=32", "--height=64"], options, FLAGS)


@pytest.mark.parametrize("word", ["--gpus=8", "--duration=200", "--ema=0.5", "--cfg=auto", "--subset=100"])
def test_what_means_something_else_is_said(word):
    with pytest.raises(InputError, match=word):
        aliases.ours([word], OPTIONS | {"--kimg"}, FLAGS)
    if not word.startswith("--gpus"):  # what to give instead is of no use where nothing is trained
        assert aliases.ours([word], OPTIONS, FLAGS) == [word]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_document_is_understood(line):
    script, *words = shlex.split(line)[1:]
    command = importlib.import_module(f"di_refine.commands.{script.removesuffix('.py')}").main
    if isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    context = command.make_context(script, words)
    assert context.params


def test_the_document_has_every_name():
    names = set(re.findall(r"`(--[\w-]+)", DOC.read_text().replace("_", "-")))
    assert set(aliases.SAME) <= names and set(aliases.WITHOUT_MEANING) <= names


# EDM's images, and projected latents


def test_edms_latents_give_edms_images(tmp_path):
    """Each image's generator gives its latent first and then its class."""
    path = registry.pretrained_folder() / "edm-digits-16x16-cond.pkl"
    arguments = [f"--network={path}", "--seeds=3,7", "--steps=4", "--latents=edm", "--subdirs", f"--outdir={tmp_path}"]
    done = CliRunner().invoke(generate, [*arguments, "--S_churn=2", "--device=cpu"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["labels"] == "edm" and "as EDM's tool draws them" in done.stderr
    net = persistence.load(path)["ema"].eval()
    z, labels = edm_latents([3, 7], (1, 16, 16), 10)
    for i, seed in enumerate((3, 7)):
        rng = torch.Generator().manual_seed(seed)
        assert torch.equal(z[i], torch.randn([1, 16, 16], generator=rng))
        assert labels[i].argmax() == torch.randint(10, size=[], generator=rng) and labels[i].sum() == 1
    torch.manual_seed(3)
    expected = to_uint8(sample(net, z, labels, num_steps=4, S_churn=2).float())
    for i, seed in enumerate((3, 7)):
        drawn = np.asarray(Image.open(tmp_path / "000000" / f"seed{seed:04d}.png")).astype(int)
        assert np.abs(drawn - expected[i, 0].numpy().astype(int)).max() <= 1
    assert torch.equal(edm_latents([3], (1, 2, 2), 0)[1], torch.zeros(1, 0))


def test_settings_of_the_solver_are_for_diffusion_models(tmp_path):
    network = registry.pretrained_folder() / "stylegan2-digits.pkl"
    done = CliRunner().invoke(generate, [f"--network={network}", "--rho=5", f"--outdir={tmp_path / 'out'}"])
    assert done.exit_code == 2 and "--rho is for diffusion models" in done.stderr


def test_projected_w(tmp_path):
    path = registry.pretrained_folder() / "stylegan2-digits.pkl"
    net = persistence.load(path)["G_ema"]
    w = net.mapping(torch.randn(2, net.z_dim), torch.eye(10)[:2]).numpy()
    np.savez(tmp_path / "w.npz", w=w)
    arguments = [f"--network={path}", f"--outdir={tmp_path / 'out'}", "--device=cpu"]
    done = CliRunner().invoke(generate, [*arguments, f"--projected-w={tmp_path / 'w.npz'}"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["images"] == 2
    expected = to_uint8(net.synthesis(torch.from_numpy(w), noise_mode="const"))
    for i in range(2):
        drawn = np.asarray(Image.open(tmp_path / "out" / f"proj{i:02d}.png")).astype(int)
        assert np.abs(drawn - expected[i, 0].numpy().astype(int)).max() <= 1
    done = CliRunner().invoke(generate, [*arguments, f"--projected-w={tmp_path / 'w.npz'}", "--trunc=0.5"])
    assert done.exit_code == 2 and "--projected-w has its own w" in done.stderr
    np.savez(tmp_path / "z.npz", z=w[0])
    np.savez(tmp_path / "bad.npz", w=w[0])
    for name, words in (("z.npz", "holds z, and w [N, "), ("bad.npz", "holds w ["), ("none.npz", "cannot be read")):
        done = CliRunner().invoke(generate, [*arguments, f"--projected-w={tmp_path / name}"])
        assert done.exit_code == 2 and words in done.stderr, done.stderr
