"""Refine a trained StyleGAN2-ADA generator with a diffusion teacher, without training data (Diff-Instruct)."""

import click

from di_refine.commands import cli
from di_refine.commands.job import launch
from di_refine.commands.options import click_options
from di_refine.commands.refinement import Refinement, RefineOptions
from di_refine.files import registry


@cli.command()
@click_options(RefineOptions)
@click.option("--dry-run", is_flag=True, help="Check everything, print the resolved options, and stop.")
@cli.ops_option
@cli.device_option
@click.pass_context
def main(context, dry_run, **values):
    """Refine a StyleGAN2-ADA generator with a diffusion model of the same images, without any data.

    \b
    python refine.py --network=stylegan2-digits.pkl                       (shipped, minutes on a CPU)
    python refine.py --network=stylegan2-cifar10.pkl --precision=bf16     (official networks, a GPU)
    python refine.py --network=mine.pkl --teacher=edm.pkl --metrics=fid5k_full --ref=reference.npz

    Options that are not given have the values of the preset. A network of the registry brings values for its size,
    which go before the preset's. --dry-run shows what results, and from where.
    """
    entry = registry.entry_for_path(registry.resolve(values["network"], option="--network")) or {}
    return launch(Refinement, RefineOptions, context, values, entry.get("refine", {}), dry_run)


if __name__ == "__main__":
    main()
