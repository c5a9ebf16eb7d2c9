"""Which run directory a command continues, with which options, and that only one process writes there."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from di_refine.errors import InputError
from di_refine.runs import checkpoint
from di_refine.runs.config import LoopConfig, RunConfig
from di_refine.runs.directory import RunDirectory, open_run
from torch_utils.settings import may_change

OPTIONS = {"command": "edm", "kimg": 36, "lr": 1e-3, "seed": 0, "outdir": "runs", "mult": (1, 2), "data": None}
MAY_CHANGE = may_change(LoopConfig, RunConfig) | {"lr"}
ROOT = Path(__file__).resolve().parents[3]


def start(outdir, kimg=None, description="toy", **changes):
    """A run directory as a finished process leaves it."""
    run, state = open_run(outdir, None, description, {**OPTIONS, **changes}, MAY_CHANGE)
    assert state is None
    if kimg:
        checkpoint.save(run.files.state(kimg * 1000), {})
    run.close()
    return run.path


def opened(*arguments, **changes):
    run, state = open_run(*arguments, "toy", {**OPTIONS, **changes}, MAY_CHANGE)
    run.close()
    return run.path, state and state.name


def test_a_new_run_is_made_by_default(tmp_path):
    assert start(tmp_path, 1).name == "00000-toy" and start(tmp_path, 1).name == "00001-toy"
    assert json.loads((tmp_path / "00001-toy/training_options.json").read_text())["mult"] == [1, 2]


def test_outdir_may_be_a_run_directory(tmp_path):
    path = start(tmp_path, 3)
    assert opened(path, None) == (path, "training-state-000003.pt")
    assert opened(path, "auto") == (path, "training-state-000003.pt")
    assert opened(start(tmp_path), None) == (tmp_path / "00001-toy", None), "nothing saved yet: from the beginning"


def test_auto_continues_the_newest_run_that_fits(tmp_path):
    assert opened(tmp_path / "new", "auto") == (tmp_path / "new/00000-toy", None)
    start(tmp_path, 1)
    start(tmp_path, 2)
    start(tmp_path, 3, description="toy-other")
    start(tmp_path, 4, command="stylegan2")
    (tmp_path / "00009-toy").mkdir()  # killed before it wrote its options
    assert opened(tmp_path, "auto") == (tmp_path / "00001-toy", "training-state-000002.pt")
    run, state = open_run(tmp_path, "auto", "third", OPTIONS, MAY_CHANGE)
    assert (run.path.name, state) == ("00010-third", None)


def test_a_run_or_a_state_can_be_named(tmp_path):
    path = start(tmp_path, 3)
    checkpoint.save(path / "training-state-000001.pt", {})
    assert opened("elsewhere", path) == (path, "training-state-000003.pt")
    assert opened("elsewhere", path / "training-state-000001.pt") == (path, "training-state-000001.pt")
    for wrong, words in [(tmp_path / "nowhere", "neither a run directory"), (start(tmp_path), "has no training state")]:
        with pytest.raises(InputError, match=words):
            opened("elsewhere", wrong)


def test_changed_options_are_listed_and_recorded(tmp_path, capsys):
    path = start(tmp_path, 1)
    opened(path, None, kimg=72, lr=1e-4, outdir=str(path), new_option=3)
    assert capsys.readouterr().err.splitlines() == ["kimg: 36 -> 72", "lr: 0.001 -> 0.0001"]
    assert (path / "log.txt").read_text().splitlines() == ["kimg: 36 -> 72", "lr: 0.001 -> 0.0001"]
    recorded = json.loads((path / "training_options.json").read_text())
    assert recorded == {**OPTIONS, "kimg": 72, "lr": 1e-4, "mult": [1, 2]}
    opened(path, None, kimg=72, lr=1e-4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1, "kimg": 72}, "was started with seed=0 and cannot be continued with seed=1; give the old value"),
        ({"mult": (1, 2, 2)}, r"with mult=\[1, 2\] and cannot be continued with mult=\[1, 2, 2\]"),
        ({"data": "photos.zip"}, "was started without `data` and cannot be continued with data=photos.zip; give"),
        ({"command": "stylegan2"}, "is a run of 'edm' and cannot be continued by 'stylegan2'"),
    ],
)
def test_other_options_are_refused(tmp_path, changes, words):
    path = start(tmp_path, 1)
    before = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    with pytest.raises(InputError, match=words):
        opened(path, None, **changes)
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == before
    run, _ = open_run(path, None, "toy", {**OPTIONS, "seed": 1}, may_change={"seed"})
    run.close()


def test_a_damaged_state_is_said_and_passed_over(tmp_path, capsys):
    path = start(tmp_path, 1)
    checkpoint.save(path / "training-state-000002.pt", {})
    (path / "training-state-000002.pt").write_bytes(b"cut short")
    assert opened(path, None) == (path, "training-state-000001.pt")
    said = (
        "training-state-000002.pt is damaged (it is no archive, or one that was cut short or altered); going back to "
    )
    assert f"{said}training-state-000001.pt" in capsys.readouterr().err and said in (path / "log.txt").read_text()


def test_one_process_at_a_time(tmp_path):
    path = start(tmp_path, 1)
    script = f"""
