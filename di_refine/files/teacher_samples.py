"""Images drawn from a diffusion teacher and kept as a data set in the cache folder.

A data-free run needs them where it learns a density ratio: noised teacher samples are one side of it. They are drawn
once by `python -m di_refine sample-teacher`, and `cached_samples` finds them again.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from di_refine import terminal
from di_refine.errors import RunError
from di_refine.files import hub, networks, registry
from di_refine.files.dataset_writer import Picture, map_in_order, new_folders, project_version, write_archive
from di_refine.files.pictures import to_uint8
from di_refine.labels import LabelLaw
from torch_utils import safe_files
from torch_utils.misc import derive_seed, open_atomic

SAMPLES, REFERENCES = "teacher-samples", "teacher-references"
"""Folders in the cache: of what users asked for, and of what metrics compare with."""

LAYOUT = 1  # to be raised when samples come to be drawn in another way


class SeededSampler(Protocol):
    """A network whose images and labels are functions of seeds, such as `di_refine.generators.NetworkSampler`.

    Attributes:
        name: of the network, for messages.
        device: where it runs.
        law: what labels are drawn from.
        chunk: images per forward pass.
    """

    name: str
    device: torch.device
    law: LabelLaw
    chunk: int

    def labels(self, seeds: list[int]) -> torch.Tensor:
        """Return labels `[len(seeds), label_dim]`."""
        ...

    def images(self, seeds: list[int], labels: torch.Tensor) -> torch.Tensor:
        """Return images `[len(seeds), C, R, R]` in [-1, 1]."""
        ...


def sample_settings(
    path: Path, num: int, steps: int, seed: int, labels: LabelLaw, config: networks.Config | None = None
) -> dict[str, Any]:
    """Return everything that samples depend on; two files with the same settings hold the same images.

    Args:
        path: the teacher's file.
        num: number of images.
        steps: steps of the sampler.
        seed: seed of latents and labels.
        labels: what labels are drawn from.
        config: what was given besides the teacher's file.
    """
    frequencies = labels.frequencies if labels.has_classes else None
    return {
        "layout": LAYOUT,
        "teacher_sha256": networks.digest(path, config),
        "images": num,
        "steps": steps,
        "seed": seed,
        "class_freq": None if frequencies is None else frequencies.tolist(),
        **({} if labels.has_classes else {"label_vectors": labels.content}),
    }


def settings_hash(settings: dict[str, Any]) -> str:
    """Return the SHA-256 of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def cached_path(teacher_path: str | os.PathLike, settings: dict[str, Any], folder: str = SAMPLES) -> Path:
    """Return where samples are kept: the teacher's name, a hash of its file, and one of the settings."""
    name = f"{hub.short_name(Path(teacher_path))}-{settings['teacher_sha256'][:12]}-{settings_hash(settings)[:8]}.zip"
    return registry.cache_folder() / folder / name


def cached_samples(teacher_path: str | os.PathLike, config: networks.Config | None = None) -> Path | None:
    """Return the kept samples of a teacher that were drawn, or asked for, last; None where there are none.

    Args:
        teacher_path: the teacher's file. Its content counts, not its name.
        config: what was given besides the teacher's file.
    """
    found = (registry.cache_folder() / SAMPLES).glob(f"*-{networks.digest(teacher_path, config)[:12]}-*.zip")
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)


def is_made(path: Path, settings: dict[str, Any]) -> bool:
    """Return whether a file holds the samples of these settings; one that does not is reported on stderr."""
    if not path.exists():
        return False
    try:
        with safe_files.open_regular(path) as file, zipfile.ZipFile(file) as archive:
            if archive.getinfo("dataset.json").file_size > 16 * safe_files.JSON_BYTES:
                raise ValueError("dataset.json is too large")
            record = safe_files.parse_json(archive.read("dataset.json"), containers=10_000_000)["conversion"]
        if all(record[name] == value for name, value in settings.items()):
            return True
    except Exception:  # of a dozen types: whatever is wrong with the file, another takes its place
        pass
    terminal.say(f"note: {path} is damaged or something else and is made anew")
    return False


def sample(sampler: SeededSampler, dest: Path, num: int, seed: int, settings: dict[str, Any]) -> None:
    """Draw `num` images into a zip file, which appears whole or not at all.

    Image i depends on the seed and i alone.

    Args:
        sampler: the teacher.
        dest: the file to write; its folder may have to be created.
        num: number of images.
        seed: seed of latents and classes.
        settings: what `sample_settings` returns for these images; kept in the file.

    Raises:
        RunError: an image is not finite.
        OSError: for instance, the disk is full.
    """
    labels: list[Any] = []
    record = {**settings, "source": "diffusion model", "tool": project_version(), "torch": torch.__version__}
    record["device"] = sampler.device.type
    with new_folders(dest.parent), open_atomic(dest) as file, terminal.progress(num, "sampling", "img") as bar:
        drawn = _draw(sampler, num, seed, labels, bar)
        pictures = map_in_order(_encode, drawn, ahead=sampler.chunk)
        write_archive(file, pictures, labels if sampler.law.label_dim else None, record, sampler.law.names)


def _draw(
    sampler: SeededSampler, num: int, seed: int, labels: list[Any], bar: terminal.progress
) -> Iterator[tuple[int, np.ndarray]]:
    """Give number and pixels [C, H, W] of each image; fill `labels`."""
    for start in range(0, num, sampler.chunk):
        indices = range(start, min(start + sampler.chunk, num))
        seeds = [derive_seed(seed, index) for index in indices]
        drawn = sampler.labels(seeds)
        images = sampler.images(seeds, drawn)
        if not torch.isfinite(images).all():
            raise RunError(f"images {start} to {indices[-1]} of {sampler.name} are not finite; check its file")
        if sampler.law.label_dim:
            labels += (drawn.argmax(dim=1) if sampler.law.has_classes else drawn).tolist()
        yield from zip(indices, to_uint8(images).cpu().numpy())
        bar.update(len(indices))
    if labels and sampler.law.has_classes and max(labels) < sampler.law.label_dim - 1:
        # Readers take the largest class number for the last class. Where that was not drawn, vectors tell.
        labels[:] = np.eye(sampler.law.label_dim)[labels].tolist()


def _encode(numbered: tuple[int, np.ndarray]) -> Picture:
    index, pixels = numbered
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return Picture.encode(image, f"number {index}")
