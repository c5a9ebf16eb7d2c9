"""One snapshot has one number in every command, and classes their names: from a data set through all files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden_io import GOLDEN
from PIL import Image

from di_refine.commands import calc_metrics, convert, dataset_tool, distill, generate, pretrain, refine, sample_teacher
from di_refine.files import networks
from di_refine.files.datasets import ImageDataset
from di_refine.labels import KEY
from di_refine.metrics.small import SmallConvNet, save_small
from torch_utils import persistence

CASES = GOLDEN.parent / "cases"
COUNTS = {"cats": 20, "flags": 2, "frogs": 6, "ships": 12}
METRIC = "fd64_full@toy"
SHORT = ["--batch=4", "--kimg=0.008", "--tick=0.004", "--snap=1", "--device=cpu"]
GAN = ["gan", "--z-dim=8", "--channel-base=64", "--channel-max=8", "--mbstd-group=4", *SHORT]
TEACHER = ["teacher", "--width=8", "--channel-mult=1,1", "--num-blocks=1", "--attn-resolutions=8", "--lr-rampup=0"]
TEACHER += SHORT
TEACHING = [*SHORT, "--score-warmup=0.004", "--lr=1e-3", "--score-lr=1e-3", "--teacher-steps=1"]


def call(command, *arguments):
    return CliRunner().invoke(command.main, [str(argument) for argument in arguments])


def report(command, *arguments):
    result = call(command, *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def refused(command, *arguments):
    result = call(command, *arguments)
    assert result.exit_code == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1, result.output
    return result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Paths by name: unbalanced data with class names, and a GAN, a teacher and a feature network of them.

    The classes have unlike brightness, so that a metric tells how often each was drawn.
    """
    folder = tmp_path_factory.mktemp("labels")
    for number, (name, count) in enumerate(COUNTS.items()):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([number, i]).integers(60 * number, 60 * number + 60, [16, 16], np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    shown = report(dataset_tool, f"--source={folder / 'photos'}", f"--dest={folder / 'data.zip'}")
    assert shown["class_names"] == list(COUNTS) and shown["class_counts"] == list(COUNTS.values())
    torch.manual_seed(0)
    save_small(SmallConvNet(16, 1, classes=4, width=4, feature_dim=8), folder / "toy.safetensors", "toy")
    measuring = [f"--metrics={METRIC}", f"--detector={folder / 'toy.safetensors'}"]
    data = f"--data={folder / 'data.zip'}"
    gan = report(pretrain, *GAN, data, f"--outdir={folder / 'gan'}", *measuring)
    teacher = report(pretrain, *TEACHER, data, f"--outdir={folder / 'teacher'}")
    return {
        "data": folder / "data.zip",
        "gan": Path(gan["snapshot"]),
        "teacher": Path(teacher["snapshot"]),
        "measuring": measuring,
        "number": gan[METRIC],
    }


def measured(made, network, *options):
    command = [f"--network={network}", f"--data={made['data']}", "--device=cpu", "--steps=1", *made["measuring"]]
    (summary,) = report(calc_metrics, *command, *options)["results"]
    return summary["results"][METRIC], summary["labels"]


def refined(made, outdir, *options):
    command = [f"--network={made['gan']}", f"--teacher={made['teacher']}", f"--outdir={outdir}", *TEACHING]
    own = [*made["measuring"], f"--ref={made['data']}", "--final-seeds=1"]  # seed 1
    return report(refine, *command, *own, *options)


@pytest.mark.parametrize("name", ["gan", "teacher"])
def test_names_and_counts_travel_beside_what_the_official_tools_pass_on(made, name):
    content = persistence.load(made[name])
    assert content[KEY] == {"classes": list(COUNTS), "counts": list(COUNTS.values())}
    official = {"class_name", "path", "use_labels", "max_size", "xflip", "resolution"}
    assert set(content["training_set_kwargs" if name == "gan" else "dataset_kwargs"]) == official


def test_one_snapshot_has_one_number(made, tmp_path):
    """While it is trained, when it is refined, and afterwards; another law has another number, and each is named."""
    number, labels = measured(made, made["gan"])
    assert number == pytest.approx(made["number"], rel=1e-6) and labels == "network"
    uniform, labels = measured(made, made["gan"], "--labels=uniform")
    assert abs(uniform / number - 1) > 0.01 and labels == "uniform"
    as_data, labels = measured(made, made["gan"], "--labels=dataset")
    assert as_data == number and labels == f"dataset:{made['data']}"

    result = refined(made, tmp_path)
    number, _ = measured(made, made["gan"], "--seed=1")
    assert result["original"] == pytest.approx(number, rel=1e-6) and result["labels"] == "network"
    assert measured(made, result["snapshot"], "--seed=1") == (pytest.approx(result["refined"], rel=1e-6), "network")
    line = json.loads((Path(result["run_dir"]) / f"metric-{METRIC}.jsonl").read_text().splitlines()[0])
    assert line["labels"] == "network"
    teacher, _ = measured(made, made["teacher"], "--seed=1")
    assert teacher == pytest.approx(result["teacher"], rel=1e-6)


@pytest.mark.parametrize("labels", ["uniform", "1,5,1,0", "frogs"])
def test_a_snapshot_keeps_the_law_that_was_chosen(made, tmp_path, labels):
    result = refined(made, tmp_path, f"--labels={labels}")
    assert result["labels"] == {"uniform": "uniform", "1,5,1,0": "list", "frogs": "class:2"}[labels]
    number, _ = measured(made, made["gan"], f"--labels={labels}", "--seed=1")
    assert number == pytest.approx(result["original"], rel=1e-6)
    assert measured(made, result["snapshot"], "--seed=1") == (pytest.approx(result["refined"], rel=1e-6), "network")
    assert networks.load(result["snapshot"]).labels.names == tuple(COUNTS)


def test_a_distilled_network_keeps_it_too_and_so_do_all_forms_of_files(made, tmp_path):
    command = [f"--teacher={made['teacher']}", f"--outdir={tmp_path}", *TEACHING, *made["measuring"]]
    result = report(distill, *command, f"--ref={made['data']}", "--final-seeds=1")
    assert measured(made, result["snapshot"], "--seed=1") == (pytest.approx(result["distilled"], rel=1e-6), "network")
    for dest in ("net.safetensors", "again.pkl"):
        source = result["snapshot"] if dest == "net.safetensors" else tmp_path / "net.safetensors"
        report(convert, f"--source={source}", f"--dest={tmp_path / dest}")
        law = networks.load(tmp_path / dest).labels
        assert law.names == tuple(COUNTS) and law.counts.tolist() == list(COUNTS.values())


def test_onnx_says_the_names(made, tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the optional package onnx")
    pytest.importorskip("onnxscript", reason="needs the optional package onnxscript")
    report(convert, f"--source={made['gan']}", f"--dest={tmp_path / 'net.onnx'}")
    found = {item.key: item.value for item in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert json.loads(found["label_classes"]) == list(COUNTS)
    assert json.loads(found["label_counts"]) == list(COUNTS.values())


def test_a_run_goes_on_only_under_the_same_law(made, tmp_path):
    run = refined(made, tmp_path, "--kimg=0.006")["run_dir"]
    command = [f"--network={made['gan']}", f"--teacher={made['teacher']}", f"--outdir={tmp_path}", *TEACHING]
    command += [*made["measuring"], f"--ref={made['data']}", f"--resume={run}"]
    assert "cannot be continued with --labels=uniform" in refused(refine, *command, "--labels=uniform")
    other = persistence.load(made["gan"])
    other[KEY]["counts"] = [1, 1, 1, 1]
    shutil.copy(made["gan"], tmp_path / "mine.pkl")
    persistence.save(other, tmp_path / "mine.pkl")
    message = refused(refine, *command, f"--network={tmp_path / 'mine.pkl'}")
    assert "cannot be continued" in message
    assert report(refine, *command)["run_dir"] == run


def test_old_files_without_a_law_are_drawn_from_as_ever_and_it_is_said(made, tmp_path):
    content = persistence.load(made["gan"])
    del content[KEY]
    persistence.save(content, tmp_path / "old.pkl")
    result = call(calc_metrics, f"--network={tmp_path / 'old.pkl'}", f"--data={made['data']}", *made["measuring"])
    assert "labels: all classes equally often, as the network's file does not say" in result.stderr
    (summary,) = json.loads(result.stdout.splitlines()[-1])["results"]
    assert summary["labels"] == "uniform"
    assert summary["results"][METRIC] == measured(made, made["gan"], "--labels=uniform")[0]
    result = call(generate, f"--network={tmp_path / 'old.pkl'}", f"--outdir={tmp_path}", "--seeds=0-7")
    assert "as the network's file does not say" in result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["class_counts"] == {str(number): 2 for number in range(4)}


def test_generate_takes_names_and_writes_them_on_the_grid(made, tmp_path):
    command = [f"--network={made['gan']}", f"--outdir={tmp_path}", "--device=cpu"]
    drawn = report(generate, *command, "--seeds=0-299", "--no-grid")
    assert drawn["labels"] == "network" and set(drawn["class_counts"]) <= set(COUNTS)
    assert drawn["class_counts"]["cats"] == pytest.approx(150, abs=30)
    one = report(generate, *command, "--seeds=0-9", "--class=FLA")
    assert one["class_counts"] == {"flags": 10} and one["labels"] == "class:1"
    assert "flags, frogs" in refused(generate, *command, "--class=f")
    assert "--class=dogs is not a class" in refused(generate, *command, "--class=dogs")
    both = refused(generate, *command, "--class=cats", "--labels=uniform")
    assert both == "error: --labels and --class both say what to draw; give one of them\n"
    report(generate, *command, "--seeds=0-15", "--columns=8", "--labels=uniform")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width == 8 * 32 and grid.height > 2 * 32, "enlarged, with turned titles of the columns"
        assert np.asarray(grid.convert("L"))[: grid.height - 64].min() < 100, "which are dark on white"


def test_samples_of_a_teacher_follow_its_law_and_keep_the_names(made, tmp_path):
    command = [f"--teacher={made['teacher']}", "--steps=1", "--device=cpu", f"--dest={tmp_path / 'a.zip'}"]
    assert report(sample_teacher, *command, "--num=300")["labels"] == "network"
    samples = ImageDataset(tmp_path / "a.zip")
    assert samples.class_names == tuple(COUNTS)
    np.testing.assert_allclose(samples.label_law().frequencies, np.array([20, 2, 6, 12]) / 40, atol=0.1)
    report(sample_teacher, *command, "--num=20", "--class=ships", "--overwrite")
    samples = ImageDataset(tmp_path / "a.zip")
    assert samples.class_names == tuple(COUNTS) and samples.class_counts().tolist() == [0, 0, 0, 20]


def test_the_ratio_knows_how_often_either_side_has_each_class(made, tmp_path):
    result = refined(made, tmp_path, "--objective=f-js", f"--data={made['data']}")
    assert result["labels"] == "network"
    few = tmp_path / "few.zip"
    report(dataset_tool, f"--source={made['data']}", f"--dest={few}", "--max-images=8")
    assert 0 in ImageDataset(few).class_counts(), "or the next lines test nothing"
    command = [f"--network={made['gan']}", f"--teacher={made['teacher']}", f"--outdir={tmp_path / 'new'}", *TEACHING]
    command += ["--objective=f-js", f"--data={few}", "--metrics=none"]
    assert "has no image of class" in refused(refine, *command) and not (tmp_path / "new").exists()
    assert report(refine, *command, "--labels=dataset")["labels"] == f"dataset:{few}"


@pytest.mark.parametrize("command", [GAN, TEACHER], ids=["gan", "teacher"])
def test_continuous_labels_train(tmp_path, command):
    data = CASES / "labels_continuous"
    result = report(pretrain, *command, f"--data={data}", f"--outdir={tmp_path}")
    assert networks.load(result["snapshot"]).labels.content == ImageDataset(data).label_law().content


def test_label_vectors_train_and_are_drawn_from_rows_of_the_data(tmp_path):
    data = CASES / "labels_multi_hot"
    rows = {tuple(row) for row in ImageDataset(data).labels(range(8)).tolist()}
    teacher = report(pretrain, *TEACHER, f"--data={data}", f"--outdir={tmp_path / 'teacher'}")["snapshot"]
    gan = report(pretrain, *GAN, f"--data={data}", f"--outdir={tmp_path / 'gan'}")["snapshot"]
    for snapshot in (teacher, gan):
        law = networks.load(snapshot).labels
        assert {tuple(row) for row in law.rows.tolist()} == rows and law.described == "network"
    common = [*TEACHING, "--metrics=none", f"--outdir={tmp_path / 'runs'}"]
    command = [f"--network={gan}", f"--teacher={teacher}", *common]
    snapshot = report(refine, *command)["snapshot"]
    assert {tuple(row) for row in networks.load(snapshot).labels.rows.tolist()} == rows
    assert report(refine, *command, "--objective=f-js", f"--data={data}")["labels"] == "network"
    assert report(distill, f"--teacher={teacher}", *common)["labels"] == "network"
    drawn = ["--num=40", "--steps=1", f"--dest={tmp_path / 'samples.zip'}", "--device=cpu"]
    report(sample_teacher, f"--teacher={teacher}", *drawn)
    samples = ImageDataset(tmp_path / "samples.zip")
    assert {tuple(row) for row in samples.labels(range(40)).tolist()} == rows
    message = refused(refine, *command, "--objective=f-js", f"--data={tmp_path / 'samples.zip'}", "--outdir=never")
    assert "has other label vectors than the generator draws; give --labels=dataset" in message
    assert not Path("never").exists()
    generating = [f"--network={snapshot}", "--device=cpu", f"--outdir={tmp_path / 'out'}"]
    assert report(generate, *generating, "--seeds=0-3")["labels"] == "network"
    assert "which has label vectors instead" in refused(generate, *generating, "--class=1")


def test_label_vectors_have_no_recognised_class(made, tmp_path):
    gan = report(pretrain, *GAN, f"--data={CASES / 'labels_multi_hot'}", f"--outdir={tmp_path}")["snapshot"]
    torch.manual_seed(0)
    save_small(SmallConvNet(16, 3, classes=4, width=4, feature_dim=8), tmp_path / "toy.safetensors", "toy")
    measuring = [f"--detector={tmp_path / 'toy.safetensors'}", f"--data={CASES / 'labels_multi_hot'}", "--device=cpu"]
    message = refused(calc_metrics, f"--network={gan}", "--metrics=acc64@toy", *measuring)
    assert "acc64@toy compares one class with another" in message
    assert (
        report(calc_metrics, f"--network={gan}", f"--metrics={METRIC}", *measuring)["results"][0]["labels"] == "network"
    )
    features = [
        f"--data={CASES / 'labels_multi_hot'}",
        f"--dest={tmp_path / 'f.safetensors'}",
        f"--stats={tmp_path / 'f.npz'}",
    ]
    assert "has label vectors, and a classifier needs one class an image" in refused(pretrain, "features", *features)


def test_classes_in_another_order_are_refused(made, tmp_path):
    content = persistence.load(made["teacher"])
    content[KEY]["classes"] = [*COUNTS][::-1]
    persistence.save(content, tmp_path / "other.pkl")
    message = refused(refine, f"--network={made['gan']}", f"--teacher={tmp_path / 'other.pkl'}", "--device=cpu")
    assert f"--teacher={tmp_path / 'other.pkl'} has the classes in another order" in message
    assert "class 0 is 'ships' there and 'cats' here" in message


def test_a_damaged_law_is_one_sentence(made, tmp_path):
    content = persistence.load(made["gan"])
    content[KEY] = {"classes": None, "counts": [1, 2]}
    persistence.save(content, tmp_path / "bad.pkl")
    message = refused(generate, f"--network={tmp_path / 'bad.pkl'}", f"--outdir={tmp_path / 'new'}")
    assert message.startswith("error: --network: the label_law in") and "4 frequencies" in message
    assert not (tmp_path / "new").exists()
