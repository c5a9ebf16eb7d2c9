"""What is shipped in pretrained/: files, registry, packaging, and the demos of the Makefile."""

import fnmatch
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from di_refine.commands import refine
from di_refine.files import networks, registry
from di_refine.files.datasets import ImageDataset
from di_refine.metrics.detectors import load_detector
from di_refine.metrics.statistics import FeatureStatistics
from torch_utils import persistence

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {name: record for name, record in registry.registry().items() if "file" in record}


def described(path, kind):
    """What a file says of its images: resolution, channels and classes."""
    if kind == "dataset":
        data = ImageDataset(path)
        return data.resolution, data.num_channels, data.label_dim
    if kind == "features":
        config = load_detector(path).net.config
        return config["resolution"], config["channels"], config["classes"]
    if kind == "statistics":
        identity = FeatureStatistics.load(path).identity
        return identity["resolution"], identity["num_channels"], None
    net = networks.load(path).average
    return net.img_resolution, net.img_channels, net.c_dim if kind == "stylegan2" else net.label_dim


@pytest.mark.parametrize("name", SHIPPED)
def test_files_are_what_the_registry_says(name):
    record, path = SHIPPED[name], registry.resolve(name)
    assert path.parent == ROOT / "pretrained"
    resolution, channels, classes = described(path, record["kind"])
    assert (resolution, channels) == (record["resolution"], record["channels"])
    assert classes in (None, record["classes"])
    for role in ("teacher", "detector", "statistics"):
        if role in record:
            assert registry.companion(path, role) == registry.resolve(record[role])
    if "detector" in record:
        statistics = FeatureStatistics.load(registry.companion(registry.companion(path, "detector"), "statistics"))
        assert statistics.identity["detector_hash"] == load_detector(registry.resolve(record["detector"])).identity.hash


def test_every_file_is_registered_packaged_and_described():
    folder = ROOT / "pretrained"
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert {name for name in names if not name.endswith((".md", ".json"))} == set(SHIPPED)
    (patterns,) = re.findall(r'^"di_refine.pretrained" = (\[.*\])$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in json.loads(patterns)) for name in names)
    text = (folder / "README.md").read_text()
    assert all(f"`{name}`" in text for name in SHIPPED)


def makefile_commands():
    """The commands of the demos, by their targets."""
    text = (ROOT / "Makefile").read_text()
    return dict(re.findall(r"^(demo\S*): setup\n\t\$\(BIN\)/python refine\.py (.*)$", text, re.M))


@pytest.mark.parametrize("target", makefile_commands())
def test_demos_run(target, tmp_path):
    """As the Makefile has it, everything is found and fits; and two updates of four images run through."""

    def run(*options):
        arguments = [*shlex.split(makefile_commands()[target]), f"--outdir={tmp_path}", "--device=cpu", *options]
        result = CliRunner().invoke(refine.main, arguments)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    planned = run("--dry-run")
    assert planned["metrics"][0].startswith("fd2k_full@") and planned["kimg"] > planned["score_warmup"]
    small = ["--kimg=0.008", "--score-warmup=0", "--batch=4", "--tick=0.004", "--metrics=none"]
    assert run(*small)["kimg"] == 0.008


def test_there_are_two_demos():
    assert set(makefile_commands()) == {"demo"}


def test_the_library_example_of_the_readme_trains(tmp_path, monkeypatch):
    """As it stands there, with 300 images."""
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"^## As a library\n\n```python\n(.*?)^```", text, re.M | re.S)
    assert code.count("KIMG = 36 ") == 1
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("KIMG = 36 ", "KIMG = 0.3 "), {})
    before = persistence.load(ROOT / "pretrained" / "stylegan2-digits.pkl")["G_ema"]
    after = persistence.load(tmp_path / "refined.pkl")["G_ema"]
    assert sum(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters())) > 10
    assert (tmp_path / "refined.png").is_file()
