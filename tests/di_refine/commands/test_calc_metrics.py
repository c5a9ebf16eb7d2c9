"""The calc_metrics command: results on stdout, and one sentence for whatever is wrong with the input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from di_refine.commands.calc_metrics import main
from di_refine.files import registry
from di_refine.metrics.kinds import KINDS
from di_refine.metrics.small import SmallConvNet, save_small
from stylegan2_ada.networks import Generator
from torch_utils import persistence

ROOT = Path(__file__).resolve().parents[3]


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


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run(folder):
    def run(*arguments, detector=True):
        options = [f"--detector={folder / 'toy.safetensors'}"] if detector else []
        return CliRunner().invoke(main, ["--device=cpu", *options, *(str(argument) for argument in arguments)])

    return run


def refused(result, *words):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert [line[:6] for line in result.stderr.splitlines() if not line.startswith("reference ")] == ["error:"]
    for word in words:
        assert word in result.stderr


def test_help_is_quick_and_knows_every_metric():
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
from di_refine.commands.calc_metrics import main
try:
    main(["--help"])
finally:
    print([name for name in ("torch", "numpy", "PIL") if name in sys.modules])
"""
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert completed.stdout.splitlines()[-1] == "[]", completed.stderr
    for kind in KINDS.values():
        assert kind.what in completed.stdout and all(form in completed.stdout for form in kind.forms)


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
    keys = ["fd1k_full@toy", "pr1k3_full@toy_precision", "pr1k3_full@toy_recall", "acc1k@toy"]
    assert lines[0].split() == ["network", *keys] and lines[2].split()[0] == "fakes" and len(lines) == 2 + 1 + 1


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
    refused(run(*data, metric), "give --network or --images", "--run")
    refused(run(*network, *data, "--metrics=fid"), "unknown metric 'fid'", "known are fid<N>k_full")
    refused(run(*network, *data, "--metrics=fd0k_full@toy"), "asks for no images")
    refused(run(*network, metric), "needs a reference; give --ref")
    refused(run(*network, metric, "--mirror"), "--mirror")
    refused(run(*network, metric, "--ref", folder / "wide.npz"), "2048 features", "toy has 8")
    refused(run(*network, metric, "--ref", folder / "none.npz"), "--ref", "none.npz")
    refused(run("--network", folder / "none.pkl", *data, metric), "--network", "none.pkl")
    refused(run("--network", folder / "wide.npz", *data, metric), "wide.npz")
    refused(run(*network, *data, metric, "--labels=4"), "--labels=4", "0 to 3")
    refused(run(*network, *data, metric, "--labels=cat"), "--labels=cat is neither a file nor a name")
    refused(
        run(*network, "--ref", folder / "wide.npz", "--metrics=acc1k@toy", "--labels=dataset"),
        "name the data set itself",
    )
    refused(run(*network, *data, metric, "--seeds=0"), "--seeds", "x>=1")
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
    refused(attempt("transparent", gray.convert("LA")), "0009.png", "mode LA")
    refused(attempt("alpha", gray.convert("RGBA")), "0009.png", "mode RGBA")
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


