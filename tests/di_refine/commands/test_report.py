"""The command `python -m di_refine report`: what it writes, and the sentences in which it refuses."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from di_refine.commands.report import main
from di_refine.files import pictures
from di_refine.files.run_files import RunFiles
from di_refine.metrics.feature_net import Identity
from di_refine.metrics.results import MetricResult, write_jsonl

FD = "fd1k_full@toy"


def report(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def run(tmp_path):
    """A run directory with a snapshot's measurement and picture."""
    files = RunFiles(tmp_path / "00000-mine")
    files.path.mkdir()
    files.options.write_text(json.dumps({"command": "refine", "seed": 0, "kimg": 4, "metrics": [FD]}))
    files.stats.write_text(json.dumps({"kimg": 4.0, "score_gap": 0.1}) + "\n")
    identity = Identity("toy", "0" * 16, 16, "antialiased-bilinear", 8, 4)
    write_jsonl(files.path, MetricResult(FD, {FD: 2.0}, 9, 0, 8, 1, identity, {}, 1.0), files.snapshot(4000).name)
    pictures.save_png(files.samples(4000), np.random.default_rng(0).integers(0, 256, [1, 80, 80], np.uint8))
    return files


def test_it_writes_beside_the_run_or_elsewhere(run, tmp_path):
    done = report(run.path)
    said = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == 0 and said["report"] == str(run.report) and said["bytes"] == run.report.stat().st_size
    dest = tmp_path / "page.html"
    assert report(run.path, f"--dest={dest}").exit_code == 0
    assert 'href="00000-mine/stats.jsonl"' in dest.read_text(encoding="utf-8")


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def pipe(path):
    path.unlink()
    os.mkfifo(path)


FAULTS = {
    "no folder": (lambda run: run.path.rename(run.path.with_name("gone")), "is no folder"),
    "no run": (lambda run: run.options.unlink(), "is no run directory: it has no training_options.json"),
    "options": (lambda run: cut(run.options), "training_options.json is damaged"),
    "no object": (lambda run: run.options.write_text("[]"), "training_options.json is damaged"),
    "result": (lambda run: run.result.write_text("{"), "result.json is damaged"),
    "statistics": (lambda run: cut(run.stats), "stats.jsonl line 1 is not a JSON object"),
    "metric": (lambda run: cut(run.metric(FD)), "metric-fd1k_full@toy.jsonl line 1 is not a JSON object"),
    "measurement": (lambda run: run.metric(FD).write_text('{"metric": 3}'), "line 1 is damaged: it is no measurement"),
    "pipe": (lambda run: pipe(run.stats), "stats.jsonl cannot be read"),
    "picture of a pipe": (lambda run: pipe(run.samples(4000)), "fakes000004.png is no readable picture"),
    "picture": (
        lambda run: run.samples(4000).write_bytes(run.samples(4000).read_bytes()[:2000]),
        "fakes000004.png is no readable picture",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_one_sentence(run, fault):
    harm, sentence = FAULTS[fault]
    harm(run)
    done = report(run.path)
    assert done.exit_code == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not run.report.exists()


def test_places_that_cannot_be_written_are_refused(run, tmp_path):
    done = report(run.path, f"--dest={tmp_path / 'none' / 'page.html'}")
    assert done.exit_code == 2 and "there is no folder" in done.stderr
    done = report(run.path, f"--dest={tmp_path}")
    assert done.exit_code == 2 and "is a folder; name a file" in done.stderr
    done = report(run.path, run.path)
    assert done.exit_code == 2 and "--dest is needed" in done.stderr


def test_help_imports_neither_pytorch_nor_plotly():
    program = (
        "import sys; from di_refine.commands import report\n"
        "try: report.main(['--help'])\n"
        "except SystemExit: assert not {'torch', 'plotly', 'jinja2'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "Usage:" in done.stdout, done.stderr


def frames_of(path):
    with Image.open(path) as film:
        for number in range(film.n_frames):
            film.seek(number)
            yield np.asarray(film.convert("L")).astype(int)


def test_a_film_goes_from_snapshot_to_snapshot(run, tmp_path):
    for nimg, grey in ((0, 40), (8000, 200)):
        pictures.save_png(run.samples(nimg), np.full([1, 80, 80], grey, np.uint8))
    dest = tmp_path / "new" / "film.webp"
    done = report(run.path, f"--film={dest}")
    assert done.exit_code == 0 and json.loads(done.stdout.splitlines()[-1])["frames"] == 6, done.stderr
    frames = list(frames_of(dest))
    middles = [frame[frame.shape[0] * 2 // 3, frame.shape[1] // 2] for frame in frames]
    assert (middles[0], middles[-1]) == (40, 200) and len(frames) == 3, "equal frames are one that stays for longer"
    assert not run.report.exists() and not np.array_equal(frames[0][:56], frames[1][:56]), "each has its title"
    other = tmp_path / "00001-other"
    shutil.copytree(run.path, other)
    (other / run.samples(4000).name).unlink()
    assert report(run.path, other, f"--film={dest}").exit_code == 0
    both = list(frames_of(dest))
    assert both[1].shape[1] > frames[1].shape[1]
    middle = both[1].shape[1] * 3 // 4
    assert [frame[100, middle] for frame in both] == [40, 40, 200], "it still shows its first"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("film.avi", "a film is one of"), ("film.gif", "has no pictures of two snapshots yet")],
)
def test_films_that_cannot_be_made(run, tmp_path, name, sentence):
    done = report(run.path, f"--film={tmp_path / name}")
    assert done.exit_code == 2 and sentence in done.stderr and not (tmp_path / name).exists()
    done = report(run.path, "--film=a.gif", "--dest=a.html")
    assert done.exit_code == 2 and "give one of them" in done.stderr


def test_a_damaged_picture_ends_a_film(run, tmp_path):
    run.samples(8000).write_bytes(run.samples(4000).read_bytes()[:200])
    done = report(run.path, f"--film={tmp_path / 'film.gif'}")
    assert done.exit_code == 2 and "is no readable picture" in done.stderr and not (tmp_path / "film.gif").exists()
