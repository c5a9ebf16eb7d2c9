"""The command `generate.py`: images from a StyleGAN2 generator, a diffusion model, or a one-step generator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from di_refine import terminal
from di_refine.commands import cli
from di_refine.commands.config import LabelsConfig
from di_refine.commands.options import options
from di_refine.errors import InputError
from torch_utils.settings import FILES, MACHINE, WHAT

if TYPE_CHECKING:
    from PIL import Image

    from di_refine.generators import NetworkSampler

GRID_IMAGES = 400
"""How many images the grid shows at the most."""


SHOWN = list(range(8))
"""The seeds of sheets and films where none are given."""

SOLVER = ("sigma_min", "sigma_max", "rho", "solver", "S_churn", "S_min", "S_max", "S_noise")
FILM_OPTIONS = ("beside", "walk", "tiles", "seconds", "fps")

option = functools.partial(click.option, cls=cli.Option)
DIFFUSION, STYLEGAN2, SHEETS, FILMS = "Diffusion models", "StyleGAN2 generators", "Sheets", "Films"


@cli.command()
@option("--network", required=True, metavar="FILE|URL|NAME", help="Draw from this network.", group=WHAT)
@option(
    "--seeds",
    type=cli.INT_LIST,
    metavar="LIST",
    help="Draw one image for each seed, as in 0-63 or 1,5,8-10.  [default: 0-63; for sheets and films 0-7]",
    group=WHAT,
)
@cli.class_option
@options(LabelsConfig)
@option(
    "--latents",
    type=click.Choice(["own", "edm"]),
    default="own",
    help="Draw latents and classes of a seed as the StyleGAN family's tools do (own), or as EDM's do.",
    group=WHAT,
)
@option(
    "--truncation",
    type=cli.Number(),
    default=1.0,
    help="Truncate w by this psi; 1 does not.",
    group=STYLEGAN2,
)
@option(
    "--noise-mode",
    type=click.Choice(["const", "random", "none"]),
    default="const",
    help="Choose the noise inputs.",
    group=STYLEGAN2,
)
@option(
    "--projected-w",
    metavar="FILE.npz",
    help="Draw from these w, [N, layers, w_dim] in the entry 'w' as projectors write it, in place of --seeds.",
    group=STYLEGAN2,
)
@option(
    "--init-sigma",
    type=cli.POSITIVE_NUMBER,
    help="Make images in one step from this noise level.  [default: from the file]",
    group=DIFFUSION,
)
@option("--steps", type=cli.POSITIVE_INT, default=18, help="Sample with this many steps.", group=DIFFUSION)
@option("--sigma-min", type=cli.POSITIVE_NUMBER, help="Let noise levels end here.  [default: 0.002]", group=DIFFUSION)
@option("--sigma-max", type=cli.POSITIVE_NUMBER, help="Let noise levels begin here.  [default: 80]", group=DIFFUSION)
@option("--rho", type=cli.POSITIVE_NUMBER, help="Space noise levels by this power.  [default: 7]", group=DIFFUSION)
@option("--solver", type=click.Choice(["heun", "euler"]), help="Choose the solver.  [default: heun]", group=DIFFUSION)
@option("--S-churn", "S_churn", type=cli.Number(0), help="Add so much noise on the way.  [default: 0]", group=DIFFUSION)
@option("--S-min", "S_min", type=cli.Number(0), help="... at noise levels from here ...  [default: 0]", group=DIFFUSION)
@option("--S-max", "S_max", type=cli.Number(0), help="... to here ...  [default: no limit]", group=DIFFUSION)
@option("--S-noise", "S_noise", type=cli.Number(0), help="... inflated by this factor.  [default: 1]", group=DIFFUSION)
@option(
    "--psis",
    type=cli.NUMBER_LIST,
    metavar="LIST",
    help="Write truncation.png: seeds in rows, these truncation psi in columns, as in 0,0.5,0.7,1.",
    group=SHEETS,
)
@option("--each-class", is_flag=True, help="Write classes.png: seeds in rows, classes in columns.", group=SHEETS)
@option(
    "--mix",
    type=cli.INT_LIST,
    metavar="SEEDS",
    help="Write mixing.png: seeds in rows, which take the styles of some layers from these seeds in columns.",
    group=SHEETS,
)
@option(
    "--mix-layers",
    type=cli.INT_LIST,
    metavar="LIST",
    help="Take the styles of these layers, of which 0 is the coarsest.  [default: the first half]",
    group=SHEETS,
)
@option(
    "--video",
    metavar="FILE.gif|.webp|.mp4",
    help="Write a film of a walk that visits the seeds and comes back to the first.",
    group=FILMS,
)
@option(
    "--beside",
    metavar="FILE|URL|NAME",
    help="Let this network walk the same way, beside the first: before and after.",
    group=FILMS,
)
@option(
    "--walk",
    type=click.Choice(["z", "w"]),
    help="Walk on the sphere of latents (z), or on a smooth curve in w.  [default: w where there is one]",
    group=FILMS,
)
@option(
    "--tiles",
    type=cli.POSITIVE_INT,
    help="Show so many walks at once, in rows of --columns; the seeds are dealt out.  [default: 1]",
    group=FILMS,
)
@option("--seconds", type=cli.POSITIVE_NUMBER, help="Take so long from a seed to the next.  [default: 1]", group=FILMS)
@option("--fps", type=cli.Number(above=0, maximum=50), help="Show so many frames a second.  [default: 25]", group=FILMS)
@option(
    "--grid/--no-grid",
    default=True,
    help=f"Write the first {GRID_IMAGES} images as one picture, too: grid.png.",
    group=FILES,
)
@option(
    "--columns",
    type=cli.POSITIVE_INT,
    help="Put this many images into a row of the grid.  [default: about square]",
    group=FILES,
)
@option(
    "--subdirs/--no-subdirs", default=False, help="Put every thousand images into a folder of their own.", group=FILES
)
@option("--outdir", default="out", metavar="DIR", help="Write pictures to this folder.", group=FILES)
@option("--batch", type=cli.POSITIVE_INT, default=64, help="Draw this many images at once.", group=MACHINE)
@cli.ops_option
@cli.device_option
def main(network, seeds, label, labels, latents, truncation, noise_mode, projected_w, init_sigma, steps, **rest):
    """Write one PNG per seed, and a grid; or a sheet, or a film.

    \b
    python generate.py --network=stylegan2-digits.pkl --seeds=0-79 --columns=10
    python generate.py --network=edm-digits-16x16-cond.pkl --seeds=0-9 --steps=18 --class=3
    python generate.py --network=mine.pkl --class=flags
    python generate.py --network=ffhq.pkl --projected-w=out/projected_w.npz
    python generate.py --network=stylegan2-digits.pkl --seeds=0-5 --psis=0,0.5,0.7,1
    python generate.py --network=stylegan2-digits.pkl --seeds=0-3 --each-class
    python generate.py --network=stylegan2-digits.pkl --seeds=0-3 --mix=4-9 --mix-layers=0-2
    python generate.py --network=before.pkl --beside=after.pkl --video=walk.gif --tiles=6 --seeds=0-17

    Classes that are all equally frequent come in turn: seed modulo classes. Otherwise each seed draws a label. A grid
    whose columns or rows have one class each shows the names that the network's file has for them. Each tile of a film
    keeps the label of its first seed.

    On a CPU a seed gives the same pixels on every machine. The latents are those of the StyleGAN family's tools; with
    --latents=edm those of EDM's, with which a diffusion model gives the images that EDM's own tool gives.
    """
    # PyTorch is imported here and not above, so that --help is quick.
    from di_refine.files import pictures, registry
    from di_refine.generators import DiffusionSampler, load_sampler

    place = cli.pick_device(rest["device"])
    folder = cli.check_outdir(rest["outdir"])
    work = _chosen(projected_w, rest)
    solver = {name: rest[name] for name in SOLVER if rest[name] is not None}

    def load(name: str) -> NetworkSampler:
        drawing = {"init_sigma": init_sigma, "noise_mode": noise_mode, "labels": labels, "label": label}
        sampler = load_sampler(registry.resolve(name), steps, truncation, place, **drawing)
        if isinstance(sampler, DiffusionSampler):
            terminal.say(
                f"note: {name} is sampled as a diffusion model, in {steps} steps; if it was distilled to one step, "
                "give the noise level with --init-sigma"
            )
            sampler.solver = solver
        elif solver:
            given = next(iter(solver)).replace("_", "-")
            raise InputError(f"--{given} is for diffusion models, and {name} makes images in a step or a few")
        pictures.check_channels(sampler.num_channels)
        return sampler

    if work == "--video":
        from di_refine.files import film

        film.check(cli.check_outfile(rest["video"], "--video"), "--video")
    sampler = load(network)
    if latents != "own" and work is not None:
        raise InputError(f"--latents={latents} is for pictures one by one, without {work}")
    if work == "--projected-w":
        if truncation != 1 or label is not None or labels is not None or seeds is not None:
            raise InputError("--projected-w has its own w; leave --seeds, --truncation, --class and --labels out")
        result = draw_projected(projected_w, sampler, network, folder)
    elif work == "--video":
        result = draw_film(load, sampler, network, seeds or SHOWN, rest)
    elif work is not None:
        if rest["columns"]:
            raise InputError(f"--columns is for pictures and films; {work} says itself what stands in columns")
        if work == "--psis" and truncation != 1:
            raise InputError("--psis has truncation psi in columns; leave --truncation out")
        result = draw_sheet(work, sampler, network, seeds or SHOWN, folder, rest)
    else:
        edms_classes = latents == "edm" and label is None and labels is None
        result = draw_pictures(sampler, seeds or list(range(64)), folder, latents == "edm", edms_classes, rest)
    terminal.print_result({"outdir": str(rest["outdir"]), **result})


def _chosen(projected_w: str | None, given: dict[str, Any]) -> str | None:
    """Say which option asks for something else than one picture per seed; None where none does.

    Raises:
        InputError: two do, or an option is given that belongs to one that is not.
    """
    asked = {"--projected-w": projected_w, "--video": given["video"], "--psis": given["psis"], "--mix": given["mix"]}
    asked["--each-class"] = given["each_class"] or None
    works = [name for name, value in asked.items() if value is not None]
    if len(works) > 1:
        raise InputError(f"{works[0]} and {works[1]} each write something of their own; give one of them")
    work = works[0] if works else None
    for whose, names in {"--video": FILM_OPTIONS, "--mix": ("mix_layers",)}.items():
        stray = [name for name in names if given[name] is not None]
        if stray and work != whose:
            raise InputError(f"--{stray[0].replace('_', '-')} is for {whose}; give that, too, or leave it out")
    return work


def draw_pictures(
    sampler: NetworkSampler, seeds: list[int], folder: Path, edm: bool, edms_classes: bool, given: dict[str, Any]
) -> dict[str, Any]:
    """Write a picture for each seed, and a grid of the first; return what the result says.

    Args:
        sampler: makes them.
        seeds: one for each picture.
        folder: where to write.
        edm: draw latents as EDM's tools do ...
        edms_classes: ... and classes, too, where there are any.
        given: the command's options.
    """
    import torch

    from di_refine.files import pictures
    from di_refine.generators import edm_latents

    law, batch, grid, columns = sampler.law, given["batch"], given["grid"], given["columns"]
    has_classes = law.label_dim > 0 and law.has_classes
    edms_classes = edms_classes and has_classes
    if edms_classes:
        terminal.say("note: labels: all classes equally often, as EDM's tool draws them")
    elif law.sentence:
        terminal.say(f"note: {law.sentence}")
    folder.mkdir(parents=True, exist_ok=True)

    def file_of(seed: int) -> Path:
        inner = folder / f"{seed - seed % 1000:06d}" if given["subdirs"] else folder
        inner.mkdir(exist_ok=True)
        return inner / f"seed{seed:04d}.png"

    shown, asked = [], []  # for the grid; more images than it shows are not kept
    counts = torch.zeros(sampler.label_dim)
    with terminal.progress(len(seeds), "generating", "img") as bar:
        for start in range(0, len(seeds), batch):
            chunk = seeds[start : start + batch]
            labels, z = law.in_turn(chunk), None
            if edm:
                z, edms = edm_latents(chunk, sampler.latent_shape, sampler.label_dim, sampler.device)
                labels = edms if edms_classes else labels
            counts += labels.sum(dim=0)
            images = sampler.images(chunk, labels, noise_seed=chunk[0], z=z)
            drawn = pictures.to_uint8(images).cpu()
            for seed, picture in zip(chunk, drawn):
                pictures.save_png(file_of(seed), picture)
            if grid and start < GRID_IMAGES:
                shown.append(drawn[: GRID_IMAGES - start])
                asked.append(labels[: GRID_IMAGES - start])
            bar.update(len(chunk))
    result: dict[str, Any] = {"images": len(seeds), "labels": "edm" if edms_classes else law.described}
    if has_classes:
        result["class_counts"] = {
            law.title(number): count for number, count in enumerate(counts.int().tolist()) if count
        }
    if grid:
        path = folder / "grid.png"
        images, labels = torch.cat(shown), torch.cat(asked)
        titles = law.titles(labels, pictures.grid_columns(len(images), columns), pictures.is_drawable)
        pictures.save_grid(path, images, columns, pictures.enlargement(sampler.resolution), titles=titles)
        result["grid"] = str(path)
        if len(seeds) > GRID_IMAGES:
            terminal.say(f"note: the grid shows the first {GRID_IMAGES} of {len(seeds)} images")
    return result


def draw_sheet(
    work: str, sampler: NetworkSampler, network: str, seeds: list[int], folder: Path, given: dict[str, Any]
) -> dict[str, Any]:
    """Write one picture whose rows are seeds; return what the result says."""
    from di_refine.commands import films
    from di_refine.files import pictures

    if work == "--psis":
        name, images, titles = "truncation", *films.truncations(sampler, network, seeds, given["psis"])
    elif work == "--each-class":
        name, images, titles = "classes", *films.classes(sampler, network, seeds)
    else:
        mixed = films.style_mixing(sampler, network, seeds, given["mix"], given["mix_layers"])
        name, images, titles = "mixing", *mixed
    folder.mkdir(parents=True, exist_ok=True)
    path, scale = folder / f"{name}.png", pictures.enlargement(sampler.resolution, films.CELL)
    pictures.save_grid(path, images, len(titles[0]), scale, gap=2, titles=titles)
    return {"sheet": str(path), "columns": len(titles[0]), "rows": len(titles[1])}


def draw_film(
    load: Callable[[str], NetworkSampler],
    sampler: NetworkSampler,
    network: str,
    seeds: list[int],
    given: dict[str, Any],
) -> dict[str, Any]:
    """Write a film of a walk; return what the result says."""
    from di_refine.commands import films
    from di_refine.files import film, pictures

    path = Path(given["video"])
    networks = [network, *([given["beside"]] if given["beside"] else [])]
    samplers = [sampler, *map(load, networks[1:])]
    fps, tiles = given["fps"] or 25.0, given["tiles"] or 1
    columns = pictures.grid_columns(tiles, given["columns"])
    walk = films.Walk(seeds, tiles, max(1, round((given["seconds"] or 1.0) * fps)), given["walk"])
    frames = films.frames(walk, [(Path(name).stem, each) for name, each in zip(networks, samplers)], columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with terminal.progress(len(walk), "filming", "frames") as bar:

        def counted() -> Iterator[Image.Image]:
            for frame in frames:
                yield frame
                bar.update()

        count = film.save(path, counted(), fps)
    return {"video": str(path), "frames": count, "seconds": count / fps}


def draw_projected(file: str, sampler: NetworkSampler, network: str, folder: Path) -> dict[str, Any]:
    """Write a picture for each w in a file; return what the result says.

    Raises:
        InputError: the network is no StyleGAN2 generator, or the file holds no w of it.
    """
    import torch

    from di_refine.commands import styles
    from di_refine.files import arrays, pictures

    generator = styles.stylegan2(sampler, "--projected-w", network)
    try:
        content, others = arrays.read(Path(file), ("w",))
    except (OSError, *arrays.ERRORS) as error:
        raise InputError(f"--projected-w={file} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    wanted = [generator.net.num_ws, generator.net.w_dim]
    ws = content.get("w")
    if ws is None or ws.ndim != 3 or list(ws.shape[1:]) != wanted or ws.dtype.kind != "f" or not len(ws):
        found = f"w {list(ws.shape)}" if ws is not None else ", ".join(list(others)[:10]) or "nothing"
        raise InputError(f"--projected-w={file} holds {found}, and w [N, {wanted[0]}, {wanted[1]}] is needed")
    folder.mkdir(parents=True, exist_ok=True)
    with terminal.progress(len(ws), "generating", "img") as bar:
        for number, w in enumerate(torch.from_numpy(ws).float()):
            image = styles.synthesize(sampler, generator, w[None])
            pictures.save_png(folder / f"proj{number:02d}.png", pictures.to_uint8(image[0]).cpu())
            bar.update()
    return {"images": len(ws), "projected_w": file}


if __name__ == "__main__":
    main()
