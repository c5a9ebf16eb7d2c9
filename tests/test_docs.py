"""Every command in the documentation is understood, and those of docs/own-pictures.md work, here at tiny size."""

import functools
import importlib
import json
import re
import shlex
from pathlib import Path

import click
import grimp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from di_refine.commands import ending

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

TINY = {
    "pretrain.py gan": ["--z-dim=8", "--channel-base=64", "--channel-max=8", "--batch=8"],
    "pretrain.py teacher": ["--width=8", "--batch=8", "--num-blocks=1"],
    "pretrain.py features": ["--epochs=1", "--width=4", "--feature-dim=4"],
    "refine.py": ["--batch=8", "--metrics=fd48@teacher", "--final-seeds=2"],
}


def commands(document):
    """The command lines in a document, in order."""
    text = (DOCS / document).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if re.match(r" {4}python \S+\.py ", line)]


def run(line):
    """Run a command line here, at tiny size; returns its JSON result."""
    script, *words = shlex.split(line)[1:]
    if script == "pretrain.py":
        script, words = f"{script} {words[0]}", words[1:]
    words = [re.sub(r"^--minutes=.*", "--kimg=0.064", word) for word in words]
    words = [word for word in words if not word.startswith(("--seeds=3",))]
    words = [word.replace("fd2k_full", "fd48_full") for word in words]
    module, *group = script.replace(".py", "").split()
    done = CliRunner().invoke(
        importlib.import_module(f"di_refine.commands.{module}").main, [*group, *words, *TINY.get(script, [])]
    )
    assert done.exit_code == 0, f"{line}\n{done.output}"
    return json.loads(done.stdout.splitlines()[-1])


CALL = r"(?:\S+=\S+ )*(?:torchrun (?:--?\S+ )*|python )(-m di_refine \S+|[a-z_]+\.py)( .*|$)"


def documented():
    """(document, command, its words) for every call of ours in an indented block of the documentation."""
    files = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "pretrained").glob("*.md")]
    for path in sorted(files):
        text = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))
        for line in text.splitlines():
            found = re.match(f" {{4}}{CALL}", line)
            if found:
                words = re.sub(r"[][]", "", re.split(r"  | #| && ", found[2])[0])
                yield path.relative_to(ROOT).as_posix(), found[1], words


@pytest.mark.parametrize(("document", "script", "words"), list(documented()))
def test_every_documented_command_is_understood(document, script, words):
    """Its options exist and take such values; nothing is run."""
    name = script.removesuffix(".py").split()[-1].replace("-", "_")
    command = importlib.import_module(f"di_refine.commands.{name}").main
    words = [word for word in shlex.split(words) if word not in ("...", "|")]
    if isinstance(command, click.Group) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    if not isinstance(command, click.Group):
        assert command.make_context(script, words, resilient_parsing=not words).params


def test_every_documented_target_of_make_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")):
        assert set(re.findall(r"`make ([a-z-]+)`", path.read_text(encoding="utf-8"))) <= targets, path


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A working folder with pictures of two classes; what trainings draw has one row, as drawing takes longest here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ending, "class_grid", functools.partial(ending.class_grid, rows=1))
    for i in range(24):
        folder = tmp_path / "pictures" / ("dark" if i % 2 else "bright")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 128, [20, 24, 3]) + 127 * (1 - i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def test_own_pictures(pictures):
    results = [run(line) for line in commands("own-pictures.md")]
    assert len(results) == 7
    assert [Path(results[i]["run_dir"]).name for i in (1, 2, 3)] == ["00000-gan", "00001-teacher", "00002-refined"]
    assert results[3]["metric"] == "fd48@teacher" and len(results[3]["verdict"]) >= 1
    assert (pictures / "runs" / "00000-gan" / "reals.png").is_file()
    assert len(list((pictures / "out").glob("seed*.png"))) == 64
    assert [len(item["values"]["fd48_full@mine"]) for item in results[-1]["results"]] == [1, 1]


def test_the_snippets_of_the_library_page_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    snippets = re.findall(r"^```python\n(.*?)^```", (DOCS / "library.md").read_text(), re.M | re.S)
    assert len(snippets) == 8
    names = {}
    torch.manual_seed(0)
    for snippet in snippets:
        exec(snippet, names)
    assert Image.open("dots.png").size == (480, 96) and (tmp_path / "copy.pkl").is_file()


def test_the_diagram_of_packages_is_that_of_the_imports():
    """docs/architecture.md shows every import between packages that does not follow from others."""
    graph = grimp.build_graph("di_refine", "stylegan2_ada", "torch_utils")
    starts = {"di_refine.__main__", "di_refine.start"}  # they import commands by name
    imports = {}
    for module in graph.modules - starts:
        imported = graph.find_modules_directly_imported_by(module) - starts
        imports.setdefault(unit(module), set()).update({unit(name) for name in imported} - {unit(module)})

    def below(package):
        return imports[package].union(*map(below, imports[package]))

    wanted = {
        f"{package} --> {other}"
        for package, others in imports.items()
        for other in others
        if not any(other in below(between) for between in others)
    }
    text = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("## What imports what")[2]
    assert set(re.findall(r"^ +(\w+ --> \w+)$", text, re.MULTILINE)) == wanted


def unit(module):
    """The box of the diagram that a module belongs to."""
    package, *parts = module.split(".")
    return parts[0] if package == "di_refine" and parts else package
