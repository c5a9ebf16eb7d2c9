"""The refine command on real (tiny) networks: what it writes, that it resumes exactly, and how it refuses bad input."""

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden_io import GOLDEN
from PIL import Image

import di_refine
from di_refine.commands import pretrain
from di_refine.commands.config import DistillConfig, FeatureFilesConfig, RefineConfig, TeachConfig
from di_refine.commands.distill import main as distill
from di_refine.commands.refine import main
from di_refine.config import TrainerConfig
from di_refine.files import registry
from di_refine.metrics.config import MeasureConfig
from di_refine.metrics.small import SmallConvNet, save_small
from di_refine.pretraining.config import FeaturesConfig
from di_refine.runs.config import LoopConfig, RunConfig
from di_refine.runs.directory import RunDirectory
from torch_utils import persistence
from torch_utils.settings import declared

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
        "metrics": "none",
    }
    values.update({name.replace("_", "-"): value for name, value in changes.items()})
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def write_images(folder, count, size):
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, [size, size, 3], np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A finished run with metrics of a toy feature network."""
    folder = tmp_path_factory.mktemp("refine")
    torch.manual_seed(0)
    save_small(SmallConvNet(32, 3, classes=10, width=4, feature_dim=8), folder / "toy.safetensors", "toy")
    data = write_images(folder / "data", 20, size=32)
    metrics = {
        "metrics": "fd64_full@toy,acc64@toy",
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
    assert report["metric"] == "fd64_full@toy"
    assert {"original", "refined", "best", "teacher", "run_dir", "snapshot", "images_per_sec"} <= set(report)
    rows = [line.split("  ")[0] for line in stdout.splitlines()[2:6]]
    assert rows == ["original", "refined (last)", "refined (best)", "teacher, 1 step"]
    assert len(report["change_interval"]) == 2 and len(report["verdict"]) >= 1

    run = Path(report["run_dir"])
    assert run.name == "00000-sg2ada-cifar-cond-ikl-batch4"
    names = {path.name for path in run.iterdir() if not path.name.startswith("events")}
    assert names == {
        "training_options.json",
        "log.txt",
        "stats.jsonl",
        "metric-fd64_full@toy.jsonl",
        "metric-acc64@toy.jsonl",
        "fakes_init.png",
        "fakes000000.png",
        "before_after.png",
        "report.html",
        "result.json",
        "network-snapshot-000000.pkl",
        "training-state-000000.pt",
    }
    ticks = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [tick["kimg"] for tick in ticks] == [0, 0.008]
    rows = [json.loads(line) for line in (run / "metric-fd64_full@toy.jsonl").read_text().splitlines()]
    last = "network-snapshot-000000.pkl"
    assert [(row["snapshot_pkl"], row["seed"]) for row in rows] == [
        *((None, seed) for seed in (1, 2, 3)),  # of the original
        *((None, seed) for seed in (1, 0)),  # of the teacher, and of the original at the start of the loop
        *((last, seed) for seed in (0, 1, 2, 3)),
    ]
    assert [row["network"] for row in rows[:5]] == [*["original"] * 3, "teacher", None]
    values = [row["results"]["fd64_full@toy"] for row in rows]
    assert report["original"] == pytest.approx(sum(values[:3]) / 3, rel=1e-5)
    assert report["refined"] == pytest.approx(sum(values[6:]) / 3, rel=1e-5)
    assert report["change"] == pytest.approx(report["best"] - report["original"], abs=1e-4)
    log = (run / "log.txt").read_text()
    assert json.loads((run / "result.json").read_text()) == report
    assert html.escape(report["verdict"][0]) in (run / "report.html").read_text(encoding="utf-8")
    assert "fd64_full@toy before: original " in log and report["verdict"][0] in log
    assert json.loads((run / "training_options.json").read_text())["teacher_files"] == [str(T_COND)]


def test_tensorboard_shows_options_pictures_and_the_verdict(measured):
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulators = pytest.importorskip(module, reason="needs the optional package tensorboard")
    report, _ = measured
    found = accumulators.EventAccumulator(report["run_dir"]).Reload()
    assert [image.step for image in found.Images("samples")] == [0, 8]
    assert [image.step for image in found.Images("before_after")] == [8]

    def text(tag):
        (event,) = found.Tensors(f"{tag}/text_summary")
        return event.tensor_proto.string_val[0].decode()

    assert text("verdict").split("\n\n") == report["verdict"]
    assert "| kimg | `0.008` | given |" in text("options")


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
    metrics = {"metrics": "acc64@toy", "final_metrics": "fd64_full@toy", "teacher_steps": 1, "kimg": 0.008}
    changes = {**metrics, "detector": folder / "toy.safetensors", "ref": folder / "data"}
    result = refine(*options(tmp_path, **changes))
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["metric"] == "fd64_full@toy"
    for row in ("original", "refined", "best", "teacher"):
        assert report[row] == pytest.approx(measured[0][row], rel=1e-5), row
    run = Path(report["run_dir"])
    count = {path.name: len(path.read_text().splitlines()) for path in run.glob("metric-*.jsonl")}
    assert count == {"metric-acc64@toy.jsonl": 2, "metric-fd64_full@toy.jsonl": 7}


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


@pytest.mark.parametrize(
    "network, teacher", [("stylegan2-digits.pkl", "edm/adm_cond.pkl"), (G_UNCOND, "edm/ncsnpp.pkl")]
)
def test_a_teacher_of_another_size_or_colour(tmp_path, network, teacher):
    """A bridge leads to the teacher's images, and back where the teacher is measured."""
    changes = {"network": network, "teacher": GOLDEN / teacher, "kimg": 0.008, "metrics": "none"}
    result = refine(*options(tmp_path, **changes))
    assert result.exit_code == 0, result.stderr
    before = persistence.load(registry.resolve(network))["G_ema"]
    after = persistence.load(json.loads(result.stdout.splitlines()[-1])["snapshot"])["G_ema"]
    assert after.img_resolution == before.img_resolution and after.img_channels == before.img_channels
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


