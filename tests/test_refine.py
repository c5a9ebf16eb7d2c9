"""The refine command on real (tiny) networks: what it writes, that it resumes exactly, and how it refuses bad input."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden_io import GOLDEN
from PIL import Image

from di_refine.metrics.smallnet import SmallConvNet, save_small
from di_refine.refinement import RefineOptions
from refine import main
from torch_utils import persistence

G_COND, G_UNCOND = GOLDEN / "stylegan2/sg2ada-cifar-cond.pkl", GOLDEN / "stylegan2/sg3repo-stylegan2.pkl"
G_GREY = GOLDEN / "stylegan2/sg2ada-resnet16.pkl"
T_COND, T_UNCOND = GOLDEN / "edm/ddpmpp_cond.pkl", GOLDEN / "edm/ddpmpp_uncond.pkl"


def refine(*arguments):
    return CliRunner().invoke(main, ["--device=cpu", *(str(argument) for argument in arguments)])


def options(outdir, **changes):
    values = {
        "network": G_COND,
        "teacher": T_COND,
        "outdir": outdir,
        "kimg": 0.024,
        "batch": 4,
        "score-warmup": 0.004,
        "ema-kimg": 0.01,
        "lr": 1e-3,
        "score-lr": 1e-3,
        "tick": 0.008,
        "snap": 1,
    }
    values.update({name.replace("_", "-"): value for name, value in changes.items()})
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A finished run with metrics of a toy feature network."""
    folder = tmp_path_factory.mktemp("refine")
    torch.manual_seed(0)
    save_small(SmallConvNet(32, 3, classes=10, width=4, feature_dim=8), folder / "toy.safetensors", "toy")
    data = folder / "data"
    data.mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, [32, 32, 3], np.uint8)
        Image.fromarray(pixels).save(data / f"{i}.png")
    metrics = {
        "metrics": "fd1k_full@toy,acc1k@toy",
        "detector": folder / "toy.safetensors",
        "ref": data,
        "teacher_steps": 1,
        "kimg": 0.008,
    }
    result = refine(*options(folder / "runs", **metrics))
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stdout


def test_result_and_run_directory(measured):
    report, stdout = measured
    assert report["metric"] == "fd1k_full@toy"
    assert {"original", "refined", "best", "teacher", "run_dir", "snapshot", "images_per_sec"} <= set(report)
    rows = [line.split("  ")[0] for line in stdout.splitlines()[2:-1]]
    assert rows == ["original", "refined (last)", "refined (best)", "teacher"]

    run = Path(report["run_dir"])
    assert run.name == "00000-sg2ada-cifar-cond-ikl-batch4"
    names = {path.name for path in run.iterdir() if not path.name.startswith("events")}
    assert names == {
        "training_options.json",
        "log.txt",
        "stats.jsonl",
        "metric-fd1k_full@toy.jsonl",
        "metric-acc1k@toy.jsonl",
        "fakes_init.png",
        "fakes000000.png",
        "before_after.png",
        "network-snapshot-000000.pkl",
        "training-state-000000.pt",
    }
    ticks = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [tick["kimg"] for tick in ticks] == [0, 0.008]
    assert ticks[0]["fd1k_full@toy"] == pytest.approx(report["original"], rel=1e-5)
    rows = [json.loads(line) for line in (run / "metric-fd1k_full@toy.jsonl").read_text().splitlines()]
    assert [row["snapshot_pkl"] for row in rows] == [None, "network-snapshot-000000.pkl", None]
    assert json.loads((run / "training_options.json").read_text())["teacher_file"] == str(T_COND)


