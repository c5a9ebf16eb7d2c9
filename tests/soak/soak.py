"""What clusters do to long runs, done to short ones: `make soak` (ten to twenty minutes). Not a part of the test suite.

    python tests/soak/soak.py [--command=teacher|gan|refine|distill] [--kills=20] [--scenario=NAME ...] [--folder=DIR]

A tiny network is trained by the real command. Each scenario does something to it; then the same command is repeated,
and has to go on with at most one tick lost, to the same final weights and log as a run that nobody disturbed. Prints a
table, then one JSON object; exit status 1 if anything was not as it should be.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from PIL import Image

from di_refine import terminal
from di_refine.commands import cli
from di_refine.files import networks
from di_refine.files.run_files import RunFiles
from di_refine.runs import checkpoint

TICK = 1024  # images; states are named by whole thousands, so a tick is not less
GOLDEN = ROOT / "tests/golden"

COMMANDS = {
    "teacher": {
        "command": "pretrain.py teacher --data={data} --width=8 --channel-mult=1,1 --num-blocks=1 "
        "--attn-resolutions=4 --lr-rampup=0",
        "batch": 32,
        "ticks": 24,
    },
    "gan": {
        "command": "pretrain.py gan --data={data} --z-dim=8 --channel-base=64 --channel-max=8 --mbstd-group=2 "
        "--ada-kimg=1",
        "batch": 32,
        "ticks": 24,
    },
    "refine": {
        "command": "refine.py --network={golden}/stylegan2/sg3repo-stylegan2.pkl --teacher={golden}/edm/vp.pkl "
        "--data={data} --objective=f-js --score-warmup=1.024 --metrics=none",
        "batch": 32,
        "ticks": 12,
        "images": [16, 16, 3],
    },
    "distill": {
        "command": "distill.py --teacher={golden}/distill/teacher.pkl --student-steps=2 --augment=0.12 "
        "--score-warmup=1.024 --metrics=none",
        "batch": 32,
        "ticks": 12,
    },
}
"""What can be tested: the options that make it small, its batch, how many ticks the whole run has, and the shape of
its data, where that is not 8x8 and grey.
"""


@dataclass
class Soak:
    """One command's run and what happened to it.

    Attributes:
        name: which of `COMMANDS`.
        folder: everything is written there.
        rows: of the table: what was done, images seen by then, images found at resume, lost, what was wrong.
    """

    name: str
    folder: Path
    rows: list[tuple] = field(default_factory=list)

    def __post_init__(self):
        self.total = COMMANDS[self.name]["ticks"] * TICK
        self.data = self.folder / "data"
        if not self.data.exists():
            self.data.mkdir(parents=True)
            for i in range(64):
                shape = COMMANDS[self.name].get("images", [8, 8])
                pixels = np.random.default_rng(i).integers(0, 256, shape, np.uint8)
                Image.fromarray(pixels).save(self.data / f"{i}.png")

    def start(self, outdir: Path, *options: str, **faults) -> subprocess.Popen:
        """The command in a process of its own, with `faults` of child.py."""
        recipe = COMMANDS[self.name]
        command = [
            *recipe["command"].format(golden=GOLDEN, data=self.data).split(),
            f"--batch={recipe['batch']}",
            f"--kimg={self.total / 1000}",
            f"--tick={TICK / 1000}",
            "--snap=5",
            "--device=cpu",
            f"--outdir={outdir}",
            "--resume=auto",
            *options,
        ]
        faults["progress"] = str(self.progress)
        self.progress.unlink(missing_ok=True)
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tests/soak/child.py"), json.dumps(faults), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def finish(self, process: subprocess.Popen) -> tuple[int, str, str]:
        """Exit status, standard output, last line of standard error."""
        out, errors = process.communicate(timeout=1800)
        return process.returncode, out, (errors.strip().splitlines() or [""])[-1]

    def whole(self, outdir: Path, *options: str, **faults) -> dict:
        """Run to the end and return the result."""
        status, out, error = self.finish(self.start(outdir, *options, **faults))
        if status:
            raise click.ClickException(f"{self.name} ended with status {status}: {error}")
        return json.loads(out.splitlines()[-1])

    @property
    def progress(self) -> Path:
        """The file of the images seen by the newest process."""
        return self.folder / "progress"

    def seen(self) -> int:
        """Images seen by the newest process; 0 before its first step."""
        return int.from_bytes(self.progress.read_bytes(), "little") if self.progress.exists() else 0

    def found(self, outdir: Path) -> int:
        """Images of the newest intact state."""
        run = self.run_directory(outdir)
        state = checkpoint.newest_intact(run) if run else None
        return checkpoint.load(state)["trainer"]["nimg"] if state else 0

    @staticmethod
    def run_directory(outdir: Path) -> Path | None:
        """The one run directory there is."""
        return next(iter(sorted(outdir.iterdir())), None) if outdir.is_dir() else None

    def note(self, what: str, seen: int, found: int, problem: str = "", allowed: int = TICK) -> None:
        """Add a row to the table, and say it."""
        lost = seen - found
        if not problem and not 0 <= lost <= allowed:
            problem = f"{lost} images lost"
        self.rows.append((what, seen, found, lost, problem or "ok"))
        print(f"{what}: at {seen} images, found {found}, {problem or 'ok'}", file=sys.stderr, flush=True)

    def compare(self, what: str, outdir: Path, reference: Path) -> None:
        """Check that two finished runs are the same, and add a row."""
        problem = differences(self.run_directory(outdir), self.run_directory(reference))
        self.note(f"{what}: end", self.total, self.found(outdir), problem)


def differences(run: Path, reference: Path) -> str:
    """What differs between two finished runs: weights of the last snapshot, or lines of stats.jsonl."""
    newest = [RunFiles(path).snapshots()[-1] for path in (run, reference)]
    a, b = (networks.load(path).networks for path in newest)
    for key, net in a.items():
        if isinstance(net, torch.nn.Module):
            for (name, x), y in zip(net.state_dict().items(), b[key].state_dict().values()):
                if not torch.equal(x, y):
                    return f"{key}.{name} differs"
    own = {"timestamp", "images_per_sec", "cpu_memory_gb", "gpu_memory_gb", "data_wait_sec"}
    ticks = [
        [
            {k: v for k, v in json.loads(line).items() if k not in own}
            for line in RunFiles(path).stats.read_text().splitlines()
        ]
        for path in (run, reference)
    ]
    return "" if ticks[0] == ticks[1] else "stats.jsonl differs"


# ----------------------------------------------------------------------------------------------------------------------
# Scenarios


def kills(soak: Soak, outdir: Path, reference: Path, count: int) -> None:
    """kill -9 at `count` random moments of a running loop, saving included, and at some of its start; then the end."""
    random.seed(0)
    for number in range(1, count + 1):
        if number % 5 == 0:
            kill(soak, f"kill before {number}, while it starts", outdir)
        # What is left is shared by the kills to come, so that none of them finds a finished run; but there must be room
        # for a tick, or the run never gets on.
        left = soak.total - soak.found(outdir)
        longest = min(max(1.5 * left / (count - number + 1), 1.6 * TICK), 0.7 * left)
        kill(soak, f"kill {number}", outdir, after=1 + random.random() * longest)
    soak.whole(outdir)
    soak.compare("kills", outdir, reference)


def kill(soak: Soak, what: str, outdir: Path, after: float | None = None) -> None:
    """Kill the command when it has seen so many images of its own, in the next step or save; None: while it starts."""
    before = soak.found(outdir)
    process = soak.start(outdir)
    while after is not None and soak.seen() < before + after and process.poll() is None:
        time.sleep(0.001)
    time.sleep(random.random() * (2 if after is None else 0.1))
    process.send_signal(signal.SIGKILL)
    status, _, error = soak.finish(process)
    problem = "" if status == -signal.SIGKILL else f"ended by itself with status {status}: {error}"
    if after is not None and not before < soak.seen() < soak.total:
        problem = problem or "killed outside of the loop"
    soak.note(what, max(soak.seen(), before), soak.found(outdir), problem)


def signals(soak: Soak, outdir: Path, reference: Path, _count: int) -> None:
    """SIGTERM, SIGUSR1 and SIGINT lose nothing."""
    for number, status in [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)]:
        before = soak.found(outdir)
        process = soak.start(outdir)
        while soak.seen() < before + TICK // 2 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        code, out, error = soak.finish(process)
        stopped = json.loads(out.splitlines()[-1])["stopped"] if out else None
        fine = code == status and stopped == number.name
        problem = "" if fine else f"status {code}, stopped by {stopped}: {error}"
        soak.note(number.name, soak.seen(), soak.found(outdir), problem, allowed=0)
    soak.whole(outdir)
    soak.compare("signals", outdir, reference)


def disk_full(soak: Soak, outdir: Path, reference: Path, _count: int) -> None:
    """No room for a training state from the third tick on; then on a file system of its own, where that can be had."""
    process = soak.start(outdir, file_limit=20_000, limit_at=2 * TICK + 1)
    _failed(soak, "disk full (file-size limit)", outdir, process, "free some space")
    soak.whole(outdir)
    soak.compare("disk full (file-size limit)", outdir, reference)

    small = outdir.with_name("tmpfs")
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(small)], check=False).returncode:
        soak.rows.append(("disk full (tmpfs)", "", "", "", "left out: no right to mount"))
        return
    try:
        process = soak.start(small / "runs")
        while soak.seen() < 2 * TICK + 1 and process.poll() is None:
            time.sleep(0.001)
        with open(small / "filler", "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        _failed(soak, "disk full (tmpfs)", small / "runs", process, "free some space")
        (small / "filler").unlink()
        soak.whole(small / "runs")
        soak.compare("disk full (tmpfs)", small / "runs", reference)
    finally:
        subprocess.run(["umount", str(small)], check=False)


def read_only(soak: Soak, outdir: Path, reference: Path, _count: int) -> None:
    """The run directory loses its write permission; a start there is refused at once, and it goes on afterwards."""
    process = soak.start(outdir, mortal=True)
    while soak.seen() < 2 * TICK + 1 and process.poll() is None:
        time.sleep(0.001)
    run = soak.run_directory(outdir)
    run.chmod(0o555)
    _failed(soak, "read-only folder", outdir, process, "make ")
    run.chmod(0o755)
    soak.whole(outdir, mortal=True)
    soak.compare("read-only folder", outdir, reference)


def _failed(soak: Soak, what: str, outdir: Path, process: subprocess.Popen, words: str) -> None:
    status, _, error = soak.finish(process)
    fine = status == 1 and "could not be written" in error and words in error
    seen, problem = soak.seen(), "" if fine else f"status {status}: {error}"
    soak.note(what, seen, soak.found(outdir), problem, allowed=2 * TICK)  # the state of the failed tick and the next


def clock(soak: Soak, outdir: Path, reference: Path, _count: int) -> None:
    """The system's clock jumps by a year, forwards and backwards."""
    for number, jump in enumerate([3.2e7, -3.2e7], 1):
        at = 2 * number * TICK
        result = soak.whole(
            outdir, "--max-minutes=60", f"--kimg={(at + 2 * TICK) / 1000}", clock=[at + TICK // 2, jump]
        )
        problem = "" if result["stopped"] is None and result["images_per_sec"] > 0 else f"result {result}"
        soak.note(f"clock {jump:+g} s", at + 2 * TICK, soak.found(outdir), problem, allowed=0)
    soak.whole(outdir)
    soak.compare("clock", outdir, reference)


def corrupt(soak: Soak, outdir: Path, reference: Path, _count: int) -> None:
    """The newest state loses its end, then has a flipped bit, then is empty."""
    for number, (what, damage) in enumerate(
        {
            "truncated": lambda content: content[: len(content) // 2],
            "one bit": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
            "empty": lambda content: b"",
        }.items(),
        1,
    ):
        at = 4 * number * TICK
        soak.whole(outdir, f"--kimg={at / 1000}")
        newest = RunFiles(soak.run_directory(outdir)).states()[0]
        newest.write_bytes(damage(newest.read_bytes()))
        soak.note(f"newest state {what}", at, soak.found(outdir))
    soak.whole(outdir)
    soak.compare("newest state damaged", outdir, reference)


def missing(soak: Soak, outdir: Path, reference: Path, _count: int) -> None:
    """Without the optional packages."""
    packages = ["tensorboard", "matplotlib", "sklearn", "onnx"]
    soak.whole(outdir, missing=packages)
    soak.compare(f"no {', '.join(packages)}", outdir, reference)


def two_runs(soak: Soak, outdir: Path, reference: Path, _count: int) -> None:
    """A second run on the same directory is refused, and the first goes on."""
    process = soak.start(outdir)
    while soak.seen() < TICK and process.poll() is None:
        time.sleep(0.01)
    progress = soak.progress.rename(soak.folder / "progress-of-the-first")
    status, _, error = soak.finish(soak.start(outdir))
    problem = "" if status == 2 and "is in use" in error else f"status {status}: {error}"
    if soak.finish(process)[0]:
        problem = "the first run failed"
    seen = int.from_bytes(progress.read_bytes(), "little")
    soak.note("two runs on one directory", seen, soak.found(outdir), problem, allowed=0)
    soak.compare("two runs on one directory", outdir, reference)


SCENARIOS = {f.__name__: f for f in (kills, signals, disk_full, read_only, clock, corrupt, missing, two_runs)}


@cli.command()
@click.option("--command", "name", type=click.Choice(list(COMMANDS)), default="teacher", help="What is trained.")
@click.option("--kills", "count", type=cli.POSITIVE_INT, default=20, help="Kill a running loop so often.")
@click.option("--scenario", "wanted", multiple=True, type=click.Choice(list(SCENARIOS)), help="Only these.")
@click.option("--folder", default=None, help="Where to work; kept.  [default: a temporary one, removed]")
def main(name, count, wanted, folder):
    """Kill, starve and mislead short training runs, and check that they go on as if nothing had happened."""
    work = Path(folder or tempfile.mkdtemp(prefix="soak-"))
    start = time.monotonic()
    try:
        soak = Soak(name, work)
        soak.whole(work / "reference")
        for scenario in wanted or SCENARIOS:
            SCENARIOS[scenario](soak, work / scenario, work / "reference", count)
    finally:
        if folder is None:
            shutil.rmtree(work, ignore_errors=True)
    terminal.table(soak.rows, ["what", "images then", "images found", "lost", "result"])
    bad = [row for row in soak.rows if not row[-1].startswith(("ok", "left out"))]
    killed = [row for row in soak.rows if re.fullmatch(r"kill \d+", row[0])]
    terminal.print_result(
        {
            "command": name,
            "scenarios": list(wanted or SCENARIOS),
            "failed": len(bad),
            "kills_of_a_running_loop": len(killed),
            "images_per_tick": TICK,
            "most_lost_to_a_kill": max((row[3] for row in killed), default=None),
            "minutes": (time.monotonic() - start) / 60,
        }
    )
    return 1 if bad else 0


if __name__ == "__main__":
    main()
