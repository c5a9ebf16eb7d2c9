"""Several processes of `refine.py` and `distill.py`, one of them killed, and the same run started twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from click.testing import CliRunner
from golden_io import GOLDEN
from PIL import Image

from di_refine.commands.distill import main as distill
from di_refine.commands.refine import main as refine
from di_refine.metrics.small import SmallConvNet, save_small
from torch_utils import persistence

REFINE = [f"--network={GOLDEN / 'stylegan2/sg3repo-stylegan2.pkl'}", f"--teacher={GOLDEN / 'edm/vp.pkl'}"]
DISTILL = [f"--teacher={GOLDEN / 'distill/teacher.pkl'}"]
COMMON = ["--device=cpu", "--batch=12", "--lr=1e-5", "--score-lr=1e-5", "--ema-kimg=0.01"]
OWN = {"timestamp", "images_per_sec", "cpu_memory_gb", "data_wait_sec"}


def started(script, *options):
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *script, *options],
        cwd=ranks.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(command, *options):
    done = CliRunner().invoke(command, options)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def wait_for(path, pattern):
    deadline = time.monotonic() + 60
    while not list(path.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.01)


def ticks(run):
    records = [json.loads(line) for line in (Path(run) / "stats.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in OWN} for record in records]


def assert_close(one, other, **tolerance):
    a, b = (persistence.load(done["snapshot"])["ema"].state_dict() for done in (one, other))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_two_processes_of_torchrun_are_as_one(tmp_path):
    """One table, one JSON line, every file once; the numbers agree, also of metrics whose last batch is smaller."""
    torch.manual_seed(0)
    save_small(SmallConvNet(16, 3, classes=10, width=4, feature_dim=8), tmp_path / "toy.safetensors", "toy")
    (tmp_path / "data").mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, [16, 16, 3], np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"data/{i}.png")
    metrics = ["--metrics=fd300_full@toy,acc300@toy", f"--detector={tmp_path / 'toy.safetensors'}"]
    options = [*DISTILL, *COMMON, *metrics, f"--ref={tmp_path / 'data'}", "--teacher-steps=1", "--score-warmup=0"]
    options += ["--kimg=0.024", "--tick=0.012", "--snap=1"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "distill.py"]
    process = started(launch, *options, f"--outdir={tmp_path / 'two'}")
    alone = result_of(distill, *options, f"--outdir={tmp_path / 'one'}")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert len(out.splitlines()) in (9, 10) and out.count('"run_dir"') == out.count("distilled (last)  ") == 1
    assert errors.count("tick 1 ") == 1
    together = json.loads(out.splitlines()[-1])
    for name in ("original", "distilled", "best", "teacher"):
        assert together[name] == pytest.approx(alone[name], rel=1e-4), name

    runs = [Path(done["run_dir"]) for done in (alone, together)]
    files = [sorted(path.name.split(".vm")[0].split(".1")[0] for path in run.iterdir()) for run in runs]
    assert files[0] == files[1]
    counts = [{path.name: len(path.read_text().splitlines()) for path in run.glob("*.jsonl")} for run in runs]
    assert (
        counts[0] == counts[1] == {"metric-acc300@toy.jsonl": 10, "metric-fd300_full@toy.jsonl": 10, "stats.jsonl": 3}
    )
    for one, other in zip(*map(ticks, runs)):
        assert one.keys() == other.keys()
        for name, value in one.items():
            expected, found = (np.array(x, dtype=float) for x in (value, other[name]))
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6, err_msg=name)
    # Adam's steps have the size of the learning rate, whatever the gradient; signs may differ where it is ~0
    assert_close(alone, together, rtol=0, atol=4 * 1e-5)


def distill_here(*options):
    ranks.say_pid()
    sys.exit(distill.main(options, standalone_mode=True))


def test_torchrun_ends_the_other_of_a_killed_process_and_one_alone_goes_on(tmp_path):
    options = [*DISTILL, *COMMON, "--metrics=none", "--score-warmup=0", "--tick=0.12", "--snap=1"]
    parts, whole = f"--outdir={tmp_path / 'parts'}", f"--outdir={tmp_path / 'whole'}"
    process = ranks.torchrun(__file__, "distill_here", 2, *options, parts, "--kimg=1000")
    pids = ranks.read_pids(process, 2)
    wait_for(tmp_path, "parts/*/training-state-*.pt")
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    out, errors = process.communicate(timeout=60)
    print(f"rank 1 of a distillation was killed: all ended after {time.monotonic() - began:.2f} s")
    assert process.returncode == 1 and out == "" and not ranks.are_running(pids)
    assert f"exitcode  : -9 (pid: {pids[1]})" in errors
    assert errors.count("Traceback") == 1, errors  # torchrun's own

    (run,) = (tmp_path / "parts").iterdir()
    kimg = ticks(run)[-1]["kimg"] + 0.12
    continued = result_of(distill, *options, parts, "--resume=auto", f"--kimg={kimg}")
    assert continued["run_dir"] == str(run) and continued["kimg"] == pytest.approx(kimg)
    if kimg < 0.5:  # else this machine was much faster than the signal
        assert_close(result_of(distill, *options, whole, f"--kimg={kimg}"), continued, rtol=0, atol=4 * kimg * 1e-3)


def test_a_second_run_on_the_directory_is_refused_and_a_killed_one_goes_on(tmp_path):
    """Bit for bit as if it had not been killed."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, [16, 16, 3], np.uint8)
        Image.fromarray(pixels).save(data / f"{i}.png")
    options = [*REFINE, *COMMON, "--objective=f-js", f"--data={data}", "--score-warmup=0.024", "--metrics=none"]
    options += ["--tick=0.12", "--snap=2"]
    parts = [f"--outdir={tmp_path / 'parts'}", "--resume=auto"]
    first = ranks.Forked(["refine.py", *options, *parts, "--kimg=1000"], {})
    wait_for(tmp_path, "parts/*/training-state-*.pt")
    second = CliRunner().invoke(refine, [*options, *parts, "--kimg=1000"])
    running = first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert running
    (run,) = (tmp_path / "parts").iterdir()
    assert second.exit_code == 2 and second.stdout == ""
    assert second.stderr.strip() == (
        f"error: {run} is in use: another process is writing there; wait for its end, or name another --outdir"
    )

    kimg = ticks(run)[-1]["kimg"] + 0.12
    continued = result_of(refine, *options, *parts, f"--kimg={kimg}")
    whole = result_of(refine, *options, f"--outdir={tmp_path / 'whole'}", f"--kimg={kimg}")
    assert continued["run_dir"] == str(run) and ticks(run) == ticks(whole["run_dir"])
    a, b = (persistence.load(done["snapshot"]) for done in (continued, whole))
    for key in ("G", "G_ema"):
        for name, value in a[key].state_dict().items():
            assert torch.equal(value, b[key].state_dict()[name]), f"{key}.{name}"


if __name__ == "__main__":
    ranks.main(globals())
