"""Run directories and the loop around a trainer: numbering, logs, which files stay, when what is measured, and that a
run that was stopped or killed goes on as if nothing had happened.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
import ranks
import torch
from PIL import Image

from di_refine import terminal
from di_refine.errors import InputError, RunError
from di_refine.files import datasets
from di_refine.runs import checkpoint, stopping
from di_refine.runs.config import LoopConfig
from di_refine.runs.directory import RunDirectory, find_run_to_resume, open_run
from di_refine.runs.loop import Loop, measure
from torch_utils import distributed, persistence


class CountingTrainer:
    """Counts images, four a step; its loss is the number of images seen before the step.

    Calls `events[nimg]` in the step that begins at `nimg` images.
    """

    def __init__(self, bad_at=None, events=None):
        self.nimg, self.bad_at, self.events, self.by_sigma = 0, bad_at, events or {}, {}

    def step(self):
        self.events.get(self.nimg, lambda: None)()
        self.nimg += 4
        seen = self.nimg - 4
        levels = [seen, float("nan") if seen % 8 else seen, float("nan")]
        self.by_sigma = {"loss_by_sigma": torch.tensor(levels)}
        report = {"loss": torch.tensor(float(seen))}
        return {**report, "rare": 7.0} if seen % 400 == 0 else report

    def check_finite(self, last_good):
        if self.bad_at is not None and self.nimg >= self.bad_at:
            raise RunError(f"not finite; last good snapshot: {last_good}")

    def state_dict(self):
        return {"nimg": self.nimg}

    def load_state_dict(self, state):
        self.nimg = state["nimg"]


def make_loop(
    path, total=4000, tick=1000, snap=1, scores=None, trainer=None, run=None, higher=False, warmup=0, **settings
):
    """A loop whose metric runs through `scores`, or is a function of them and the images seen."""
    run = run or RunDirectory.create(path, "test", {"a": 1})
    trainer = trainer or CountingTrainer()
    values = scores if callable(scores) else iter(scores or [])
    return Loop(
        run,
        trainer,
        LoopConfig(kimg=total / 1000, tick=tick / 1000, snap=snap, **settings),
        networks=lambda: {"G_ema": None, "training_set_kwargs": {"nimg": trainer.nimg}},
        evaluate=lambda: {"fd": values(trainer.nimg) if callable(values) else next(values)},
        higher_is_better=higher,
        status={"loss": "loss"},
        warmup=warmup,
    )


def drawing(names):
    """Draws a small picture into a file, and notes the file's name."""

    def draw(path):
        names.append(path.name)
        Image.new("RGB", (3000, 6), (len(names), 0, 0)).save(path, format="PNG")

    return draw


def falling(nimg):
    """A metric that depends on the images seen alone."""
    return 10 - nimg / 1000


def again(loop, **arguments):
    """A new process's loop on the same run, continued from its newest state."""
    loop.run.close()
    run, state = find_run_to_resume(loop.run.path)
    loop = make_loop(None, run=run, **arguments)
    loop.resume(state)
    return loop


def send(number):
    return lambda: os.kill(os.getpid(), number)


def names(run, pattern):
    return sorted(path.name for path in run.path.glob(pattern))


def stats(run):
    return [json.loads(line) for line in (run.path / "stats.jsonl").read_text().splitlines()]


def timeless(run):
    """The ticks without what differs from one time to another."""
    own = ("timestamp", "images_per_sec", "cpu_memory_gb", "gpu_memory_gb", "data_wait_sec")
    return [{name: value for name, value in record.items() if name not in own} for record in stats(run)]


def test_runs_are_numbered(tmp_path):
    (tmp_path / "00007-old").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert RunDirectory.create(tmp_path, "a", {}).path.name == "00008-a"
    assert RunDirectory.create(tmp_path, "b", {"lr": 1}).path.name == "00009-b"
    assert json.loads((tmp_path / "00009-b/training_options.json").read_text()) == {"lr": 1}


def test_runs_that_start_together_get_their_own_folder(tmp_path):
    threads = [threading.Thread(target=RunDirectory.create, args=(tmp_path, "same", {})) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"{i:05d}-same" for i in range(8)]