def last(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_rows_in_the_order_given(run, folder):
    network, fakes = folder / "net.pkl", folder / "fakes"
    result = run(
        "--images", fakes, "--network", network, "--data", folder / "data", "--metrics=acc1k@toy,fd1k_full@toy"
    )
    results = last(result)["results"]
    assert [(summary["source"], summary["metric"]) for summary in results] == [
        (str(source), metric) for source in (fakes, network) for metric in ("acc1k@toy", "fd1k_full@toy")
    ]
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["network", "acc1k@toy", "fd1k_full@toy"] and lines[4] == "labels: uniform"
    assert [line.split()[0] for line in lines[2:4]] == ["fakes", "net.pkl"]
    first, second = (summary["results"]["fd1k_full@toy"] for summary in results if summary["metric"] != "acc1k@toy")
    assert results[3]["delta"]["fd1k_full@toy"] == pytest.approx(second - first, rel=1e-3, abs=1e-4)
    assert "delta" not in results[0]


def test_comparison_over_seeds(run, folder):
    """Two networks that are the same have a difference of 0 with an interval of 0, whatever the seeds."""
    copy = folder / "copy.pkl"
    copy.write_bytes((folder / "net.pkl").read_bytes())
    arguments = ["--network", folder / "net.pkl", "--network", copy, "--data", folder / "data"]
    result = run(*arguments, "--metrics=fd1k_full@toy", "--seeds=3", "--no-jsonl")
    first, second = last(result)["results"]
    assert second["delta"] == {"fd1k_full@toy": 0} and second["delta_interval"] == {"fd1k_full@toy": [0, 0]}
    low, high = first["interval"]["fd1k_full@toy"]
    assert low < first["min"]["fd1k_full@toy"] < first["results"]["fd1k_full@toy"] < high
    assert "+- is the standard deviation over 3 seeds" in result.stdout
    assert " * " not in result.stdout and "* differs" not in result.stdout


def test_jsonl_beside_the_network(run, folder, tmp_path, monkeypatch):
    network = tmp_path / "network-snapshot-000004.pkl"
    network.write_bytes((folder / "net.pkl").read_bytes())
    arguments = ["--network", network, "--data", folder / "data", "--metrics=acc1k@toy,pr1k3_full@toy"]
    last(run(*arguments, "--no-jsonl"))
    assert not list(tmp_path.glob("*.jsonl"))
    last(run(*arguments, "--seeds=2"))
    lines = (tmp_path / "metric-pr1k3_full@toy.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]
    record = json.loads(lines[0])
    assert record["snapshot_pkl"] == network.name and record["metric"] == "pr1k3_full@toy"
    assert (tmp_path / "metric-acc1k@toy.jsonl").is_file()
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path))  # downloaded networks are not the user's to write beside
    (tmp_path / "metric-acc1k@toy.jsonl").unlink()
    last(run(*arguments))
    assert not (tmp_path / "metric-acc1k@toy.jsonl").exists()


def test_run_directory(run, folder, tmp_path):
    """All snapshots of a run, drawn together with what was recorded during training."""
    directory = tmp_path / "00000-run"
    directory.mkdir()
    for kimg in (8, 4):
        (directory / f"network-snapshot-{kimg:06d}.pkl").write_bytes((folder / "net.pkl").read_bytes())
    (directory / "stats.jsonl").write_text(json.dumps({"kimg": 0.0, "acc1k@toy": 0.5}) + "\n")
    arguments = ["--network", directory, "--data", folder / "data", "--metrics=acc1k@toy"]
    result = last(run(*arguments, "--plot", tmp_path / "new" / "a.png"))
    assert [Path(summary["source"]).name[-10:] for summary in result["results"]] == ["000004.pkl", "000008.pkl"]
    assert [x for x, _ in result["curves"][str(directory)]["acc1k@toy"]] == [0, 4, 8]
    assert (tmp_path / "new" / "a.png").is_file()
    again = last(run("--run", directory, "--plot", tmp_path / "b.png", detector=False))
    assert again["curves"] == result["curves"] and "results" not in again


def test_grid(run, folder, tmp_path):
    arguments = ["--images", folder / "fakes", "--data", folder / "data", "--metrics=acc1k@toy"]
    last(run(*arguments, "--grid", tmp_path / "one.png"))
    with Image.open(tmp_path / "one.png") as grid:
        assert grid.size == (256, 256) and grid.mode == "L"
        with Image.open(folder / "fakes" / "0009.png") as image:
            np.testing.assert_array_equal(np.asarray(grid)[32:64:2, 32:64:2], np.asarray(image))
    last(run(*arguments, "--network", folder / "net.pkl", "--grid", tmp_path / "two.png"))
    with Image.open(tmp_path / "two.png") as grid:
        assert grid.width > 600


def test_outputs_are_checked(run, folder, tmp_path, monkeypatch):
    arguments = ["--network", folder / "net.pkl", "--data", folder / "data", "--metrics=acc1k@toy"]
    refused(run(*arguments, "--plot", tmp_path / "a.png"), "--plot draws run directories")
    refused(run("--run", tmp_path), "nothing to measure")
    refused(run("--run", tmp_path / "none", "--plot", tmp_path / "a.png"), "--run=", "not a run directory")
    refused(run("--run", tmp_path, "--plot", tmp_path / "a.png"), "records no measurements")
    refused(run("--run", tmp_path, "--plot", tmp_path / "a.png", "--grid", tmp_path / "b.png"), "--grid shows")
    refused(run(*arguments, "--grid", tmp_path), "--grid=", "is a folder")

    refused(run("--network", tmp_path, "--metrics=acc1k@toy"), "--network=", "no run directory")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(run("--run", tmp_path, "--plot", tmp_path / "a.png"), "--plot needs matplotlib", "di-refine[plots]")


