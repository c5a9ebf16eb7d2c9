"""The calc_metrics command: results on stdout, and one sentence for whatever is wrong with the input."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from calc_metrics import main
from di_refine.metrics.smallnet import SmallConvNet, save_small
from stylegan2_ada.networks import Generator
from torch_utils import persistence


def write_images(folder, count, labels=False, mean=120):
    folder.mkdir()
    rng = np.random.default_rng(mean)
    for i in range(count):
        pixels = rng.normal(mean, 40, [16, 16]).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png", compress_level=0)
    if labels:
        content = {"labels": [[f"{i:04d}.png", i % 4] for i in range(count)]}
        (folder / "dataset.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A feature network 'toy', reference images, generated images, and a conditional generator."""
    folder = tmp_path_factory.mktemp("calc")
    torch.manual_seed(0)
    save_small(SmallConvNet(16, 1, classes=4, width=4, feature_dim=8), folder / "toy.safetensors", "toy")
    write_images(folder / "data", 40, labels=True)
    write_images(folder / "fakes", 1001, labels=True, mean=150)
    net = Generator(
        z_dim=8,
        c_dim=4,
        w_dim=8,
        img_resolution=16,
        img_channels=1,
        mapping_kwargs={"num_layers": 1},
        synthesis_kwargs={"channel_base": 64, "channel_max": 8},
    )
    persistence.save({"G_ema": net.eval().requires_grad_(False)}, folder / "net.pkl")
    np.savez(folder / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    return folder


@pytest.fixture
def run(folder):
    def run(*arguments, detector=True):
        options = [f"--detector={folder / 'toy.safetensors'}"] if detector else []
        return CliRunner().invoke(main, ["--device=cpu", *options, *(str(argument) for argument in arguments)])

    return run


def refused(result, *words):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_images(run, folder):
    names = "fd1k_full@toy,pr1k3_full@toy,acc1k@toy"
    result = run("--images", folder / "fakes", "--data", folder / "data", "--metrics", names)
    assert result.exit_code == 0, result.output
    lines = result.stdout.strip().splitlines()
    summaries = {summary["metric"]: summary for summary in json.loads(lines[-1])["results"]}
    assert list(summaries) == names.split(",")
    frechet = summaries["fd1k_full@toy"]
    assert frechet["results"]["fd1k_full@toy"] > 0 and frechet["num_images"] == 1000 and frechet["resolution"] == 16
    assert frechet["detector"]["name"] == "toy" and frechet["reference"]["count"] == 40
    assert set(summaries["pr1k3_full@toy"]["results"]) == {"pr1k3_full@toy_precision", "pr1k3_full@toy_recall"}
    assert lines[0].split() == ["source", "metric", "value"] and len(lines) == 2 + 4 + 1


def test_network_over_seeds(run, folder):
    arguments = ["--network", folder / "net.pkl", "--data", folder / "data", "--metrics=fd1k_full@toy", "--seed=5"]
    result = run(*arguments, "--seeds=2")
    assert result.exit_code == 0, result.output
    (summary,) = json.loads(result.stdout.strip().splitlines()[-1])["results"]
    values = summary["values"]["fd1k_full@toy"]
    assert summary["seeds"] == [5, 6] and len(values) == 2 and values[0] != values[1]
    assert summary["results"]["fd1k_full@toy"] == pytest.approx(np.mean(values), rel=1e-4)
    assert summary["sd"]["fd1k_full@toy"] == pytest.approx(np.std(values, ddof=1), rel=1e-2)
    assert summary["min"]["fd1k_full@toy"] == min(values)
    alone = json.loads(run(*arguments, "--batch=77").stdout.strip().splitlines()[-1])["results"][0]
    assert alone["results"]["fd1k_full@toy"] == pytest.approx(values[0], rel=1e-4) and alone["sd"] == {}
    mirrored = json.loads(run(*arguments, "--mirror").stdout.strip().splitlines()[-1])["results"][0]
    assert mirrored["reference"]["count"] == 80


@pytest.mark.parametrize("labels, classes", [("uniform", {0, 1, 2, 3}), ("2", {2}), ("dataset", {0, 1, 2, 3})])
def test_labels(run, folder, labels, classes, monkeypatch):
    from di_refine.generators import NetworkSampler

    seen = []
    draw = NetworkSampler.labels
    monkeypatch.setattr(NetworkSampler, "labels", lambda self, seeds: seen.append(draw(self, seeds)) or seen[-1])
    result = run("--network", folder / "net.pkl", "--data", folder / "data", "--metrics=acc1k@toy", "--labels", labels)
    assert result.exit_code == 0, result.output
    assert set(torch.cat(seen).argmax(dim=1).tolist()) == classes


def test_options_are_checked(run, folder):
    network, data, metric = ["--network", folder / "net.pkl"], ["--data", folder / "data"], "--metrics=fd1k_full@toy"
    refused(run(*data, metric), "give --network or --images")
    refused(run(*network, *data, "--metrics=fid"), "unknown metric 'fid'", "known are fid<N>k_full")
    refused(run(*network, *data, "--metrics=fd0k_full@toy"), "asks for no images")
    refused(run(*network, metric), "needs a reference; give --ref")
    refused(run(*network, metric, "--mirror"), "--mirror")
    refused(run(*network, metric, "--ref", folder / "wide.npz"), "2048 features", "toy has 8")
    refused(run(*network, metric, "--ref", folder / "none.npz"), "--ref", "none.npz")
    refused(run("--network", folder / "none.pkl", *data, metric), "--network", "none.pkl")
    refused(run("--network", folder / "wide.npz", *data, metric), "wide.npz")
    refused(run(*network, *data, metric, "--labels=4"), "--labels=4", "4 classes")
    refused(run(*network, *data, metric, "--labels=cat"), "--labels must be")
    refused(run(*network, "--ref", folder / "wide.npz", "--metrics=acc1k@toy", "--labels=dataset"), "needs --data")
    refused(run(*network, *data, metric, "--seeds=0"), "--seeds must be")
    refused(run(*network, *data, metric, "--detector", folder / "wide.npz", detector=False), "wide.npz")
    refused(run(*network, *data, metric, detector=False), "toy")


def test_folders_are_checked(run, folder, tmp_path):
    data, metric = ["--data", folder / "data"], "--metrics=fd1k_full@toy"

    def attempt(name, image=None):
        if not (tmp_path / name).exists():
            write_images(tmp_path / name, 3)
        if image is not None:
            image.save(tmp_path / name / "0009.png")
        return run("--images", tmp_path / name, *data, metric)

    gray = Image.new("L", [16, 16])
    refused(run("--images", folder / "data", *data, metric), "needs 1000 images and there are 40")
    (tmp_path / "none").mkdir()
    refused(attempt("none"), "holds no images")
    refused(run("--images", tmp_path / "missing", *data, metric), "missing does not exist")
    refused(attempt("mixed", Image.new("L", [8, 8])), "0009.png is 8x8", "dataset_tool.py")
    refused(attempt("palette", gray.convert("P")), "0009.png", "mode P")
    refused(attempt("alpha", gray.convert("RGBA")), "0009.png", "mode RGBA")
    refused(attempt("deep", Image.fromarray(np.zeros([16, 16], np.uint16))), "0009.png", "mode I;16")
    refused(attempt("colour", gray.convert("RGB")), "0009.png", "mode RGB")
    write_images(tmp_path / "ink", 0)
    gray.convert("CMYK").save(tmp_path / "ink" / "a.jpg")
    refused(attempt("ink"), "a.jpg", "mode CMYK")
    write_images(tmp_path / "rgb", 0)
    refused(attempt("rgb", gray.convert("RGB")), "toy takes images with 1 channel")


def test_damaged_picture_is_named(run, folder, tmp_path):
    write_images(tmp_path / "cut", 1000)
    path = tmp_path / "cut" / "0500.png"
    path.write_bytes(path.read_bytes()[:120])  # the header is whole, so only decoding finds out
    refused(run("--images", tmp_path / "cut", "--data", folder / "data", "--metrics=fd1k_full@toy"), "0500.png")


def test_several_sources(run, folder):
    result = run(
        "--images", folder / "fakes", "--network", folder / "net.pkl", "--data", folder / "data", "--metrics=acc1k@toy"
    )
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout.strip().splitlines()[-1])["results"]
    assert [summary["source"] for summary in results] == [str(folder / "net.pkl"), str(folder / "fakes")]
