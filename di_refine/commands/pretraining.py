"""What the trainings of `pretrain.py` share: their options, their data, and the loop's view of the GAN."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from di_refine import terminal
from di_refine.commands import cli
from di_refine.errors import InputError, RunError
from di_refine.files import datasets, pictures, registry
from di_refine.generators import NetworkSampler
from di_refine.metrics.evaluate import Evaluator
from di_refine.runs import loop
from stylegan2_ada.adversarial import AdversarialTrainer
from torch_utils import distributed, misc


def common_options(batch: int, lr: float, kimg: float):
    """The options both kinds of training share."""
    options = [
        click.option("--data", required=True, metavar="PATH", help="Images: a zip or folder made by dataset_tool.py."),
        click.option(
            "--outdir",
            required=True,
            metavar="DIR",
            help="Where the numbered run directory is made, or one to continue.",
        ),
        click.option("--desc", default=None, help="Words for the run directory's name.  [default: from the data]"),
        click.option("--cond/--no-cond", default=None, help="Class-conditional.  [default: if the data have labels]"),
        click.option("--kimg", type=cli.POSITIVE_NUMBER, default=kimg, help="Length, in thousands of images."),
        click.option("--max-minutes", type=cli.POSITIVE_NUMBER, default=None, help="Stop, saving, after this long."),
        click.option(
            "--stop-if-worse",
            type=cli.Number(above=1),
            default=None,
            help="Stop when the first metric is worse than at the start by this factor.",
        ),
        click.option("--batch", type=cli.POSITIVE_INT, default=batch, help="Images per step."),
        click.option(
            "--batch-gpu", type=cli.POSITIVE_INT, default=None, help="Images per forward pass.  [default: all]"
        ),
        click.option("--lr", type=cli.POSITIVE_NUMBER, default=lr, help="Learning rate."),
        click.option("--ema-kimg", type=cli.NON_NEGATIVE_NUMBER, default=500, help="Half-life of the average."),
        click.option("--mirror/--no-mirror", default=False, help="Also train on images flipped left to right."),
        click.option(
            "--metrics", default="", metavar="LIST", help="Measured at each snapshot, such as fd2k_full@digits."
        ),
        click.option("--detector", metavar="FILE", help="Feature network of metrics that are not in the registry."),
        click.option(
            "--tick", type=cli.POSITIVE_NUMBER, default=10, help="Kimg between status lines and training states."
        ),
        click.option("--snap", type=cli.POSITIVE_INT, default=10, help="Ticks between snapshots."),
        click.option("--keep", type=cli.POSITIVE_INT, default=2, help="How many newest states and snapshots stay."),
        click.option("--seed", type=cli.NON_NEGATIVE_INT, default=0, help="Of everything random."),
        click.option("--workers", type=cli.POSITIVE_INT, default=2, help="Threads or processes that decode images."),
        click.option(
            "--resume",
            default=None,
            metavar="auto|RUN",
            help="Continue the newest such run in --outdir, or a run directory or training-state file.",
        ),
        click.option("--dry-run", is_flag=True, help="Print the resolved options and stop."),
        cli.ops_option,
        cli.device_option,
    ]

    def add(function):
        for option in reversed(options):
            function = option(function)
        return function

    return add


def in_process_group(function):
    """Runs a command as one of the processes that torchrun started, if it did."""

    @functools.wraps(function)
    def run_in_group(device, **options):
        with distributed.process_group(cli.pick_device(device)) as device:
            return function(device=device, **options)

    return run_in_group


class GanTrainer:
    """`AdversarialTrainer` with its data and random draws, as `run.Loop` drives it."""

    def __init__(self, inner: AdversarialTrainer, batches, class_frequencies, batch: int, seed: int):
        self.inner, self._data, self._seed, self._batch = inner, batches, seed, batch
        self._frequencies = class_frequencies
        self._share = distributed.share(batch)
        self._batches = None

    @property
    def nimg(self) -> int:
        return self.inner.nimg

    def step(self) -> dict[str, torch.Tensor]:
        inner = self.inner
        if self._batches is None:
            self._batches = self._data(self.nimg)
        real, labels = next(self._batches)
        device = next(inner.G.parameters()).device
        rng = torch.Generator(device).manual_seed(misc.derive_seed(self._seed, self.nimg, "latents"))
        z = torch.randn([2 * self._batch, inner.G.z_dim], generator=rng, device=device)
        fake_labels = torch.zeros([len(z), labels.shape[1]], device=device)
        if labels.shape[1]:
            probs = torch.as_tensor(self._frequencies(), dtype=torch.float32, device=device)
            index = torch.multinomial(probs, len(z), replacement=True, generator=rng)
            fake_labels.scatter_(1, index[:, None], 1)
        # Drawn for the whole batch, for both networks, and then cut: the same images for any number of processes.
        z, fake_labels = (torch.cat([half[self._share] for half in x.chunk(2)]) for x in (z, fake_labels))
        rank = [distributed.rank()] if distributed.rank() else []
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(misc.derive_seed(self._seed, self.nimg, "networks", *rank))
            return inner.step(real.to(torch.float32) / 127.5 - 1, labels, z, fake_labels)

    def check_finite(self, last_good: str = "none yet") -> None:
        try:
            self.inner.check_finite()
        except FloatingPointError as error:
            raise RunError(f"{error}; last good snapshot: {last_good}. Lower --lr, or raise --gamma.") from None

    def state_dict(self) -> dict:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.inner.load_state_dict(state)
        self._batches = None


@dataclass
class _Namespace:
    """Options by attribute."""

    values: dict

    def __getattr__(self, name):
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None


class Options(_Namespace):
    """Checked options of a training command, and what follows from them."""

    def __init__(self, values: dict, kind: str):
        super().__init__(values)
        self.kind = kind
        if self.batch_gpu and self.batch % self.batch_gpu:
            raise InputError(f"--batch={self.batch} is not divisible by --batch-gpu={self.batch_gpu}")
        cli.check_outdir(self.outdir)
        self.dataset = datasets.ImageDataset(registry.resolve(self.data, option="--data"), mirror=self.mirror)
        if self.cond and not self.dataset.has_labels:
            raise InputError(f"--cond needs labels, and --data={self.data} has none; add them, or give --no-cond")
        self.label_dim = self.dataset.label_dim if self.cond in (None, True) else 0
        labels = self.label_dim > 0
        self.batches = datasets.Stream(
            self.dataset, self.batch, self.seed, self.device, self.workers, labels, as_float=False
        )
        metrics = [name for name in self.metrics.split(",") if name]
        self.evaluator = None
        if metrics:
            several = distributed.world_size() > 1
            self.evaluator = Evaluator(metrics, self.dataset, self.detector, self.device, distributed=several)
        elif self.stop_if_worse:
            raise InputError("--stop-if-worse goes by the first metric, and there is none; give --metrics")

    def record(self) -> dict:
        """What `training_options.json` says."""
        record = {k: str(v) if k == "device" else v for k, v in self.values.items() if k != "dry_run"}
        return {"command": self.kind, **record, "label_dim": self.label_dim, "images": len(self.dataset)}

    def finish_dry_run(self) -> bool:
        """Print the options if only they were wanted."""
        if self.dry_run and distributed.is_first():
            click.echo(json.dumps(self.record(), indent=2), err=True)
            terminal.print_result(self.record())
        return self.dry_run

    def train(self, trainer, networks, net, status) -> int:
        """Run the loop, print the result, and return the command's exit status."""
        desc = self.desc or f"{self.kind}-{Path(self.dataset.name).stem}{'-cond' if self.label_dim else ''}"
        directory, state = loop.open_run(self.outdir, self.resume, desc, self.record())

        def evaluate():
            sampler = NetworkSampler(net(), self.device, class_probs=self._class_probs())
            name = f"network-snapshot-{trainer.nimg // 1000:06d}.pkl" if trainer.nimg else None
            return loop.measure(self.evaluator, sampler, self.seed, directory, name)

        def picture(path):
            sampler = NetworkSampler(net(), self.device, class_probs=self._class_probs())
            pictures.save_grid(path, sampler(0, 64, self.seed)[0], scale=max(1, 32 // self.dataset.resolution))

        driver = loop.Loop(
            directory,
            trainer,
            loop.Schedule(
                total=max(round(self.kimg * 1000), 1),
                tick=round(self.tick * 1000),
                snap=self.snap,
                max_seconds=self.max_minutes * 60 if self.max_minutes else None,
                keep=self.keep,
                stop_if_worse=self.stop_if_worse,
            ),
            networks,
            evaluate if self.evaluator else None,
            higher_is_better=bool(self.evaluator) and self.evaluator.specs[0].higher_is_better,
            picture=picture,
            status=status,
            data_wait=lambda: self.batches.seconds,
        )
        if state is not None:
            driver.resume(state)
        driver()
        directory.close()
        parameters = sum(p.numel() for p in net().parameters())
        last = driver.last or loop.Snapshot(0, None)  # a signal may come before there is any
        result = {
            "run_dir": str(directory.path),
            "snapshot": last.path,
            "kimg": trainer.nimg / 1000,
            "stopped": driver.stopped,
            "parameters": parameters,
            "images_per_sec": driver.images_per_sec,
            "minutes": driver.train_seconds / 60,
            **last.results,
        }
        if driver.best is not None:
            result["best_snapshot"] = driver.best.path
        if distributed.is_first():
            terminal.print_result(result)
        return driver.exit_status

    def _class_probs(self):
        return self.dataset.class_frequencies() if self.label_dim else None
