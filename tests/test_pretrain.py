"""The pretrain command: both trainings run, write what refine.py reads, and continue exactly after a stop."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from di_refine.generators import load_networks
from di_refine.metrics.features import load_detector
from di_refine.metrics.statistics import FeatureStatistics
from pretrain import main
from torch_utils import persistence

TEACHER = ["teacher", "--width=8", "--channel-mult=1,1", "--num-blocks=1", "--attn-resolutions=8", "--lr-rampup=0"]
GAN = ["gan", "--z-dim=8", "--channel-base=64", "--channel-max=8", "--mbstd-group=2", "--ada-kimg=0.1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 grey 16x16 images in three classes."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    folder.mkdir()
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, [16, 16], np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    (folder / "dataset.json").write_text(json.dumps({"labels": [[f"{i:02d}.png", i % 3] for i in range(24)]}))
    return folder


def pretrain(command, data, outdir, *arguments):
    common = [f"--data={data}", f"--outdir={outdir}", "--batch=4", "--tick=0.008", "--device=cpu"]
    return CliRunner().invoke(main, [*command, *common, *(str(argument) for argument in arguments)])


def report(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(("command", "kind"), [(TEACHER, "edm"), (GAN, "stylegan2")])
def test_a_stop_between_changes_nothing(tmp_path, data, command, kind):
    whole = report(pretrain(command, data, tmp_path / "whole", "--kimg=0.024"))
    first = report(pretrain(command, data, tmp_path / "parts", "--kimg=0.012"))
    second = report(pretrain(command, data, tmp_path / "parts", "--kimg=0.024", f"--resume={first['run_dir']}"))
    assert second["run_dir"] == first["run_dir"] and second["kimg"] == 0.024
    (found, a), (_, b) = load_networks(whole["snapshot"]), load_networks(second["snapshot"])
    assert found == kind
    for key, net in a.items():
        if isinstance(net, torch.nn.Module):
            for (name, x), y in zip(net.state_dict().items(), b[key].state_dict().values()):
                assert torch.equal(x, y), f"{key}.{name}"


@pytest.mark.parametrize("command", [TEACHER, GAN])
def test_labels_resolution_and_kwargs(tmp_path, data, command):
    conditional = persistence.load(report(pretrain(command, data, tmp_path, "--kimg=0.004"))["snapshot"])
    unconditional = persistence.load(report(pretrain(command, data, tmp_path, "--kimg=0.004", "--no-cond"))["snapshot"])
    key, attribute = ("ema", "label_dim") if command is TEACHER else ("G_ema", "c_dim")
    assert getattr(conditional[key], attribute) == 3 and getattr(unconditional[key], attribute) == 0
    assert conditional[key].img_resolution == 16 and conditional[key].img_channels == 1
    described = conditional["dataset_kwargs" if command is TEACHER else "training_set_kwargs"]
    assert described["resolution"] == 16 and described["use_labels"] is True


def test_gan_carries_its_augmentation_and_teacher_its_augment_input(tmp_path, data):
    saved = persistence.load(report(pretrain(GAN, data, tmp_path, "--kimg=0.008", "--augment=bg"))["snapshot"])
    assert saved["augment_pipe"].xflip == 1 and saved["augment_pipe"].brightness == 0
    saved = persistence.load(report(pretrain(TEACHER, data, tmp_path, "--kimg=0.004"))["snapshot"])
    assert saved["ema"].model.map_augment.weight.shape[1] == 9
    saved = persistence.load(report(pretrain(TEACHER, data, tmp_path, "--kimg=0.004", "--augment=0"))["snapshot"])
    assert saved["ema"].model.map_augment is None


def test_max_minutes_stops_and_saves(tmp_path, data):
    stopped = report(pretrain(GAN, data, tmp_path, "--kimg=100", "--max-minutes=0.02"))
    assert 0 < stopped["kimg"] < 100 and Path(stopped["snapshot"]).is_file()


def test_features_and_metrics_during_training(tmp_path, data):
    detector, stats = tmp_path / "toy.safetensors", tmp_path / "toy.npz"
    arguments = ["features", f"--data={data}", f"--dest={detector}", f"--stats={stats}", "--epochs=2", "--device=cpu"]
    made = CliRunner().invoke(main, [*arguments, "--width=4", "--feature-dim=8"])
    assert report(made)["held_out_images"] == 2
    net = load_detector(detector)
    assert net.identity.name == "toy" and FeatureStatistics.load(stats).count == 24
    metrics = ["--metrics=fd1k_full@toy", f"--detector={detector}"]
    result = report(pretrain(GAN, data, tmp_path, "--kimg=0.008", "--snap=1", *metrics))
    assert result["fd1k_full@toy"] > 0
    rows = (Path(result["run_dir"]) / "metric-fd1k_full@toy.jsonl").read_text().splitlines()
    assert [json.loads(row)["snapshot_pkl"] for row in rows] == [None, "network-snapshot-000000.pkl"]


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        (TEACHER, ["--batch-gpu=3"], ["--batch=4", "--batch-gpu=3"]),
        (TEACHER, ["--channel-mult=1,1,1,1,1,1"], ["--channel-mult"]),
        (TEACHER, ["--width=132"], ["132"]),
        (TEACHER, ["--kimg=0"], ["--kimg"]),
        (TEACHER, ["--metrics=fid"], ["unknown metric"]),
        (GAN, ["--mbstd-group=3"], ["--mbstd-group=3"]),
        (GAN, ["--resume=nowhere"], ["--resume=nowhere"]),
        (GAN, ["--augment=all"], ["--augment"]),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, data, command, options, words):
    result = pretrain(command, data, tmp_path / "new", *options)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert not (tmp_path / "new").exists()


def test_cond_needs_labels(tmp_path, data):
    unlabelled = tmp_path / "plain"
    unlabelled.mkdir()
    Image.open(data / "00.png").save(unlabelled / "0.png")
    result = pretrain(GAN, unlabelled, tmp_path / "new", "--cond")
    assert result.exit_code == 2 and "--cond" in result.stderr
