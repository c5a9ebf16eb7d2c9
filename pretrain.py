"""Make the networks that refinement needs, from images: a diffusion teacher, a GAN, a feature network."""

import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch

from di_refine import cli, data, images, run, zoo
from di_refine.edm.augment import AugmentPipe as EdmAugmentPipe
from di_refine.edm.networks import EDMPrecond
from di_refine.edm.training import TeacherConfig, TeacherTrainer
from di_refine.errors import InputError, RunError
from di_refine.generators import NetworkSampler
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.features import load_detector
from di_refine.metrics.smallnet import save_small, train_features
from stylegan2_ada import augment
from stylegan2_ada.adversarial import AdaController, AdversarialConfig, AdversarialTrainer
from stylegan2_ada.networks import Discriminator, Generator
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


@cli.group()
def main():
    """Train what `refine.py` starts from: a diffusion teacher, a GAN, or a feature network for metrics."""


@main.command(cls=cli.Command, context_settings=cli.CONTEXT)
@common_options(batch=512, lr=1e-3, kimg=200_000)
@click.option("--width", type=cli.POSITIVE_INT, default=128, help="Channels at full resolution.")
@click.option("--channel-mult", type=cli.INT_LIST, default="2,2,2", help="Channel multiplier of each level.")
@click.option("--num-blocks", type=cli.POSITIVE_INT, default=4, help="Residual blocks per level.")
@click.option("--attn-resolutions", type=cli.INT_LIST, default="16", help="Resolutions with self-attention.")
@click.option("--dropout", type=cli.Number(0, 0.9), default=0.13, help="Dropout probability.")
@click.option("--augment", type=cli.Number(0, 1), default=0.12, help="Probability of EDM's augmentations; 0 for none.")
@click.option("--lr-rampup", type=cli.NON_NEGATIVE_NUMBER, default=10_000, help="Thousand images to the full rate.")
@click.option("--sigma-mean", type=cli.Number(), default=-1.2, help="Mean of ln(sigma) in training.")
@click.option("--sigma-std", type=cli.NON_NEGATIVE_NUMBER, default=1.2, help="Standard deviation of ln(sigma).")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", help="Arithmetic of the network.")
@in_process_group
def teacher(**options):
    """Train an EDM diffusion model (DDPM++ U-Net). The defaults are the published ones for CIFAR-10."""
    o = Options(options, "edm")
    dataset, label_dim, device = o.dataset, o.label_dim, o.device
    widths = {
        "model_channels": o.width,
        "channel_mult": o.channel_mult,
        "num_blocks": o.num_blocks,
        "attn_resolutions": o.attn_resolutions,
        "dropout": o.dropout,
        "augment_dim": 9 if o.augment else 0,
    }
    shape = {"img_resolution": dataset.resolution, "img_channels": dataset.num_channels, "label_dim": label_dim}
    if dataset.resolution % 2 ** (len(o.channel_mult) - 1):
        raise InputError(
            f"--channel-mult has {len(o.channel_mult)} levels, and {dataset.resolution}x{dataset.resolution} images "
            f"cannot be halved {len(o.channel_mult) - 1} times; give fewer levels"
        )
    if o.finish_dry_run():
        return 0
    torch.manual_seed(misc.derive_seed(o.seed, "weights"))
    try:
        net = EDMPrecond(**shape, model_type="SongUNet", **widths)
    except ValueError as error:
        raise InputError(f"--width={o.width} with --channel-mult cannot be built: {error}") from None
    net = net.to(device, memory_format=torch.channels_last)
    pipe = None
    if o.augment:
        pipe = EdmAugmentPipe(p=o.augment, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)
    config = TeacherConfig(
        batch=o.batch,
        batch_gpu=o.batch_gpu,
        lr=o.lr,
        lr_rampup=o.lr_rampup * 1000,
        ema_nimg=o.ema_kimg * 1000,
        p_mean=o.sigma_mean,
        p_std=o.sigma_std,
        precision=o.precision,
        seed=o.seed,
    )
    trainer = TeacherTrainer(net, o.batches, config, pipe)
    return o.train(
        trainer,
        networks=lambda: {
            "ema": trainer.ema,
            "loss_fn": None,
            "augment_pipe": None,
            "dataset_kwargs": {"path": dataset.name, "resolution": dataset.resolution, "use_labels": label_dim > 0},
        },
        net=lambda: trainer.ema,
        status={"loss": "loss", "grad_norm": "|g|"},
    )


