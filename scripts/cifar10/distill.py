"""Stage 5: distilling the teacher into a generator of one step, without images.

An update takes a pass and a backward pass each of the generator and of the student score (7.7 GFLOP each), and a pass
of the teacher (2.6): 18 GFLOP an image. As in stage 4 the settings are starting points; others go after `--`, under
another --name.
"""

import click
from stages import Stage, stage

FULL = [
    "--init-sigma=2.5",
    "--precision=bf16",
    "--batch=256",
    "--lr=1e-4",
    "--score-lr=2e-4",
    "--score-warmup=0",
    "--ema-kimg=20",
    "--kimg=100000",
    "--tick=50",
    "--snap=4",
]
SMOKE = ["--batch=8", "--score-warmup=0", "--ema-kimg=0.01", "--kimg=0.032", "--tick=0.016", "--teacher-steps=2"]


@stage(minutes=2.5)
@click.option("--name", default="one-step", help="Of this generator.")
def main(stage: Stage, name: str):
    """Distil the teacher."""
    result = stage.run(
        "distill.py",
        f"--teacher={stage.network('teacher', 'teacher.py')}",
        f"--outdir={stage.workdir / 'runs' / 'distill'}",
        f"--desc={name}",
        "--resume=auto",
        f"--max-minutes={stage.minutes}",
        *stage.metric_options("fd1k_full" if stage.smoke else "fd5k_full"),
        *(SMOKE if stage.smoke else FULL),
    )
    stage.keep(name, {**result, "stage": "distill"})


if __name__ == "__main__":
    main()
