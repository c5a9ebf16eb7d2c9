"""The pretrain command: both trainings run, write what refine.py reads, and continue exactly after a stop."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from click.testing import CliRunner
from PIL import Image

from di_refine.commands.pretrain import main
from di_refine.errors import InputError
from di_refine.files import networks, registry
from di_refine.files.datasets import ImageDataset
from di_refine.metrics.detectors import load_detector
from di_refine.metrics.statistics import FeatureStatistics
from stylegan2_ada.adversarial import AdversarialTrainer
from torch_utils import persistence

PAPER = "--preset=paper-cifar10"  # which is the same for every length
TEACHER = ["teacher", PAPER, "--width=8", "--channel-mult=1,1", "--num-blocks=1", "--attn-resolutions=8"]
TEACHER += ["--lr-rampup=0"]
ROOT = Path(__file__).resolve().parents[3]
GAN = ["gan", PAPER, "--z-dim=8", "--channel-base=64", "--channel-max=8", "--mbstd-group=2", "--ada-kimg=0.1"]


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


def arguments(command, data, outdir, *more):
    common = [f"--data={data}", f"--outdir={outdir}", "--batch=4", "--tick=0.008", "--device=cpu"]
    return [*command, *common, *(str(argument) for argument in more)]


def pretrain(*args):
    return CliRunner().invoke(main, arguments(*args))


def report(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def assert_same_networks(one, two, kind, **tolerance):
    """Two snapshots; bit for bit, unless a tolerance is given."""
    first, a, b = networks.load(one), networks.load(one).networks, networks.load(two).networks
    assert first.kind == kind
    for key, net in a.items():
        if isinstance(net, torch.nn.Module):
            for (name, x), y in zip(net.state_dict().items(), b[key].state_dict().values()):
                assert torch.allclose(x, y, **tolerance) if tolerance else torch.equal(x, y), f"{key}.{name}"


def ticks(run_dir):
    """The lines of stats.jsonl without what differs from one time to another."""
    own = ("timestamp", "images_per_sec", "cpu_memory_gb", "gpu_memory_gb", "data_wait_sec")
    lines = [json.loads(line) for line in (Path(run_dir) / "stats.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in own} for line in lines]


@pytest.mark.parametrize(("command", "kind"), [(TEACHER, "edm"), (GAN, "stylegan2")])
def test_a_stop_between_changes_nothing(tmp_path, data, command, kind):
    """N images, and N more, are 2N; also when the process is killed on the way and the second half has a lost tick."""
    whole = report(pretrain(command, data, tmp_path / "whole", "--kimg=0.024"))
    first = report(pretrain(command, data, tmp_path / "parts", "--kimg=0.012"))
    second = report(pretrain(command, data, tmp_path / "parts", "--kimg=0.024", f"--resume={first['run_dir']}"))
    assert second["run_dir"] == first["run_dir"] and second["kimg"] == 0.024
    assert_same_networks(whole["snapshot"], second["snapshot"], kind)

    child = ["tests/soak/child.py", json.dumps({"kill_at": 20}), "pretrain.py"]
    killed = ranks.Forked([*child, *arguments(command, data, tmp_path / "killed", "--kimg=0.024")], {})
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    third = pretrain(command, data, tmp_path / "killed", "--kimg=0.024", "--resume=auto")
    assert "continuing from training-state-000000.pt at 0.016 kimg" in third.stderr
    assert_same_networks(whole["snapshot"], report(third)["snapshot"], kind)
    assert ticks(report(third)["run_dir"]) == ticks(whole["run_dir"])


def test_a_run_that_is_named_keeps_what_is_not_given(tmp_path, data):
    """`--resume=RUN` needs no option of the first command but the required ones."""
    first = report(pretrain(TEACHER, data, tmp_path, "--kimg=0.012", "--lr=0.0007", "--dropout=0.05", "--batch-gpu=2"))
    common = [f"--data={data}", f"--outdir={tmp_path}", f"--resume={first['run_dir']}", "--device=cpu"]
    longer = CliRunner().invoke(main, ["teacher", *common, "--kimg=0.02"])
    assert report(longer)["kimg"] == 0.02 and "kimg: 0.012 -> 0.02" in longer.stderr
    record = json.loads((Path(first["run_dir"]) / "training_options.json").read_text())
    assert "batch_gpu: 2 -> null" in longer.stderr, "it belongs to the machine"
    assert (record["lr"], record["dropout"], record["width"], record["tick"]) == (0.0007, 0.05, 8, 0.008)
    assert record["sources"]["lr"] == record["sources"]["kimg"] == "given"
    other = CliRunner().invoke(main, ["teacher", *common, "--width=16"])
    assert other.exit_code == 2 and "was started with --width=8" in other.stderr


def test_the_same_command_continues_a_run_directory(tmp_path, data):
    first = report(pretrain(GAN, data, tmp_path, "--kimg=0.012"))
    assert first["stopped"] is None
    run_dir = first["run_dir"]
    again = pretrain(GAN, data, run_dir, "--kimg=0.012")
    assert {**report(again), "images_per_sec": 0} == {**first, "images_per_sec": 0}, "nothing is left to do"
    longer = pretrain(GAN, data, run_dir, "--kimg=0.02", "--lr=1e-3", "--keep=3")
    assert report(longer)["kimg"] == 0.02 and report(longer)["run_dir"] == run_dir
    listed = longer.stderr.splitlines()[:3]
    assert sorted(listed) == ["keep: 2 -> 3", "kimg: 0.012 -> 0.02", "lr: 0.0025 -> 0.001"]
    for option, words in [
        ("--seed=1", "with --seed=0"),
        ("--z-dim=9", "with --z-dim=8"),
        ("--gamma=1", "with --gamma="),
    ]:
        refused = pretrain(GAN, data, run_dir, option)
        assert refused.exit_code == 2 and words in refused.stderr, refused.stderr
    other = pretrain(TEACHER, data, run_dir)
    assert other.exit_code == 2 and "cannot be continued by 'edm'" in other.stderr
    assert [path.name for path in tmp_path.iterdir()] == [Path(run_dir).name]


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_signal_ends_with_a_result(tmp_path, data, monkeypatch, name, status):
    step = AdversarialTrainer.step

    def interrupted(trainer):
        if trainer.nimg == 8:
            os.kill(os.getpid(), getattr(signal, name))
        return step(trainer)

    monkeypatch.setattr(AdversarialTrainer, "step", interrupted)
    result = pretrain(GAN, data, tmp_path, "--kimg=0.024")
    assert result.exit_code == status
    stopped = json.loads(result.stdout.splitlines()[-1])
    assert (stopped["stopped"], stopped["kimg"]) == (name, 0.012) and Path(stopped["snapshot"]).is_file()
    page = Path(stopped["run_dir"], "report.html")
    assert f"stopped by {name} at 0.012 of 0.024 kimg" in page.read_text(encoding="utf-8")
    monkeypatch.undo()
    assert report(pretrain(GAN, data, tmp_path, "--kimg=0.024", "--resume=auto"))["kimg"] == 0.024
    assert "finished: 0.024 of 0.024 kimg" in page.read_text(encoding="utf-8")


def test_options_of_the_schedule_reach_the_loop(tmp_path, data, monkeypatch):
    def loop(_run, _trainer, config, *_, **__):
        raise InputError(str(config))

    monkeypatch.setattr("di_refine.commands.training.Loop", loop)
    options = ["--kimg=2", "--snap=3", "--keep=4", "--stop-if-worse=1.5", "--max-minutes=2"]
    options += ["--metrics=fd1k_full@digits"]
    result = pretrain(GAN, data, tmp_path, *options)
    words = ["--kimg=2.0", "--tick=0.008", "--snap=3", "--keep=4", "--stop-if-worse=1.5", "--max-minutes=2.0"]
    assert all(word in result.stderr for word in words), result.stderr


def teacher_on_ranks(*options):
    result = CliRunner().invoke(main, options)
    print(result.stdout if result.exit_code == 0 else result.stderr)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, data):
    """One process, then two: the same up to the order of summation."""
    exact = [*TEACHER, "--dropout=0"]
    whole = report(pretrain(exact, data, tmp_path / "whole", "--kimg=0.016"))
    report(pretrain(exact, data, tmp_path / "parts", "--kimg=0.008"))
    options = arguments(exact, data, tmp_path / "parts", "--kimg=0.016", "--resume=auto")
    first, other = ranks.run(__file__, "teacher_on_ranks", 2, *options)
    assert other.strip() == "", "one process alone prints the result"
    result = json.loads(first.strip().splitlines()[-1])
    assert result["kimg"] == 0.016
    # Adam's first steps have the size of the learning rate, whatever the gradient; signs may differ where it is ~0
    assert_same_networks(whole["snapshot"], result["snapshot"], "edm", atol=1e-4)


@pytest.mark.parametrize("command", [TEACHER, GAN])
def test_labels_resolution_and_kwargs(tmp_path, data, command):
    conditional = persistence.load(report(pretrain(command, data, tmp_path, "--kimg=0.004"))["snapshot"])
    unconditional = persistence.load(report(pretrain(command, data, tmp_path, "--kimg=0.004", "--no-cond"))["snapshot"])
    key, attribute = ("ema", "label_dim") if command is TEACHER else ("G_ema", "c_dim")
    assert getattr(conditional[key], attribute) == 3 and getattr(unconditional[key], attribute) == 0
    assert conditional[key].img_resolution == 16 and conditional[key].img_channels == 1
    described = conditional["dataset_kwargs" if command is TEACHER else "training_set_kwargs"]
    assert described == {
        "class_name": "training.dataset.ImageFolderDataset",
        "path": str(data.absolute()),
        "use_labels": True,
        "max_size": len(ImageDataset(data)),
        "xflip": False,
        "resolution": 16,
    }


@pytest.mark.parametrize("command", [TEACHER, GAN])
def test_kwargs_of_mirrored_data_found_from_a_folder(tmp_path, data, command, monkeypatch):
    """The official data set class mirrors after it has counted."""
    monkeypatch.chdir(data.parent)
    saved = persistence.load(report(pretrain(command, data.name, tmp_path, "--kimg=0.004", "--mirror"))["snapshot"])
    described = saved["dataset_kwargs" if command is TEACHER else "training_set_kwargs"]
    assert described["path"] == str(data.absolute())
    assert described["xflip"] is True and described["max_size"] == len(ImageDataset(data))


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
    metrics = ["--metrics=fd64_full@toy", f"--detector={detector}"]
    result = report(pretrain(GAN, data, tmp_path, "--kimg=0.008", "--snap=1", *metrics))
    assert result["fd64_full@toy"] > 0
    rows = (Path(result["run_dir"]) / "metric-fd64_full@toy.jsonl").read_text().splitlines()
    assert [json.loads(row)["snapshot_pkl"] for row in rows] == ["network-snapshot-000000.pkl"]


def test_options_of_the_teacher_reach_its_trainer(tmp_path, data, monkeypatch):
    def trainer(_net, _batches, config, total):
        raise InputError(f"{config}, total {total}")

    monkeypatch.setattr("di_refine.pretraining.teacher.TeacherTrainer", trainer)
    given = pretrain(TEACHER, data, tmp_path, "--kimg=2", "--lr-rampdown=0.5", "--compile", "--precision=bf16")
    words = ["--lr-rampdown=0.5", "total 2000", "--compile=True", "--precision='bf16'"]
    assert all(word in given.stderr for word in words), given.stderr
    assert all(word in pretrain(TEACHER, data, tmp_path).stderr for word in ["--lr-rampdown=0.0,", "--compile=False"])


def test_final_metrics_are_measured_at_the_end(tmp_path, data):
    known = [f"--detector={registry.resolve('features-digits.safetensors')}", "--kimg=0.016", "--snap=1"]
    done = report(pretrain(GAN, data, tmp_path, *known, "--metrics=none", "--final-metrics=fd_all@digits"))
    (line,) = (Path(done["run_dir"]) / "metric-fd_all@digits.jsonl").read_text().splitlines()
    assert json.loads(line)["results"]["fd_all@digits"] == pytest.approx(done["fd_all@digits"], rel=1e-5)
    assert json.loads(line)["num_images"] == 24


def test_features_with_given_held_out_images_in_two_parts(tmp_path, data):
    detector, stats = tmp_path / "toy.safetensors", tmp_path / "toy.npz"
    command = ["features", f"--data={data}", f"--dest={detector}", f"--stats={stats}", "--epochs=2", "--device=cpu"]
    command += ["--width=4", "--feature-dim=8", "--architecture=residual", "--augment=shift", "--half"]
    command += [f"--held-out={data}", "--max-minutes=1e-9"]
    planned = report(CliRunner().invoke(main, [*command, "--dry-run"]))
    assert planned["images"] == 24 and planned["epochs"] == 2 and not list(tmp_path.iterdir())
    first = report(CliRunner().invoke(main, command))
    assert first == {"dest": None, "stats": None, "epochs": 2, "epochs_done": 1} and not detector.exists()
    second = report(CliRunner().invoke(main, command))
    assert (second["held_out_images"], second["training_images"]) == (24, 24)
    assert load_detector(detector).net.config["architecture"] == "residual"
    unlabelled = tmp_path / "plain"
    unlabelled.mkdir()
    Image.open(data / "00.png").save(unlabelled / "0.png")
    for also in ([], ["--dry-run"]):
        refused = CliRunner().invoke(main, [*command[:-2], f"--held-out={unlabelled}", *also])
        assert refused.exit_code == 2 and f"--held-out={unlabelled} has no labels" in refused.stderr


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
        (GAN, ["--augment=bgcfnc"], ["--augment=bgcfnc", "more than 21 pixels", "16"]),
        (GAN, ["--data=DAMAGED"], ["07.png"]),
        (TEACHER, ["--data=DAMAGED"], ["07.png"]),
        (GAN, ["--stop-if-worse=2"], ["--stop-if-worse", "--metrics"]),
        (TEACHER, ["--metrics=fd12_full@digits", "--ref=SMALL"], ["resolution 8, these have 16"]),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, data, command, options, words):
    damaged, small = tmp_path / "damaged", tmp_path / "small"
    shutil.copytree(data, damaged)
    (damaged / "07.png").write_bytes((damaged / "07.png").read_bytes()[:-100])
    small.mkdir()
    for i in range(2):
        Image.new("L", [8, 8], i).save(small / f"{i}.png")
    options = [option.replace("DAMAGED", str(damaged)).replace("SMALL", str(small)) for option in options]
    run = pretrain(command, data, tmp_path / "new" / "runs", *options)
    dry = pretrain(command, data, tmp_path / "new" / "runs", *options, "--dry-run")
    for result in (run, dry):
        assert result.exit_code == 2 and result.stdout == "", result.output
        assert all(word in result.stderr for word in words), result.stderr
        assert result.stderr.splitlines()[-1] == run.stderr.splitlines()[-1]
    assert len(dry.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_cond_needs_labels(tmp_path, data):
    unlabelled = tmp_path / "plain"
    unlabelled.mkdir()
    Image.open(data / "00.png").save(unlabelled / "0.png")
    result = pretrain(GAN, unlabelled, tmp_path / "new", "--cond")
    assert result.exit_code == 2 and "--cond" in result.stderr


@pytest.mark.parametrize("command", [TEACHER, GAN])
def test_classes_without_images_are_said(tmp_path, command):
    data = ROOT / "tests" / "cases" / "labels_from_one"
    result = pretrain(command, data, tmp_path, "--dry-run")
    assert result.exit_code == 0 and f"note: data={data}: no image of class 0 of 3" in result.stderr
    assert "no image of" not in pretrain(command, data, tmp_path, "--dry-run", "--no-cond").stderr


if __name__ == "__main__":
    ranks.main(globals())
