"""Images drawn from a diffusion teacher, as a data set: `python -m di_refine sample-teacher --teacher=edm.pkl`.

A data-free run needs them where it learns a density ratio: noised teacher samples are one side of it. They are drawn
once and kept in the cache folder, where `cached_samples` finds them.
"""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from di_refine import terminal
from di_refine.commands import cli
from di_refine.errors import InputError, RunError
from di_refine.files import registry
from di_refine.files.dataset_writer import Picture, map_in_order, new_folders, tool, write_archive
from di_refine.files.datasets import ImageDataset
from di_refine.files.download import sha256_of
from di_refine.files.pictures import to_uint8
from di_refine.generators import NetworkSampler, averaged, load_kind
from torch_utils.misc import derive_seed, open_atomic

LAYOUT = 1  # to be raised when samples come to be drawn in another way


@cli.command()
@click.option("--teacher", required=True, metavar="FILE|URL|NAME", help="The EDM diffusion model.")
@click.option("--num", type=cli.Integer(1, 10_000_000), default=10_000, help="Images to draw.")
@click.option("--steps", type=cli.POSITIVE_INT, default=18, help="Steps of EDM's deterministic Heun sampler.")
@click.option("--dest", metavar="FILE.zip", help="Data set to write.  [default: one in the cache folder]")
@click.option(
    "--class-freq",
    default="uniform",
    metavar="uniform|LIST|DATA",
    help="Class frequencies: equal, numbers such as 1,1,2, or those of a data set.",
)
@click.option("--seed", type=cli.NON_NEGATIVE_INT, default=0, help="Of latents and classes.")
@click.option(
    "--batch", type=cli.POSITIVE_INT, default=128, help="Images per pass; changes images by rounding at most."
)
@click.option("--overwrite/--no-overwrite", default=False, help="Draw them anew even if the file is there.")
@cli.device_option
def main(teacher, num, steps, dest, class_freq, seed, batch, overwrite, device):
    """Draw images from a diffusion model into a data set: a zip of PNG files with their classes in dataset.json.

    \b
    python -m di_refine sample-teacher --teacher=edm-digits-16x16-cond.pkl --num=5000
    python -m di_refine sample-teacher --teacher=edm.pkl --dest=samples.zip --class-freq=train.zip --device=cuda

    Without --dest the file is kept in the cache folder and taken from there when the same samples are asked for again.
    Image i depends on the seed and i alone, so a larger --num begins with the same images.
    """
    device = cli.pick_device(device)
    if dest is not None and not dest.lower().endswith(".zip"):
        raise InputError(f"--dest={dest} must end in .zip")
    path = registry.resolve(teacher, option="--teacher", kind="edm")
    net = load_teacher(path)
    probs = class_probs(class_freq, net.label_dim)
    settings = sample_settings(path, num, steps, seed, probs)
    kept = dest is None
    dest = cached_path(path, settings) if kept else Path(dest)
    cli.check_outfile(dest, "DI_REFINE_CACHE" if kept else "--dest", overwrite or kept)

    reused = kept and not overwrite and is_made(dest, settings)
    start = time.monotonic()
    if reused:
        click.echo(f"these samples were drawn before: {dest}", err=True)
        with suppress(OSError):  # the newest file is the one that was asked for last
            os.utime(dest)
    else:
        sampler = NetworkSampler(net, device, steps, class_probs=probs, chunk=min(batch, num))
        sample(sampler, dest, num, seed, settings)
    seconds = time.monotonic() - start
    terminal.print_result(
        {
            "dest": dest,
            "reused": reused,
            "images": num,
            "resolution": net.img_resolution,
            "channels": net.img_channels,
            "classes": net.label_dim,
            "steps": steps,
            "seed": seed,
            "teacher": path,
            "teacher_sha256": settings["teacher_sha256"],
            "sha256": sha256_of(dest),
            "images_per_sec": None if reused else num / max(seconds, 1e-9),
        }
    )


def load_teacher(path: Path) -> torch.nn.Module:
    """The averaged denoiser in a pickle.

    Raises:
        InputError: naming --teacher, when the file is none or holds another kind of network.
    """
    return averaged(load_kind(path, "edm", "--teacher"))


