"""Stage 2: the teacher, a class-conditional DDPM++ with EDM's preconditioning and augmentation.

8.1 million parameters and 2.6 GFLOP a forward pass (counted with torch.utils.flop_counter), so 7.7 GFLOP an image in
training. Matrix products in bf16 run at up to 790 TFLOP/s on an H200; at a quarter of that, 25,000 images/s and 15
million images in ten minutes. That is reckoned: how near it comes has to be measured. 64 channels at 32x32 and more
where the images are small spend parameters where they cost least.
"""

import click
from stages import Stage, stage

FULL = [
    "--width=32",
    "--channel-mult=2,3,4,4",
    "--num-blocks=2",
    "--attn-resolutions=16",
    "--dropout=0",  # fifteen million images are too few to overfit with
    "--batch=512",
    "--lr=1e-3",
    "--lr-rampup=200",
    "--lr-rampdown=3000",
    "--ema-kimg=500",
    "--precision=bf16",
    "--compile",
    "--tick=500",
    "--snap=8",
    "--workers=8",
]
SMOKE = [
    "--width=8",
    "--channel-mult=1,1",
    "--num-blocks=1",
    "--attn-resolutions=8",
    "--dropout=0",
    "--batch=8",
    "--lr-rampup=0",
    "--lr-rampdown=0.016",
    "--tick=0.016",
]


@stage(minutes=8.5)
@click.option(
    "--finish", is_flag=True, help="End the training within --minutes, with the fall of the learning rate before it."
)
@click.option("--kimg", type=float, help="Length of the training.  [default: 16000, in --smoke 0.032]")
def main(stage: Stage, finish: bool, kimg: float | None):
    """Train the teacher. Two calls: the first with what the time allows, the last with --finish."""
    kimg = kimg or (0.032 if stage.smoke else 16_000)
    before = stage.result("teacher")
    if finish:
        if before is None or not before["images_per_sec"]:
            raise click.UsageError("--finish is for the last call: without one before it the speed is not known")
        if before["kimg"] < before["target_kimg"]:
            # 5% less than the speed allows: a rate that has not fallen to its end would be worse than fewer images.
            kimg = before["kimg"] + 0.95 * before["images_per_sec"] * 60 * stage.minutes / 1000
        else:
            kimg = before["target_kimg"]
    result = stage.run(
        "pretrain.py teacher",
        f"--data={stage.train_images}",
        f"--outdir={stage.workdir / 'runs' / 'teacher'}",
        "--desc=teacher",
        "--resume=auto",
        f"--kimg={kimg}",
        f"--max-minutes={stage.minutes}",
        *(SMOKE if stage.smoke else FULL),
    )
    stage.keep("teacher", {**result, "target_kimg": kimg})


if __name__ == "__main__":
    main()
