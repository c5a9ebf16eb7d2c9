"""The command `generate.py`: images from a StyleGAN2 generator, a diffusion model, or a one-step generator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from di_refine import terminal
from di_refine.commands import cli
from di_refine.commands.config import LabelsConfig
from di_refine.commands.options import options
from di_refine.errors import InputError

if TYPE_CHECKING:
    from di_refine.generators import NetworkSampler

GRID_IMAGES = 400
"""How many images the grid shows at the most."""


@cli.command()
@click.option("--network", required=True, metavar="FILE|URL|NAME", help="Draw from this network.")
@click.option(
    "--seeds",
    type=cli.INT_LIST,
    default="0-63",
    metavar="LIST",
    help="Draw one image for each seed, as in 0-63 or 1,5,8-10.",
)
@cli.class_option
@options(LabelsConfig)
@click.option(
    "--truncation", type=cli.Number(), default=1.0, help="Truncate a StyleGAN2 generator's w by this psi; 1 does not."
)
@click.option("--steps", type=cli.POSITIVE_INT, default=18, help="Sample a diffusion model with this many steps.")
@click.option("--sigma-min", type=cli.POSITIVE_NUMBER, help="Let its noise levels end here.  [default: 0.002]")
@click.option("--sigma-max", type=cli.POSITIVE_NUMBER, help="Let its noise levels begin here.  [default: 80]")
@click.option("--rho", type=cli.POSITIVE_NUMBER, help="Space its noise levels by this power.  [default: 7]")
@click.option("--solver", type=click.Choice(["heun", "euler"]), help="Choose its solver.  [default: heun]")
@click.option("--S-churn", "S_churn", type=cli.Number(0), help="Add so much noise on the way.  [default: 0]")
@click.option("--S-min", "S_min", type=cli.Number(0), help="... at noise levels from here ...  [default: 0]")
@click.option("--S-max", "S_max", type=cli.Number(0), help="... to here ...  [default: no limit]")
@click.option("--S-noise", "S_noise", type=cli.Number(0), help="... inflated by this factor.  [default: 1]")
@click.option(
    "--latents",
    type=click.Choice(["own", "edm"]),
    default="own",
    help="Draw latents and classes of a seed as the StyleGAN family's tools do (own), or as EDM's do.",
)
@click.option(
    "--projected-w",
    metavar="FILE.npz",
    help="Draw from these w, [N, layers, w_dim] in the entry 'w' as projectors write it, in place of --seeds.",
)
@click.option(
    "--init-sigma",
    type=cli.POSITIVE_NUMBER,
    help="Use an EDM network as a one-step generator from this noise level.  [default: from the file]",
)
@click.option(
    "--noise-mode",
    type=click.Choice(["const", "random", "none"]),
    default="const",
    help="Choose the noise inputs of a StyleGAN2 generator.",
)
@click.option(
    "--grid/--no-grid", default=True, help=f"Write the first {GRID_IMAGES} images as one picture, too: grid.png."
)
@click.option(
    "--columns", type=cli.POSITIVE_INT, help="Put this many images into a row of the grid.  [default: about square]"
)
@click.option("--subdirs/--no-subdirs", default=False, help="Put every thousand images into a folder of their own.")
@click.option("--batch", type=cli.POSITIVE_INT, default=64, help="Draw this many images at once.")
@click.option("--outdir", default="out", metavar="DIR", help="Write seed0000.png ... and grid.png to this folder.")
@cli.ops_option
@cli.device_option
def main(
    network,
    seeds,
    label,
    labels,
    truncation,
    steps,
    init_sigma,
    noise_mode,
    latents,
    projected_w,
    grid,
    columns,
    subdirs,
    batch,
    outdir,
    device,
    **solver,
):
    """Write one PNG per seed, and a grid.

    \b
    python generate.py --network=stylegan2-digits.pkl --seeds=0-79 --columns=10
    python generate.py --network=edm-digits-16x16-cond.pkl --seeds=0-9 --steps=18 --class=3
    python generate.py --network=mine.pkl --class=flags
    python generate.py --network=ffhq.pkl --projected-w=out/projected_w.npz

    Classes that are all equally frequent come in turn: seed modulo classes. Otherwise each seed draws a label. A grid
    whose columns or rows have one class each shows the names that the network's file has for them.

    On a CPU a seed gives the same pixels on every machine. The latents are those of the StyleGAN family's tools; with
    --latents=edm those of EDM's, with which a diffusion model gives the images that EDM's own tool gives.
    """
    # PyTorch is imported here and not above, so that --help is quick.
    import torch

    from di_refine.files import pictures, registry
    from di_refine.generators import DiffusionSampler, edm_latents, load_sampler

    place = cli.pick_device(device)
    folder = cli.check_outdir(outdir)
    solver = {name: value for name, value in solver.items() if value is not None}
    drawing = {"init_sigma": init_sigma, "noise_mode": noise_mode, "labels": labels, "label": label}
    sampler = load_sampler(registry.resolve(network), steps, truncation, place, **drawing)
    if isinstance(sampler, DiffusionSampler):
        terminal.say(
            f"note: {network} is sampled as a diffusion model, in {steps} steps; if it was distilled to one step, give "
            "the noise level with --init-sigma"
        )
    if solver and not isinstance(sampler, DiffusionSampler):
        name = next(iter(solver)).replace("_", "-")
        raise InputError(f"--{name} is for diffusion models, and {network} makes images in a step or a few")
    if isinstance(sampler, DiffusionSampler):
        sampler.solver = solver
    pictures.check_channels(sampler.num_channels)
    if projected_w is not None:
        if truncation != 1 or label is not None or labels is not None or latents != "own":
            raise InputError("--projected-w has its own w; leave --truncation, --class, --labels and --latents out")
        draw_projected(projected_w, sampler, network, folder, outdir)
        return
    law = sampler.law
    edms_classes = latents == "edm" and label is None and labels is None and law.label_dim > 0 and law.has_classes
    if edms_classes:
        terminal.say("note: labels: all classes equally often, as EDM's tool draws them")
    elif law.sentence:
        terminal.say(f"note: {law.sentence}")
    folder.mkdir(parents=True, exist_ok=True)

    def file_of(seed: int) -> Path:
        inner = folder / f"{seed - seed % 1000:06d}" if subdirs else folder
        inner.mkdir(exist_ok=True)
        return inner / f"seed{seed:04d}.png"

    shown, asked = [], []  # for the grid; more images than it shows are not kept
    counts = torch.zeros(sampler.label_dim)
    with terminal.progress(len(seeds), "generating", "img") as bar:
        for start in range(0, len(seeds), batch):
            chunk = seeds[start : start + batch]
            labels, z = law.in_turn(chunk), None
            if latents == "edm":
                z, edms = edm_latents(chunk, sampler.latent_shape, sampler.label_dim, place)
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
    result = {"outdir": str(outdir), "images": len(seeds), "labels": "edm" if edms_classes else law.described}
    if sampler.law.label_dim and sampler.law.has_classes:
        drawn = enumerate(counts.long().tolist())
        result["class_counts"] = {sampler.law.title(number): count for number, count in drawn if count}
    if grid:
        path = folder / "grid.png"
        images, labels = torch.cat(shown), torch.cat(asked)
        titles = sampler.law.titles(labels, pictures.grid_columns(len(images), columns), pictures.is_drawable)
        pictures.save_grid(path, images, columns, titles=titles)
        result["grid"] = str(path)
        if len(seeds) > GRID_IMAGES:
            terminal.say(f"note: the grid shows the first {GRID_IMAGES} of {len(seeds)} images")
    terminal.print_result(result)


def draw_projected(file: str, sampler: NetworkSampler, network: str, folder: Path, outdir: str) -> None:
    """Write a picture for each w in a file, and print the JSON result.

    Raises:
        InputError: the network is no StyleGAN2 generator, or the file holds no w of it.
    """
    import torch

    from di_refine.files import arrays, pictures
    from di_refine.generators import StyleGAN2Generator

    generator = getattr(sampler, "generator", None)
    if not isinstance(generator, StyleGAN2Generator):
        raise InputError(f"--projected-w is for StyleGAN2 generators, and {network} is none")
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
    device = sampler.device
    with torch.inference_mode(), terminal.progress(len(ws), "generating", "img") as bar:
        for number, w in enumerate(torch.from_numpy(ws).float()):
            image = generator.net.synthesis(w[None].to(device), noise_mode=generator.noise_mode)
            pictures.save_png(folder / f"proj{number:02d}.png", pictures.to_uint8(image[0]).cpu())
            bar.update()
    terminal.print_result({"outdir": str(outdir), "images": len(ws), "projected_w": file})


if __name__ == "__main__":
    main()