def test_ticks_average_the_steps_between(tmp_path):
    loop = make_loop(tmp_path, scores=[5, 4, 3, 2, 1])
    loop()
    records = stats(loop.run)
    assert [record["kimg"] for record in records] == [0, 1, 2, 3, 4]
    assert "loss" not in records[0]
    assert records[1]["loss"] == 498 and records[4]["loss"] == 3498  # means of 0..996 and 3000..3996
    assert [record["fd"] for record in records] == [5, 4, 3, 2, 1]
    assert "kimg 4.000" in (loop.run.path / "log.txt").read_text().splitlines()[-1]


def test_vectors_and_rare_values_are_averaged_over_the_steps_that_have_them(tmp_path):
    loop = make_loop(tmp_path, total=1000, scores=[1, 1])
    loop()
    _, record = stats(loop.run)
    assert record["loss_by_sigma"] == [498, 496, None]  # of 0..996 in fours; in eights; never
    assert record["rare"] == 7
    assert record["images_per_sec"] > 0 and 0.05 < record["cpu_memory_gb"] < 50


def test_the_wait_for_data_is_logged_where_it_is_known(tmp_path):
    loop = make_loop(tmp_path, total=2000, scores=[1, 1, 1])
    loop._data_wait = lambda: loop.trainer.nimg / 100
    loop()
    assert [record["data_wait_sec"] for record in stats(loop.run)] == [0, 10, 10]


def test_the_newest_and_the_best_stay(tmp_path):
    loop = make_loop(tmp_path, total=6000, scores=[1, 9, 3, 7, 8, 8, 8], keep=1)
    loop()
    assert names(loop.run, "*.pkl") == ["network-snapshot-000002.pkl", "network-snapshot-000006.pkl"]
    assert names(loop.run, "*.pt") == ["training-state-000006.pt"]
    assert (loop.first.nimg, loop.best.nimg, loop.last.nimg) == (0, 2000, 6000)
    assert loop.best.results == {"fd": 3}, "the untouched network is no candidate"
    loop = make_loop(tmp_path, total=6000, scores=[1, 9, 3, 7, 8, 8, 8], keep=3)
    loop()
    assert names(loop.run, "*.pkl") == [f"network-snapshot-{kimg:06d}.pkl" for kimg in (2, 4, 5, 6)]
    assert names(loop.run, "*.pt") == [f"training-state-{kimg:06d}.pt" for kimg in (4, 5, 6)]


def test_every_tick_leaves_a_state_also_between_snapshots(tmp_path):
    loop = make_loop(tmp_path, total=5000, snap=3, warmup=2000, scores=[5, 4, 3], trainer=CountingTrainer(bad_at=2500))
    with pytest.raises(RunError):
        loop()
    assert names(loop.run, "*.pt") == ["training-state-000001.pt", "training-state-000002.pt"]
    assert names(loop.run, "*.pkl") == []


def test_higher_may_be_better(tmp_path):
    loop = make_loop(tmp_path, scores=[1, 9, 3, 7, 8], higher=True)
    loop()
    assert loop.best.nimg == 1000


def test_anything_is_better_than_nan(tmp_path):
    loop = make_loop(tmp_path, scores=[1, float("nan"), 9, 9, 9])
    loop()
    assert loop.best.nimg == 2000


def test_snapshots_every_so_many_ticks_and_at_the_end(tmp_path):
    loop = make_loop(tmp_path, total=5000, snap=3, scores=[5, 4, 3])
    loop()
    assert [record["kimg"] for record in stats(loop.run) if "fd" in record] == [0, 3, 5]


def test_nothing_is_measured_while_nothing_changes(tmp_path):
    loop = make_loop(tmp_path, total=5000, warmup=2000, scores=[5, 4, 3, 2])
    loop()
    assert [record["kimg"] for record in stats(loop.run) if "fd" in record] == [0, 3, 4, 5]
    assert loop.train_images == 3000


def test_a_non_finite_step_keeps_the_last_good_snapshot(tmp_path):
    loop = make_loop(tmp_path, scores=[5, 4, 3], trainer=CountingTrainer(bad_at=3000))
    with pytest.raises(RunError, match=r"last good snapshot: .*network-snapshot-000002\.pkl"):
        loop()
    saved = persistence.load(loop.run.path / "network-snapshot-000002.pkl")
    assert saved == {"G_ema": None, "training_set_kwargs": {"nimg": 2000}}
    assert loop.run.newest_state().name == "training-state-000002.pt"


# ----------------------------------------------------------------------------------------------------------------------
# Stop and go on


