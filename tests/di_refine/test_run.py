"""Run directories and the loop around a trainer: numbering, logs, which snapshots stay, when what is measured."""

import json
import threading

import pytest
import torch

from di_refine.errors import InputError, RunError
from di_refine.run import Loop, RunDirectory, Schedule, find_run_to_resume
from torch_utils import persistence


class CountingTrainer:
    """Counts images, four a step; its loss is the number of images seen before the step."""

    def __init__(self, bad_at=None):
        self.nimg, self.bad_at = 0, bad_at

    def step(self):
        self.nimg += 4
        return {"loss": torch.tensor(float(self.nimg - 4))}

    def check_finite(self, last_good):
        if self.bad_at is not None and self.nimg >= self.bad_at:
            raise RunError(f"not finite; last good snapshot: {last_good}")

    def state_dict(self):
        return {"nimg": self.nimg}

    def load_state_dict(self, state):
        self.nimg = state["nimg"]


def make_loop(path, total=4000, tick=1000, snap=1, scores=None, trainer=None, **arguments):
    """A loop whose metric runs through `scores`."""
    run = RunDirectory.create(path, "test", {"a": 1})
    scores = iter(scores or [])
    return Loop(
        run,
        trainer or CountingTrainer(),
        Schedule(total, tick, snap, **arguments),
        networks=lambda: {"G_ema": None, "training_set_kwargs": {}},
        evaluate=lambda: {"fd": next(scores)},
        status={"loss": "loss"},
    )


def names(run, pattern):
    return sorted(path.name for path in run.path.glob(pattern))


def stats(run):
    return [json.loads(line) for line in (run.path / "stats.jsonl").read_text().splitlines()]


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


def test_the_best_and_the_last_snapshot_stay(tmp_path):
    loop = make_loop(tmp_path, scores=[1, 9, 3, 7, 8])
    loop()
    assert names(loop.run, "*.pkl") == ["network-snapshot-000002.pkl", "network-snapshot-000004.pkl"]
    assert names(loop.run, "*.pt") == ["training-state-000004.pt"]
    assert (loop.first.nimg, loop.best.nimg, loop.last.nimg) == (0, 2000, 4000)
    assert loop.best.results == {"fd": 3}, "the untouched network is no candidate"


def test_higher_may_be_better(tmp_path):
    loop = make_loop(tmp_path, scores=[1, 9, 3, 7, 8])
    loop._higher = True
    loop()
    assert loop.best.nimg == 1000


def test_snapshots_every_so_many_ticks_and_at_the_end(tmp_path):
    loop = make_loop(tmp_path, total=5000, snap=3, scores=[5, 4, 3])
    loop()
    assert [record["kimg"] for record in stats(loop.run) if "fd" in record] == [0, 3, 5]


def test_nothing_is_measured_while_nothing_changes(tmp_path):
    loop = make_loop(tmp_path, total=5000, quiet=2000, scores=[5, 4, 3, 2])
    loop()
    assert [record["kimg"] for record in stats(loop.run) if "fd" in record] == [0, 3, 4, 5]
    assert loop.train_images == 3000


def test_stop_by_the_clock_saves(tmp_path):
    loop = make_loop(tmp_path, total=10**9, tick=10**9, max_seconds=0.05, scores=[5, 4])
    loop()
    assert 0 < loop.last.nimg < 10**9 and loop.last.path.is_file()


def test_resume_goes_on_where_it_was(tmp_path):
    first = make_loop(tmp_path, total=2000, scores=[5, 2, 3])
    first()
    run, state = find_run_to_resume(first.run.path)
    second = make_loop(tmp_path / "other", total=4000, scores=[4, 6])
    second.run = run
    second.resume(state)
    second()
    assert [record["kimg"] for record in stats(run)] == [0, 1, 2, 3, 4]
    assert (second.first.results, second.best.nimg, second.last.nimg) == ({"fd": 5}, 1000, 4000)
    assert names(run, "*.pkl") == ["network-snapshot-000001.pkl", "network-snapshot-000004.pkl"]


def test_a_non_finite_step_keeps_the_last_good_snapshot(tmp_path):
    loop = make_loop(tmp_path, scores=[5, 4, 3], trainer=CountingTrainer(bad_at=3000))
    with pytest.raises(RunError, match=r"last good snapshot: .*network-snapshot-000002\.pkl"):
        loop()
    assert persistence.load(loop.run.path / "network-snapshot-000002.pkl") == {"G_ema": None, "training_set_kwargs": {}}
    assert names(loop.run, "*.pt") == ["training-state-000002.pt"]


@pytest.mark.parametrize("content", [b"", b"not a state", None])
def test_a_broken_state_is_named(tmp_path, content):
    loop = make_loop(tmp_path, total=1000, scores=[5, 4])
    loop()
    state = loop.run.newest_state()
    state.write_bytes(state.read_bytes()[:200] if content is None else content)
    with pytest.raises(InputError, match=r"--resume: .*training-state-000001\.pt cannot be continued from"):
        loop.resume(state)


def test_what_cannot_be_resumed(tmp_path):
    run = RunDirectory.create(tmp_path, "empty", {})
    with pytest.raises(InputError, match="no training-state"):
        find_run_to_resume(run.path)
    with pytest.raises(InputError, match="not a run directory"):
        find_run_to_resume(tmp_path / "nowhere")
