"""Draw images from a network: a StyleGAN2 generator, a diffusion model, or a one-step generator."""

from pathlib import Path

import click
import torch

from di_refine import terminal
from di_refine.commands import cli
from di_refine.errors import InputError
from di_refine.files import pictures, registry
from di_refine.generators import load_sampler


@cli.command()
@click.option("--network", required=True, metavar="FILE|URL|NAME", help="The network.")
@click.option(
    "--seeds", type=cli.INT_LIST, default="0-63", metavar="LIST", help="One image each, as in 0-63 or 1,5,8-10."
)
@click.option(
    "--class", "label", type=cli.NON_NEGATIVE_INT, help="Class of all images.  [default: seed modulo classes]"
)
@click.option("--truncation", type=cli.Number(), default=1.0, help="Truncation psi; for StyleGAN2.")
@click.option("--steps", type=cli.POSITIVE_INT, default=18, help="Sampling steps; for a diffusion model.")
@click.option(
    "--init-sigma",
    type=cli.POSITIVE_NUMBER,
    help="Use an EDM network as a one-step generator from this level.  [default: from the file]",
)
@click.option(
    "--noise-mode", type=click.Choice(["const", "random", "none"]), default="const", help="Noise; for StyleGAN2."
)
@click.option("--grid/--no-grid", default=True, help="Also write all images as one picture, grid.png.")
@click.option("--columns", type=cli.POSITIVE_INT, help="Images per row of the grid.  [default: about square]")
@click.option("--batch", type=cli.POSITIVE_INT, default=64, help="Images per forward pass.")
@click.option("--outdir", default="out", metavar="DIR", help="Where seed0000.png ... and grid.png go.")
@cli.ops_option
@cli.device_option
def main(network, seeds, label, truncation, steps, init_sigma, noise_mode, grid, columns, batch, outdir, device):
    """Write one PNG per seed, and a grid.

    \b
    python generate.py --network=stylegan2-digits.pkl --seeds=0-79 --columns=10
    python generate.py --network=edm-digits-16x16-cond.pkl --seeds=0-9 --steps=18 --class=3

    On a CPU a seed gives the same pixels on every machine. The latents are those of the StyleGAN family's tools.
    """
    device = cli.pick_device(device)
    outdir = cli.check_outdir(outdir)
    sampler = load_sampler(registry.resolve(network), steps, truncation, device, label, init_sigma=init_sigma)
    if truncation != 1 and sampler.is_diffusion:
        raise InputError("--truncation is for StyleGAN2 generators, this is a diffusion network")
    outdir.mkdir(parents=True, exist_ok=True)
    drawn = []
    with terminal.progress(len(seeds), "generating", "img") as bar:
        for start in range(0, len(seeds), batch):
            chunk = seeds[start : start + batch]
            labels = torch.zeros(len(chunk), sampler.label_dim)
            if sampler.label_dim:
                classes = [seed % sampler.label_dim if label is None else label for seed in chunk]
                labels[range(len(chunk)), classes] = 1
            drawn.append(
                pictures.to_uint8(sampler.images(chunk, labels, noise_seed=chunk[0], noise_mode=noise_mode)).cpu()
            )
            for seed, picture in zip(chunk, drawn[-1]):
                pictures.save_png(outdir / f"seed{seed:04d}.png", picture)
            bar.update(len(chunk))
    result = {"outdir": str(outdir), "images": len(seeds)}
    if grid:
        path = Path(outdir) / "grid.png"
        pictures.save_grid(path, torch.cat(drawn), columns)
        result["grid"] = str(path)
    terminal.print_result(result)


if __name__ == "__main__":
    main()