def test_a_finished_run_can_be_made_longer(tmp_path):
    """The end of the first part lies between two ticks; those after it come where they would have come."""
    first = make_loop(tmp_path, total=1400, scores=falling)
    first()
    second = again(first, total=4000, scores=falling)
    second()
    assert [record["kimg"] for record in stats(second.run)] == [0, 1, 1.4, 2, 3, 4]
    assert (second.first.results, second.best.nimg, second.last.nimg) == ({"fd": 10}, 4000, 4000)


def test_a_finished_run_does_nothing_when_started_again(tmp_path):
    first = make_loop(tmp_path, scores=falling)
    first()
    before = timeless(first.run)
    second = again(first, scores=[])
    second()
    assert timeless(second.run) == before and second.last == first.last and second.stopped is None
    assert second.images_per_sec == pytest.approx(first.images_per_sec)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
@pytest.mark.parametrize("at", [400, 2000, 3996])
def test_a_signal_stops_and_saves_and_the_run_goes_on_unchanged(tmp_path, name, at):
    whole = make_loop(tmp_path, scores=falling)
    whole()
    handler = signal.getsignal(getattr(signal, name))
    first = make_loop(tmp_path, scores=falling, trainer=CountingTrainer(events={at: send(getattr(signal, name))}))
    first()
    if at == 3996:  # the last step: finished anyway
        assert first.stopped is None and first.trainer.nimg == 4000
        return
    assert (first.stopped, first.trainer.nimg) == (name, at + 4), "the step is finished, no other begun"
    assert first.exit_status == (130 if name == "SIGINT" else 0)
    assert signal.getsignal(getattr(signal, name)) is handler
    assert f"stopped by {name} at {(at + 4) / 1000:.3f} kimg" in (first.run.path / "log.txt").read_text()
    if at == 400:  # the snapshot of this moment
        assert persistence.load(first.last.path)["training_set_kwargs"] == {"nimg": 404} and first.best is None
    else:  # its name is that of a snapshot that was measured
        assert persistence.load(first.last.path)["training_set_kwargs"] == {"nimg": 2000}
    second = again(first, scores=falling)
    second()
    assert timeless(second.run) == timeless(whole.run)
    assert (second.best.nimg, second.last.results) == (whole.best.nimg, whole.last.results)
    assert names(second.run, "network*") == names(whole.run, "network*")