def class_probs(text: str | None, classes: int) -> np.ndarray | None:
    """What `--class-freq` means for a network: `[classes]` with sum 1, or None for equal frequencies.

    Args:
        text: 'uniform' or None, numbers separated by commas, or a labelled data set (path, URL or name).
        classes: of the network.

    Raises:
        InputError: naming --class-freq, when the frequencies do not fit.
    """
    if text in (None, "uniform"):
        return None
    if not classes:
        raise InputError(f"--class-freq={text}: the network has no classes")
    try:
        freq = np.array([float(word) for word in text.split(",")])
    except ValueError:
        path = registry.resolve(text, option="--class-freq", kind="dataset")
        freq = ImageDataset(path, option="--class-freq").class_frequencies()
    if len(freq) != classes:
        raise InputError(f"--class-freq must give {classes} frequencies, one per class of the network, not {len(freq)}")
    if not np.isfinite(freq).all() or (freq < 0).any() or freq.sum() <= 0:
        raise InputError(f"--class-freq={text}: frequencies must not be negative, and one must be positive")
    return freq / freq.sum()


def sample_settings(path: Path, num: int, steps: int, seed: int, probs: np.ndarray | None) -> dict[str, Any]:
    """Everything that samples depend on; two files with the same settings hold the same images."""
    return {
        "layout": LAYOUT,
        "teacher_sha256": sha256_of(path),
        "images": num,
        "steps": steps,
        "seed": seed,
        "class_freq": None if probs is None else probs.tolist(),
    }


def cached_path(teacher_path: str | os.PathLike, settings: dict[str, Any]) -> Path:
    """Where samples are kept: the teacher's name, a hash of its file, and one of the settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return _folder() / f"{Path(teacher_path).stem}-{settings['teacher_sha256'][:12]}-{digest[:8]}.zip"


def cached_samples(teacher_path: str | os.PathLike) -> Path | None:
    """The kept samples of a teacher that were drawn, or asked for, last; None where there are none.

    Args:
        teacher_path: the teacher's file. Its content counts, not its name.
    """
    found = _folder().glob(f"*-{sha256_of(teacher_path)[:12]}-*.zip")
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)


def is_made(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a file holds the samples of these settings; one that does not is reported on stderr."""
    if not path.exists():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            record = json.loads(archive.read("dataset.json"))["conversion"]
        if all(record[name] == value for name, value in settings.items()):
            return True
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError):
        pass
    click.echo(f"note: {path} is damaged or something else and is made anew", err=True)
    return False


def sample(sampler: NetworkSampler, dest: Path, num: int, seed: int, settings: dict[str, Any]) -> None:
    """Draw `num` images into a zip file, which appears whole or not at all.

    Raises:
        RunError: an image is not finite.
        OSError: for instance, the disk is full.
    """
    labels: list[Any] = []
    record = {**settings, "source": "diffusion model", "tool": tool(), "torch": torch.__version__}
    record["device"] = sampler.device.type
    with new_folders(dest.parent), open_atomic(dest) as file, terminal.progress(num, "sampling", "img") as bar:
        drawn = _draw(sampler, num, seed, labels, bar)
        pictures = map_in_order(_encode, drawn, ahead=sampler.chunk)
        write_archive(file, pictures, labels if sampler.label_dim else None, record)


def _draw(
    sampler: NetworkSampler, num: int, seed: int, labels: list, bar: terminal.progress
) -> Iterator[tuple[int, np.ndarray]]:
    """Number and pixels [C, H, W] of each image; fills `labels`."""
    for start in range(0, num, sampler.chunk):
        indices = range(start, min(start + sampler.chunk, num))
        seeds = [derive_seed(seed, index) for index in indices]
        one_hot = sampler.labels(seeds)
        images = sampler.images(seeds, one_hot)
        if not torch.isfinite(images).all():
            raise RunError(f"the teacher's images are not finite, at images {start} to {indices[-1]}; check its file")
        if sampler.label_dim:
            labels += one_hot.argmax(dim=1).tolist()
        yield from zip(indices, to_uint8(images).cpu().numpy())
        bar.update(len(indices))
    if labels and max(labels) < sampler.label_dim - 1:
        # Readers take the largest class number for the last class. Where that was not drawn, vectors tell.
        labels[:] = np.eye(sampler.label_dim)[labels].tolist()


def _encode(numbered: tuple[int, np.ndarray]) -> Picture:
    index, pixels = numbered
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return Picture.encode(image, f"number {index}")


def _folder() -> Path:
    return registry.cache_folder() / "teacher-samples"


if __name__ == "__main__":
    main()
