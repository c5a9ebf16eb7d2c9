"""Refine a normalizing flow: a generator that was trained by exact likelihood, taught by a diffusion model.

    pip install zuko
    python examples/flow.py

A RealNVP (Dinh et al., arXiv 1605.08803, as the library zuko builds it) is fitted to handwritten digits. A flow has as
many latents as pixels, each layer can be inverted, and likelihood asks it to cover all images: its samples are noisy.
Then Diff-Instruct refines it with the shipped diffusion model, without images; it stays a flow, but no longer one that
knows how likely images are.
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


class Flow(nn.Module):
    """Images `[N, 1, 16, 16]` in about [-1, 1] of latents `[N, 256]` and labels `[N, 10]`, and the way back."""

    latent_shape, label_dim, img_channels, img_resolution = (256,), 10, 1, 16

    def __init__(self, layers: int = 6, width: int = 256):
        super().__init__()
        try:
            import zuko
        except ImportError:
            raise click.ClickException("this example needs zuko: pip install zuko") from None
        self.flow = zuko.flows.RealNVP(256, context=10, transforms=layers, hidden_features=[width, width])

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.flow(labels).transform.inv(z).unflatten(1, (1, 16, 16))

    def log_likelihood(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Natural logarithms of densities, `[N]`."""
        return self.flow(labels).log_prob(images.flatten(1))


def train_flow(images: torch.Tensor, labels: torch.Tensor, kimg: float, batch: int = 64, seed: int = 0) -> Flow:
    """Fit a flow by maximum likelihood; a little noise keeps the density of black pixels finite."""
    torch.manual_seed(seed)
    flow = Flow()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    steps = round(kimg * 1000 / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        index = torch.randint(len(images), [batch])
        x = images[index] + 0.05 * torch.randn_like(images[index])
        loss = -flow.log_likelihood(x, labels[index]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 10)
        optimizer.step()
        schedule.step()
    return flow


def refine(flow: Flow, teacher: nn.Module, kimg: float, seed: int = 0) -> Flow:
    """Teach the flow; return its average."""
    facts = presets.Facts(resolution=16, device="cpu", kimg=kimg, parameters=sum(p.numel() for p in flow.parameters()))
    trainer = Trainer(flow, teacher, presets.settings(TrainerConfig, presets.teach(facts) | {"seed": seed}))
    while trainer.nimg < kimg * 1000:
        trainer.step()
    return trainer.ema


@click.command()
@click.option("--flow-kimg", default=200.0, help="Fit the flow on this many thousand images.")
@click.option("--kimg", default=20.0, help="Refine it on this many thousand.")
@click.option("--seed", default=0, help="Draw random numbers from this seed.")
@click.option("--metrics", default="fd2k_full@digits,pr2k3_full@digits", help="Measure these.")
@click.option("--dest", default="flow.png", metavar="FILE.png", help="Write real images, flow and refined flow here.")
def main(flow_kimg, kimg, seed, metrics, dest):
    """Print distance, precision and recall of the flow before and after, and the likelihood of real images."""
    dataset = ImageDataset(registry.resolve("digits-16x16.zip"))
    images = torch.from_numpy(dataset.images(list(range(len(dataset))))).float() / 127.5 - 1
    numbers = dataset.class_numbers()
    labels = F.one_hot(torch.from_numpy(numbers)).float()
    evaluator = Evaluator(metrics, reference=dataset)

    rows, start = 6, time.monotonic()
    flow = train_flow(images, labels, flow_kimg, seed=seed)
    real = [int(np.flatnonzero(numbers == number)[row]) for row in range(rows) for number in range(10)]
    panels = [("real", dataset.images(real))]
    for title in ("flow", "refined"):
        if title == "refined":
            flow = refine(flow, load_denoiser("edm-digits-16x16-cond.pkl"), kimg, seed)
        sampler = GeneratorSampler(flow)
        panels.append((title, sampler.images(list(range(10 * rows)), torch.eye(10).repeat(rows, 1))))
        values = {key: value for result in evaluator(sampler, seed=seed) for key, value in result.values.items()}
        with torch.no_grad():
            values["bits/dim"] = -float(flow.log_likelihood(images, labels).mean()) / (256 * np.log(2))
        print(
            f"{title:8}", *(f"{key} {value:.3f} " for key, value in values.items()), f"{time.monotonic() - start:.0f} s"
        )
    pictures.save_side_by_side(dest, panels, columns=10)
    print(f"wrote {dest}")


if __name__ == "__main__":
    main()
