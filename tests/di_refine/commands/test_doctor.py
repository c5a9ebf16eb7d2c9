"""python -m di_refine doctor: what it finds, and what it advises."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from di_refine.commands import doctor
from torch_utils.ops import building

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments):
    result = CliRunner().invoke(doctor.main, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout, json.loads(result.stdout.splitlines()[-1])


def test_text_and_json_say_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path))
    text, found = run()
    alone, again = run("--json")
    assert len(alone.splitlines()) == 1 and again["versions"] == found["versions"]
    for heading in ("versions", "machine", "operators", "extras", "cache"):
        assert f"{heading}\n" in text
        assert all(re.search(rf"^  {re.escape(name)} ", text, re.M) for name in found[heading])
    assert all(sentence in text for sentence in found["advice"])
    assert found["versions"]["torch"] and found["machine"]["cores"] >= 1 and found["machine"]["memory_gib"] > 0


def test_no_path_but_the_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path / "cache"))
    text, found = run()
    assert found["cache"]["folder"] == str(tmp_path / "cache") and not (tmp_path / "cache").exists()
    assert str(ROOT) not in text and str(Path.home()) not in text.replace(str(tmp_path), "")


def test_operators_are_built_or_not_or_cannot_be(monkeypatch, tmp_path):
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path))
    _, found = run()
    assert found["operators"]["cpu"] == (building.missing_tool("cpu") or "not built")
    library = building.folder("cpu") / f"{building.NAME}.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert run()[1]["operators"]["cpu"] == "built"
    library.unlink()
    monkeypatch.setattr(building, "compiler", lambda: None)
    _, found = run()
    assert "no C++ compiler" in found["operators"]["cpu"] and found["operators"]["compiler"] is None
    assert any("no C++ compiler" in sentence for sentence in found["advice"])


GOOD = {
    "machine": {"gpus": ["a GPU"], "cores": 4, "threads": 4},
    "operators": {"cpu": "built", "cuda": "built"},
    "extras": dict.fromkeys(doctor.EXTRAS, True),
    "cache": {"folder": "~/here", "writable": True, "free_gib": 50.0},
}


def test_nothing_is_advised_where_all_is_there():
    assert doctor.advice(GOOD) == []


@pytest.mark.parametrize(
    "part, change, words",
    [
        ("machine", {"threads": 1}, "OMP_NUM_THREADS=4"),
        ("operators", {"cpu": "not built"}, "python -m torch_utils.custom_ops"),
        ("operators", {"cuda": "no CUDA toolkit"}, "no CUDA toolkit"),
        ("cache", {"writable": False}, "DI_REFINE_CACHE"),
        ("cache", {"free_gib": 0.1}, "0.1 GiB"),
        ("extras", {"onnx": False}, "di-refine[onnx]"),
    ],
)
def test_what_is_missing_is_advised(part, change, words):
    (sentence,) = doctor.advice({**GOOD, part: {**GOOD[part], **change}})
    assert words in sentence


def test_a_gpu_that_pytorch_does_not_see(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    (sentence,) = doctor.advice({**GOOD, "machine": {**GOOD["machine"], "gpus": []}})
    assert "CUDA build of PyTorch" in sentence


def test_extras_are_those_of_the_package():
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = dict(re.findall(r"^(\w+) = (\[.*\])$", section, re.M))
    assert set(doctor.EXTRAS) == set(extras) - {"dev", "docs"}
    for name, (modules, _) in doctor.EXTRAS.items():
        packages = [re.split(r"[<>=]", item)[0] for item in json.loads(extras[name])]
        imported = [name.replace("scikit-learn", "sklearn").replace("-", "_") for name in packages]
        assert tuple(imported) == modules
