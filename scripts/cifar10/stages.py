"""What the stages share: options, the split of the data, running a command of the project, results in the workdir.

    WORKDIR/train.zip, heldout.zip         nine tenths of the images, and the rest
    WORKDIR/features-cifar10.safetensors   the feature network, and stats-cifar10-features.npz: its view of train.zip
    WORKDIR/runs/<stage>/                  run directories of the commands
    WORKDIR/networks/<name>.pkl            what the stages made
    WORKDIR/results/<name>.json            the commands' results, with the options they were called with

A stage leaves everything to the project's commands. This module imports nothing slow: the commands do.
"""

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[2]
NAME = "cifar10"  # of the feature network, in metrics' names
sys.path.insert(0, str(ROOT))

from di_refine.files.run_files import RunFiles  # noqa: E402


@dataclass
class Stage:
    """A stage as it was called.

    Attributes:
        workdir: see the module's text.
        data: the data set, or None where the workdir has been given one before.
        minutes: what the command may train for, measuring included, once it has started.
        smoke: tiny sizes, to see that everything runs.
        device: for the commands.
        extra: further options for the command, as given.
    """

    workdir: Path
    data: str | None
    minutes: float
    smoke: bool
    device: str
    extra: tuple[str, ...]

    @property
    def features(self) -> Path:
        return self.workdir / f"features-{NAME}.safetensors"

    @property
    def statistics(self) -> Path:
        return self.workdir / f"stats-{NAME}-features.npz"

    @property
    def train_images(self) -> Path:
        return self._split()[0]

    @property
    def held_out_images(self) -> Path:
        return self._split()[1]

    def network(self, name: str, made_by: str) -> Path:
        """A network of an earlier stage."""
        return self.need(self.workdir / "networks" / f"{name}.pkl", made_by)

    def need(self, path: Path, made_by: str) -> Path:
        if not path.is_file():
            raise click.ClickException(f"{path} is missing; run {made_by} first, with the same --workdir")
        return path

    def metric_options(self, metrics: str, with_reference: bool = True) -> list[str]:
        """`metrics` has the names without the network's, as in fd5k_full,acc5k."""
        self.need(self.features, "features.py")
        names = ",".join(f"{metric}@{NAME}" for metric in metrics.split(","))
        reference = [f"--ref={self.statistics}"] if with_reference else []
        return [f"--metrics={names}", f"--detector={self.features}", *reference]

    def run(self, command: str, *options: str, extra: bool = True) -> dict[str, Any]:
        """Run a command of the project and return its result; its failure ends the stage with its exit status.

        What torch.compile makes and the statistics of data sets are kept in the workdir, for the next call.
        """
        words = command.split()
        arguments = [*words[1:], *options, f"--device={self.device}", *(self.extra if extra else ())]
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": str(self.workdir / "cache" / "inductor"),
            "DI_REFINE_CACHE": str(self.workdir / "cache"),
            **os.environ,
        }
        line = [sys.executable, str(ROOT / words[0]), *arguments]
        with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True) as process:
            # The command saves and ends well when it is asked to stop; Ctrl-C reaches it without us.
            signal.signal(signal.SIGTERM, lambda number, _frame: process.send_signal(number))
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            output, _ = process.communicate()
        if process.returncode:
            sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)
        return {**json.loads(output.splitlines()[-1]), "command": [words[0], *map(self._anonymous, arguments)]}

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Remember a result, and copy its newest network to where other stages find it."""
        snapshot = result.get("snapshot")
        if snapshot is not None:
            (self.workdir / "networks").mkdir(exist_ok=True)
            part = self.workdir / "networks" / f".{name}.part"
            shutil.copyfile(snapshot, part)
            part.replace(self.workdir / "networks" / f"{name}.pkl")
        self.write_json(f"results/{name}.json", result)
        click.echo(json.dumps({"name": name, **result}))

    def result(self, name: str) -> dict[str, Any] | None:
        """What `keep` remembered, or None."""
        return self.read_json(f"results/{name}.json")

    def read_json(self, name: str) -> Any:
        path = self.workdir / name
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    def write_json(self, name: str, value: Any) -> None:
        path = self.workdir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
        part.replace(path)

    def trained_seconds(self, name: str) -> float:
        """How long the training of a result took; the control's and the GAN's are two parts of one run."""
        run_dir = self.result(name)["run_dir"]
        after_gan = 0.0
        if name in ("gan", "gan-longer"):
            after_gan = training_seconds(run_dir, from_kimg=self.result("gan")["kimg"])
        return after_gan if name == "gan-longer" else training_seconds(run_dir) - after_gan

    def _anonymous(self, option: str) -> str:
        """An option without the folders of this machine."""
        return option.replace(str(self.workdir), "WORKDIR").replace(str(ROOT), ".")

    def _split(self) -> tuple[Path, Path]:
        parts = self.workdir / "train.zip", self.workdir / "heldout.zip"
        if not all(path.is_file() for path in parts):
            if self.data is None:
                raise click.UsageError(f"--data is needed: {self.workdir} has no images yet")
            split(Path(self.data), *parts)
        return parts


def stage(minutes: float, extra: bool = True) -> Callable[[Callable], click.Command]:
    """Makes a command of `function(stage, **further options)`.

    Args:
        minutes: default of `--minutes`.
        extra: whether options after `--` go to the command.
    """

    def decorate(function: Callable) -> click.Command:
        @functools.wraps(function)
        def call(workdir, data, minutes, smoke, device, extra=(), **options):
            workdir = Path(workdir).resolve()
            workdir.mkdir(parents=True, exist_ok=True)
            return function(Stage(workdir, data, minutes, smoke, device, extra), **options)

        options = [
            click.option("--data", metavar="PATH", help="The images with labels, a zip; needed in the first call."),
            click.option("--workdir", required=True, metavar="DIR", help="Where everything is kept between calls."),
            click.option(
                "--minutes",
                type=click.FloatRange(min=0, min_open=True),
                default=minutes,
                help="Time of this call once it trains or measures; the next call goes on.",
            ),
            click.option("--smoke", is_flag=True, help="Tiny sizes: shows that everything runs, on any machine."),
            click.option("--device", default="auto", metavar="auto|cpu|cuda", help="Where to compute."),
        ]
        if extra:
            options.append(click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS]"))
        for option in reversed(options):
            call = option(call)
        return click.command(context_settings={"show_default": True, "max_content_width": 110})(call)

    return decorate


def split(source: Path, train: Path, held_out: Path) -> None:
    """Put a tenth of each class aside: of its images in the order of their names' SHA-256, the first tenth.

    The images themselves are copied as they are. The same source gives the same two files, byte for byte.
    """
    with zipfile.ZipFile(source) as archive:
        content = json.loads(archive.read("dataset.json"))
        by_class: dict[str, list[str]] = {}
        for name, label in content["labels"]:
            by_class.setdefault(json.dumps(label), []).append(name)
        chosen = set()
        for names in by_class.values():
            names.sort(key=lambda name: hashlib.sha256(PurePosixPath(name).name.encode()).hexdigest())
            chosen.update(names[: max(len(names) // 10, 1)])
        for path, wanted in [(held_out, True), (train, False)]:
            labels = [[name, label] for name, label in content["labels"] if (name in chosen) == wanted]
            part = path.with_name(f".{path.name}.part")
            with zipfile.ZipFile(part, "w") as copy:
                for name, text in [*((name, archive.read(name)) for name, _ in labels), _description(content, labels)]:
                    copy.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), text)
            part.replace(path)


def _description(content: dict, labels: list) -> tuple[str, str]:
    return "dataset.json", json.dumps({**content, "labels": labels})


def ticks(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `stats.jsonl`."""
    return [json.loads(line) for line in RunFiles(run_dir).stats.read_text("utf-8").splitlines()]


def training_seconds(run_dir: str | Path, from_kimg: float = 0) -> float:
    """How long a run has trained, warm-up included, without metrics and saving."""
    seconds, before = 0.0, 0.0
    for tick in ticks(run_dir):
        if tick["images_per_sec"] and tick["kimg"] > from_kimg:
            seconds += (tick["kimg"] - before) * 1000 / tick["images_per_sec"]
        before = tick["kimg"]
    return seconds
