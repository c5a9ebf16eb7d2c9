"""Checkpoints of rosinality's stylegan2-pytorch, against golden numbers that its own code made."""

import argparse
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden_io import GOLDEN

from di_refine.commands import convert, generate
from di_refine.errors import InputError
from di_refine.files import networks, rosinality
from stylegan2_ada.networks import Discriminator, Generator
from torch_utils import persistence

FOLDER = GOLDEN / "rosinality"
FILES = ["converted-32", "train-16"]
LIMIT = 3e-5  # relative to the largest value


def golden(name):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}


def content(name):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def assert_near(actual, expected):
    assert (actual - expected).abs().max() <= LIMIT * expected.abs().max()


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_images_and_logits(name):
    arrays = golden(name)
    file = networks.load(FOLDER / f"{name}.pt")
    assert file.kind == networks.STYLEGAN2
    net, critic = file.average, file.networks["D"]
    ws = net.mapping(arrays["z"], None)
    assert_near(ws[:, 0], arrays["w"])
    assert_near(net(arrays["z"], None, noise_mode="const"), arrays["img"])
    assert_near(net.synthesis(arrays["ws"], noise_mode="const"), arrays["img_ws"])
    assert_near(net.synthesis(arrays["ws_mix"], noise_mode="const"), arrays["img_mix"])
    assert_near(net.synthesis(ws, noise_mode="none")[:1], arrays["img_no_noise"])
    assert_near(critic(arrays["img"], None), arrays["logits"])
    centre = net.mapping.w_avg if name == "converted-32" else arrays["mean_latent_of_mean_z"]
    truncated = net.synthesis(centre.lerp(ws, 0.7), noise_mode="const")
    assert_near(truncated[: len(arrays["img_psi07"])], arrays["img_psi07"])
    noises = [arrays[f"other_noise_{i}"] for i in range(sum(key.startswith("other_noise") for key in arrays))]
    for buffer, noise in zip((b for key, b in net.named_buffers() if key.endswith("noise_const")), noises):
        buffer.copy_(noise)
    assert_near(net(arrays["z"][:1], None, noise_mode="const"), arrays["img_other_noise"])


def test_what_a_training_keeps_besides_is_said(capsys):
    networks.say.cache_clear()
    file = networks.load(FOLDER / "train-16.pt")
    said = capsys.readouterr().err
    assert "it has no average latent; the mean w of 10000 latents is taken" in said
    assert "optimizers, settings of the training, and the strength of its augmentation are not carried over" in said
    assert list(file.networks) == ["G", "G_ema", "D"]
    deviation = file.average.mapping(torch.randn(1000, 16), None)[:, 0].std(dim=0)
    mean = golden("train-16")["mean_latent_of_mean_z"]  # of 64 latents
    assert ((file.average.mapping.w_avg - mean).abs() < 5 * deviation / 8).all()


@pytest.mark.parametrize("name", FILES)
def test_there_and_back(name, tmp_path):
    """Through our pickle, every tensor comes back under its name and in its shape, bit for bit."""
    runs = [(FOLDER / f"{name}.pt", tmp_path / "a.pkl"), (tmp_path / "a.pkl", tmp_path / "b.pt")]
    for source, dest in runs:
        result = CliRunner().invoke(convert.main, [f"--source={source}", f"--dest={dest}"])
        assert result.exit_code == 0, result.stderr
    before, after = content(name), torch.load(tmp_path / "b.pt", weights_only=True)
    for key in ("g_ema", "d"):
        assert after[key].keys() == before[key].keys()
        assert all(torch.equal(after[key][item], before[key][item].float()) for item in before[key])
    result = CliRunner().invoke(generate.main, [f"--network={tmp_path / 'b.pt'}", "--seeds=0", f"--outdir={tmp_path}"])
    assert result.exit_code == 0, result.stderr


