"""Refine the decoder of a variational autoencoder: any differentiable generator can be taught by a diffusion model.

    python examples/vae.py                  # handwritten digits
    python examples/vae.py --set=emoji      # emoji, in colour

A VAE (Kingma and Welling, arXiv 1312.6114) is trained by its own loss, whose squared error makes pictures blurry. Then
its decoder is refined by Diff-Instruct with the shipped diffusion model of the same images, without encoder and data.
"""

import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from di_refine import presets
from di_refine.denoisers import load_denoiser
from di_refine.files import pictures, registry
from di_refine.files.datasets import ImageDataset
from di_refine.generators import GeneratorSampler
from di_refine.metrics.evaluate import Evaluator
from di_refine.trainer import Trainer, TrainerConfig

SETS = {
    "digits": ("digits-16x16.zip", "edm-digits-16x16-cond.pkl"),
    "emoji": ("emoji-16x16.zip", "edm-emoji-16x16-cond.pkl"),
}


class Decoder(nn.Module):
    """Images `[N, C, 16, 16]` in [-1, 1] of latents `[N, 32]` and labels `[N, label_dim]`.

    The attributes are all that training, drawing and measuring need to know of a generator.
    """

    def __init__(self, channels: int, label_dim: int, width: int = 64):
        super().__init__()
        self.latent_shape, self.label_dim = (32,), label_dim
        self.img_channels, self.img_resolution = channels, 16
        self.start = nn.Linear(32 + label_dim, 2 * width * 16)
        self.layers = nn.Sequential(
            nn.SiLU(), nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.GroupNorm(8, 2 * width), nn.SiLU(),
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.layers(self.start(torch.cat([z, labels], dim=1)).unflatten(1, (-1, 4, 4)))


class Encoder(nn.Module):
    """Mean and log variance `[N, 32]` of the latents of images."""

    def __init__(self, channels: int, label_dim: int, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.SiLU(),
            nn.Flatten(),
        )
        self.end = nn.Linear(2 * width * 16 + label_dim, 64)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = self.end(torch.cat([self.layers(images), labels], dim=1)).chunk(2, dim=1)
        return mean, log_variance


def train_vae(images: torch.Tensor, labels: torch.Tensor, kimg: float, batch: int = 64, seed: int = 0) -> Decoder:
    """Train encoder and decoder by the evidence lower bound, with pixels of variance 0.1; return the decoder."""
    torch.manual_seed(seed)
    encoder, decoder = Encoder(images.shape[1], labels.shape[1]), Decoder(images.shape[1], labels.shape[1])
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    for _ in range(round(kimg * 1000 / batch)):
        index = torch.randint(len(images), [batch])
        x, c = images[index], labels[index]
        mean, log_variance = encoder(x, c)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        error = (decoder(z, c) - x).square().sum() / (2 * 0.1)
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum() / 2
        optimizer.zero_grad()
        ((error + divergence) / batch).backward()
        optimizer.step()
    return decoder


def refine(decoder: Decoder, teacher: torch.nn.Module, kimg: float, seed: int = 0) -> Decoder:
    """Teach the decoder; return its average."""
    facts = presets.Facts(
        resolution=16, device="cpu", kimg=kimg, parameters=sum(p.numel() for p in decoder.parameters())
    )
    trainer = Trainer(decoder, teacher, presets.settings(TrainerConfig, presets.teach(facts) | {"seed": seed}))
    while trainer.nimg < kimg * 1000:
        trainer.step()
    return trainer.ema


@click.command()
@click.option("--set", "name", type=click.Choice(list(SETS)), default="digits", help="Take these images.")
@click.option("--vae-kimg", default=60.0, help="Train the VAE on this many thousand images.")
@click.option("--kimg", default=20.0, help="Refine its decoder on this many thousand.")
@click.option("--seed", default=0, help="Draw random numbers from this seed.")
@click.option("--metrics", help="Measure these.  [default: distance, precision and recall of 2,000 images]")
@click.option("--dest", default="vae.png", metavar="FILE.png", help="Write real images, VAE and refined VAE here.")
def main(name, vae_kimg, kimg, seed, metrics, dest):
    """Print distance, precision and recall of the VAE before and after."""
    data, teacher = SETS[name]
    dataset = ImageDataset(registry.resolve(data))
    images = torch.from_numpy(dataset.images(list(range(len(dataset))))).float() / 127.5 - 1
    labels = F.one_hot(torch.from_numpy(dataset.class_numbers())).float()
    evaluator = Evaluator(metrics or f"fd2k_full@{name},pr2k3_full@{name}", reference=dataset)

    classes, rows, start = labels.shape[1], 6, time.monotonic()
    decoder = train_vae(images, labels, vae_kimg, seed=seed)
    of_class = [np.flatnonzero(dataset.class_numbers() == number) for number in range(classes)]
    panels = [
        ("real", dataset.images([int(of_class[number][row]) for row in range(rows) for number in range(classes)]))
    ]
    for title in ("VAE", "refined"):
        if title == "refined":
            decoder = refine(decoder, load_denoiser(teacher), kimg, seed)
        sampler = GeneratorSampler(decoder)
        panels.append((title, sampler.images(list(range(rows * classes)), torch.eye(classes).repeat(rows, 1))))
        values = {key: value for result in evaluator(sampler, seed=seed) for key, value in result.values.items()}
        print(
            f"{title:8}", *(f"{key} {value:.3f} " for key, value in values.items()), f"{time.monotonic() - start:.0f} s"
        )
    pictures.save_side_by_side(dest, panels, columns=classes)
    print(f"wrote {dest}")


if __name__ == "__main__":
    main()
