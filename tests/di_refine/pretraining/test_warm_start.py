"""Trainings that start from a network file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from di_refine.commands.pretrain import main
from di_refine.edm.networks import EDMPrecond, VPPrecond
from di_refine.pretraining import warm_start
from stylegan2_ada.networks import Discriminator, Generator
from torch_utils import persistence

SMALL = {"channel_base": 64, "channel_max": 8}
UNET = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}


def generator(size=16, classes=0):
    return Generator(8, classes, 8, size, 3, mapping_kwargs={"num_layers": 2}, synthesis_kwargs=SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Networks of 16 x 16 pixels, and images of several sizes, with two classes or without."""
    path = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    gan = {"G": generator(), "G_ema": generator(), "D": Discriminator(0, 16, 3, **SMALL)}
    gan["G"].mapping.w_avg.normal_()
    persistence.save({**gan, "training_set_kwargs": {}, "augment_pipe": None}, path / "gan.pkl")
    persistence.save({"G_ema": gan["G_ema"], "training_set_kwargs": {}}, path / "alone.pkl")
    # Positional arguments, as some files have them; attention on the second level.
    persistence.save({"ema": EDMPrecond(16, 3, 0, attn_resolutions=[8], **UNET)}, path / "edm.pkl")
    persistence.save({"ema": VPPrecond(16, 3, model_type="SongUNet", model_channels=8)}, path / "vp.pkl")
    for name, size, classes in (("same", 16, 0), ("classes", 16, 2), ("larger", 32, 0), ("odd", 24, 0)):
        (path / name).mkdir()
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 256, [size, size, 3], np.uint8)
            Image.fromarray(pixels).save(path / name / f"{i}.png")
        if classes:
            labels = [[f"{i}.png", i % classes] for i in range(8)]
            (path / name / "dataset.json").write_text(json.dumps({"labels": labels}))
    return path


def pretrain(kind, folder, data, outdir, *more, kimg=0.008, start=None):
    words = [kind, f"--data={folder / data}", f"--outdir={outdir}", f"--kimg={kimg}", "--batch=4", "--metrics=none"]
    start = start or {"gan": "gan.pkl", "teacher": "edm.pkl"}[kind]
    return CliRunner().invoke(main, [*words, f"--from={folder / start}", "--device=cpu", *more])


def result(done):
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def tensors(net):
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


@pytest.mark.parametrize("kind", ["gan", "teacher"])
def test_the_same_architecture_is_copied_bit_for_bit(folder, kind, tmp_path):
    said = result(pretrain(kind, folder, "same", tmp_path, "--dry-run"))
    assert sum(said["new"].values()) == 0 and sum(said["copied"].values()) > 0
    file = warm_start_file(folder, kind)
    made = build(file, kind, 16, 0)
    for name, net in made.items():
        theirs = tensors(file.networks[name])
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in tensors(net).items()), name
    assert not list(tmp_path.iterdir())


def warm_start_file(folder, kind, name=None):
    from di_refine.files import networks

    return networks.load(folder / (name or {"gan": "gan.pkl", "teacher": "edm.pkl"}[kind]))


def build(file, kind, size, classes, **more):
    if kind == "teacher":
        return {"ema": warm_start.teacher(file, size, 3, classes, more.get("augment", False), 0)[0]}
    G, D, G_ema, _ = warm_start.gan(file, size, 3, classes, more.get("freeze_d", 0), 0)
    return {"G": G, "G_ema": G_ema, "D": D}


def test_blocks_of_resolutions_that_both_have_are_copied(folder):
    file = warm_start_file(folder, "gan")
    made, theirs = build(file, "gan", 32, 0), file.networks
    for part, layer in (("G", "synthesis.b{}.conv0.weight"), ("D", "b{}.conv1.weight")):
        shared, new = layer.format(16), layer.format(32)
        assert torch.equal(tensors(made[part])[shared], tensors(theirs[part])[shared])
        assert new not in tensors(theirs[part]) and new in tensors(made[part])
    z = torch.randn(2, 8)
    assert made["G_ema"](z, torch.zeros(2, 0)).shape == (2, 3, 32, 32)
    raw, average = (tensors(made[part])["synthesis.b32.conv0.weight"] for part in ("G", "G_ema"))
    assert torch.equal(raw, average), "what is new is the same in both"


def test_a_unet_of_another_size_is_copied_whole_by_its_levels(folder):
    file = warm_start_file(folder, "teacher")
    net, (report,) = warm_start.teacher(file, 32, 3, 0, False, 0)
    assert report.new == 0 and report.copied == sum(p.numel() for p in file.average.parameters())
    assert hasattr(net.model.enc["16x16_block0"], "qkv") and not hasattr(net.model.enc["32x32_block0"], "qkv")


