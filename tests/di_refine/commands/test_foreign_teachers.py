"""Teachers of other code bases in every command that takes a teacher, as files, folders and results of a run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden_io import GOLDEN

from di_refine.commands import calc_metrics, convert, distill, generate, inspect, refine, sample_teacher
from di_refine.denoisers import load_denoiser
from di_refine.edm2.networks import MPConv
from di_refine.files import diffusers_folder, networks, onnx_export
from di_refine.metrics.small import SmallConvNet, save_small
from torch_utils import persistence

EDM2 = GOLDEN / "edm2/cond.pkl"
ADM = GOLDEN / "guided/gd64-cond.pt"
FLAGS = json.loads(str(np.load(ADM.with_suffix(".npz"))["meta"][0]))["flags"]
FOLDER = GOLDEN / "diffusers/ddim-v-scaled-class"
G_COND = GOLDEN / "stylegan2/sg2ada-cifar-cond.pkl"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["edm2", "adm", "diffusers"])
def teacher(request, tmp_path):
    """A teacher of 10 classes at 8x8, and the options that name it."""
    if request.param == "diffusers":
        pytest.importorskip("diffusers", reason="needs the optional package diffusers")
        return [f"--teacher={FOLDER}"]
    if request.param == "edm2":
        return [f"--teacher={EDM2}"]
    (tmp_path / "flags.json").write_text(json.dumps(FLAGS))
    return [f"--teacher={ADM}", f"--teacher-config={tmp_path / 'flags.json'}"]


SHORT = ["--kimg=0.016", "--batch=4", "--score-warmup=0.004", "--ema-kimg=0.01", "--lr=1e-3"]
SHORT += ["--tick=0.004", "--snap=1", "--device=cpu", "--metrics=none"]


def invoke(module, *arguments):
    return CliRunner().invoke(module.main, [str(argument) for argument in arguments])


def good(module, *arguments):
    result = invoke(module, *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def loaded(teacher):
    return load_denoiser(teacher[0].partition("=")[2], FLAGS if len(teacher) == 2 else None)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_refining_and_resuming(teacher, tmp_path):
    """The student score is a copy of the teacher, and a run that stops and goes on ends as one that does not."""
    options = [f"--network={G_COND}", *teacher, *SHORT]
    options += ["--dropout=off", "--checkpoint-score", "--precision=bf16"]
    whole = good(refine, *options, f"--outdir={tmp_path / 'a'}")
    first = good(refine, *options, f"--outdir={tmp_path / 'b'}", "--kimg=0.008")
    second = good(refine, *options, f"--outdir={tmp_path / 'b'}", f"--resume={first['run_dir']}")
    ends = [persistence.load(run["snapshot"])["G_ema"] for run in (whole, second)]
    assert equal(*ends) and not equal(ends[0], persistence.load(G_COND)["G_ema"])
    record = json.loads((Path(whole["run_dir"]) / "training_options.json").read_text())
    parameters = sum(p.numel() for p in loaded(teacher).parameters())
    assert record["classes"] == 10 and record["teacher_parameters"] == parameters


def test_it_judges_where_there_is_no_other_metric(teacher, tmp_path):
    options = [f"--network={G_COND}", *teacher, *SHORT[:-1], f"--outdir={tmp_path}"]
    assert good(refine, *options, "--dry-run")["metrics"] == ["fd1k@teacher"]
    run = good(refine, *options, "--metrics=fd16@teacher", "--kimg=0.008", "--final-seeds=1")
    assert run["metric"] == "fd16@teacher" and 0 < run["teacher"] < run["original"]


def test_a_density_ratio_of_its_samples(teacher, tmp_path):
    made = good(sample_teacher, *teacher, "--num=64", "--steps=2", "--device=cpu")
    assert (made["resolution"], made["classes"]) == (8, 10)
    assert good(sample_teacher, *teacher, "--num=64", "--steps=2", "--device=cpu")["reused"]
    options = [f"--network={G_COND}", *teacher, *SHORT, f"--outdir={tmp_path / 'runs'}"]
    good(refine, *options, "--objective=f-js", "--data=teacher", "--kimg=0.008", "--ratio-r1=0.1")


def test_distilling(teacher, tmp_path):
    """The result opens as ours, as the teacher's own kind, and in the commands that draw and measure."""
    run = good(distill, *teacher, *SHORT, f"--outdir={tmp_path / 'runs'}", "--init-sigma=2.5")
    file = networks.load(run["snapshot"])
    assert file.kind == networks.DISTILLED and file.sigmas == [2.5]
    image = good(
        generate, f"--network={run['snapshot']}", "--seeds=0-3", f"--outdir={tmp_path / 'out'}", "--device=cpu"
    )
    assert image["images"] == 4
    if len(teacher) == 2:
        target = tmp_path / "student.pt"
        good(convert, f"--source={run['snapshot']}", f"--dest={target}")
        again = load_denoiser(target, FLAGS)
        assert equal(again.unet, file.average.unet)
        return
    if teacher == [f"--teacher={EDM2}"]:
        norms = [
            layer.weight.flatten(1).square().mean(dim=1).sqrt()
            for layer in file.average.modules()
            if isinstance(layer, MPConv)
        ]
        assert all(norm.sub(1).abs().max() < 0.01 for norm in norms), "the average of normalised weights"
        assert "encoder" in file.networks
        return
    diffusers = pytest.importorskip("diffusers", reason="needs the optional package diffusers")
    folder = Path(run["run_dir"]) / "diffusers"
    again = networks.load(folder)
    assert again.kind == networks.DISTILLED and again.sigmas == [2.5] and equal(again.average, file.average)
    pipeline = diffusers.DDIMPipeline.from_pretrained(folder)
    assert all(
        torch.equal(value, file.average.unet.state_dict()[name]) for name, value in pipeline.unet.state_dict().items()
    )
    assert pipeline.scheduler.config["prediction_type"] == "v_prediction"
    good(convert, f"--source={run['snapshot']}", f"--dest={tmp_path / 'student'}")
    assert equal(networks.load(tmp_path / "student").average, file.average)
    assert invoke(convert, f"--source={run['snapshot']}", f"--dest={tmp_path / 'student'}").exit_code == 2
    good(convert, f"--source={tmp_path / 'student'}", f"--dest={tmp_path / 'student'}", "--overwrite")
    report = good(inspect, tmp_path / "student")
    assert report["networks"]["ema"]["class"] == "DiffusersPrecond"


