import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from di_refine import terminal
from di_refine.commands import cli
from di_refine.errors import InputError, RunError

ROOT = Path(cli.__file__).parents[2]


def run(error: Exception | None = None, args=()):
    @cli.command()
    @click.option("--batch", type=cli.POSITIVE_INT, default=64, help="Images.")
    @click.option("--lr", type=cli.POSITIVE_NUMBER, default=0.01, help="Step.")
    @click.option("--decay", type=cli.Number(0, 1), default=0.5, help="Share.")
    @click.option("--seeds", type=cli.INT_LIST, default="0-3", help="Seeds.")
    @cli.device_option
    def main(**options):
        if error is not None:
            raise error
        terminal.print_result(options)

    return CliRunner().invoke(main, list(args), prog_name="tool")


@pytest.mark.parametrize(
    "error, status, sentence",
    [
        (InputError("--data is\n  missing"), 2, "error: --data is missing\n"),
        (RunError("loss is not finite"), 1, "error: loss is not finite\n"),
        (click.UsageError("no."), 2, "error: no (--help lists the options)\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "/x: No space left on device; free some space"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), 2, "error: /x: File name too long\n"),
        (torch.OutOfMemoryError("x" * 500), 1, "error: out of GPU memory; use a smaller batch per GPU\n"),
    ],
)
def test_failures_are_one_sentence_and_a_status(error, status, sentence):
    result = run(error)
    assert result.exit_code == status
    assert sentence in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


def test_a_folder_whose_name_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^--outdir=.*: its name is not UTF-8; choose another place"):
        cli.check_outdir(tmp_path / os.fsdecode(b"x\xff"))
    cli.check_outdir(tmp_path / "\u00e9")


def test_network_format_error_is_the_users_to_mend(monkeypatch):
    class NetworkFormatError(ValueError):
        pass

    module = type(sys)("torch_utils.persistence")
    module.NetworkFormatError = NetworkFormatError
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)
    assert cli.describe(NetworkFormatError("a.pkl: no network")) == (2, "error: a.pkl: no network")
    assert cli.describe(ValueError("a bug")) is None


def test_a_bug_keeps_its_exception():
    result = run(ZeroDivisionError("bug"))
    assert isinstance(result.exception, ZeroDivisionError)


def test_interrupt_is_130_with_one_line():
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from di_refine.commands import cli\n"
        "@cli.command()\n"
        "def main(): raise KeyboardInterrupt\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip(), done.stdout) == (130, "interrupted", "")


@pytest.mark.parametrize(
    "option, message",
    [
        ("--batch=0", "Invalid value for '--batch': 0 is not in the range x>=1"),
        ("--batch=many", "Invalid value for '--batch': 'many' is not a valid integer"),
        ("--batch=1.5", "'1.5' is not a valid integer"),
        ("--lr=0", "Invalid value for '--lr': 0.0 is not in the range x>0"),
        ("--lr=nan", "nan is not a finite number"),
        ("--lr=inf", "inf is not a finite number"),
        ("--decay=1.01", "Invalid value for '--decay': 1.01 is not in the range 0<=x<=1"),
        ("--seeds=3-1", "'3-1' is not a list of numbers and ascending ranges such as 0-63 or 1,5,8-10"),
        ("--seeds=0-99999999999", "Invalid value for '--seeds'"),
        ("--seeds=", "Invalid value for '--seeds'"),
        ("--seeds=1,-2", "Invalid value for '--seeds'"),
        ("--nope=1", "--nope"),
        ("--batch", "--batch"),
    ],
)
def test_bad_options_are_named(option, message):
    result = run(args=[option])
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")


def test_options_are_parsed_and_help_shows_defaults():
    result = run(args=["--batch=8", "--lr=1e-3", "--seeds=1,5,8-10", "--device=cpu"])
    expected = {"batch": 8, "lr": 0.001, "decay": 0.5, "seeds": [1, 5, 8, 9, 10], "device": "cpu"}
    assert json.loads(result.stdout) == expected and result.exit_code == 0
    help_text = run(args=["--help"])
    assert help_text.exit_code == 0
    assert "[default: 64; x>=1]" in help_text.stdout and "[default: 0-3]" in help_text.stdout