@main.command(cls=cli.Command, context_settings=cli.CONTEXT)
@common_options(batch=64, lr=2.5e-3, kimg=100_000)
@click.option("--z-dim", type=cli.POSITIVE_INT, default=512, help="Size of the latents z and w.")
@click.option("--channel-base", type=cli.POSITIVE_INT, default=32768, help="Channels at resolution R: this over R ...")
@click.option("--channel-max", type=cli.POSITIVE_INT, default=512, help="... but at most this.")
@click.option("--mapping-layers", type=cli.POSITIVE_INT, default=2, help="Layers of the mapping network.")
@click.option("--g-arch", type=click.Choice(["orig", "skip", "resnet"]), default="skip", help="Generator architecture.")
@click.option("--d-arch", type=click.Choice(["orig", "skip", "resnet"]), default="orig", help="Discriminator's.")
@click.option(
    "--fp16-res", type=cli.NON_NEGATIVE_INT, default=0, help="Highest resolutions computed in float16 on CUDA."
)
@click.option("--mbstd-group", type=cli.POSITIVE_INT, default=32, help="Group size of minibatch standard deviation.")
@click.option("--gamma", type=cli.NON_NEGATIVE_NUMBER, default=0.01, help="Weight of the R1 penalty.")
@click.option("--pl-weight", type=cli.NON_NEGATIVE_NUMBER, default=0, help="Weight of path-length regularisation.")
@click.option("--style-mixing", type=cli.Number(0, 1), default=0, help="Probability of mixing styles.")
@click.option("--augment", type=click.Choice(["none", *augment.PRESETS]), default="bgc", help="Augmentations of ADA.")
@click.option("--target", type=cli.Number(0, 1), default=0.6, help="ADA: wanted mean sign of D on real images.")
@click.option("--ada-kimg", type=cli.POSITIVE_NUMBER, default=500, help="ADA: thousand images to move p from 0 to 1.")
@in_process_group
def gan(**options):
    """Train StyleGAN2 with adaptive discriminator augmentation. The defaults are the published CIFAR-10
    configuration.
    """
    o = Options(options, "stylegan2")
    dataset, label_dim, device = o.dataset, o.label_dim, o.device
    if dataset.resolution & (dataset.resolution - 1) or dataset.resolution < 8:
        raise InputError(
            f"--data: StyleGAN2 needs a power of two from 8 on, the images are {dataset.resolution} pixels wide"
        )
    micro = distributed.micro_batch(o.batch, o.batch_gpu)
    if micro % min(o.mbstd_group, micro):
        raise InputError(
            f"--mbstd-group={o.mbstd_group} does not divide the {micro} images of a forward pass; use a divisor"
        )
    if o.finish_dry_run():
        return 0
    torch.manual_seed(misc.derive_seed(o.seed, "weights"))
    shared = {"channel_base": o.channel_base, "channel_max": o.channel_max, "num_fp16_res": o.fp16_res}
    shared["conv_clamp"] = 256 if o.fp16_res else None
    image = {"img_resolution": dataset.resolution, "img_channels": dataset.num_channels}
    G = Generator(
        z_dim=o.z_dim,
        c_dim=label_dim,
        w_dim=o.z_dim,
        **image,
        mapping_kwargs={"num_layers": o.mapping_layers},
        synthesis_kwargs={**shared, "architecture": o.g_arch},
    ).to(device)
    D = Discriminator(
        c_dim=label_dim, **image, architecture=o.d_arch, **shared, epilogue_kwargs={"mbstd_group_size": o.mbstd_group}
    ).to(device)
    pipe = ada = None
    if o.augment != "none":
        pipe = augment.AugmentPipe(**augment.PRESETS[o.augment]).to(device)
        ada = AdaController(target=o.target, kimg=o.ada_kimg)
    config = AdversarialConfig(
        batch_gpu=micro,
        g_lr=o.lr,
        d_lr=o.lr,
        r1_gamma=o.gamma,
        pl_weight=o.pl_weight,
        style_mixing_prob=o.style_mixing,
        ema_kimg=o.ema_kimg,
    )
    trainer = GanTrainer(
        AdversarialTrainer(G, D, pipe, ada, config), o.batches, dataset.class_frequencies, o.batch, o.seed
    )
    return o.train(
        trainer,
        networks=lambda: {
            "training_set_kwargs": {
                "path": dataset.name,
                "resolution": dataset.resolution,
                "use_labels": label_dim > 0,
            },
            "G": G,
            "D": D,
            "G_ema": trainer.inner.G_ema,
            "augment_pipe": pipe,
        },
        net=lambda: trainer.inner.G_ema,
        status={"loss_G": "G", "loss_D": "D", "r1_penalty": "R1", "augment_p": "p"},
    )


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


