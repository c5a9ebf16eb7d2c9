"""The stages of scripts/cifar10 one after the other, at tiny sizes, on a data set made here."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from di_refine.files.datasets import ImageDataset
from di_refine.generators import load_sampler
from di_refine.metrics.detectors import load_detector
from di_refine.metrics.statistics import FeatureStatistics

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "cifar10"
CLASSES, PER_CLASS = 3, 20

# What the machine does not have that these scripts are for.
BLOCKED = ("requests", "sklearn", "tensorboard", "pooch", "onnx")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """60 colour images of 16x16 in three classes that differ in brightness, as JPEG files in a zip."""
    path = tmp_path_factory.mktemp("images") / "toy.zip"
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(CLASSES * PER_CLASS):
            name, label = f"0000{index % 2}/img{index:08d}.jpg", index % CLASSES
            pixels = np.random.default_rng(index).integers(80 * label, 80 * label + 90, [16, 16, 3], np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=95)
            archive.writestr(name, file.getvalue())
            labels.append([name, label])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a stage; of packages, only those are there that its machine has."""
    folder = tmp_path_factory.mktemp("blocked")
    blocker = "import sys\nfor name in {}:\n    sys.modules[name] = None\n"
    (folder / "sitecustomize.py").write_text(blocker.format(BLOCKED))
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}

    def run(stage, workdir, *options, status=0):
        command = [sys.executable, SCRIPTS / f"{stage}.py", f"--workdir={workdir}", "--smoke", "--device=cpu", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else done.stderr

    return run


def test_all_stages(tmp_path, images, run):
    workdir = tmp_path / "work"
    assert "--data is needed" in run("features", workdir, status=2)
    assert "features.py" in run("gan", workdir, f"--data={images}", status=1)

    # Cut off after an epoch, and gone on with.
    assert run("features", workdir, "--minutes=1e-9")["epochs_done"] == 1
    assert run("features", workdir)["held_out_images"] == CLASSES * PER_CLASS // 10
    _check_split(workdir, images)

    first = run("teacher", workdir, "--minutes=1e-4")
    assert first["stopped"] == "max_minutes" and first["kimg"] < 0.032
    last = run("teacher", workdir, "--finish", "--minutes=0.02")
    assert last["run_dir"] == first["run_dir"] and last["kimg"] > first["kimg"]
    assert last["target_kimg"] != 0.032

    gan = run("gan", workdir)
    refined = run("refine", workdir, "--", "--lr=1e-4")
    assert json.loads((Path(refined["run_dir"]) / "training_options.json").read_text())["lr"] == 1e-4
    longer = run("gan", workdir, "--longer")
    assert longer["run_dir"] == gan["run_dir"] and longer["kimg"] > gan["kimg"] == 0.032
    assert "control goes on from this GAN" in run("gan", workdir, status=2)
    run("distill", workdir)

    waiting = run("report", workdir, "--minutes=1e-9")
    assert len(waiting["pending"]) == 1 and not (workdir / "results.md").exists()
    report = run("report", workdir)
    assert report["pending"] == [] and report["results"] == f"{workdir}/results.md"
    assert report["rows"] == ["data", "teacher", "gan", "gan-longer", "refined", "one-step"]
    text = (workdir / "results.md").read_text()
    assert text.count("±") == 5 * 3 + 1 and "{" not in text and str(tmp_path) not in text and "JPEG" in text
    assert Image.open(workdir / "results" / "cifar10.png").width > 600
    assert len((workdir / "results" / "cifar10-teacher.jsonl").read_text().splitlines()) >= 2

    exported = run("export", workdir, "--limit-mib=0.3")
    assert len(exported["files"]) == 5 and exported["mib"] <= 0.3
    assert [text.split()[0] for text in exported["left_out"]] == ["onestep-cifar10-small.pkl"]
    _check_export(Path(exported["dest"]), workdir)


def _check_split(workdir, images):
    whole, train, held_out = (ImageDataset(path) for path in (images, workdir / "train.zip", workdir / "heldout.zip"))
    assert len(train) == 54 and len(held_out) == 6
    assert np.array_equal(held_out.label_law().class_frequencies, np.ones(3) / 3)
    pixels = [part.decode_all().reshape(len(part), -1) for part in (whole, train, held_out)]
    both = np.concatenate(pixels[1:])
    assert np.array_equal(np.unique(both, axis=0), np.unique(pixels[0], axis=0)), "the parts are the whole"


def _check_export(folder, workdir):
    registry = json.loads((folder / "registry.json").read_text())
    assert set(registry) == {path.name for path in folder.iterdir()} - {"registry.json", "cifar10.md"}
    assert registry["stylegan2-cifar10-small.pkl"]["teacher"] == "edm-cifar10-small.pkl"
    assert registry["stylegan2-cifar10-small.pkl"]["refine"]["lr"] == 1e-4
    assert "command" in (folder / "cifar10.md").read_text() and str(workdir) not in (folder / "cifar10.md").read_text()
    detector = load_detector(folder / "features-cifar10.safetensors")
    statistics = FeatureStatistics.load(folder / "stats-cifar10-features.npz")
    assert statistics.features is None and statistics.identity["detector_hash"] == detector.identity.hash
    for name, kind in [("gan", "stylegan2-cifar10-small"), ("teacher", "edm-cifar10-small")]:
        shipped = folder / f"{kind}.pkl"
        assert shipped.stat().st_size < (workdir / "networks" / f"{name}.pkl").stat().st_size
        one, other = (
            load_sampler(path, steps=2)(0, 4, 0)[0] for path in (workdir / "networks" / f"{name}.pkl", shipped)
        )
        assert (one.int() - other.int()).abs().max() <= 3, "half precision is for the file"
