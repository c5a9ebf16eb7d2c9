"""Samples of a teacher as a data set: readable, reproducible, kept once, whole or not there at all."""

import errno
import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden_io import GOLDEN

from di_refine import denoisers
from di_refine.commands import sample_teacher
from di_refine.errors import InputError
from di_refine.files import label_laws, networks, registry, teacher_samples
from di_refine.files.dataset_writer import Picture
from di_refine.files.datasets import ImageDataset
from di_refine.generators import load_sampler
from di_refine.labels import LabelLaw
from torch_utils import persistence

COND, UNCOND, GAN = GOLDEN / "edm/adm_cond.pkl", GOLDEN / "edm/vp.pkl", GOLDEN / "stylegan2/sg2ada-cifar-cond.pkl"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*options, teacher=UNCOND, num=5):
    arguments = [f"--teacher={teacher}", f"--num={num}", "--steps=1", "--device=cpu", *map(str, options)]
    return CliRunner().invoke(sample_teacher.main, arguments)


def good(*options, **settings) -> dict:
    result = run(*options, **settings)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def record(path) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("dataset.json"))


@pytest.mark.parametrize("teacher, classes", [(COND, 10), (UNCOND, 0)])
def test_a_data_set_of_the_samplers_images(tmp_path, teacher, classes):
    """The very pixels and classes that metrics see of this network with this seed, whatever the batch."""
    dest = tmp_path / "new" / "samples.zip"
    result = good(f"--dest={dest}", "--seed=3", "--batch=4", teacher=teacher, num=9)
    dataset = ImageDataset(dest)
    assert (len(dataset), dataset.resolution, dataset.num_channels) == (9, 16, 3)
    assert (result["images"], result["resolution"], result["channels"], result["classes"]) == (9, 16, 3, classes)
    images, labels = load_sampler(teacher, steps=1)(0, 9, seed=3)
    assert np.abs(dataset.images(range(9)).astype(int) - images.numpy()).max() <= 1  # by rounding
    assert dataset.label_dim == classes
    if classes:
        assert np.array_equal(dataset.labels(range(9)), labels.numpy())
    made = record(dest)["conversion"]
    assert made["steps"] == 1 and made["seed"] == 3 and made["teacher_sha256"] == result["teacher_sha256"]


def test_same_bytes_twice_and_a_longer_set_begins_alike(tmp_path):
    for name, num, seed in [("a", 4, 0), ("b", 4, 0), ("c", 8, 0), ("d", 4, 1)]:
        good(f"--dest={tmp_path / name}.zip", f"--seed={seed}", "--batch=4", num=num)
    a, b, c, d = (tmp_path / f"{name}.zip" for name in "abcd")
    assert a.read_bytes() == b.read_bytes()
    pixels = [ImageDataset(path).images(range(4)) for path in (a, c, d)]
    assert np.array_equal(pixels[0], pixels[1]) and not np.array_equal(pixels[0], pixels[2])


def test_classes_that_were_not_drawn_still_count(tmp_path):
    """Class numbers up to 2 alone would look like a data set of three classes, and a network of ten refuse it."""
    good(f"--dest={tmp_path / 'a.zip'}", "--class-freq=0,1,1,0,0,0,0,0,0,0", teacher=COND, num=6)
    dataset = ImageDataset(tmp_path / "a.zip")
    dataset.check_compatible(16, 3, 10)
    labels = dataset.labels(range(6))
    assert set(labels.argmax(axis=1)) <= {1, 2} and (labels.sum(axis=1) == 1).all()
    np.testing.assert_allclose(dataset.label_law().class_frequencies, labels.mean(axis=0))


def test_class_frequencies_of_a_data_set(tmp_path):
    good(f"--dest={tmp_path / 'a.zip'}", "--class-freq=0,0,0,0,0,0,0,0,1,3", teacher=COND, num=8)
    drawn = label_laws.choose(str(tmp_path / "a.zip"), LabelLaw(10))
    np.testing.assert_allclose(drawn.frequencies, ImageDataset(tmp_path / "a.zip").label_law().frequencies)
    assert good("--labels", tmp_path / "a.zip", teacher=COND)["labels"] == f"file:{tmp_path / 'a.zip'}"


def test_kept_once(cache):
    first = good()
    assert Path(first["dest"]).parent.parent == cache and "vp" in Path(first["dest"]).name and not first["reused"]
    stamp = Path(first["dest"]).stat().st_ino
    result = run()
    again = json.loads(result.stdout.splitlines()[-1])
    assert again["reused"] and again["dest"] == first["dest"] and again["sha256"] == first["sha256"]
    assert "drawn before" in result.stderr and Path(first["dest"]).stat().st_ino == stamp
    anew = good("--overwrite")
    assert not anew["reused"] and anew["sha256"] == first["sha256"] and Path(first["dest"]).stat().st_ino != stamp


def test_every_setting_has_a_file_of_its_own(tmp_path):
    made = [good(*options, teacher=COND)["dest"] for options in ([], ["--seed=1"], ["--steps=2"])]
    made += [good("--class-freq=1,1,1,1,1,1,1,1,1,3", teacher=COND)["dest"], good(teacher=COND, num=6)["dest"]]
    assert len(set(made)) == len(made) == len(files(Path(made[0]).parent))
    assert good("--batch=2", teacher=COND)["reused"], "the batch makes no difference"
    shutil.copy(COND, tmp_path / "other.pkl")
    copied = good(teacher=tmp_path / "other.pkl")
    assert not copied["reused"], "the teacher's name is part of the file's name"