@pytest.fixture
def python_interrupts():
    """Ctrl-C as Python begins with it; shells start background jobs with SIGINT ignored, and so perhaps these tests."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_a_second_interrupt_quits_at_once(tmp_path, capfd, python_interrupts):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    loop = make_loop(tmp_path, scores=falling, trainer=CountingTrainer(events={1200: twice}))
    with pytest.raises(KeyboardInterrupt):
        loop()
    assert loop.run.newest_state().name == "training-state-000001.pt"
    assert "SIGINT: finishing the step and saving; once more quits at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert again(loop, scores=falling).trainer.nimg == 1000, "the lock is free"


class Slow:
    """An evaluator that gets a signal in the middle."""

    def num_images(self, sampler):
        return 3

    def __call__(self, sampler, seed, progress):
        for i in range(3):
            if i == 1:
                sampler()
            progress(1)
        return []


def test_measuring_is_given_up_for_a_signal_and_done_again(tmp_path):
    loop = make_loop(tmp_path, scores=falling)
    calls = []

    def evaluate():
        calls.append(loop.trainer.nimg)
        measure(Slow(), send(signal.SIGTERM) if loop.trainer.nimg == 2000 else lambda: None, 0, loop.run, None)
        return {"fd": 1.0}

    loop._evaluate = evaluate
    loop()
    assert loop.stopped == "SIGTERM" and calls == [0, 1000, 2000] and loop.trainer.nimg == 2000
    assert [record["kimg"] for record in stats(loop.run)] == [0, 1]
    second = again(loop, scores=falling)
    second()
    assert [record.get("fd") for record in stats(second.run)] == [1, 1, 8, 7, 6]
    assert stats(second.run)[2]["loss"] == 1498, "with the whole tick's mean"


def test_the_speed_is_known_also_where_all_is_warm_up(tmp_path):
    loop = make_loop(tmp_path, scores=falling, warmup=10**6)
    loop()
    assert loop.train_images == 0 and loop.images_per_sec > 0


def test_progress_begins_where_the_run_goes_on(tmp_path, monkeypatch):
    seen = []
    real = terminal.progress

    def progress(total, desc, *args, **settings):
        seen.append((desc, settings["done"], settings["max_seconds"]))
        return real(total, desc, *args, **settings)

    monkeypatch.setattr(terminal, "progress", progress)
    first = make_loop(tmp_path, scores=falling, trainer=CountingTrainer(events={2000: send(signal.SIGTERM)}))
    first()
    again(first, scores=falling, max_minutes=3)()
    assert seen == [("training", 0, None), ("training", 2004, 180)]


def test_an_untrained_network_is_neither_measured_nor_drawn(tmp_path):
    """The comparison of `stop_if_worse` is then with the first that was measured."""
    drawn = []
    loop = make_loop(tmp_path, scores=[1.0, 2.0, 3.0, 4.0], stop_if_worse=2.5)
    loop._untrained, loop._picture = True, drawing(drawn)
    loop()
    assert [record.get("fd") for record in stats(loop.run)] == [None, 1, 2, 3]
    assert loop.first.nimg == 1000 and loop.stopped == "stop_if_worse"
    assert drawn == ["fakes000001.png", "fakes000002.png", "fakes000003.png"]


def test_there_is_a_picture_soon(tmp_path):
    """At the first tick after the warm-up, whenever the first snapshot comes."""
    drawn = []
    loop = make_loop(tmp_path, total=8000, snap=4, warmup=1500, scores=falling)
    loop._picture = drawing(drawn)
    loop()
    assert drawn == ["fakes_init.png", "fakes000002.png", "fakes000004.png", "fakes000008.png"]
    assert [record.get("fd") for record in stats(loop.run)][:5] == [10, None, None, None, 6]


def test_stop_by_the_clock_saves(tmp_path):
    loop = make_loop(tmp_path, total=10**9, tick=10**9, max_minutes=0.05 / 60, scores=[5, 4])
    loop()
    assert 0 < loop.last.nimg < 10**9 and loop.last.path.is_file()
    assert loop.stopped == "max_minutes" and loop.exit_status == 0


@pytest.mark.parametrize("jump", [1e6, -1e6])
def test_a_jump_of_the_clock_does_not_matter(tmp_path, monkeypatch, jump):
    real = time.time
    loop = make_loop(tmp_path, scores=falling, max_minutes=100 / 60)
    loop.trainer.events[2000] = lambda: monkeypatch.setattr(time, "time", lambda: real() + jump)
    loop()
    assert loop.stopped is None and loop.trainer.nimg == 4000
    assert 0 < loop.train_seconds < 100 and all(record["images_per_sec"] > 0 for record in stats(loop.run)[1:])
    assert abs(stats(loop.run)[-1]["timestamp"] - real() - jump) < 100


@pytest.mark.parametrize(
    ("scores", "higher", "end"),
    [
        ([10, 9, 14.9, 15.1], False, 3000),
        ([10, 15, 15, 15, 15], False, None),
        ([10, float("nan")], False, 1000),
        ([9, 8, 6.1, 5.9], True, 3000),
        ([9, 20, 30, 40, 50], True, None),
        ([-0.1, 1, 2, 3, 4], False, None),  # no multiple of a negative distance means anything
    ],
)
def test_a_metric_that_gets_much_worse_stops_the_run(tmp_path, scores, higher, end):
    loop = make_loop(tmp_path, scores=scores, higher=higher, stop_if_worse=1.5)
    loop()
    assert loop.stopped == ("stop_if_worse" if end else None) and loop.trainer.nimg == (end or 4000)
    assert loop.exit_status == 0 and loop.best.path.is_file()
    assert loop.run.newest_state().name == f"training-state-{(end or 4000) // 1000:06d}.pt"


def test_no_guard_where_nothing_is_asked_for(tmp_path):
    loop = make_loop(tmp_path, scores=[1, 100, 1000, 1000, 1000])
    loop()
    assert loop.stopped is None


# ----------------------------------------------------------------------------------------------------------------------
# Faults


def in_a_process_that_is_killed(function):
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(("at", "found"), [(500, None), (1500, 1), (3500, 3)])
def test_a_killed_run_loses_a_tick_at_most(tmp_path, at, found):
    """Killed inside a step; the last tick is torn, and lacks a snapshot that was begun."""
    whole = make_loop(tmp_path, scores=falling)
    whole()
    dying = CountingTrainer(events={at: send(signal.SIGKILL)})
    in_a_process_that_is_killed(lambda: make_loop(tmp_path, scores=falling, trainer=dying)())
    path = tmp_path / "00001-test"
    with open(path / "stats.jsonl", "a") as file:
        file.write('{"kimg": 3.7, "lo')
    run, state = RunDirectory(path), checkpoint.newest_intact(path)
    assert (state and state.name) == (found and f"training-state-{found:06d}.pt")
    loop = make_loop(None, run=run, scores=falling)
    if state:
        loop.resume(state)
    loop()
    assert timeless(run) == timeless(whole.run) and names(run, "network*") == names(whole.run, "network*")


def test_a_kill_while_the_state_is_written(tmp_path, monkeypatch):
    whole = make_loop(tmp_path, scores=falling)
    whole()
    save = checkpoint.save

    def die(path, state):
        if "000003" in path.name:
            os.kill(os.getpid(), signal.SIGKILL)
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", die)
    in_a_process_that_is_killed(make_loop(tmp_path, scores=falling))
    monkeypatch.undo()
    run, state = find_run_to_resume(tmp_path / "00001-test")
    assert state.name == "training-state-000002.pt" and len(stats(run)) == 4, "the line comes before the state"
    loop = make_loop(None, run=run, scores=falling)
    loop.resume(state)
    loop()
    assert timeless(run) == timeless(whole.run)


def test_a_damaged_newest_state_falls_back_with_its_best(tmp_path, capsys):
    scores = {0: 9, 1000: 1, 2000: 2, 3000: 0.5, 4000: 3}
    loop = make_loop(tmp_path, total=3000, scores=scores.get)
    loop()
    newest = loop.run.newest_state()
    newest.write_bytes(newest.read_bytes()[:-200])
    second = again(loop, scores=scores.get)
    assert "training-state-000003.pt is damaged" in capsys.readouterr().err
    assert (second.trainer.nimg, second.best.nimg) == (2000, 1000) and second.best.path.is_file()
    second()
    assert second.best.nimg == 3000
    assert names(second.run, "*state*") == [
        "training-state-000003.pt",
        "training-state-000003.pt.old",
        "training-state-000004.pt",
    ]


def test_a_best_snapshot_that_was_deleted_is_said(tmp_path, capsys):
    loop = make_loop(tmp_path, total=2000, scores=[9, 1, 2])
    loop()
    loop.best.path.unlink()
    second = again(loop, total=3000, scores=[5])
    assert "network-snapshot-000001.pkl is missing" in capsys.readouterr().err
    second()
    assert second.best.nimg == 3000


@pytest.mark.parametrize("failing", ["training-state-000003.pt", "network-snapshot-000003.pkl", "stats.jsonl"])
def test_a_full_disk_ends_the_run_with_the_last_good_state(tmp_path, monkeypatch, failing):
    real, opened = tempfile.mkstemp, os.open
    loop = make_loop(tmp_path, scores=falling)

    def full(*args, **kwargs):
        if failing in (kwargs.get("prefix") or ""):
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    def full_log(path, *args, **kwargs):
        if str(path).endswith(failing) and loop.trainer.nimg == 3000:
            raise OSError(28, "No space left on device")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr("tempfile.mkstemp", full)
    monkeypatch.setattr("os.open", full_log)
    with pytest.raises(RunError, match=rf"{failing} could not be written \(No space.*\); free some space, then repeat"):
        loop()
    monkeypatch.undo()
    assert not [entry for entry in loop.run.path.iterdir() if entry.name.endswith(".tmp")]
    second = again(loop, scores=falling)
    assert second.trainer.nimg == 2000
    second()
    assert [record["kimg"] for record in stats(second.run)] == [0, 1, 2, 3, 4]


def test_a_broken_state_is_named(tmp_path):
    loop = make_loop(tmp_path, total=1000, scores=[5, 4])
    loop()
    state = loop.run.newest_state()
    for content in (b"", b"not a state", state.read_bytes()[:200]):
        state.write_bytes(content)
        with pytest.raises(InputError, match=r"training-state-000001\.pt is damaged"):
            loop.resume(state)
    checkpoint.save(state, {"trainer": {"nimg": 4}})
    with pytest.raises(InputError, match=r"resume=.*training-state-000001\.pt cannot be continued from"):
        loop.resume(state)


def test_a_state_of_another_layout_is_refused_in_one_sentence(tmp_path):
    """Such as one that holds names of files."""
    loop = make_loop(tmp_path, total=1000, scores=[5, 4])
    loop()
    path = loop.run.newest_state()
    state = checkpoint.load(path)
    state["loop"]["files"] = ["network-snapshot-000001.pkl", "../../elsewhere.pkl"]
    checkpoint.save(path, state)
    with pytest.raises(InputError, match=r"^resume=.*000001\.pt cannot be continued from: another version .* new run$"):
        again(loop, scores=[5])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("saved", ["../../elsewhere.pkl"]),
        ("saved", 3),
        ("bests", [1.5]),
        ("bests", [-1]),
        ("best", [10**30, {}]),
        ("first", [0, ["fd"]]),
        ("last", [4, {"fd": "small"}]),
        ("ticks", True),
        ("next_tick", "soon"),
        ("recorded", -2),
        ("train", [4, float("nan")]),
        ("train", [4]),
        ("tick", [4, -1.0]),
        ("means", {"sums": {"loss": "much"}, "counts": {"loss": 1}}),
        ("means", []),
    ],
)
def test_every_value_of_a_state_is_checked(tmp_path, name, value):
    """A stranger's state may hold anything; it is refused in one sentence, and no file is touched."""
    loop = make_loop(tmp_path, total=1000, scores=[5, 4])
    loop()
    path = loop.run.newest_state()
    state = checkpoint.load(path)
    state["loop"][name] = value
    checkpoint.save(path, state)
    before = sorted(entry.name for entry in loop.run.path.iterdir())
    with pytest.raises(InputError, match=r"^resume=.*000001\.pt cannot be continued from \(") as caught:
        again(loop, scores=[5])
    assert "\n" not in str(caught.value)
    assert sorted(entry.name for entry in loop.run.path.iterdir()) == before