import sys, time
from di_refine.runs.config import LoopConfig, RunConfig
from di_refine.runs.directory import RunDirectory, open_run
run = RunDirectory({str(path)!r})
run.lock()
print("locked", flush=True)
time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=f"{path} is in use: .*, or name another `outdir`"):
            opened(path, None)
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    opened(path, None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked on POSIX systems alone")
def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    run = RunDirectory(start(tmp_path))
    run.lock()
    context = multiprocessing.get_context("fork")
    started, end = context.Event(), context.Event()
    worker = context.Process(target=lambda: (started.set(), end.wait(60)))
    worker.start()
    try:
        assert started.wait(30)
        with pytest.raises(InputError, match="in use"):
            RunDirectory(run.path).lock()
        run.close()
        opened(run.path, None)
    finally:
        end.set()
        worker.join()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rewind_repairs_the_logs(tmp_path):
    path = start(tmp_path, 2)
    checkpoint.save(path / "training-state-000003.pt", {})
    stats, metric = path / "stats.jsonl", path / "metric-fd@toy.jsonl"
    stats.write_text("".join(f'{{"kimg": {kimg}}}\n' for kimg in (0, 1.5, 2.0, 2.5)) + '{"kimg": 3.0, "lo')
    with open(stats, "a") as file:
        file.write('\n{"kimg": Infinity}\n{"kimg": "1"}\n[]\n')
    snapshots = ["null", '"network-snapshot-000002.pkl"', '"network-snapshot-000003.pkl"']
    metric.write_text("".join(f'{{"snapshot_pkl": {name}}}\n' for name in snapshots) + '{"resu')
    (path / "log.txt").write_text("tick 3 of a li")
    (path / ".training-state-000003.pt.abcd1234.tmp").write_bytes(b"half")
    run = RunDirectory(path)
    run.rewind(2000)
    run.log("next")
    run.append_stats({"kimg": 3.0, "loss": float("nan"), "by_sigma": [1.0, float("inf")]})
    assert [record["kimg"] for record in lines(stats)] == [0, 1.5, 2.0, 3.0]
    assert lines(stats)[-1] == {"kimg": 3.0, "loss": None, "by_sigma": [1.0, None]}
    assert [record["snapshot_pkl"] for record in lines(metric)] == [None, "network-snapshot-000002.pkl"]
    log = (path / "log.txt").read_text().splitlines()
    assert log[-1] == "next" and "tick 3 of a li" in log[0]
    assert sorted(entry.name for entry in path.glob("*training-state*")) == [
        "training-state-000002.pt",
        "training-state-000003.pt.old",
    ]


def test_a_line_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    run = RunDirectory(start(tmp_path))
    run.append_stats({"kimg": 0})
    write = os.write
    monkeypatch.setattr("os.write", lambda handle, data: write(handle, data[:5]))
    with pytest.raises(RuntimeError, match=r"stats\.jsonl could not be written \(No space left on device\)"):
        run.append_stats({"kimg": 1})
    monkeypatch.undo()
    assert lines(run.path / "stats.jsonl") == [{"kimg": 0}]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders here")
@pytest.mark.parametrize("name", ["log.txt", "stats.jsonl"])
def test_nothing_is_written_through_links_and_pipes(tmp_path, name):
    path = start(tmp_path)
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match=f"{name} is a symbolic link, which is not followed; remove it"):
        write(path)
    assert not (tmp_path / "victim").exists()
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(InputError, match=f"{name} is not a regular file; remove it"):
        write(path)


def write(path):
    run = RunDirectory(path)
    run.lock()
    try:
        run.append_stats({"kimg": 0})
    finally:
        run.close()


def test_no_password_is_recorded(tmp_path):
    options = {"command": "refine", "network": "https://me:secret@host/x.pkl"}
    run, _ = open_run(tmp_path, None, "x", options, [])
    run.close()
    assert "secret" not in run.files.options.read_text() and "https://***@host/x.pkl" in run.files.options.read_text()
    again, _ = open_run(run.path, None, "x", options, [])  # compares like with like
    again.close()


@pytest.mark.parametrize("recorded", [{"sources": "abc"}, {"sources": ["a"]}, {"minutes": "1"}, {"kimg": [1]}])
def test_recorded_options_of_other_kinds_are_refused(tmp_path, recorded):
    (tmp_path / "training_options.json").write_text(json.dumps({"command": "refine", **recorded}))
    with pytest.raises(InputError, match=r"training_options\.json is damaged: its \w+ is none; restore it"):
        open_run(tmp_path, None, "x", {"command": "refine"}, [])
