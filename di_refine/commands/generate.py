"""The command `generate.py`: images from a StyleGAN2 generator, a diffusion model, or a one-step generator."""

import click

from di_refine import terminal
from di_refine.commands import cli
from di_refine.commands.config import LabelsConfig
from di_refine.commands.options import options

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
@click.option("--batch", type=cli.POSITIVE_INT, default=64, help="Draw this many images at once.")
@click.option("--outdir", default="out", metavar="DIR", help="Write seed0000.png ... and grid.png to this folder.")
@cli.ops_option
@cli.device_option
def main(
    network, seeds, label, labels, truncation, steps, init_sigma, noise_mode, grid, columns, batch, outdir, device
):
    """Write one PNG per seed, and a grid.

    \b
    python generate.py --network=stylegan2-digits.pkl --seeds=0-79 --columns=10
    python generate.py --network=edm-digits-16x16-cond.pkl --seeds=0-9 --steps=18 --class=3
    python generate.py --network=mine.pkl --class=flags

    Classes that are all equally frequent come in turn: seed modulo classes. Otherwise each seed draws a label. A grid
    whose columns or rows have one class each shows the names that the network's file has for them.

    On a CPU a seed gives the same pixels on every machine. The latents are those of the StyleGAN family's tools.
    """
    # PyTorch is imported here and not above, so that --help is quick.
    import torch

    from di_refine.files import pictures, registry
    from di_refine.generators import DiffusionSampler, load_sampler

    place = cli.pick_device(device)
    folder = cli.check_outdir(outdir)
    drawing = {"init_sigma": init_sigma, "noise_mode": noise_mode, "labels": labels, "label": label}
    sampler = load_sampler(registry.resolve(network), steps, truncation, place, **drawing)
    if isinstance(sampler, DiffusionSampler):
        terminal.say(
            f"note: {network} is sampled as a diffusion model, in {steps} steps; if it was distilled to one step, give "
            "the noise level with --init-sigma"
        )
    pictures.check_channels(sampler.num_channels)
    if sampler.law.sentence:
        terminal.say(f"note: {sampler.law.sentence}")
    folder.mkdir(parents=True, exist_ok=True)
    shown, asked = [], []  # for the grid; more images than it shows are not kept
    counts = torch.zeros(sampler.label_dim)
    with terminal.progress(len(seeds), "generating", "img") as bar:
        for start in range(0, len(seeds), batch):
            chunk = seeds[start : start + batch]
            labels = sampler.law.in_turn(chunk)
            counts += labels.sum(dim=0)
            images = sampler.images(chunk, labels, noise_seed=chunk[0])
            drawn = pictures.to_uint8(images).cpu()
            for seed, picture in zip(chunk, drawn):
                pictures.save_png(folder / f"seed{seed:04d}.png", picture)
            if grid and start < GRID_IMAGES:
                shown.append(drawn[: GRID_IMAGES - start])
                asked.append(labels[: GRID_IMAGES - start])
            bar.update(len(chunk))
    result = {"outdir": str(outdir), "images": len(seeds), "labels": sampler.law.described}
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


if __name__ == "__main__":
    main()