def test_two_teachers(tmp_path):
    changes = {"network": G_UNCOND, "teacher": T_UNCOND, "metrics": "none", "kimg": 0.008}
    more = [f"--teacher={T_UNCOND}", "--teacher-weight=0.5", "--teacher-weight=0.5"]
    result = refine(*options(tmp_path / "two", **changes), *more)
    assert result.exit_code == 0, result.stderr
    alone = refine(*options(tmp_path / "one", **changes))
    a, b = (persistence.load(json.loads(r.stdout.splitlines()[-1])["snapshot"])["G"] for r in (result, alone))
    for x, y in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)  # the mean of a score with itself is that score


def data_set(folder, labels=True):
    """Forty images of noise, 32x32, with classes in turn."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, [32, 32, 3], np.uint8)).save(folder / f"{i:02d}.png")
    if labels:
        rows = [[f"{i:02d}.png", i % 10] for i in range(40)]
        (folder / "dataset.json").write_text(json.dumps({"labels": rows}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "f-js"},
        {"objective": "uni-fkl", "ratio_r1": 0.1, "score_steps": 2, "sigma_dist": "edm-grid"},
        {"adversarial_weight": 0.1},
        {"objective": "sid", "augment": 0.5, "dropout": "matched"},
    ],
    ids=str,
)
def test_options_of_the_objectives_resume_exactly(tmp_path, changes):
    """What is learned beside the score (ratio, discriminator), and the order of the data, go on as if never stopped."""
    if "sid" not in changes.values():
        changes = {**changes, "data": data_set(tmp_path / "data")}
    common = {"metrics": "none", "score_warmup": 0, **changes}
    whole = refine(*options(tmp_path / "whole", **common, kimg=0.016))
    assert whole.exit_code == 0, whole.stderr
    first = refine(*options(tmp_path / "parts", **common, kimg=0.008))
    run_dir = json.loads(first.stdout.splitlines()[-1])["run_dir"]
    second = refine(*options(tmp_path / "parts", **common, kimg=0.016, resume=run_dir))
    assert second.exit_code == 0, second.stderr
    a, b = (persistence.load(json.loads(r.stdout.splitlines()[-1])["snapshot"]) for r in (whole, second))
    for key in ("G", "G_ema", "D"):
        for (name, x), y in zip(a[key].state_dict().items(), b[key].state_dict().values()):
            assert torch.equal(x, y), f"{key}.{name}"
    original = persistence.load(G_COND)["D"]
    moved = any(not torch.equal(x, y) for x, y in zip(original.parameters(), a["D"].parameters()))
    assert moved == ("adversarial_weight" in changes), "the discriminator trains where it is used, and only there"


def test_dry_run_says_everything_and_writes_nothing(tmp_path):
    result = refine(*options(tmp_path / "new"), "--dry-run")
    assert result.exit_code == 0
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["resolution"] == 32 and record["classes"] == 10 and record["lr"] == 1e-3
    assert list(tmp_path.iterdir()) == []


TEACHING = (TeachConfig, LoopConfig, TrainerConfig, MeasureConfig, RunConfig)


@pytest.mark.parametrize(
    "command, parts",
    [
        (main, (RefineConfig, *TEACHING)),
        (distill, (DistillConfig, *TEACHING)),
        (pretrain.teacher, pretrain.TEACHER),
        (pretrain.gan, pretrain.GAN),
        (pretrain.features, (FeatureFilesConfig, FeaturesConfig)),
    ],
)
def test_every_option_is_a_setting_that_is_read(command, parts):
    """An option that nobody reads is a lie: each is a setting of a part, or handled by the command itself."""
    names = [parameter.name for parameter in command.params if parameter.name not in ("dry_run", "ops", "device")]
    assert sorted(names) == sorted(item.name for part in parts for item in declared(part))
    packages = Path(di_refine.__file__).parent, Path(di_refine.__file__).parents[1] / "stylegan2_ada"
    source = "".join(
        path.read_text() for package in packages for path in package.rglob("*.py") if path.name != "config.py"
    )
    config = "".join(path.read_text() for path in packages[0].rglob("config.py"))
    unread = {name for name in names if not re.search(rf"\.{name}\b|\"{name}\"", source)}
    assert not {name for name in unread if f"self.{name}" not in config}


def broken(tmp_path, kind):
    path = tmp_path / "broken.pkl"
    if kind == "text":
        path.write_text("not a pickle")
    elif kind == "truncated":
        path.write_bytes(G_COND.read_bytes()[:100_000])
    elif kind == "forbidden":
        path.write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network": "nowhere.pkl"}, ["--network=nowhere.pkl", "neither a file nor a name"]),
        ({"network": "text"}, ["--network", "broken.pkl"]),
        ({"network": "truncated"}, ["--network", "broken.pkl"]),
        ({"network": "forbidden"}, ["--network", "broken.pkl", "os.system"]),
        ({"network": T_COND}, ["--network", "a diffusion model"]),
        ({"teacher": G_COND}, ["--teacher", "StyleGAN2 generator"]),
        ({"teacher": None}, ["--teacher is needed"]),
        ({"teacher": GOLDEN / "edm/vp.pkl"}, ["classes", "10", "no"]),
        ({"teacher": T_UNCOND}, ["classes", "10", "no"]),
        ({"objective": "f-js"}, ["--objective=f-js", "--data", "sample-teacher"]),
        ({"adversarial_weight": 1}, ["--adversarial-weight", "--data"]),
        ({"objective": "f-js", "data": "teacher"}, ["--data=teacher", "sample-teacher --teacher="]),
        ({"objective": "f-js", "data": "nowhere.zip"}, ["--data=nowhere.zip"]),
        ({"objective": "f-js", "data": "digits-16x16.zip"}, ["--data", "16x16", "32x32"]),
        ({"objective": "sid", "alpha": 0}, ["--alpha", "x<=2"]),
        ({"objective": "sid", "alpha": 2.5}, ["--alpha", "x<=2"]),
        ({"metrics": None, "ref": "digits-16x16.zip"}, ["--ref", "give --metrics"]),
        ({"tmax": 500}, ["--tmax=500", "--sigma-dist=edm-grid"]),
        ({"data": "digits-16x16.zip"}, ["--data", "--objective=ikl", "leave it out"]),
        ({"tmax": 1001}, ["--tmax", "x<=1000"]),
        ({"teacher_weight": 0.5}, ["--teacher-weight must sum to 1"]),
        ({"teacher_weight": "half"}, ["--teacher-weight", "half"]),
        ({"stop_if_worse": 1.5}, ["--stop-if-worse", "--metrics"]),
        ({"score_steps": 0}, ["--score-steps", "x>=1"]),
        ({"network": G_UNCOND}, ["classes", "unconditional teacher"]),
        ({"batch": 6, "batch_gpu": 4}, ["--batch=6", "--batch-gpu=4"]),
        ({"batch": 0}, ["--batch", "x>=1"]),
        ({"kimg": -1}, ["--kimg", "0<x"]),
        ({"lr": 0}, ["--lr", "x>0"]),
        ({"score_warmup": 1}, ["--kimg=0.024", "--score-warmup=1"]),
        ({"metrics": "fid50"}, ["unknown metric", "fid<N>k_full"]),
        ({"metrics": "fd1k_full@nothing"}, ["nothing"]),
        ({"labels": "1,2,3"}, ["--labels=1,2,3", "10 frequencies"]),
        ({"network": G_UNCOND, "teacher": T_UNCOND, "labels": "1,2"}, ["--labels=1,2", "no classes"]),
        ({"alpha": 1.2}, ["--alpha", "--objective=ikl"]),
        ({"objective": "kl"}, ["--objective", "ikl"]),
        ({"objective": "sds"}, ["--objective=sds", "without randomness"]),
        ({"device": "tpu"}, ["--device"]),
        ({"resume": "nowhere"}, ["--resume=nowhere"]),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, changes, words):
    changes = {k: broken(tmp_path, v) if v in ("text", "truncated", "forbidden") else v for k, v in changes.items()}
    outdir = tmp_path / "new" / "runs"
    result = refine(*options(outdir, **changes))
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and len(result.stderr.strip().splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr
    dry = refine(*options(outdir, **changes), "--dry-run")
    assert (dry.exit_code, dry.stderr) == (2, result.stderr)
    assert not outdir.parent.exists()


def refused_alike(outdir, words, **changes):
    """A run and its dry run say the same, and nothing is left; returns the sentence."""
    there = sorted(outdir.rglob("*")) if outdir.exists() else None
    run, dry = (refine(*options(outdir, **changes), *also) for also in ([], ["--dry-run"]))
    for result in (run, dry):
        assert result.exit_code == 2 and result.stdout == "" and words in result.stderr, result.output
    assert dry.stderr.splitlines()[-1] == run.stderr.splitlines()[-1]
    assert (sorted(outdir.rglob("*")) if outdir.exists() else None) == there


def test_what_shows_late_is_refused_by_the_dry_run_too_and_leaves_no_directory(tmp_path, measured):
    folder = Path(measured[0]["run_dir"]).parents[1]
    small = write_images(tmp_path / "small", 8, size=16)
    known = {"detector": folder / "toy.safetensors", "teacher_steps": 1}
    # The reference has another size than the generator's images, at snapshots, and at the end alone.
    for metrics in ({"metrics": "fd12_full@toy"}, {"metrics": "none", "final_metrics": "fd12_full@toy"}):
        refused_alike(tmp_path / "runs", "resolution 16, these have 32", **known, **metrics, ref=small)
    # A picture whose header is whole and whose pixels are not.
    damaged = write_images(tmp_path / "damaged", 8, size=32)
    (damaged / "3.png").write_bytes((damaged / "3.png").read_bytes()[:-200])
    changes = {"objective": "f-js", "data": damaged, "class_freq": "1,1,1,1,1,1,1,1,0,0", "metrics": "none"}
    labels = [[f"{i}.png", [float(c == i) for c in range(10)]] for i in range(8)]
    (damaged / "dataset.json").write_text(json.dumps({"labels": labels}))
    refused_alike(tmp_path / "runs", "3.png", **changes)
    # A run that cannot go on like this, or is going on now.
    done = json.loads(refine(*options(tmp_path / "runs", kimg=0.012, metrics="none")).stdout.splitlines()[-1])
    seeded = {"metrics": "none", "resume": done["run_dir"], "seed": 1}
    refused_alike(tmp_path / "runs", "cannot be continued with --seed=1", **seeded)
    torch.save({"trainer": {}, "loop": {}}, Path(done["run_dir"]) / "training-state-000099.pt")
    refused_alike(tmp_path / "runs", "cannot be continued from", metrics="none", resume=done["run_dir"])
    busy = RunDirectory(done["run_dir"])
    busy.lock()
    refused_alike(tmp_path / "runs", "is in use", metrics="none", resume=done["run_dir"])
    busy.close()


def test_full_disk_ends_with_a_sentence_and_leaves_nothing_half_written(tmp_path):
    """Under a limit on file sizes the snapshot fits and the training state does not."""
    command = ["refine.py", "--device=cpu", *options(tmp_path, kimg=0.012, metrics="none")]
    script = f"ulimit -f 3000; exec {shlex.join([sys.executable, *command])}"
    root = Path(__file__).resolve().parents[3]
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


def test_another_experiment_does_not_continue_a_run(tmp_path):
    first = refine(*options(tmp_path, kimg=0.012, metrics="none"))
    run_dir = json.loads(first.stdout.splitlines()[-1])["run_dir"]
    other = refine(*options(tmp_path, metrics="none", network=G_UNCOND, teacher=T_UNCOND, resume=run_dir))
    assert other.exit_code == 2 and "start a new one" in other.stderr
    for name, value in (("objective", "sid"), ("batch", 8), ("seed", 1), ("score_steps", 2)):
        other = refine(*options(tmp_path, metrics="none", resume=run_dir, **{name: value}))
        flag = f"--{name.replace('_', '-')}={value}"
        assert other.exit_code == 2 and f"cannot be continued with {flag}" in other.stderr, other.stderr
    longer = refine(*options(tmp_path, metrics="none", resume="auto", kimg=0.016, lr=2e-3))
    assert longer.exit_code == 0 and json.loads(longer.stdout.splitlines()[-1])["run_dir"] == run_dir
    assert "kimg: 0.012 -> 0.016" in longer.stderr and "lr: 0.001 -> 0.002" in longer.stderr
    shutil.rmtree(run_dir)
    assert refine(*options(tmp_path, resume=run_dir)).exit_code == 2


def test_a_run_that_gets_worse_or_late_stops(tmp_path, measured):
    folder = Path(measured[0]["run_dir"]).parents[1]
    metrics = {"metrics": "fd64_full@toy", "detector": folder / "toy.safetensors", "ref": folder / "data"}
    changes = {**metrics, "teacher_steps": 1, "lr": 1, "score_warmup": 0, "stop_if_worse": 1.01}
    result = refine(*options(tmp_path / "worse", **changes))
    report = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 0 and report["stopped"] == "stop_if_worse" and report["kimg"] < 0.024
    result = refine(*options(tmp_path / "late", metrics="none", kimg=1000, max_minutes=0.01))
    report = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 0 and report["stopped"] == "max_minutes" and Path(report["snapshot"]).exists()
