"""A generator of your own, taught by a diffusion model: the smallest complete use of the library.

    python examples/own_generator.py            # minutes on a CPU; the same command again goes on where it stopped

No image is read: the generator starts from nothing, and all that it learns of digits it learns from the teacher.
"""

import sys
from pathlib import Path

import click
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from di_refine.denoisers import load_denoiser
from di_refine.files.pictures import save_grid
from di_refine.generators import GeneratorSampler
from di_refine.metrics.evaluate import Evaluator
from di_refine.trainer import Trainer, TrainerConfig
from torch_utils.misc import open_atomic


class Digits(nn.Module):
    """Latents and labels become images: any module that can do this can be trained."""

    latent_shape = (32,)  # of one latent; they are unit normals
    label_dim = 10  # length of a one-hot label; 0 without classes
    img_channels, img_resolution = 1, 16  # for sampling and measuring

    def __init__(self, width: int = 64):
        super().__init__()
        self.start = nn.Sequential(nn.Linear(32 + 10, 2 * width * 4 * 4), nn.Unflatten(1, (2 * width, 4, 4)))
        self.layers = nn.Sequential(block(2 * width, width), block(width, width), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`[N, 32]`, `[N, 10]` -> `[N, 1, 16, 16]` with values about -1..1."""
        return self.layers(self.start(torch.cat([z, labels], dim=1)))


def block(channels: int, out: int) -> nn.Module:
    """Layers that double the resolution."""
    norm = nn.GroupNorm(8, out)
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, out, 3, padding=1), norm, nn.SiLU())


@click.command()
@click.option("--kimg", default=60.0, help="Train on this many thousand images.")
@click.option("--out", default="runs/own-generator", type=Path, help="Write into this folder.")
@click.option("--metrics", default="fd2k_full@digits,acc2k@digits", help="Measure these.")
def main(kimg: float, out: Path, metrics: str) -> None:
    """Train, draw, measure, save; and go on with what is saved already."""
    out.mkdir(parents=True, exist_ok=True)
    state = out / "state.pt"
    torch.manual_seed(0)

    # Train.
    teacher = load_denoiser("edm-digits-16x16-cond.pkl")  # nothing in the file is ever executed
    config = TrainerConfig(batch=64, lr=1e-3, score_lr=1e-3, score_warmup=1, ema_kimg=3)
    trainer = Trainer(Digits(), teacher, config)
    if state.exists():
        trainer.load_state_dict(torch.load(state, weights_only=True))
    while trainer.nimg < kimg * 1000:
        stats = trainer.step()
        if trainer.nimg // config.batch % 50 == 0:
            trainer.check_finite()
            print(f"{trainer.nimg / 1000:6.1f} kimg   score loss {stats['score_loss']:.4f}")

    # Save: everything, to go on from, and the averaged generator alone.
    with open_atomic(state) as file:
        torch.save(trainer.state_dict(), file)
    with open_atomic(out / "generator.pt") as file:
        torch.save(trainer.ema.state_dict(), file)

    # Draw and measure.
    sampler = GeneratorSampler(trainer.ema)
    labels = torch.eye(10).repeat(6, 1)
    save_grid(out / "images.png", sampler.images(range(60), labels), columns=10, scale=3)
    for result in Evaluator(metrics)(sampler):
        print(result.values)


if __name__ == "__main__":
    main()
