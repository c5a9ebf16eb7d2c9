"""The page of a run: what it says, that it holds nothing that runs, and how it works in a browser."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browsing import chromium

from di_refine.errors import InputError
from di_refine.files import pictures
from di_refine.files.run_files import RunFiles
from di_refine.metrics.feature_net import Identity
from di_refine.metrics.results import MetricResult, write_jsonl
from di_refine.report import charts, page
from di_refine.report.record import Run
from di_refine.runs.directory import RunDirectory

FD, ACC = "fd1k_full@toy", "acc1k@toy"
OPTIONS = {
    "command": "refine",
    "network": "mine.pkl",
    "preset": "auto",
    "seed": 0,
    "lr": 0.001,
    "batch": 64,
    "kimg": 12,
    "outdir": "elsewhere",
    "desc": None,
    "metrics": [FD, ACC],
    "sources": {"network": "given", "lr": "auto", "batch": "registry"},
    "network_file": "/somewhere/mine.pkl",
    "class_names": ["cat", "dog"],
}


def measured(folder, name, value, seed, snapshot=None, network=None, **changes):
    identity = Identity("toy", "0" * 16, 16, "antialiased-bilinear", 8, 4)
    details = {"num_images": 9, "resolution": 8, "num_channels": 1, "reference": {"count": 5}, **changes}
    result = MetricResult(name, {name: value}, seed=seed, detector=identity, seconds=1.0, **details)
    write_jsonl(folder, result, snapshot, network)


def make_run(folder, options=(), shift=0.0, reference=5, result=True):
    """A finished run of three snapshots, the second of which is the best."""
    folder.mkdir()
    files = RunFiles(folder)
    files.options.write_text(json.dumps({**OPTIONS, **dict(options)}))
    seed = {**OPTIONS, **dict(options)}["seed"]
    rng = np.random.default_rng(0)
    lines = []
    for number, fd in enumerate([9.0, 6.0, 4.0, 5.0]):
        nimg = number * 4032
        record = {"kimg": nimg / 1000, "images_per_sec": 100.0 * bool(number), "cpu_memory_gb": 0.5, "timestamp": 1.8e9}
        if number:
            gaps = [0.1, 0.2, 0.3, 0.4, 0.5, None]
            record |= {"score_loss": 0.2, "score_gap": 0.1, "score_gap_by_sigma": gaps, "score_grad_norm": 1.0}
        lines.append(json.dumps({**record, FD: fd + shift, ACC: 0.9}))
        pictures.save_grid(files.samples(nimg), rng.integers(0, 256, [20, 3, 8, 8], np.uint8), 10, scale=8)
        snapshot = files.snapshot(nimg).name if number else None
        for offset in [0, 1, 2, 3] if number in (0, 2) else [0]:
            draw = 0.1 * offset * (1 + number)
            measured(folder, FD, fd + shift + draw, seed + offset, snapshot, reference={"count": reference})
            measured(folder, ACC, 0.9, seed + offset, snapshot)
    measured(folder, FD, 1.0, seed + 1, network="teacher", reference={"count": reference})
    files.stats.write_text("\n".join(lines) + "\n")
    pictures.save_grid(files.reals, rng.integers(0, 256, [20, 3, 8, 8], np.uint8), 10, scale=8)
    files.log.write_text("tick 0\n")
    if result:
        said = {"verdict": ["better: it went down", "use that file"], "stopped": None}
        files.result.write_text(json.dumps({**said, "best_snapshot": str(files.snapshot(8064))}))
    return folder


def text_of(folder, *others):
    path = folder / "report.html"
    page.write(path, [folder, *others])
    return path.read_text(encoding="utf-8")


def markup(text):
    """A page without the content of its scripts."""
    return re.sub(r"(<script[^>]*>).*?</script>", r"\1</script>", text, flags=re.DOTALL)


def visible(text):
    """The text of a page, without its scripts and tags."""
    text = re.sub(r"<style.*?</style>", "", markup(text), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "00000-mine")


def test_what_a_run_records_is_found(run):
    found = Run(run)
    course = found.courses[FD]
    assert list(found.courses) == [FD, ACC]
    assert {kimg: sorted(seeds) for kimg, seeds in course.snapshots.items()} == {
        0.0: [0, 1, 2, 3],
        4.032: [0],
        8.064: [0, 1, 2, 3],
        12.096: [0],
    }
    assert [result.values[FD] for result in course.teacher.values()] == [1.0]
    assert found.best == 8.064 and found.last == 12.096 and found.kimg == 12.096


def test_the_page_says_it(run):
    text = text_of(run)
    said = visible(text)
    assert said.startswith("00000-mine: refine.py 00000-mine: refine.py better: it went down use that file")
    # Without the seed by which the best was chosen: 9.1, 9.2, 9.3 and 4.3, 4.6, 4.9.
    assert "original 9.20 +- 0.10 0.9000 +- 0.0000" in said and "best, 8.064 kimg 4.60 +- 0.30 *" in said
    assert "teacher 1" in said and "original best, 8 kimg" in said and "Classes: cat, dog" in said
    assert "network mine.pkl command line" in said and "lr 0.001 fitted to the run" in said
    assert "outdir elsewhere command line" in said and "desc default" in said
    assert "batch 64 registry, for this network" in said and "seed 0 default" in said
    assert markup(text).count('src="data:image/png;base64,') == 3
    links = re.findall(r'href="([^"#]+)"', markup(text))
    assert {"stats.jsonl", "metric-fd1k_full%40toy.jsonl", "fakes000008.png", "data:,"} < set(links)
    assert all((run / link.replace("%40", "@")).is_file() for link in links if link != "data:,")


def test_every_chart_is_one_for_plotly_and_has_units(run):
    figures = pytest.importorskip("plotly.graph_objects")
    found = Run(run)
    drawn = {**{key: charts.metric(key, [found]) for key in found.courses}, **charts.lines(found)}
    drawn |= charts.heat_maps(found)
    assert {"Score gap by noise level", "Denoising loss", "Score gap", "Gradients", "Speed", "Memory"} < set(drawn)
    for chart in drawn.values():
        figures.Figure(chart)  # refuses what plotly does not know
        for axis in ("xaxis", "yaxis"):
            assert re.search(r"\(.+\)|per", chart["layout"][axis]["title"]["text"])
    traces = {trace["name"]: trace for trace in drawn[FD]["data"]}
    assert traces["every snapshot, seed 0"]["y"] == [9.0, 6.0, 4.0, 5.0]
    spread = traces["mean of 3 seeds, 95% interval"]
    assert spread["x"] == [0.0, 8.064] and spread["y"] == pytest.approx([9.2, 4.6])
    assert spread["error_y"]["array"][1] == pytest.approx(4.3027 * 0.3 / 3**0.5, rel=1e-4)
    assert traces["best, 8.064 kimg"]["y"] == [4.0]
    assert traces["original 9.2"]["y"] == pytest.approx([9.2, 9.2]) and traces["teacher 1"]["y"] == [1.0, 1.0]
    heat = drawn["Score gap by noise level"]["data"][0]
    assert heat["z"][0] == [0.1] * 3 and heat["z"][5] == [None] * 3 and heat["y"][0] == "< 0.1"


def test_verdicts_before_and_after_the_end(tmp_path):
    folder = make_run(tmp_path / "00000-mine", {"kimg": 40}, result=False)
    assert Run(folder).verdict() == [
        "not finished: 12.096 of 40 kimg; the same command with --resume=auto goes on",
    ]
    directory = RunDirectory(folder)
    directory.lock()
    assert Run(folder).verdict() == ["running: 12.096 of 40 kimg", f"best at 8.064 kimg: {FD} 4"]
    directory.close()
    (folder / "log.txt").write_text("tick 3\nbetter: it fell\nuse it\n")  # as before there was a result.json
    assert Run(folder).verdict() == ["better: it fell", "use it"]
    directory.write_result({"verdict": [], "stopped": "SIGINT"})
    assert Run(folder).verdict() == [
        "stopped by SIGINT at 12.096 of 40 kimg; the same command with --resume=auto goes on"
    ]


def test_measurements_of_old_runs_that_may_be_of_the_teacher_are_left_out(tmp_path):
    folder = make_run(tmp_path / "00000-old")
    path = RunFiles(folder).metric(FD)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record["network"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    course = Run(folder).courses[FD]
    assert list(course.snapshots[0.0]) == [0] and course.teacher == {}


def test_a_run_without_snapshots(tmp_path):
    folder = tmp_path / "00000-new"
    folder.mkdir()
    (folder / "training_options.json").write_text(json.dumps(OPTIONS))
    said = visible(text_of(folder))
    assert "No snapshot yet" in said and "Nothing has been measured" in said and "0 of 12 kimg" in said


HOSTILE = "</script><script>window.hostile = 1</script><img src=x onerror='window.hostile = 1'>{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run in which every text that a user or a file may choose is an attack."""
    options = {"class_names": [HOSTILE], "network": HOSTILE, HOSTILE: HOSTILE, "command": HOSTILE, "data": HOSTILE}
    options["sources"] = {"network": HOSTILE}
    folder = make_run(tmp_path_factory.mktemp("report") / "<img src=x onerror=alert(1)>", options)
    files = RunFiles(folder)
    files.result.write_text(json.dumps({"verdict": [HOSTILE], "stopped": HOSTILE, "best_snapshot": HOSTILE}))
    with files.stats.open("a") as file:
        file.write(json.dumps({"kimg": 13, f"{HOSTILE}grad_norm": 1.0}) + "\n")
    text_of(folder)
    return folder