def test_snapshot_is_the_original_file_with_other_weights(measured):
    before, after = persistence.load(G_COND), persistence.load(measured[0]["snapshot"])
    assert list(after) == list(before)
    assert after["training_set_kwargs"] == before["training_set_kwargs"]
    assert torch.equal(after["augment_pipe"].p, before["augment_pipe"].p)
    for a, b in zip(after["D"].parameters(), before["D"].parameters()):
        assert torch.equal(a, b)
    changed = [not torch.equal(a, b) for a, b in zip(after["G_ema"].parameters(), before["G_ema"].parameters())]
    assert sum(changed) > len(changed) * 0.9
    difference = [float((a - b).abs().max()) for a, b in zip(after["G"].parameters(), after["G_ema"].parameters())]
    assert max(difference) > 0, "the average lags behind"


def test_final_metrics_are_measured_at_the_end_alone(measured, tmp_path):
    folder = Path(measured[0]["run_dir"]).parents[1]
    metrics = {"metrics": "acc1k@toy", "final_metrics": "fd1k_full@toy", "teacher_steps": 1, "kimg": 0.008}
    changes = {**metrics, "detector": folder / "toy.safetensors", "ref": folder / "data"}
    result = refine(*options(tmp_path, **changes))
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["metric"] == "fd1k_full@toy"
    for row in ("original", "refined", "best", "teacher"):
        assert report[row] == pytest.approx(measured[0][row], rel=1e-5), row
    run = Path(report["run_dir"])
    count = {path.name: len(path.read_text().splitlines()) for path in run.glob("metric-*.jsonl")}
    assert count == {"metric-acc1k@toy.jsonl": 2, "metric-fd1k_full@toy.jsonl": 3}


@pytest.mark.parametrize("objective", ["ikl", "sid"])
def test_resume_is_exact(tmp_path, objective):
    """Twelve and twelve images with a stop between are 24 images in one go, bit for bit."""
    common = {"objective": objective, "metrics": "none"}
    whole = refine(*options(tmp_path / "whole", **common))
    assert whole.exit_code == 0, whole.stderr
    first = refine(*options(tmp_path / "parts", **common, kimg=0.012))
    run_dir = json.loads(first.stdout.splitlines()[-1])["run_dir"]
    second = refine(*options(tmp_path / "parts", **common, resume=run_dir))
    assert second.exit_code == 0, second.stderr
    one, two = (json.loads(r.stdout.splitlines()[-1]) for r in (whole, second))
    assert two["run_dir"] == run_dir
    a, b = (persistence.load(report["snapshot"]) for report in (one, two))
    for key in ("G", "G_ema"):
        for (name, x), y in zip(a[key].state_dict().items(), b[key].state_dict().values()):
            assert torch.equal(x, y), f"{key}.{name}"


def test_unconditional_networks_and_gradient_accumulation(tmp_path):
    changes = {"network": G_UNCOND, "teacher": T_UNCOND, "batch_gpu": 2, "kimg": 0.008, "metrics": "none"}
    result = refine(*options(tmp_path, **changes))
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert "metric" not in report and persistence.load(report["snapshot"])["G_ema"].c_dim == 0


def test_dry_run_says_everything_and_writes_nothing(tmp_path):
    result = refine(*options(tmp_path / "new"), "--dry-run")
    assert result.exit_code == 0
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["resolution"] == 32 and record["classes"] == 10 and record["lr"] == 1e-3
    assert list(tmp_path.iterdir()) == []


def test_every_option_reaches_the_run():
    """An option that nobody reads is a lie: each is a field of RefineOptions, or handled by the command itself."""
    names = {parameter.name for parameter in main.params} - {"dry_run", "ops"}
    assert names == {field.name for field in fields(RefineOptions)}
    defaults = {field.name: field.default for field in fields(RefineOptions)}
    for parameter in main.params:
        if defaults.get(parameter.name) not in (None, MISSING):
            assert parameter.default == defaults[parameter.name], parameter.name


