"""The verdict on a training, in words."""

from types import SimpleNamespace

import pytest

from di_refine.commands import comparison
from di_refine.metrics import compare
from di_refine.metrics.feature_net import Identity
from di_refine.metrics.kinds import parse_metric
from di_refine.metrics.results import MetricResult
from di_refine.runs.loop import Snapshot

ROWS = {"original": "original", "refined": "last", "best": "best", "teacher": "teacher"}
FD = "fd1k_full@toy"


def verdict(original, last, best, teacher, at=(8000, 16000), margins=(), name=FD):
    """The sentences on values by seed."""
    identity = Identity("toy", "0" * 16, 16, "antialiased-bilinear", 8, 4)
    rows = {"original": original, "last": last, "best": best, "teacher": [teacher]}
    summaries = [
        compare.summarise(
            row, [MetricResult(name, {name: v}, 9, i, 8, 1, identity, {}, 1.0) for i, v in enumerate(values)]
        )
        for row, values in rows.items()
    ]
    compare.add_differences(summaries)
    job = SimpleNamespace(
        subject=SimpleNamespace(rows=ROWS), final_evaluator=SimpleNamespace(specs=[parse_metric(name)])
    )
    loop = SimpleNamespace(best=Snapshot(at[0], "b.pkl"), last=Snapshot(at[1], "l.pkl"))
    return comparison.verdict(job, loop, summaries, list(margins))


def test_better_and_best_at_the_end():
    said = verdict([9.0, 9.2, 9.1], [5.0, 5.2, 5.3], [5.0, 5.2, 5.3], 3.0, at=(16000, 16000))
    assert said[0].startswith(f"better: {FD} went from 9.1 to 5.167 in 16 kimg (change -4.")
    assert "95% interval over 3 seeds" in said[0] and said[1:] == ["use b.pkl"]


def test_better_for_a_while():
    said = verdict([9.0, 9.2, 9.1], [7.0, 7.2, 7.3], [5.0, 5.2, 5.3], 3.0)
    assert said[2] == "it was best at 8 kimg and is 7.167 at the end: shorten --kimg, or lower --lr"


def test_more_may_be_better():
    said = verdict([0.5, 0.52, 0.51], [0.7, 0.71, 0.72], [0.7, 0.71, 0.72], 0.9, name="acc1k@toy")
    assert said[0].startswith("better") and len(said) == 2
    said = verdict([0.7, 0.71, 0.72], [0.5, 0.52, 0.51], [0.5, 0.52, 0.51], 0.9, name="acc1k@toy")
    assert said[0].startswith("worse")


def test_as_good_as_the_teacher():
    said = verdict([9.0, 9.2, 9.1], [2.0, 2.2, 2.3], [2.0, 2.2, 2.3], 3.0)
    assert said[-1].startswith("the result is as good as the teacher")


def test_chance():
    said = verdict([9.0, 9.6, 9.1], [8.9, 9.7, 8.9], [8.9, 9.7, 8.9], 3.0)
    assert said[0].startswith("no difference beyond chance: ") and said[1] == "train longer with --kimg"
    assert not any(sentence.startswith("use ") for sentence in said)


@pytest.mark.parametrize(
    ("teacher", "margins", "words"),
    [
        (12.0, (), "the teacher is no better than the original"),
        (3.0, (0.01, 0.01, 0.02, 0.03), "the student score lags"),
        (3.0, (0.1, 0.1, 0.1, 0.11), "lower --lr"),
        (3.0, (), "lower --lr"),
    ],
)
def test_worse_and_why(teacher, margins, words):
    said = verdict([9.0, 9.2, 9.1], [11.0, 11.2, 11.3], [11.0, 11.2, 11.3], teacher, margins=margins)
    assert said[0].startswith("worse: ") and said[0].endswith("keep the original network") and words in said[-1]


def test_one_seed_has_no_interval():
    said = verdict([9.0], [5.0], [5.0], 3.0)
    assert said[0] == f"better: {FD} went from 9 to 5 in 8 kimg"
