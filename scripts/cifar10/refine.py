"""Stage 4: refining the GAN with the teacher, without images (Diff-Instruct).

An update takes a pass and a backward pass of the generator (1.5 GFLOP), the same of the student score (7.7) and a pass
of the teacher (2.6): 12 GFLOP an image. Nothing is compiled here, so expect a smaller share of the device than in
stage 2.

The learning rates are starting points, chosen between the digits' and the published ones and tried on nothing yet.
Other settings go after `--`, under another --name; the report shows them all:

    python scripts/cifar10/refine.py --workdir=runs/cifar10 --name=refined-slow -- --lr=2e-5 --score-lr=1e-4
"""

import click
from stages import Stage, stage

FULL = [
    "--precision=bf16",
    "--generator-precision=fp32",  # small, and what its weights were trained in
    "--batch=256",
    "--lr=2e-4",
    "--score-lr=4e-4",
    "--score-warmup=30",
    "--ema-kimg=20",
    "--kimg=100000",
    "--tick=50",
    "--snap=4",
]
SMOKE = ["--batch=8", "--score-warmup=0.016", "--ema-kimg=0.01", "--kimg=0.048", "--tick=0.016", "--teacher-steps=2"]


@stage(minutes=2.5)
@click.option("--name", default="refined", help="Of this refinement; gan.py --longer goes by the one called refined.")
def main(stage: Stage, name: str):
    """Refine the GAN."""
    result = stage.run(
        "refine.py",
        f"--network={stage.network('gan', 'gan.py')}",
        f"--teacher={stage.network('teacher', 'teacher.py')}",
        f"--outdir={stage.workdir / 'runs' / 'refine'}",
        f"--desc={name}",
        "--resume=auto",
        f"--max-minutes={stage.minutes}",
        *stage.metric_options("fd1k_full" if stage.smoke else "fd5k_full"),
        *(SMOKE if stage.smoke else FULL),
    )
    stage.keep(name, {**result, "stage": "refine"})


if __name__ == "__main__":
    main()
