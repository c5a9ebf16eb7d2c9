"""`python -m di_refine TOOL`."""

import subprocess
import sys
from pathlib import Path

import pytest

import di_refine
from di_refine.__main__ import TOOLS, main

ROOT = Path(di_refine.__file__).parents[1]
SLOW = ("torch", "numpy", "scipy", "PIL", "matplotlib", "requests", "pooch")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["di_refine", *arguments])
    main()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_without_a_tool_they_are_listed(monkeypatch, capsys, arguments):
    run(monkeypatch, *arguments)
    output = capsys.readouterr()
    assert output.out.startswith("Usage: python -m di_refine TOOL") and output.err == ""
    for tool, what in TOOLS.items():
        assert f"  {tool}" in output.out and what in output.out and what[0].isupper() and what.endswith(".")


def test_the_tools_are_those_of_the_documentation():
    own = {"inspect", "convert", "zoo", "playground", "sample-teacher"}
    assert own | {"refine", "distill", "pretrain", "generate", "calc-metrics", "dataset-tool"} <= set(TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_is_a_command(monkeypatch, capsys, tool):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tool, "--help")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"Usage: python -m di_refine {tool} ")


@pytest.mark.parametrize("name", ["no-such-tool", "sample_teacher", ""])
def test_an_unknown_tool_is_one_sentence(monkeypatch, capsys, name):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, name)
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == ""
    assert output.err == f"error: there is no tool {name!r}; python -m di_refine --help lists them\n"


def test_as_a_module():
    command = [sys.executable, "-m", "di_refine"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "sample-teacher" in done.stdout and not done.stderr


@pytest.mark.parametrize("module", ["__main__", *(f"commands.{tool.replace('-', '_')}" for tool in TOOLS)])
def test_help_waits_for_nothing_slow(module):
    script = f"import sys\nimport di_refine.{module}\nprint(*{{*{SLOW}}} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