@pytest.mark.parametrize("state", [[], {"trainer": {"nimg": 4}, "loop": 3}, {"trainer": 1, "loop": {}}, 5])
def test_a_state_that_is_something_else_is_one_sentence(tmp_path, state):
    loop = make_loop(tmp_path, total=1000, scores=[5, 4])
    loop()
    path = loop.run.newest_state()
    checkpoint.save(path, state)
    with pytest.raises(InputError, match=r"^resume=.*000001\.pt cannot be continued from"):
        again(loop, scores=[5])


def test_a_state_holds_no_names_of_files(tmp_path):
    loop = make_loop(tmp_path, scores=falling)
    loop()

    def texts(value):
        if isinstance(value, dict):
            return set(value) | {text for item in value.values() for text in texts(item)}
        return (
            {text for item in value for text in texts(item)}
            if isinstance(value, (list, tuple))
            else ({value} if isinstance(value, str) else set())
        )

    assert not [text for text in texts(checkpoint.load(loop.run.newest_state())) if "." in text or "/" in text]


def test_what_cannot_be_resumed(tmp_path):
    run = RunDirectory.create(tmp_path, "empty", {})
    with pytest.raises(InputError, match="resume=.*empty has no training state; name"):
        find_run_to_resume(run.path)
    with pytest.raises(InputError, match="resume=.*nowhere is neither a run directory nor a training state"):
        find_run_to_resume(tmp_path / "nowhere")