def test_drawing_and_measuring(teacher, tmp_path):
    """Files that say all of themselves, by a JSON file beside them, need no further option."""
    source = tmp_path / "teacher.pt"
    if teacher == [f"--teacher={EDM2}"]:
        source = EDM2
    elif len(teacher) == 1:
        source = shutil.copytree(FOLDER, tmp_path / "teacher")
    else:
        shutil.copy(ADM, source)
        source.with_suffix(".json").write_text(json.dumps(FLAGS))
    torch.manual_seed(0)
    save_small(SmallConvNet(8, 3, classes=10, width=4, feature_dim=8), tmp_path / "toy.safetensors", "toy")
    good(generate, f"--network={source}", "--seeds=0-3", "--steps=2", f"--outdir={tmp_path / 'out'}", "--device=cpu")
    arguments = [
        "--metrics=acc1k@toy",
        "--no-jsonl",
        f"--detector={tmp_path / 'toy.safetensors'}",
        "--steps=1",
        "--device=cpu",
    ]
    result = good(calc_metrics, f"--network={source}", *arguments)["results"]
    assert result[0]["metric"] == "acc1k@toy"
    report = good(inspect, source)
    assert report["networks"]["ema"]["parameters"] > 0 and report["sha256"] == networks.digest(source)
    pickle = tmp_path / "again.pkl"
    good(convert, f"--source={source}", f"--dest={pickle}")
    assert equal(networks.load(pickle).average, networks.load(source).average)


def test_label_vectors_are_refused(teacher, tmp_path):
    vectors = tmp_path / "labels.json"
    vectors.write_text(json.dumps({"labels": [["a.png", [0.5, 0.5] + [0] * 8], ["b.png", [0.0, 1.0] + [0] * 8]]}))
    result = invoke(sample_teacher, *teacher, "--num=1", f"--labels={vectors}", "--device=cpu")
    if teacher == [f"--teacher={EDM2}"]:  # whose labels go through a matrix
        assert result.exit_code == 0
        return
    assert (
        result.exit_code == 2 and "--labels are vectors, and the diffusion model knows single classes" in result.stderr
    )


def test_a_config_for_each_teacher(tmp_path):
    (tmp_path / "flags.json").write_text(json.dumps(FLAGS))
    options = [f"--network={G_COND}", "--dry-run", "--device=cpu", f"--outdir={tmp_path}"]
    two = [f"--teacher={ADM}", f"--teacher={ADM}"]
    config = f"--teacher-config={tmp_path / 'flags.json'}"
    assert invoke(refine, *options, *two, config, config).exit_code == 0
    result = invoke(refine, *options, *two, config)
    assert result.exit_code == 2 and "--teacher-config is given 1 times and --teacher 2 times" in result.stderr
    result = invoke(refine, *options, f"--teacher={ADM}")
    assert result.exit_code == 2 and "the weights do not say image_size" in result.stderr


def test_only_what_came_from_a_kind_is_written_as_it(tmp_path):
    for name, words in [("a.pt", "such a file can be written"), ("a", "a diffusers folder can be written")]:
        result = invoke(convert, f"--source={GOLDEN / 'edm/vp.pkl'}", f"--dest={tmp_path / name}")
        assert result.exit_code == 2 and words in result.stderr
    (tmp_path / "full").mkdir()
    result = invoke(convert, f"--source={GOLDEN / 'edm/vp.pkl'}", f"--dest={tmp_path / 'full'}", "--overwrite")
    assert result.exit_code == 2 and "exists already, and is no diffusers folder" in result.stderr
    assert diffusers_folder.is_folder(FOLDER) and not diffusers_folder.is_folder(tmp_path)


def test_a_generator_of_one_step_as_onnx(teacher, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs the optional package onnxruntime")
    pytest.importorskip("onnxscript", reason="needs the optional package onnxscript")
    if torch.__version__ < onnx_export.OLDEST_TORCH:
        pytest.skip("the exporter of this PyTorch is too old")
    source = [option.replace("--teacher", "--source") for option in teacher]
    good(convert, *source, f"--dest={tmp_path / 'a.onnx'}", "--init-sigma=2.5")
    net = loaded(teacher)
    z, c = torch.randn(3, 3, 8, 8), torch.eye(10)[:3]
    (images,) = runtime.InferenceSession(tmp_path / "a.onnx").run(None, {"z": z.numpy(), "c": c.numpy()})
    with torch.no_grad():
        expected = net(2.5 * z, torch.tensor(2.5), c)
    torch.testing.assert_close(torch.from_numpy(images), expected, rtol=1e-4, atol=1e-4)