@pytest.mark.parametrize(("kind", "part"), [("gan", "mapping.embed"), ("teacher", "model.map_label")])
def test_classes_are_new(folder, kind, part, tmp_path):
    said = result(pretrain(kind, folder, "classes", tmp_path))
    log = (Path(said["run_dir"]) / "log.txt").read_text()
    assert "parameters are copied, " in log and part in log
    assert (Path(said["run_dir"]) / "fakes_init.png").is_file(), "there is something to see at the start"
    record = json.loads((Path(said["run_dir"]) / "training_options.json").read_text())
    assert all(record["copied"].values()) and any(record["new"].values())


def test_the_architecture_comes_from_the_file(folder, tmp_path):
    said = result(pretrain("gan", folder, "same", tmp_path, "--dry-run"))
    assert (said["z_dim"], said["channel_base"], said["channel_max"], said["mapping_layers"]) == (8, 64, 8, 2)
    assert said["sources"]["z_dim"] == "start_from" and said["sources"]["lr"] == "auto"
    said = result(pretrain("teacher", folder, "larger", tmp_path, "--dry-run"))
    assert (said["width"], said["channel_mult"], said["attn_resolutions"]) == (8, "1,2", "16")


def test_a_discriminator_that_is_not_there_is_new(folder, tmp_path):
    said = result(pretrain("gan", folder, "same", tmp_path, "--mbstd-group=2", start="alone.pkl"))
    assert set(json.loads((Path(said["run_dir"]) / "training_options.json").read_text())["copied"]) == {"G", "G_ema"}


def test_frozen_layers_keep_their_weights(folder, tmp_path):
    """In a skip or residual network the first layer is `fromrgb`, then come the block's convolutions."""
    said = result(pretrain("gan", folder, "same", tmp_path, "--freeze-d=3", "--augment=none", kimg=0.024))
    before, after = (tensors(persistence.load(path)["D"]) for path in (folder / "gan.pkl", said["snapshot"]))
    frozen = ("b16.fromrgb.", "b16.conv0.", "b16.conv1.")
    for key, tensor in before.items():
        if key.endswith(("weight", "bias")):
            assert torch.equal(tensor, after[key]) == key.startswith(frozen), key


def test_a_stop_between_changes_nothing(folder, tmp_path):
    fixed = ["--freeze-d=1", "--ema-kimg=0.0016", "--ada-kimg=0.0053", "--tick=0.004", "--snap=2"]
    whole = result(pretrain("gan", folder, "classes", tmp_path / "whole", *fixed, kimg=0.016))
    half = result(pretrain("gan", folder, "classes", tmp_path / "parts", *fixed))
    again = result(pretrain("gan", folder, "classes", tmp_path / "parts", *fixed, "--resume=auto", kimg=0.016))
    assert again["run_dir"] == half["run_dir"]
    for part in ("G", "D", "G_ema"):
        one, two = (tensors(persistence.load(run["snapshot"])[part]) for run in (whole, again))
        assert all(torch.equal(one[key], two[key]) for key in one), part


@pytest.mark.parametrize(
    ("kind", "data", "options", "start", "words"),
    [
        ("gan", "same", ["--z-dim=16"], None, "--z-dim comes from --start-from="),
        ("gan", "same", ["--fp16-res=2"], None, "--fp16-res comes from --start-from="),
        ("teacher", "same", ["--width=16"], None, "--width comes from --start-from="),
        ("teacher", "same", [], "gan.pkl", "is a StyleGAN2 generator"),
        ("gan", "same", [], "edm.pkl", "is a diffusion model"),
        ("teacher", "same", [], "vp.pkl", "only networks with EDM's preconditioning"),
        ("teacher", "odd", [], None, "they must be twice, four times"),
        ("gan", "same", ["--freeze-d=2"], "alone.pkl", "holds a generator alone"),
        ("gan", "same", [], "none.pkl", "--start-from="),
    ],
)
def test_bad_input_is_one_sentence(folder, kind, data, options, start, words, tmp_path):
    done = pretrain(kind, folder, data, tmp_path, *options, start=start)
    assert done.exit_code == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_freezing_needs_a_trained_discriminator(folder, tmp_path):
    done = CliRunner().invoke(main, ["gan", f"--data={folder / 'same'}", "--freeze-d=2", f"--outdir={tmp_path}"])
    assert done.exit_code == 2 and "give --start-from" in done.stderr