def test_workers_that_decode_images_outlive_the_signals(tmp_path):
    """As on a cluster, where all processes of a job get them."""
    for i in range(8):
        Image.fromarray(np.full([8, 8], i, np.uint8)).save(tmp_path / f"{i}.png")
    stream = datasets.batches(datasets.ImageDataset(tmp_path), 2, seed=0, workers=1, memory_limit=0)
    first = [next(stream)[0].flatten(1)[:, 0].tolist()]
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker.pid, number)
    time.sleep(0.1)
    rest = [next(stream)[0].flatten(1)[:, 0].tolist() for _ in range(3)]
    assert sorted(sum(first + rest, [])) == list(range(8)) and worker.is_alive()
    stream.close()


# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard


def accumulated(path):
    """What TensorBoard reads from a run directory."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the optional package tensorboard"
    )
    every = {"images": 0, "tensors": 0}  # by default few are kept
    accumulator = event_accumulator.EventAccumulator(str(path), every, purge_orphaned_data=True)
    accumulator.Reload()
    return accumulator


def events(path):
    """(name, step) -> value, as TensorBoard shows it."""
    accumulator = accumulated(path)
    found = [
        (tag, event.step, event.value) for tag in accumulator.Tags()["scalars"] for event in accumulator.Scalars(tag)
    ]
    table = {(tag, step): value for tag, step, value in found}
    assert len(table) == len(found), "a step appears twice"
    return table


def test_tensorboard_and_jsonl_agree_also_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the optional package tensorboard")

    def die():
        raise SystemError("as if killed")

    loop = make_loop(tmp_path, tick=600, scores=falling, trainer=CountingTrainer(events={3500: die}))
    with pytest.raises(SystemError):
        loop()
    os.unlink(loop.run.newest_state())
    second = again(loop, tick=600, scores=falling)
    assert second.trainer.nimg == 2400
    second()
    second.run.close()
    wanted = {}
    for record in stats(second.run):
        step = round(record.pop("kimg") * 1000)
        record.pop("timestamp")
        for name, value in record.items():
            parts = {f"{name}/{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {name: value}
            wanted.update({(part, step): np.nan if x is None else x for part, x in parts.items()})
    found = events(second.run.path)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-6, nan_ok=True), key


def test_tensorboard_has_pictures_options_and_texts(tmp_path):
    """Pictures are those of the run's files, smaller where they are large; a resumed run has no step twice."""
    pytest.importorskip("tensorboard", reason="needs the optional package tensorboard")
    drawn = []
    first = make_loop(tmp_path, scores=falling, trainer=CountingTrainer(events={2000: send(signal.SIGTERM)}))
    first.run.write_options({"lr": 0.5, "desc": None, "names": ["a|b"], "sources": {"lr": "given"}})
    first._picture = drawing(drawn)
    first()
    second = again(first, scores=falling)
    second._picture = drawing(drawn)
    second()
    second.run.text("verdict", "better", second.trainer.nimg)
    second.run.close()
    found = accumulated(second.run.path)
    images = found.Images("samples")
    assert [image.step for image in images] == [0, 1000, 2000, 3000, 4000]
    assert len(images) == len(drawn) and {(image.width, image.height) for image in images} == {(1024, 2)}
    texts = {
        tag: [text.tensor_proto.string_val[0].decode() for text in found.Tensors(tag)]
        for tag in found.Tags()["tensors"]
    }
    assert texts["verdict/text_summary"] == ["better"]
    options = texts["options/text_summary"]
    assert len(options) == 2 and "| lr | `0.5` | given |" in options[0] and "desc" not in options[0]
    assert "a\\|b" in options[0], "which does not end a cell of the table"


