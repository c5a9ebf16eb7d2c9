"""Films of a walk through the latent space, and sheets: one picture in which rows and columns each change one thing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.interpolate import CubicSpline

from di_refine.commands.styles import first_half, has_styles, mapped, mixed, slerp, stylegan2, synthesize
from di_refine.errors import InputError
from di_refine.files import pictures
from di_refine.generators import NetworkSampler, latents
from di_refine.report.record import Run

Titled = tuple[torch.Tensor, pictures.Titles]
"""Images `[rows * columns, C, R, R]`, uint8 on the CPU, and the titles of columns and rows."""

SNAPSHOTS_PER_SECOND = 2.0

TILE, CELL = 128, 64
"""Pixels to which small images are enlarged in a film and in a sheet."""


# ----------------------------------------------------------------------------------------------------------------------
# Walks


@dataclass(frozen=True)
class Walk:
    """A closed walk from seed to seed, by several pictures at once, each of which keeps one label.

    Attributes:
        seeds: what is visited; picture t visits every `tiles`-th seed from the t-th on.
        tiles: how many pictures there are.
        frames: how many there are from a seed to the next.
        space: 'z' turns latents on their sphere; 'w' draws a smooth curve (a periodic cubic spline) through the w of a
            StyleGAN2 generator; None is the latter where there is one.
    """

    seeds: Sequence[int]
    tiles: int = 1
    frames: int = 25
    space: str | None = None

    def __post_init__(self) -> None:
        if len(self.seeds) % self.tiles or len(self.seeds) < 2 * self.tiles:
            raise InputError(
                f"--video: each of the {self.tiles} walks visits as many seeds, at least two, and --seeds gives "
                f"{len(self.seeds)}; give a multiple of {self.tiles}, or change --tiles"
            )

    def __len__(self) -> int:
        return self.frames * (len(self.seeds) // self.tiles)

    def images(self, sampler: NetworkSampler, labels: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield each frame's images, uint8 `[tiles, C, R, R]` on the CPU, for labels `[tiles, label_dim]`."""
        z = latents(list(self.seeds), sampler.latent_shape).unflatten(0, (-1, self.tiles))  # [stations, tiles, ...]
        in_w = has_styles(sampler) if self.space is None else self.space == "w"
        draw = _drawing_w(sampler, z, labels) if in_w else _drawing_z(sampler, z, labels)
        for frame in range(len(self)):
            yield pictures.to_uint8(draw(frame / self.frames)).cpu()


def _drawing_z(sampler: NetworkSampler, z: torch.Tensor, labels: torch.Tensor) -> Callable[[float], torch.Tensor]:
    """Images at a position in [0, stations), of which the whole numbers are the stations."""

    def draw(position: float) -> torch.Tensor:
        station = int(position)
        between = slerp(z[station], z[(station + 1) % len(z)], position - station)
        return sampler.images([], labels, z=between)

    return draw


def _drawing_w(sampler: NetworkSampler, z: torch.Tensor, labels: torch.Tensor) -> Callable[[float], torch.Tensor]:
    """As `_drawing_z`, on a curve through the w of a StyleGAN2 generator."""
    generator = stylegan2(sampler, "--walk=w", sampler.name)
    stations = torch.stack([mapped(sampler, generator, at, labels) for at in z]).cpu().double().numpy()
    curve = CubicSpline(np.arange(len(z) + 1), np.concatenate([stations, stations[:1]]), bc_type="periodic")
    return lambda position: synthesize(sampler, generator, torch.from_numpy(curve(position)).float())


def frames(walk: Walk, samplers: Sequence[tuple[str, NetworkSampler]], columns: int) -> Iterator[Image.Image]:
    """The pictures of a film: a grid of one network's images, or of several networks', each under its title.

    Raises:
        InputError: networks do not have the same latents and classes, or there is no w to walk in.
    """
    first = samplers[0][1]
    for title, sampler in samplers[1:]:
        if (sampler.latent_shape, sampler.label_dim) != (first.latent_shape, first.label_dim):
            raise InputError(f"--beside: {title} has other latents or classes, so it cannot walk the same way")
    for title, sampler in samplers if walk.space == "w" else ():
        stylegan2(sampler, "--walk=w", title)
    labels = first.law.in_turn(walk.seeds[: walk.tiles])
    return _frames(walk, samplers, columns, labels)


