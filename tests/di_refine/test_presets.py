"""Settings that are fitted to a run: they suit its length, a resumed run keeps them, and the library has the same."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from golden_io import GOLDEN
from PIL import Image

from di_refine import presets
from di_refine.commands.pretrain import main as pretrain
from di_refine.commands.refine import main as refine
from di_refine.config import TrainerConfig
from di_refine.pretraining.config import GanConfig, TeacherConfig, UNetConfig
from di_refine.runs.config import LoopConfig
from stylegan2_ada.config import AdversarialConfig
from torch_utils.settings import declared

PARTS = {
    "edm": (UNetConfig, TeacherConfig, LoopConfig),
    "stylegan2": (GanConfig, AdversarialConfig, LoopConfig),
    "refine": (TrainerConfig, LoopConfig),
}
NETWORKS = [f"--network={GOLDEN / 'stylegan2/sg2ada-cifar-cond.pkl'}", f"--teacher={GOLDEN / 'edm/ddpmpp_cond.pkl'}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    folder.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, [8, 8, 3], np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def record(command, *arguments):
    result = CliRunner().invoke(command, [*map(str, arguments), "--device=cpu"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", PARTS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kimg", [None, 0.05, 1, 30, 1000, 200_000])
@pytest.mark.parametrize("resolution", [8, 16, 32, 64, 256])
def test_everything_ends_within_the_run(command, device, kimg, resolution):
    facts = presets.Facts(resolution=resolution, device=device, kimg=kimg, images=500, parameters=10**6)
    values = presets.values_of(command, "auto", facts)
    assert presets.warnings(values) == [] and (kimg is None or values["kimg"] == kimg)
    used = {item.name for part in PARTS[command] for item in declared(part)}
    assert set(values) <= used, "every value is a setting"
    for part in PARTS[command]:
        presets.settings(part, values)  # checks the ranges


def test_published_values_at_published_lengths():
    edm = presets.teacher(presets.Facts(resolution=32, device="cuda", kimg=200_000, images=50_000))
    names = {item.name for part in (UNetConfig, TeacherConfig) for item in declared(part)}
    assert presets.settings(UNetConfig, edm) == UNetConfig() and presets.settings(TeacherConfig, edm) == TeacherConfig()
    assert names >= set(edm) - {"kimg", "tick", "snap"}
    ada = presets.gan(presets.Facts(resolution=256, device="cuda", images=50_000))
    assert ada["gamma"] == round(0.0002 * 256**2 / ada["batch"], 2) and ada["lr"] == 2.5e-3
    paper = presets.teach(presets.Facts(resolution=32, device="cuda", kimg=5000, parameters=20_000_000))
    assert presets.settings(TrainerConfig, paper) == TrainerConfig()


def test_warnings_name_a_number_that_works():
    values = {"kimg": 36, "ema_kimg": 500, "score_warmup": 20, "lr_rampup": 10_000, "tick": 50}
    sentences = presets.warnings(values)
    assert len(sentences) == 4 and "ema_kimg=500" in sentences[-1] and "use ema_kimg=3.6" in sentences[-1]
    named = dict(sentence.rsplit("use ", 1)[1].split("=") for sentence in sentences)
    assert presets.warnings(values | {name: float(value) for name, value in named.items()}) == []
    result = CliRunner().invoke(refine, [*NETWORKS, "--kimg=1", "--ema-kimg=500", "--device=cpu", "--dry-run"])
    assert "warning: --ema-kimg=500" in result.stderr and "use --ema-kimg=0.1" in result.stderr


def test_the_library_has_the_values_of_the_commands(data):
    """--dry-run says which values are fitted; everything else has the default of its dataclass."""
    for name, word, command in (("edm", "teacher", pretrain), ("stylegan2", "gan", pretrain), ("refine", None, refine)):
        given = NETWORKS if word is None else [word, f"--data={data}"]
        said = record(command, *given, "--kimg=3", "--dry-run")
        resolution = 8 if word else 32
        parameters = None if word else said["generator_parameters"]
        facts = presets.Facts(resolution=resolution, device="cpu", kimg=3, images=8, parameters=parameters)
        fitted = presets.values_of(name, "auto", facts)
        for part in PARTS[name]:
            mine = presets.settings(part, fitted)
            for item in declared(part):
                if item.name in ("kimg", "tick", "snap") or item.name in fitted or part is not LoopConfig:
                    assert said[item.name] == getattr(mine, item.name), item.name
        assert {name for name, source in said["sources"].items() if source == "auto"} == set(fitted) - {"kimg"}


def test_minutes_become_a_length_that_a_resumed_run_keeps(data, tmp_path):
    words = ["gan", f"--data={data}", f"--outdir={tmp_path}", "--z-dim=8", "--channel-base=64", "--channel-max=8"]
    words += ["--batch=4", "--mbstd-group=2", "--minutes=0.01"]
    first = record(pretrain, *words)
    options = Path(first["run_dir"]) / "training_options.json"
    before = json.loads(options.read_text())
    assert before["sources"]["kimg"] == "minutes" and first["kimg"] > before["kimg"] - 0.001 >= 0
    again = record(pretrain, *words, f"--resume={first['run_dir']}")
    assert again["kimg"] == first["kimg"] and json.loads(options.read_text()) == before
    longer = record(pretrain, *words[:-1], "--minutes=0.02", "--resume=auto")
    after = json.loads(options.read_text())
    assert after["kimg"] == 2 * before["kimg"] and after["ema_kimg"] == before["ema_kimg"]
    assert longer["run_dir"] == first["run_dir"] and longer["kimg"] > after["kimg"] - 0.001
    both = CliRunner().invoke(pretrain, [*words, "--kimg=1", "--device=cpu"])
    assert both.exit_code == 2 and "--kimg and --minutes" in both.stderr
