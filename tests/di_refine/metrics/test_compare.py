"""Comparison of measurements, and curves over a run."""

import json

import pytest
from PIL import Image

from di_refine.errors import InputError
from di_refine.metrics import compare, plots
from di_refine.metrics.feature_net import Identity
from di_refine.metrics.results import MetricResult, write_jsonl

DETECTOR = Identity("toy", "0" * 16, 16, "antialiased-bilinear", 8, 4)


def result(value, seed=0, name="fd1k_full@toy"):
    values = {name: value} if not isinstance(value, dict) else value
    return MetricResult(name, values, 1000, seed, 16, 1, DETECTOR, {}, 1.0)


def series(source, values, first_seed=0):
    return compare.summarise(source, [result(value, first_seed + i) for i, value in enumerate(values)])


def test_interval():
    # Student's t with two degrees of freedom: 4.30265 standard errors.
    low, high = compare.interval([1.0, 2.0, 3.0])
    assert (high - low) / 2 == pytest.approx(4.302653 / 3**0.5) and (high + low) / 2 == pytest.approx(2)
    assert compare.interval([1.0]) is None
    assert compare.interval([2.0, 2.0]) == (2.0, 2.0)


def test_differences_are_paired():
    """What the seeds have in common does not widen the interval of a difference."""
    first, second, third = series("a", [1.0, 5.0, 9.0]), series("b", [0.8, 4.9, 8.7]), series("c", [2.0], 7)
    compare.add_differences([first, second, third])
    assert "delta" not in first
    assert second["delta"]["fd1k_full@toy"] == pytest.approx(-0.2)
    low, high = second["delta_interval"]["fd1k_full@toy"]
    assert (high - low) / 2 == pytest.approx(4.302653 * 0.1 / 3**0.5) and low < -0.2 < high < 1
    low, high = first["interval"]["fd1k_full@toy"]
    assert high - low > 10
    assert third["delta"]["fd1k_full@toy"] == pytest.approx(-3) and third["delta_interval"] == {}


def test_a_table_has_a_row_for_each_network():
    pair = {"pr1k3_full@toy_precision": 0.5, "pr1k3_full@toy_recall": 0.25}
    one = [series("a", [1.0]), compare.summarise("a", [result(pair, name="pr1k3_full@toy")])]
    rows, header, legend = compare.table(one)
    assert header == ["network", "fd1k_full@toy", *pair] and rows == [["a", "1", "0.5", "0.25"]] and legend == []
    several = [series("b", [1.0, 3.0, 2.1]), one[1], series("a", [2.0, 4.1, 3.0]), series("c", [1.0, 3.0, 2.1])]
    compare.add_differences(several)
    rows, header, legend = compare.table([{**summary, "steps": 18} for summary in several[:1]] + several[1:])
    assert [row[:2] for row in rows] == [["b, 18 steps", "2.0 +- 1.0"], ["a", "3.0 +- 1.1 *"], ["c", "2.0 +- 1.0"]]
    assert [line[:20] for line in legend] == ["+- is the standard d", "* differs from the f"]


def test_labels_stand_below_the_table_or_where_they_differ_beside_it():
    uniform, other = (
        {**series(name, [1.0]), "labels": labels} for name, labels in (("a", "uniform"), ("b", "class:3"))
    )
    rows, header, legend = compare.table([uniform, {**other, "labels": "uniform"}])
    assert header == ["network", "fd1k_full@toy"] and legend == ["labels: uniform"]
    rows, header, legend = compare.table([uniform, other])
    assert header[-1] == "labels" and [row[-1] for row in rows] == ["uniform", "class:3"] and legend == []


def test_networks_are_called_by_their_file_or_run():
    snapshots = [f"runs/00001-mine/network-snapshot-{kimg:06d}.pkl" for kimg in (8, 40)]
    assert compare.short_names(snapshots) == ["00001-mine at 8 kimg", "00001-mine at 40 kimg"]
    assert compare.short_names(["a/x.pkl", "b/x.pkl", "a/y.pkl"]) == ["a/x.pkl", "b/x.pkl", "y.pkl"]


@pytest.mark.parametrize(
    ("mean", "sd", "text"),
    [
        (9.1512, 0.3216, "9.15 +- 0.32"),
        (152.2, 31.9, "152 +- 32"),
        (0.998, 0.00012, "0.99800 +- 0.00012"),
        (1.0, 0.0, "1.0000 +- 0.0000"),
        (2.71828, None, "2.718"),
        (2.71828, float("nan"), "2.718"),
    ],
)
def test_numbers_have_the_digits_that_mean_something(mean, sd, text):
    assert compare.number(mean, sd) == text


# Curves


@pytest.fixture
def run(tmp_path):
    """What training leaves: the original, two snapshots (of which one is gone), the teacher; one measured again."""
    run = tmp_path / "00000-run"
    run.mkdir()
    lines = [{"kimg": 0.0, "fd1k_full@toy": 9.0, "loss": 1}, {"kimg": 2.0, "loss": 1}]
    lines += [{"kimg": 4.096, "fd1k_full@toy": 5.0}, {"kimg": 8.192, "fd1k_full@toy": 4.0}]
    (run / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_jsonl(run, result(9.0))
    for kimg, value in ((4, 5.0), (8, 4.0), (8, 4.4)):
        write_jsonl(run, result(value), f"network-snapshot-{kimg:06d}.pkl")
    write_jsonl(run, result(2.0))  # the teacher has no place on the axis
    write_jsonl(run, result(0.5, name="acc1k@toy"), "network-snapshot-000008.pkl")
    return run


def test_curves(run):
    found = plots.curves(run)
    assert found == {"acc1k@toy": {8: [0.5]}, "fd1k_full@toy": {0: [9.0], 4: [5.0], 8: [4.0, 4.4]}}
    assert list(plots.curves(run, ["fd1k_full@toy"])) == ["fd1k_full@toy"]
    with pytest.raises(InputError, match="00000-run records no measurements of is1k@toy"):
        plots.curves(run, ["is1k@toy"])
    (run / "stats.jsonl").write_text("{\n")
    with pytest.raises(InputError, match="stats.jsonl line 1 is not a JSON object"):
        plots.curves(run)


def test_plot(run, tmp_path):
    drawn = plots.plot_runs(tmp_path / "out.png", [run])
    assert drawn[str(run)]["fd1k_full@toy"] == [[0, 9.0], [4, 5.0], [8, pytest.approx(4.2)]]
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG" and image.width > 500
    plots.plot_runs(tmp_path / "out.svg", [run])
    assert b"<svg" in (tmp_path / "out.svg").read_bytes()
    with pytest.raises(InputError, match="unknown picture format .docx"):
        plots.plot_runs(tmp_path / "out.docx", [run])
