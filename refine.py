"""Refine a trained StyleGAN2-ADA generator with a diffusion teacher, without training data (Diff-Instruct)."""

import json

import click

from di_refine import cli, objectives, zoo
from di_refine.noise import WEIGHTS
from di_refine.refinement import RECOMMENDED, Refinement, RefineOptions

OBJECTIVES = [name for name in objectives.NAMES if name != "sds" and not objectives.get(name).needs_ratio]


@cli.command()
@click.option("--network", required=True, metavar="FILE|URL|NAME", help="The StyleGAN2 generator to refine.")
@click.option("--teacher", metavar="FILE|URL|NAME", help="The EDM diffusion model.  [default: from the registry]")
@click.option("--outdir", default="runs", metavar="DIR", help="Where the numbered run directory is made.")
@click.option("--desc", help="Words for the run directory's name.  [default: from the network]")
@click.option("--kimg", type=cli.POSITIVE_NUMBER, default=5000, help="Length in thousands of images, warm-up included.")
@click.option("--batch", type=cli.POSITIVE_INT, default=128, help="Images per update.")
@click.option(
    "--batch-gpu", type=cli.POSITIVE_INT, help="Images per forward pass; must divide --batch.  [default: --batch]"
)
@click.option("--lr", type=cli.POSITIVE_NUMBER, default=1e-5, help="Learning rate of the generator.")
@click.option("--score-lr", type=cli.POSITIVE_NUMBER, default=1e-5, help="Learning rate of the student score.")
@click.option(
    "--score-warmup", type=cli.NON_NEGATIVE_NUMBER, default=20, help="Kimg that train the student score alone."
)
@click.option("--ema-kimg", type=cli.POSITIVE_NUMBER, default=500, help="Half-life of the generator's average.")
@click.option("--objective", type=click.Choice(OBJECTIVES), default="ikl", help="What pulls the generator.")
@click.option(
    "--weight", type=click.Choice(["default", *WEIGHTS]), default="default", help="w(sigma) of the objective."
)
@click.option(
    "--normalize/--no-normalize", default=None, help="Divide each gradient by mean|x0 - Dq|.  [default: objective's]"
)
@click.option("--alpha", type=cli.Number(maximum=2, above=0), help="Of --objective=sid.  [default: 1.2]")
@click.option("--sigma-mean", type=cli.Number(), default=-1.2, help="Mean of ln(sigma).")
@click.option("--sigma-std", type=cli.NON_NEGATIVE_NUMBER, default=1.2, help="Standard deviation of ln(sigma).")
@click.option(
    "--dropout", type=click.Choice(["off", "matched"]), default="off", help="Shared dropout masks, as in the paper."
)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", help="Arithmetic of the networks.")
@click.option(
    "--class-freq", metavar="LIST|DATA", help="Class frequencies: numbers, or a data set's.  [default: uniform]"
)
@click.option(
    "--metrics", metavar="LIST|none", help="Measured at each snapshot.  [default: from the registry, else none]"
)
@click.option(
    "--final-metrics", metavar="LIST", help="Measured at the end instead.  [default: from the registry, else --metrics]"
)
@click.option("--detector", metavar="FILE", help="Feature network of metrics that are not in the registry.")
@click.option("--ref", metavar="FILE.npz|DATA", help="What the metrics compare with.  [default: from the registry]")
@click.option("--teacher-steps", type=cli.POSITIVE_INT, default=18, help="Sampling steps when the teacher is measured.")
@click.option("--tick", type=cli.POSITIVE_NUMBER, default=50, help="Kimg between status lines.")
@click.option("--snap", type=cli.POSITIVE_INT, default=10, help="Ticks between snapshots and measurements.")
@click.option("--seed", type=cli.NON_NEGATIVE_INT, default=0, help="Of everything random.")
@click.option("--workers", type=cli.POSITIVE_INT, default=2, help="Threads that decode a reference data set.")
@click.option(
    "--resume", metavar="RUN", help="Continue a run directory or training-state file, with the options given now."
)
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

    A network of the registry brings recommended values for options that are not given; --dry-run shows them.
    """
    entry = zoo.entry_for_path(zoo.resolve(values["network"], option="--network"))
    for name, value in (entry or {}).get("refine", {}).items():
        given = context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT
        if name in RECOMMENDED and not given:
            values[name] = value
    refinement = Refinement(RefineOptions(**values))
    if dry_run:
        click.echo(json.dumps(refinement.record(), indent=2), err=True)
        cli.print_result(refinement.record())
        return
    cli.print_result(refinement.run())


if __name__ == "__main__":
    main()