@main.command(cls=cli.Command, context_settings=cli.CONTEXT)
@click.option("--data", "data_path", required=True, metavar="PATH", help="Labelled images from dataset_tool.py.")
@click.option("--dest", required=True, metavar="FILE.safetensors", help="The feature network to write.")
@click.option("--stats", required=True, metavar="FILE.npz", help="Its statistics of the images, to measure against.")
@click.option("--name", default=None, help="Its name in metrics, as in fd2k_full@NAME.  [default: from --dest]")
@click.option("--epochs", type=cli.POSITIVE_INT, default=40, help="Passes over the images.")
@click.option("--width", type=cli.POSITIVE_INT, default=32, help="Channels of the first layer.")
@click.option("--feature-dim", type=cli.POSITIVE_INT, default=64, help="Size of a feature vector.")
@click.option("--mirror/--no-mirror", default=False, help="Also train on images flipped left to right.")
@click.option("--seed", type=cli.NON_NEGATIVE_INT, default=0, help="Of everything random.")
@cli.ops_option
@cli.device_option
def features(data_path, dest, stats, name, epochs, width, feature_dim, mirror, seed, device):
    """Train a small classifier whose features metrics can use, and measure its statistics of the images."""
    device = cli.pick_device(device)
    dest, stats = cli.check_outfile(dest, "--dest"), cli.check_outfile(stats, "--stats")
    dataset = data.ImageDataset(zoo.resolve(data_path, option="--data"))
    if not dataset.has_labels:
        raise InputError(f"--data={data_path} has no labels, which a classifier needs; add them with dataset_tool.py")
    everything = np.arange(len(dataset))
    classes = dataset.labels(everything).argmax(axis=1)
    with cli.progress(epochs, "training features", "epoch") as bar:

        def progress(done, total, loss):
            bar.note(f"loss {loss:.4f}")
            bar.update()

        net, report = train_features(
            dataset.decode_all(),
            classes,
            width=width,
            feature_dim=feature_dim,
            epochs=epochs,
            mirror=mirror,
            seed=seed,
            device=device,
            progress=progress,
        )
    for path in (dest, stats):
        path.parent.mkdir(parents=True, exist_ok=True)
    save_small(net, dest, name or dest.stem.removeprefix("features-"), report)
    Evaluator.reference_statistics(dataset, load_detector(dest, device=device), device=device).save(stats)
    cli.print_result({"dest": str(dest), "stats": str(stats), **report})


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
        self.data_seconds = 0.0
        if self.batch_gpu and self.batch % self.batch_gpu:
            raise InputError(f"--batch={self.batch} is not divisible by --batch-gpu={self.batch_gpu}")
        cli.check_outdir(self.outdir)
        self.dataset = data.ImageDataset(zoo.resolve(self.data, option="--data"), mirror=self.mirror)
        if self.cond and not self.dataset.has_labels:
            raise InputError(f"--cond needs labels, and --data={self.data} has none; add them, or give --no-cond")
        self.label_dim = self.dataset.label_dim if self.cond in (None, True) else 0
        metrics = [name for name in self.metrics.split(",") if name]
        self.evaluator = None
        if metrics:
            several = distributed.world_size() > 1
            self.evaluator = Evaluator(metrics, self.dataset, self.detector, self.device, distributed=several)

    def record(self) -> dict:
        """What `training_options.json` says."""
        record = {k: str(v) if k == "device" else v for k, v in self.values.items() if k != "dry_run"}
        return {"command": self.kind, **record, "label_dim": self.label_dim, "images": len(self.dataset)}

    def finish_dry_run(self) -> bool:
        """Print the options if only they were wanted."""
        if self.dry_run and distributed.is_first():
            click.echo(json.dumps(self.record(), indent=2), err=True)
            cli.print_result(self.record())
        return self.dry_run

    def batches(self, start_nimg: int):
        """This process's training batches from that image on; labels are dropped for an unconditional network."""
        rank, size = distributed.rank(), distributed.world_size()
        stream = data.batches(
            self.dataset,
            self.batch // size,
            self.seed,
            start_nimg,
            self.device,
            self.workers,
            rank=rank,
            world_size=size,
        )
        while True:
            clock = time.monotonic()
            pixels, labels = next(stream)
            self.data_seconds += time.monotonic() - clock
            yield pixels, labels if self.label_dim else labels[:, :0]

    def train(self, trainer, networks, net, status) -> int:
        """Run the loop, print the result, and return the command's exit status."""
        desc = self.desc or f"{self.kind}-{Path(self.dataset.name).stem}{'-cond' if self.label_dim else ''}"
        directory, state = run.open_run(self.outdir, self.resume, desc, self.record())

        def evaluate():
            sampler = NetworkSampler(net(), self.device, class_probs=self._class_probs())
            name = f"network-snapshot-{trainer.nimg // 1000:06d}.pkl" if trainer.nimg else None
            return run.measure(self.evaluator, sampler, self.seed, directory, name)

        def picture(path):
            sampler = NetworkSampler(net(), self.device, class_probs=self._class_probs())
            images.save_grid(path, sampler(0, 64, self.seed)[0], scale=max(1, 32 // self.dataset.resolution))

        loop = run.Loop(
            directory,
            trainer,
            run.Schedule(
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
            data_wait=lambda: self.data_seconds,
        )
        if state is not None:
            loop.resume(state)
        loop()
        directory.close()
        parameters = sum(p.numel() for p in net().parameters())
        last = loop.last or run.Snapshot(0, None)  # a signal may come before there is any
        result = {
            "run_dir": str(directory.path),
            "snapshot": last.path,
            "kimg": trainer.nimg / 1000,
            "stopped": loop.stopped,
            "parameters": parameters,
            "images_per_sec": loop.images_per_sec,
            "minutes": loop.train_seconds / 60,
            **last.results,
        }
        if loop.best is not None:
            result["best_snapshot"] = loop.best.path
        if distributed.is_first():
            cli.print_result(result)
        return loop.exit_status

    def _class_probs(self):
        return self.dataset.class_frequencies() if self.label_dim else None


if __name__ == "__main__":
    main()
