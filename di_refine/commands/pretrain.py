"""Make the networks that refinement needs, from images: a diffusion teacher, a GAN, a feature network."""

import click
import numpy as np
import torch

from di_refine import terminal
from di_refine.commands import cli
from di_refine.commands.pretraining import GanTrainer, Options, common_options, in_process_group
from di_refine.edm.augment import AugmentPipe as EdmAugmentPipe
from di_refine.edm.networks import EDMPrecond
from di_refine.errors import InputError
from di_refine.files import datasets, registry
from di_refine.metrics.detectors import load_detector
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.small import ARCHITECTURES, save_small
from di_refine.pretraining.features import AUGMENTATIONS, train_features
from di_refine.pretraining.teacher import TeacherConfig, TeacherTrainer
from stylegan2_ada import augment
from stylegan2_ada.adversarial import AdaController, AdversarialConfig, AdversarialTrainer
from stylegan2_ada.networks import Discriminator, Generator
from torch_utils import distributed, misc


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
@click.option(
    "--lr-rampdown",
    type=cli.NON_NEGATIVE_NUMBER,
    default=0,
    help="Thousand images before --kimg in which the rate falls to zero; 0 keeps it.",
)
@click.option("--sigma-mean", type=cli.Number(), default=-1.2, help="Mean of ln(sigma) in training.")
@click.option("--sigma-std", type=cli.NON_NEGATIVE_NUMBER, default=1.2, help="Standard deviation of ln(sigma).")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", help="Arithmetic of the network.")
@click.option(
    "--compile/--no-compile", default=False, help="Compile the network with torch.compile, which takes a minute once."
)
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
        lr_rampdown=o.lr_rampdown * 1000,
        total=round(o.kimg * 1000),
        ema_nimg=o.ema_kimg * 1000,
        p_mean=o.sigma_mean,
        p_std=o.sigma_std,
        precision=o.precision,
        compile="inductor" if o.compile else None,
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


@main.command(cls=cli.Command, context_settings=cli.CONTEXT)
@click.option("--data", "data_path", required=True, metavar="PATH", help="Labelled images from dataset_tool.py.")
@click.option("--dest", required=True, metavar="FILE.safetensors", help="The feature network to write.")
@click.option("--stats", required=True, metavar="FILE.npz", help="Its statistics of the images, to measure against.")
@click.option("--name", default=None, help="Its name in metrics, as in fd2k_full@NAME.  [default: from --dest]")
@click.option("--epochs", type=cli.POSITIVE_INT, default=40, help="Passes over the images.")
@click.option("--width", type=cli.POSITIVE_INT, default=32, help="Channels of the first layer.")
@click.option("--feature-dim", type=cli.POSITIVE_INT, default=64, help="Size of a feature vector.")
@click.option("--mirror/--no-mirror", default=False, help="Also train on images flipped left to right.")
@click.option("--architecture", type=click.Choice(list(ARCHITECTURES)), default="plain", help="Kind of the network.")
@click.option(
    "--augment",
    type=click.Choice(list(AUGMENTATIONS)),
    default="warp",
    help="Of the images in training: shifted, turned and scaled between the pixels, or shifted by whole pixels.",
)
@click.option("--batch", type=cli.POSITIVE_INT, default=64, help="Images per step.")
@click.option("--lr", type=cli.POSITIVE_NUMBER, default=3e-3, help="Highest learning rate.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", help="Arithmetic of the training.")
@click.option(
    "--held-out", metavar="PATH", help="Images to judge it by; all of --data are trained on.  [default: a tenth]"
)
@click.option(
    "--max-minutes",
    type=cli.POSITIVE_NUMBER,
    help="Stop, saving, after the epoch in which this is over; the same command goes on.",
)
@click.option("--half", is_flag=True, help="Store the weights in float16.")
@click.option("--seed", type=cli.NON_NEGATIVE_INT, default=0, help="Of everything random.")
@cli.ops_option
@cli.device_option
def features(data_path, dest, stats, name, held_out, max_minutes, half, device, **settings):
    """Train a small classifier whose features metrics can use, and measure its statistics of the images."""
    device = cli.pick_device(device)
    dest, stats = cli.check_outfile(dest, "--dest"), cli.check_outfile(stats, "--stats")
    dataset = datasets.ImageDataset(registry.resolve(data_path, option="--data"))
    test = (
        datasets.ImageDataset(registry.resolve(held_out, option="--held-out"), option="--held-out")
        if held_out
        else None
    )
    for part in filter(None, (dataset, test)):
        if not part.has_labels:
            raise InputError(f"{part.option}={part.path} has no labels, which a classifier needs; see dataset_tool.py")
    if test is not None:
        test.check_compatible(dataset.resolution, dataset.num_channels, what="data set of --data")
        if test.label_dim > dataset.label_dim:
            raise InputError(f"--held-out={held_out} has classes that --data={data_path} lacks; give both the same")
    for path in (dest, stats):
        path.parent.mkdir(parents=True, exist_ok=True)
    with terminal.progress(settings["epochs"], "training features", "epoch") as bar:

        def progress(done, total, loss):
            bar.note(f"loss {loss:.4f}")
            bar.update(done - bar.count)

        net, report = train_features(
            *_images_and_classes(dataset),
            held_out=None if test is None else _images_and_classes(test),
            state=dest.with_suffix(".state.pt") if max_minutes else None,
            max_seconds=max_minutes and 60 * max_minutes,
            device=device,
            progress=progress,
            **settings,
        )
    if net is None:
        terminal.print_result({"dest": None, "stats": None, **report})
        return
    save_small(net, dest, name or dest.stem.removeprefix("features-"), report, half)
    Evaluator.reference_statistics(dataset, load_detector(dest, device=device), device=device).save(stats)
    terminal.print_result({"dest": str(dest), "stats": str(stats), **report})


def _images_and_classes(dataset: datasets.ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    return dataset.decode_all(), dataset.labels(np.arange(len(dataset))).argmax(axis=1)


if __name__ == "__main__":
    main()