def _frames(walk, samplers, columns, labels) -> Iterator[Image.Image]:
    for images in zip(*(walk.images(sampler, labels) for _, sampler in samplers)):
        if len(samplers) == 1:
            scale = pictures.enlargement(images[0].shape[-1], TILE)
            yield pictures.to_pillow(pictures.make_grid(images[0], columns, scale))
        else:
            panels = [(title, shown) for (title, _), shown in zip(samplers, images)]
            yield pictures.side_by_side(panels, columns, scale=pictures.enlargement(images[0].shape[-1], TILE // 2))


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def of_runs(runs: Sequence[Run]) -> Iterator[Image.Image]:
    """The pictures of samples that runs have drawn of the same latents, one snapshot after the other.

    Where a run has no picture at the number of images of another, it shows the one before. The first and the last stay
    for longer.

    Raises:
        InputError: there are less than two pictures of a run, or one cannot be read.
    """
    for run in runs:
        if len(run.pictures) < 2:
            raise InputError(f"--film: {run.path} has no pictures of two snapshots yet; let it train for longer")
    times = sorted({kimg for run in runs for kimg, _ in run.pictures})
    at_times = [
        [([item for item in run.pictures if item[0] <= at] or run.pictures[:1])[-1] for at in times] for run in runs
    ]
    # A slow network's first picture may have fewer rows.
    sizes = [pictures.read_png(path)[1].size for run in runs for _, path in run.pictures]
    width, height = (max(sides) for sides in zip(*sizes))

    def title(run: Run, kimg: int, path: Path) -> str:
        when = run.start_name if path.name == run.files.samples(0).name else f"{kimg} kimg"
        return when if len(runs) == 1 else f"{run.path.name}, {when}"

    titles = [[title(run, *item) for item in its] for run, its in zip(runs, at_times)]

    def frame(index: int) -> Image.Image:
        panels = []
        for its, titled in zip(at_times, titles):
            paper = Image.new("RGB", (width, height), pictures.PAPER)
            paper.paste(pictures.on_paper(pictures.read_png(its[index][1])[1]))
            panels.append(np.asarray(pictures.headed(paper, titled[index], titled)))
        return Image.fromarray(np.concatenate(panels, axis=1))

    last = len(times) - 1
    return (frame(index) for index in [0, *range(last + 1), last, last])


# ----------------------------------------------------------------------------------------------------------------------
# Sheets


def truncations(sampler: NetworkSampler, network: str, seeds: list[int], psis: Sequence[float]) -> Titled:
    """Each seed in a row, each truncation psi in a column.

    Raises:
        InputError: the network is no StyleGAN2 generator.
    """
    generator = stylegan2(sampler, "--psis", network)
    labels, before, columns = sampler.law.in_turn(seeds), generator.truncation_psi, []
    try:
        for psi in psis:
            generator.truncation_psi = psi
            columns.append(sampler.images(seeds, labels))
    finally:
        generator.truncation_psi = before
    return _rows_first(columns), ([f"psi {psi:g}" for psi in psis], _seed_titles(seeds))


def classes(sampler: NetworkSampler, network: str, seeds: list[int]) -> Titled:
    """Each seed in a row, each class that is drawn in a column.

    Raises:
        InputError: the network has no classes.
    """
    law = sampler.law
    if not (law.label_dim and law.has_classes):
        raise InputError(f"--each-class: {network} has no classes")
    table = torch.eye(law.label_dim)
    columns = [sampler.images(seeds, table[number].expand(len(seeds), -1)) for number in law.present]
    names = [law.title(number) for number in law.present]
    if not all(map(pictures.is_drawable, names)):
        names = [str(number) for number in law.present]
    return _rows_first(columns), (names, _seed_titles(seeds))


def style_mixing(
    sampler: NetworkSampler, network: str, seeds: list[int], others: list[int], layers: Sequence[int] | None
) -> Titled:
    """Each seed in a row; each column takes the w of some layers from another seed (arXiv 1812.04948, section 3.1).

    The first row and column are the seeds by themselves; the corner is white. None for layers is their first half.

    Raises:
        InputError: the network is no StyleGAN2 generator, or has no such layer.
    """
    generator = stylegan2(sampler, "--mix", network)
    if layers is None:
        layers = first_half(generator)
    elif max(layers) >= generator.net.num_ws:
        raise InputError(f"--mix-layers: {network} has the layers 0 to {generator.net.num_ws - 1}")

    def ws_of(of: list[int]) -> torch.Tensor:
        return mapped(sampler, generator, latents(of, sampler.latent_shape), sampler.law.in_turn(of))

    ws, from_others = ws_of(seeds), ws_of(others)
    columns = [synthesize(sampler, generator, ws)]
    columns += [synthesize(sampler, generator, mixed(ws, styles[None], layers)) for styles in from_others]
    alone = synthesize(sampler, generator, from_others)
    top = torch.cat([torch.ones_like(alone[:1]), alone])
    images = torch.cat([pictures.to_uint8(top).cpu(), _rows_first(columns)])
    return images, (["", *_seed_titles(others)], ["", *_seed_titles(seeds)])


def _rows_first(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Columns `[rows, C, R, R]` as the images of a grid, row by row, uint8 on the CPU."""
    return pictures.to_uint8(torch.stack(list(columns), dim=1).flatten(0, 1)).cpu()


def _seed_titles(seeds: Sequence[int]) -> list[str]:
    return [f"seed {seed}" for seed in seeds]