def test_what_is_left_out_in_writing_is_said(tmp_path):
    small = {"channel_base": 64, "channel_max": 8}
    net = Generator(8, 0, 8, 16, 3, {"num_layers": 2}, {**small, "conv_clamp": 256})
    critic = Discriminator(0, 16, 3, architecture="orig", **small)
    notes = rosinality.save({"G": net, "G_ema": net, "D": critic, "training_set_kwargs": {}}, tmp_path / "a.pt")
    assert [note.split(" ")[0] for note in notes] == ["the", "clamps", "training_set_kwargs"]
    assert "another architecture than skip and resnet" in notes[0]
    again = networks.load(tmp_path / "a.pt")
    assert list(again.networks) == ["G_ema"]
    z = torch.randn(2, 8)
    torch.testing.assert_close(again.average(z, None, noise_mode="const"), net.eval()(z, None, noise_mode="const"))


@pytest.mark.parametrize(
    "arguments, changes, words",
    [
        ({"c_dim": 3}, {}, "labels of 3 classes"),
        ({"img_channels": 1}, {}, "images of 1 channels"),
        ({"w_dim": 4}, {}, "latents of 8 numbers beside w of 4"),
        ({}, {"resample_filter": [1, 1]}, "another resampling filter"),
        ({}, {"architecture": "resnet"}, "another architecture"),
        (
            {"mapping_kwargs": {"num_layers": 2, "lr_multiplier": 0.1}},
            {},
            "another learning rate of the mapping network",
        ),
    ],
)
def test_generators_that_it_has_no_place_for(arguments, changes, words, tmp_path):
    basic = {"z_dim": 8, "c_dim": 0, "w_dim": 8, "img_resolution": 16, "img_channels": 3}
    synthesis = {"channel_base": 64, "channel_max": 8, **changes}
    net = Generator(**{**basic, "mapping_kwargs": {"num_layers": 2}, **arguments}, synthesis_kwargs=synthesis)
    persistence.save({"G_ema": net}, tmp_path / "a.pkl")
    result = CliRunner().invoke(convert.main, [f"--source={tmp_path / 'a.pkl'}", f"--dest={tmp_path / 'a.pt'}"])
    assert result.exit_code == 2 and words in result.stderr and not (tmp_path / "a.pt").exists()


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda g: without(g, "to_rgb1.bias"), "missing: to_rgb1.bias"),
        (lambda g: {**g, "more": torch.zeros(1)}, "unexpected: more"),
        (lambda g: without(g, "noises.noise_6"), "it has 6 noise inputs"),
        (lambda g: {**g, "input.input": torch.zeros(12)}, "there is no tensor input.input of 4 axes"),
        (lambda g: {**g, "conv1.conv.weight": torch.zeros(1, 12, 11, 3, 3)}, "wrong shape: synthesis.b4.conv1.weight"),
        (lambda g: {**g, "convs.0.conv.blur.kernel": torch.ones(4, 4)}, "convs.0.conv.blur.kernel is another filter"),
        (lambda g: {**g, "style.1.bias": torch.full([24], float("inf"))}, "contains non-finite values"),
        (lambda g: {**g, "style.1.bias": "text"}, "'style.1.bias' in 'g_ema' is no tensor"),
        (lambda g: {**g, "convs.3.conv.weight": torch.zeros(1, 5, 12, 3, 3)}, "its widths are 12, 12, 5, 6"),
    ],
)
def test_damaged_checkpoints(change, words, tmp_path):
    torch.save({"g_ema": change(content("converted-32")["g_ema"]), "latent_avg": torch.zeros(24)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=words):
        networks.load(tmp_path / "a.pt")


def test_the_options_of_a_training_are_plain_values(tmp_path):
    class Other:
        pass

    before = content("train-16")
    assert isinstance(before["args"], argparse.Namespace) and json.dumps(vars(before["args"]))
    for extra in (Other, print):
        before["args"].extra = extra
        try:
            torch.save(before, tmp_path / "a.pt")
        except Exception:  # what cannot be pickled
            continue
        with pytest.raises(InputError, match="a.pt holds more than tensors and plain values"):
            networks.load(tmp_path / "a.pt")