def test_cache_of_references(run, folder, own_cache):
    arguments = ["--network", folder / "net.pkl", "--data", folder / "data", "--metrics=kd1k_full@toy"]
    without = last(run(*arguments, "--no-cache"))["results"][0]["results"]
    assert not own_cache.exists()
    first = last(run(*arguments))["results"][0]["results"]
    (path,) = (own_cache / "statistics").iterdir()
    assert path.name.startswith("toy-") and last(run(*arguments))["results"][0]["results"] == first == without
    path.write_bytes(path.read_bytes()[:-50])
    result = run(*arguments)
    assert "cached statistics are damaged" in result.stderr and last(result)["results"][0]["results"] == first


def test_registry_recommends_metrics(run, folder, monkeypatch):
    record = {"file": "net.pkl", "kind": "stylegan2", "metrics": ["acc1k@toy"]}
    monkeypatch.setattr(registry, "registry", lambda: {"net.pkl": record})
    assert [s["metric"] for s in last(run("--network", folder / "net.pkl"))["results"]] == ["acc1k@toy"]
    monkeypatch.setattr(registry, "registry", dict)
    refused(run("--network", folder / "net.pkl"), "--metrics is needed")


def test_rank_deficiency_is_said(run, folder, tmp_path):
    (tmp_path / "wide.py").write_text(
        "import torch\n"
        "def detector():\n"
        "    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 1200))\n"
        "    net.name, net.input_size, net.resize = 'wide', 16, 'antialiased-bilinear'\n"
        "    return net\n"
    )
    arguments = [
        "--images",
        folder / "fakes",
        "--data",
        folder / "data",
        "--detector",
        tmp_path / "wide.py",
        "--allow-code",
    ]
    result = run(*arguments, "--metrics=fd1k_full@wide", detector=False)
    assert "1000 images leave the covariance of 1200 features rank-deficient" in result.stderr
    assert "the reference has 40 images for 1200 features" in result.stderr
    content = last(result)
    assert len(content["warnings"]) == 2 and content["results"][0]["results"]["fd1k_full@wide"] > 0


def test_equal_pictures(run, folder, tmp_path):
    """A folder of one picture over and over is measured, not refused."""
    write_images(tmp_path / "same", 1)
    for i in range(1, 1000):
        (tmp_path / "same" / f"{i:04d}.png").hardlink_to(tmp_path / "same" / "0000.png")
    arguments = ["--images", tmp_path / "same", "--data", folder / "data"]
    results = last(run(*arguments, "--metrics=fd1k_full@toy,kd1k_full@toy,pr1k3_full@toy,is1k@toy"))["results"]
    assert all(np.isfinite(list(summary["results"].values())).all() for summary in results)


def test_two_processes_agree_with_one(run, folder, tmp_path):
    """The command under torchrun: reference, generator and folder shared, one table, the same numbers."""
    arguments = [f"--detector={folder / 'toy.safetensors'}", "--device=cpu", "--no-cache", "--no-jsonl"]
    arguments += [f"--network={folder / 'net.pkl'}", f"--images={folder / 'fakes'}", f"--data={folder / 'data'}"]
    arguments += ["--metrics=fd1k_full@toy,kd1k_full@toy,pr1k3_full@toy,dc1k3_full@toy,is1k@toy,acc1k@toy"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(
        [*launch, str(ROOT / "calc_metrics.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.count("network  ") == 2  # two blocks of columns
    shared = json.loads(completed.stdout.splitlines()[-1])["results"]
    alone = last(run(*arguments, detector=False))["results"]
    for summary in shared + alone:
        summary.pop("seconds")
    assert shared == alone


def test_arrays_of_samples_are_measured_as_a_folder_is(run, folder, tmp_path):
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "fakes").glob("*.png"))])
    np.savez(tmp_path / "samples.npz", arr_0=pixels[..., None])
    sources = [f"--images={folder / 'fakes'}", f"--images={tmp_path / 'samples.npz'}"]
    result = run("--metrics=fd1k_full@toy", f"--data={folder / 'data'}", *sources)
    assert result.exit_code == 0, result.stderr
    one, two = json.loads(result.stdout.splitlines()[-1])["results"]
    assert one["values"] == two["values"]


def test_none_only_draws(run, folder, tmp_path):
    arguments = ["--images", folder / "data", "--metrics=none"]
    assert last(run(*arguments, "--grid", tmp_path / "one.png"))["results"] == []
    assert (tmp_path / "one.png").is_file()
    refused(run(*arguments), "--metrics=none measures nothing", "--grid")
