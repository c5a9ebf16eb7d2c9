"""Stage 1: the feature network, a small residual classifier, and its statistics of the training images.

A wide ResNet of 1.6 million parameters and 0.47 GFLOP a forward pass (counted), so 45,000 images are 64 TFLOP an
epoch and 30 epochs 1.9 PFLOP: half a minute of an H200 at a tenth of its bf16 rate (reckoned, not measured), were it
not for 2,600 steps of many small kernels.
"""

from stages import NAME, Stage, stage

FULL = ["--epochs=30", "--width=48", "--batch=512", "--lr=4e-3", "--precision=bf16"]
SMOKE = ["--epochs=2", "--width=4", "--batch=16", "--feature-dim=16"]


@stage(minutes=2)
def main(stage: Stage):
    """Train the feature network; accuracy is that on the held-out tenth."""
    result = stage.run(
        "pretrain.py features",
        f"--data={stage.train_images}",
        f"--held-out={stage.held_out_images}",
        f"--dest={stage.features}",
        f"--stats={stage.statistics}",
        f"--name={NAME}",
        "--architecture=residual",
        "--augment=shift",
        "--mirror",
        "--half",
        f"--max-minutes={stage.minutes}",
        *(SMOKE if stage.smoke else FULL),
    )
    stage.keep("features", result)


if __name__ == "__main__":
    main()