def test_nothing_of_a_user_is_markup(hostile):
    text = (hostile / "report.html").read_text(encoding="utf-8")
    assert "window.hostile = 1" in text, "the attack is in the page, as text"
    assert not re.search(r"<script>window|<img src=x| 49 ", markup(text))
    assert markup(text).count("<script") == 3


def test_a_run_of_fifty_snapshots_stays_small(tmp_path):
    folder = make_run(tmp_path / "00000-large")
    files = RunFiles(folder)
    noise = np.random.default_rng(0).integers(0, 256, [80, 3, 128, 128], np.uint8)  # compresses worse than any image
    pictures.save_grid(files.samples(0), noise, 10)
    for number in range(1, 51):
        shutil.copyfile(files.samples(0), files.samples(number * 4032))
        measured(folder, FD, 9.0, 0, files.snapshot(number * 4032).name)
    shutil.copyfile(files.samples(0), files.reals)
    line = files.stats.read_text().splitlines()[2]
    records = [{**json.loads(line), "kimg": number * 0.4032} for number in range(5000)]
    files.stats.write_text("".join(json.dumps(record) + "\n" for record in records))
    text_of(folder)
    assert files.report.stat().st_size < 8e6


def test_several_runs_are_compared_over_the_seeds_of_both(run, tmp_path):
    other = make_run(tmp_path / "00001-other", {"seed": 1, "lr": 0.002}, shift=-1.0)
    said = visible(text_of(run, other))
    # Seeds 2 and 3 of both: 3.3 - 4.6 and 3.6 - 4.9.
    assert "00001-other 8.20 +- 0.10 3.60 +- 0.30 8.064 1 -1.3 (-1.3 to -1.3) *" in said
    assert "lr 0.001 0.002" in said and "which the runs agree" in said
    chart = charts.metric(FD, [Run(run), Run(other)], ["00000-mine", "00001-other"])
    assert [trace["name"] for trace in chart["data"] if trace.get("showlegend", True)] == ["00000-mine", "00001-other"]
    twin = make_run(tmp_path / "00000-mine", reference=6)
    said = visible(text_of(run, twin))
    assert f"{run.parent.name}/00000-mine" in said and f"{tmp_path.name}/00000-mine" in said
    assert "measured against something else" in said


