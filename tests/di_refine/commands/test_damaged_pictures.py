"""Networks whose pictures are not finite, or constant: commands that draw them say so, once, and name the file."""

import re
import shutil

import pytest
import torch
from click.testing import CliRunner

from di_refine.commands import calc_metrics, convert, generate, sample_teacher
from di_refine.files import registry
from torch_utils import persistence

SHIPPED = registry.pretrained_folder()
WORDS = {"infinite": "are not finite", "constant": r"are constant: every pixel is \d+ of 255"}


def damaged(folder, kind, name="stylegan2-digits.pkl", last=("torgb.weight", "torgb.bias"), key="G_ema"):
    """A copy of a shipped network with finite weights in its last layers that spoil all pictures."""
    networks = persistence.load(SHIPPED / name)
    value = {"infinite": 3e38, "constant": 0.0, "whole": None}[kind]
    with torch.no_grad():
        for parameter_name, parameter in networks[key].named_parameters():
            if parameter_name.endswith(last) and value is not None:
                parameter.fill_(value)
    persistence.save(networks, folder / f"{kind}.pkl")
    return folder / f"{kind}.pkl"


def run(command, *arguments):
    return CliRunner().invoke(command.main, [str(argument) for argument in arguments])


def warnings(result):
    return [line for line in result.stderr.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("kind", ["infinite", "constant", "whole"])
def test_drawing_and_measuring_say_so_once(tmp_path, kind):
    network = damaged(tmp_path, kind)
    expected = [] if kind == "whole" else [rf"warning: pictures of {network} {WORDS[kind]}; the network is damaged"]
    drawn = run(generate, f"--network={network}", "--seeds=0-5", "--batch=2", f"--outdir={tmp_path / 'out'}")
    other = tmp_path / "measured" / network.name
    other.parent.mkdir()
    shutil.copy(network, other)
    measured = run(calc_metrics, f"--network={other}", "--metrics=is200@digits", "--batch=64")
    for result, path in ((drawn, network), (measured, other)):
        assert result.exit_code == 0, result.stderr
        said = warnings(result)
        assert len(said) == len(expected), result.stderr
        for line, words in zip(said, expected):
            assert re.match(words.replace(str(network), str(path)), line)


@pytest.mark.parametrize("kind", ["infinite", "constant", "whole"])
def test_export_says_so(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("di_refine.files.onnx_export.save", lambda model, path, facts: path.write_bytes(b""))
    network = damaged(tmp_path, kind)
    result = run(convert, f"--source={network}", f"--dest={tmp_path / 'x.onnx'}")
    assert result.exit_code == 0, result.stderr
    assert [f"pictures of {network} " in line for line in warnings(result)] == [True] * (kind != "whole")


def test_sampling_a_teacher_stops_and_names_it(tmp_path):
    network = damaged(tmp_path, "infinite", "edm-digits-16x16-cond.pkl", "aux_conv.weight", "ema")
    result = run(sample_teacher, f"--teacher={network}", "--num=4", "--steps=2", f"--dest={tmp_path / 'x.zip'}")
    assert result.exit_code == 1 and f"of {network} are not finite; check its file" in result.stderr
    assert not (tmp_path / "x.zip").exists()