def test_without_tensorboard_the_rest_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    loop = make_loop(tmp_path, scores=falling)
    loop()
    assert len(stats(loop.run)) == 5 and names(loop.run, "events*") == []


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def stop_and_go_on(outdir):
    """Rank 1 alone gets a signal; then all start again. The ranks do not agree on the metric."""
    rank = distributed.rank()
    for number in (signal.SIGTERM, None):
        run, state = open_run(outdir, "auto", "test", {"command": "test"}, frozenset())
        events = {2400: send(number)} if rank == 1 and number else {}
        trainer = CountingTrainer(events=events)
        loop = make_loop(None, run=run, scores=lambda nimg: nimg + distributed.rank(), trainer=trainer)
        if state is not None:
            loop.resume(state)
        loop()
        print(json.dumps([loop.stopped, loop.trainer.nimg, loop.last.results, run.path.name]))
        run.close()


def test_two_processes_stop_together_and_one_writes(tmp_path):
    first, second = ranks.run(__file__, "stop_and_go_on", 2, tmp_path)
    assert first == second
    assert [json.loads(line) for line in first.splitlines()] == [
        ["SIGTERM", 2404, {"fd": 2000}, "00000-test"],
        [None, 4000, {"fd": 4000}, "00000-test"],
    ]
    run = RunDirectory(tmp_path / "00000-test")
    assert [(record["kimg"], record.get("loss")) for record in stats(run)] == [
        (0, None),
        (1, 498),
        (2, 1498),
        (3, 2498),
        (4, 3498),
    ]


def test_a_request_to_stop_is_none_outside_a_loop():
    stopping.check()
    with stopping.StopRequest() as request:
        assert request.reason() is None
        stopping.check()


if __name__ == "__main__":
    ranks.main(globals())