def broken(tmp_path, kind):
    path = tmp_path / "broken.pkl"
    if kind == "text":
        path.write_text("not a pickle")
    elif kind == "truncated":
        path.write_bytes(G_COND.read_bytes()[:100_000])
    elif kind == "forbidden":
        path.write_bytes(b"\x80\x02cos\nsystem\n(S'true'\ntR.")
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network": "nowhere.pkl"}, ["--network=nowhere.pkl", "neither a file nor a name"]),
        ({"network": "text"}, ["--network", "broken.pkl"]),
        ({"network": "truncated"}, ["--network", "broken.pkl"]),
        ({"network": "forbidden"}, ["--network", "broken.pkl", "os.system"]),
        ({"network": T_COND}, ["--network", "EDM diffusion model", "--teacher"]),
        ({"teacher": G_COND}, ["--teacher", "StyleGAN2 generator", "--network"]),
        ({"teacher": None}, ["--teacher is needed"]),
        ({"teacher": GOLDEN / "edm/vp.pkl"}, ["resolution", "16", "32"]),
        ({"network": G_GREY, "teacher": GOLDEN / "edm/vp.pkl"}, ["channels", "3", "1"]),
        ({"teacher": T_UNCOND}, ["classes", "10", "no"]),
        ({"network": G_UNCOND}, ["classes", "unconditional teacher"]),
        ({"batch": 6, "batch_gpu": 4}, ["--batch=6", "--batch-gpu=4"]),
        ({"batch": 0}, ["--batch", "at least 1"]),
        ({"kimg": -1}, ["--kimg", "greater than 0"]),
        ({"lr": 0}, ["--lr", "greater than 0"]),
        ({"score_warmup": 1}, ["--kimg=0.024", "--score-warmup=1"]),
        ({"metrics": "fid50"}, ["unknown metric", "fid<N>k_full"]),
        ({"metrics": "fd1k_full@nothing"}, ["nothing"]),
        ({"class_freq": "1,2,3"}, ["--class-freq", "10"]),
        ({"network": G_UNCOND, "teacher": T_UNCOND, "class_freq": "1,2"}, ["--class-freq", "no classes"]),
        ({"alpha": 1.2}, ["--alpha", "--objective=ikl"]),
        ({"objective": "kl"}, ["--objective", "ikl"]),
        ({"device": "tpu"}, ["--device"]),
        ({"resume": "nowhere"}, ["--resume=nowhere"]),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, changes, words):
    changes = {k: broken(tmp_path, v) if v in ("text", "truncated", "forbidden") else v for k, v in changes.items()}
    outdir = tmp_path / "runs"
    result = refine(*options(outdir, **changes))
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and len(result.stderr.strip().splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert not outdir.exists()


def test_full_disk_ends_with_a_sentence_and_leaves_nothing_half_written(tmp_path):
    """Under a limit on file sizes the snapshot fits and the training state does not."""
    command = ["refine.py", "--device=cpu", *options(tmp_path, kimg=0.012, metrics="none")]
    script = f"ulimit -f 3000; exec {shlex.join([sys.executable, *command])}"
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run(["bash", "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "training-state-000000.pt could not be written" in result.stderr.splitlines()[-1]
    (run,) = tmp_path.iterdir()
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    assert persistence.load(run / "network-snapshot-000000.pkl")["G_ema"].img_resolution == 32


def test_unwritable_outdir(tmp_path):
    (tmp_path / "file").write_text("")
    result = refine(*options(tmp_path / "file" / "runs"))
    assert result.exit_code == 2 and "--outdir" in result.stderr


def test_a_state_of_other_networks_is_refused(tmp_path):
    first = refine(*options(tmp_path, kimg=0.012, metrics="none"))
    run_dir = json.loads(first.stdout.splitlines()[-1])["run_dir"]
    other = refine(*options(tmp_path, metrics="none", network=G_UNCOND, teacher=T_UNCOND, resume=run_dir))
    assert other.exit_code == 2 and "cannot be continued" in other.stderr
    shutil.rmtree(run_dir)
    assert refine(*options(tmp_path, resume=run_dir)).exit_code == 2
