"""Stage 3: the GAN, StyleGAN2-ADA in the published configuration for CIFAR-10 with a quarter of its channels.

1.3 million parameters in the generator and 1.4 million in the discriminator, 0.51 GFLOP a forward pass of either
(counted). A step of both takes 3 x (0.51 + 0.51) + 0.51 + 6 x 0.51 = 6.6 GFLOP an image, so arithmetic is no limit on
an H200; the number of kernels is. Hence a batch of 256 instead of 64: four times the images in nearly the same time
(reckoned, not measured). ADA moves p five times as fast as published, since there is less time to find it.

With --longer the same training goes on for as long as the refinement trained: the control it is compared with. Call it
again if --minutes were not enough.
"""

import click
from stages import NAME, Stage, stage

FULL = [
    "--z-dim=128",
    "--channel-base=8192",
    "--channel-max=128",
    "--mbstd-group=32",
    "--gamma=0.01",
    "--batch=256",
    "--lr=2.5e-3",
    "--ada-kimg=100",
    "--ema-kimg=100",
    "--kimg=100000",
    "--tick=100",
    "--snap=4",
    "--workers=8",
]
SMOKE = [
    "--z-dim=8",
    "--channel-base=64",
    "--channel-max=8",
    "--mbstd-group=4",
    "--batch=8",
    "--ada-kimg=0.1",
    "--kimg=0.032",
    "--tick=0.016",
]


@stage(minutes=6)
@click.option("--longer", is_flag=True, help="Go on with as many images as the GAN sees in the refinement's time.")
def main(stage: Stage, longer: bool):
    """Train the GAN, or with --longer the control."""
    before, more = stage.result("gan"), []
    if longer:
        if before is None or stage.result("refined") is None:
            raise click.UsageError("--longer comes after gan.py and refine.py: it takes as long as the refinement did")
        # Of training alone, at the GAN's own speed: time for measurements must not be the control's loss.
        more = [f"--kimg={before['kimg'] + before['images_per_sec'] * stage.trained_seconds('refined') / 1000}"]
    elif stage.result("gan-longer") is not None:
        raise click.UsageError("the control goes on from this GAN, so it cannot change any more; use another --workdir")
    result = stage.run(
        "pretrain.py gan",
        f"--data={stage.train_images}",
        f"--outdir={stage.workdir / 'runs' / 'gan'}",
        "--desc=gan",
        "--resume=auto",
        f"--max-minutes={stage.minutes}",
        *stage.metric_options("fd1k_full" if stage.smoke else "fd5k_full", with_reference=False),
        *(SMOKE if stage.smoke else FULL),
        *more,
    )
    stage.keep("gan-longer" if longer else "gan", {**result, "feature_network": NAME})


if __name__ == "__main__":
    main()