def test_pick_device(monkeypatch):
    assert cli.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="--device must be auto, cpu, mps, cuda or cuda:N, not 'gpu'"):
        cli.pick_device("gpu")
    with pytest.raises(InputError, match="--device must be"):
        cli.pick_device("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert cli.pick_device("auto") == cli.pick_device(None) == torch.device("cpu")
    with pytest.raises(InputError, match="--device=cuda: this PyTorch .* sees no CUDA GPU"):
        cli.pick_device("cuda")
    with pytest.raises(InputError, match="--device=mps"):
        cli.pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert cli.pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.pick_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.pick_device("cuda") == torch.device("cuda", 1) and cli.pick_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(InputError, match="--device=cuda:2: this machine has 2 GPU"):
        cli.pick_device("cuda:2")


def test_check_outdir_and_outfile(tmp_path):
    assert cli.check_outdir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == [], "a check must leave nothing behind"
    file = tmp_path / "file"
    file.write_text("x")
    for path in (file, file / "below"):
        with pytest.raises(InputError, match="--outdir=.*is not a folder"):
            cli.check_outdir(path)
    with pytest.raises(InputError, match="--outdir=/proc.*cannot write"):
        cli.check_outdir("/proc/run") if Path("/proc/self").exists() else pytest.skip("no /proc")
    assert cli.check_outfile(tmp_path / "new" / "x.zip", "--dest", overwrite=False).name == "x.zip"
    assert cli.check_outfile(file, "--dest") == file
    with pytest.raises(InputError, match="--dest=.* exists already"):
        cli.check_outfile(file, "--dest", overwrite=False)
    with pytest.raises(InputError, match="--dest=.* is a folder"):
        cli.check_outfile(tmp_path, "--dest")


def test_plain_progress_goes_to_stderr_in_lines(capsys):
    with terminal.progress(10, "sampling", "img", every=0) as bar:
        bar.update(4)
        bar.note("loss 3")
        bar.update(6)
    with terminal.progress(2, "silent", enabled=False, every=0) as bar:
        bar.update(2)
    with terminal.progress(None, "reading", "B", every=0) as bar:
        bar.update(3)
    with terminal.progress(2, "what is quick is not worth a line") as bar:
        bar.update(2)
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert output.out == "" and len(lines) == 3
    assert lines[0].startswith("sampling: 4/10 img (40%), ")
    assert lines[1].startswith("sampling: 10/10 img (100%), ") and lines[1].endswith("loss 3")
    assert lines[2].startswith("reading: 3 B, ")


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with terminal.progress(3, "sampling", "img") as bar:
        bar.update(3)
    assert "sampling: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("seconds, text", [(8.4, "8s"), (125, "2m 05s"), (11220, "3h 07m"), (187200, "2d 04h")])
def test_format_time(seconds, text):
    assert terminal.format_time(seconds) == text


def test_results_are_strict_json(capsys):
    terminal.print_result(
        {
            "fid": 2.123456789,
            "small": 1.23456789e-7,
            "time": 1700000000.123,
            "nan": math.nan,
            "inf": np.float32("inf"),
            "count": np.int64(5),
            "flag": True,
            "pair": (torch.tensor(0.5), np.array([1.0, 2.0])),
            "path": Path("a/b"),
            "none": None,
        }
    )
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and text.endswith("\n")
    assert json.loads(text) == {
        "fid": 2.12346,
        "small": 1.23457e-7,
        "time": 1700000000,
        "nan": None,
        "inf": None,
        "count": 5,
        "flag": True,
        "pair": [0.5, [1, 2]],
        "path": "a/b",
        "none": None,
    }


def test_table(capsys):
    terminal.table([["before", 6.5, None], ["after a while", 12.25, "*"]], ["step", "FID", ""])
    assert capsys.readouterr().out.splitlines() == [
        "step             FID",
        "-------------  -----  -",
        "before           6.5",
        "after a while  12.25  *",
    ]


def test_settings_are_spelled_as_options():
    """Below the commands a message says batch_gpu=3 or `batch_gpu`, as a user of the library writes it."""

    @cli.command()
    @click.option("--batch", default=1)
    @click.option("--batch-gpu", default=1)
    @click.option("--class", "label", default=1)
    def tool(**_):
        pass

    for text, wanted in {
        "batch=6 is not a multiple of batch_gpu=4": "--batch=6 is not a multiple of --batch-gpu=4",
        "`batch_gpu` is needed": "--batch-gpu is needed",
        "it needs `batch_gpu=2`, not `something`": "it needs --batch-gpu=2, not something",
        "label=12 is no class": "--class=12 is no class",
        "--batch=3 and path/batch=3 and img_batch=3": "--batch=3 and path/batch=3 and img_batch=3",
    }.items():
        assert cli.spell(text, tool) == wanted


def test_sub_commands_have_the_same_errors_and_help():
    @cli.group()
    def tool():
        pass

    @tool.command()
    @click.option("--batch", type=cli.POSITIVE_INT, default=64, help="Images.")
    def work(batch):
        raise InputError("--data is missing")

    for arguments, message in [
        (["work"], "--data is missing"),
        (["work", "--batch=0"], "Invalid value for '--batch'"),
        (["x"], "'x'"),
    ]:
        result = CliRunner().invoke(tool, arguments)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert "[default: 64; x>=1]" in CliRunner().invoke(tool, ["work", "--help"]).stdout
