"""The command `python -m di_refine sample-teacher`: it draws a data set from a diffusion model."""

import os
import time
from contextlib import suppress
from pathlib import Path

import click

from di_refine import terminal
from di_refine.commands import cli
from di_refine.commands.config import LabelsConfig
from di_refine.commands.options import options
from di_refine.errors import InputError


@cli.command()
@click.option(
    "--teacher", required=True, metavar="FILE|FOLDER|URL|NAME|hf:ORG/NAME", help="Draw from this diffusion model."
)
@click.option(
    "--teacher-config",
    metavar="FILE.json",
    help="Take from this JSON file what the teacher's file does not say: the flags of a .pt file's training, or a "
    "scheduler's settings.  [default: the JSON file that has the .pt file's name]",
)
@click.option("--num", type=cli.Integer(1, 10_000_000), default=10_000, help="Draw this many images.")
@click.option(
    "--steps", type=cli.POSITIVE_INT, default=18, help="Take this many steps of EDM's deterministic Heun sampler."
)
@click.option("--dest", metavar="FILE.zip", help="Write the data set to this file.  [default: one in the cache folder]")
@options(LabelsConfig)
@cli.class_option
@click.option("--seed", type=cli.NON_NEGATIVE_INT, default=0, help="Draw latents and classes from this seed.")
@click.option(
    "--batch",
    type=cli.POSITIVE_INT,
    default=128,
    help="Draw this many images per forward pass; the number changes pixels by rounding at most.",
)
@click.option(
    "--overwrite/--no-overwrite", default=False, help="Draw the images anew even if the file is there, and replace it."
)
@cli.device_option
def main(teacher, teacher_config, num, steps, dest, labels, label, seed, batch, overwrite, device):
    """Draw images from a diffusion model into a data set: a zip of PNG files with their classes in dataset.json.

    \b
    python -m di_refine sample-teacher --teacher=edm-digits-16x16-cond.pkl --num=5000
    python -m di_refine sample-teacher --teacher=edm.pkl --dest=samples.zip --labels=train.zip --device=cuda

    Without --dest the file is kept in the cache folder and taken from there when the same samples are asked for again.
    Image i depends on the seed and i alone, so a larger --num begins with the same images.
    """
    # What imports PyTorch is imported here, because --help must not wait for it.
    from di_refine import denoisers
    from di_refine.files import label_laws, networks, registry, teacher_samples
    from di_refine.files.download import sha256_of
    from di_refine.generators import DiffusionSampler

    device = cli.pick_device(device)
    if dest is not None and not dest.lower().endswith(".zip"):
        raise InputError(f"--dest={dest} must end in .zip")
    path = registry.resolve(teacher, setting="teacher", kind="edm")
    file = networks.load(path, "teacher", teacher_config).require(networks.EDM, "teacher")
    net = file.average
    law = label_laws.choose(labels, file.labels, label=label)
    denoisers.check_labels(net, law)
    settings = teacher_samples.sample_settings(path, num, steps, seed, law, teacher_config)
    kept = dest is None
    dest = teacher_samples.cached_path(path, settings) if kept else Path(dest)
    cli.check_outfile(dest, "DI_REFINE_CACHE" if kept else "--dest", overwrite or kept)

    if law.sentence:
        terminal.say(f"note: {law.sentence}")
    reused = kept and not overwrite and teacher_samples.is_made(dest, settings)
    start = time.monotonic()
    if reused:
        terminal.say(f"these samples were drawn before: {dest}")
        with suppress(OSError):  # the newest file is the one that was asked for last
            os.utime(dest)
    else:
        sampler = DiffusionSampler(net, device, steps, law=law, chunk=min(batch, num), name=str(path))
        teacher_samples.sample(sampler, dest, num, seed, settings)
    seconds = time.monotonic() - start
    terminal.print_result(
        {
            "dest": dest,
            "reused": reused,
            "images": num,
            "resolution": net.img_resolution,
            "channels": net.img_channels,
            "classes": net.label_dim,
            "labels": law.described,
            "steps": steps,
            "seed": seed,
            "teacher": path,
            "teacher_sha256": settings["teacher_sha256"],
            "sha256": sha256_of(dest),
            "images_per_sec": None if reused else num / max(seconds, 1e-9),
        }
    )


if __name__ == "__main__":
    main()