def test_runs_without_a_common_metric_are_refused(run, tmp_path):
    other = make_run(tmp_path / "00001-other")
    for path in RunFiles(other).metrics():
        path.unlink()
    with pytest.raises(InputError, match="00000-mine and .*00001-other have no metric in common"):
        page.write(tmp_path / "both.html", [run, other])
    assert not (tmp_path / "both.html").exists()


# ----------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    yield from chromium()


def opened(browser, path: Path, width=1280, height=900):
    """A page once it is drawn, with what it said and asked for."""
    tab = browser.new_page(viewport={"width": width, "height": height})
    heard: list[str] = []
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on("request", lambda request: heard.append(request.url) if not request.url.startswith("data:") else None)
    tab.goto(path.as_uri())
    return tab, heard


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_without_a_word_and_without_the_network(run, browser, width):
    text_of(run)
    tab, heard = opened(browser, run / "report.html", width)
    tab.wait_for_function("document.querySelectorAll('.chart .main-svg').length >= 8")
    assert heard == [(run / "report.html").as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") == width, "nothing is wider than the screen"
    tab.close()


def test_the_slider_moves_from_one_picture_to_the_other(run, browser):
    text_of(run)
    tab, _ = opened(browser, run / "report.html")
    clip = "getComputedStyle(document.querySelector('.pair .after')).clipPath"
    assert tab.evaluate(clip) == "inset(0px 0px 0px 50%)"
    box = tab.locator(".pair").bounding_box()
    tab.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2)
    assert float(re.search(r"([\d.]+)%\)", tab.evaluate(clip))[1]) == pytest.approx(80, abs=2)
    tab.keyboard.press("Home")
    assert re.fullmatch(r"inset\(0px( 0px 0px 0%)?\)", tab.evaluate(clip))
    tab.emulate_media(media="print")
    assert tab.evaluate(clip) == "none", "print shows both"
    tab.close()


def test_a_hostile_run_does_nothing(hostile, browser):
    tab, heard = opened(browser, hostile / "report.html")
    tab.wait_for_function("document.querySelectorAll('.chart .main-svg').length >= 8")
    assert tab.evaluate("window.hostile") is None and len(heard) == 1
    tab.close()
