"""Distil a diffusion model into a generator of one step or a few, without training data (Diff-Instruct)."""

import click

from di_refine.commands import cli
from di_refine.commands.distillation import Distillation, DistillOptions
from di_refine.commands.job import launch
from di_refine.commands.options import click_options
from di_refine.files import registry


@cli.command()
@click_options(DistillOptions)
@click.option("--dry-run", is_flag=True, help="Check everything, print the resolved options, and stop.")
@cli.ops_option
@cli.device_option
@click.pass_context
def main(context, dry_run, **values):
    """Distil an EDM diffusion model into a generator that makes an image in one step, without any data.

    \b
    python distill.py --teacher=edm-digits-16x16-cond.pkl                          (shipped, minutes on a CPU)
    python distill.py --teacher=edm-cifar10-32x32-cond-vp.pkl --preset=sid --precision=bf16
    python distill.py --teacher=edm.pkl --student-steps=2 --metrics=fid5k_full --ref=reference.npz

    Options that are not given have the values of the preset. A teacher of the registry brings values for its size,
    which go before the preset's. --dry-run shows what results, and from where.
    """
    teachers = [registry.resolve(name, option="--teacher") for name in values["teacher"]]
    entry = (registry.entry_for_path(teachers[0]) if teachers else None) or {}
    return launch(Distillation, DistillOptions, context, values, entry.get("distill", {}), dry_run)


if __name__ == "__main__":
    main()