def test_the_newest_samples_of_a_teacher(tmp_path):
    assert teacher_samples.cached_samples(UNCOND) is None
    first, second = Path(good()["dest"]), Path(good("--seed=1")["dest"])
    os.utime(first, ns=(10**18, 10**18))
    assert teacher_samples.cached_samples(UNCOND) == second
    assert teacher_samples.cached_samples(COND) is None
    assert good()["reused"] and teacher_samples.cached_samples(UNCOND) == first, "it was asked for last"
    shutil.copy(UNCOND, tmp_path / "renamed.pkl")
    assert teacher_samples.cached_samples(tmp_path / "renamed.pkl") == first, "the content counts"
    assert len(ImageDataset(first)) == 5


def test_a_damaged_file_is_made_anew():
    dest = Path(good()["dest"])
    whole = dest.read_bytes()
    for content in (whole[:-40], b""):
        dest.write_bytes(content)
        result = run()
        assert result.exit_code == 0 and "made anew" in result.stderr
        assert dest.read_bytes() == whole


@pytest.mark.parametrize(
    "error, status, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "free some space"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_nothing_is_left_behind(tmp_path, monkeypatch, cache, error, status, words, kept):
    written = []

    def writestr(archive, entry, content):
        written.append(entry.filename)
        if len(written) == 3:
            raise error

    monkeypatch.setattr(zipfile.ZipFile, "writestr", writestr)
    result = run(*([] if kept else [f"--dest={tmp_path / 'new' / 'a.zip'}"]))
    assert result.exit_code == status and words in result.stderr and len(result.stderr.split("\n")) <= 3
    assert len(written) == 3 and not files(tmp_path) and not (tmp_path / "new").exists()


def test_an_old_file_survives_a_failure(tmp_path, monkeypatch):
    dest = tmp_path / "a.zip"
    good(f"--dest={dest}")
    before = dest.read_bytes()
    monkeypatch.setattr(Picture, "encode", lambda image, name: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(f"--dest={dest}", "--overwrite", "--seed=1").exit_code == 130
    assert dest.read_bytes() == before and files(tmp_path) == [dest]


def test_images_that_are_not_finite(tmp_path, monkeypatch):
    teacher = denoisers.load_denoiser(UNCOND)
    with torch.no_grad():
        teacher.model.map_layer0.bias.fill_(float("nan"))
    file = replace(networks.load(UNCOND), average=teacher)
    monkeypatch.setattr(networks, "load", lambda *arguments: file)
    result = run()
    assert result.exit_code == 1 and "not finite" in result.stderr and not files(tmp_path)


@pytest.mark.parametrize(
    "options, teacher, words",
    [
        ([], GAN, "is a StyleGAN2 generator, and a diffusion model is needed"),
        ([], "no/such.pkl", "--teacher=no/such.pkl: there is no such file"),
        ([], "stylegan2-digits.pkl", "needs edm"),
        ([], Path(__file__), "test_sample_teacher.py"),
        (["--num=0"], UNCOND, "Invalid value for '--num'"),
        (["--steps=x"], UNCOND, "Invalid value for '--steps'"),
        (["--dest=a.tar"], UNCOND, "--dest=a.tar must end in .zip"),
        (["--class-freq=1,1"], UNCOND, "--labels=1,1: the network has no classes"),
        (["--class-freq=1,1"], COND, "there must be 10 frequencies, one per class of the network, not 2"),
        (["--class-freq=1,1,1,1,1,1,1,1,1,-1"], COND, "must not be negative"),
        (["--class-freq=0,0,0,0,0,0,0,0,0,0"], COND, "one must be positive"),
        (["--class-freq=nan,0,0,0,0,0,0,0,0,0"], COND, "must not be negative"),
        (["--class-freq=no/such.zip"], COND, "--labels=no/such.zip: there is no such file"),
        (["--device=tpu"], UNCOND, "--device"),
    ],
)
def test_bad_input(tmp_path, options, teacher, words):
    result = run(*options, teacher=teacher)
    assert result.exit_code == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert not result.stdout and not files(tmp_path)


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "there.zip").write_bytes(b"mine")
    result = run(f"--dest={tmp_path / 'there.zip'}")
    assert result.exit_code == 2 and "--overwrite" in result.stderr
    assert (tmp_path / "there.zip").read_bytes() == b"mine"
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path / "there.zip"))
    result = run()
    assert result.exit_code == 2 and "DI_REFINE_CACHE" in result.stderr and "is not a folder" in result.stderr


def test_a_distilled_network_is_no_teacher(monkeypatch):
    content = persistence.load(UNCOND)
    monkeypatch.setattr(persistence, "load", lambda path, notes: {**content, "distilled_sigmas": [2.5]})
    with pytest.raises(InputError, match="teacher=.* was distilled from a diffusion model"):
        denoisers.load_denoiser(UNCOND)


def test_the_cache_folder_is_the_projects(cache):
    settings = teacher_samples.sample_settings(UNCOND, 5, 1, 0, LabelLaw(0))
    assert registry.cache_folder() in teacher_samples.cached_path(UNCOND, settings).parents
