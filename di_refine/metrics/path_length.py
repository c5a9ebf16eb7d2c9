"""Perceptual path length of StyleGAN2 generators (Karras et al., arXiv 1812.04948, section 4.1; arXiv 1912.04958).

Two latents span a path in W; the generator's images at its beginning and a step of epsilon further are compared by a
perceptual network, and the distance is divided by epsilon squared. The extreme percent at either end is left out.
"""

import os
from typing import Any, TypeGuard

import numpy as np
import torch

from di_refine.errors import InputError
from di_refine.generators import GeneratorSampler, Sampler, StyleGAN2Generator, latents
from di_refine.metrics.detectors import load_detector
from torch_utils.misc import derive_seed

EPSILON = 1e-4
LARGEST = 256  # pixels; larger images are averaged down to this before they are compared


class Perceptual:
    """A network whose squared feature distances say how different two images look.

    Args:
        source: a TorchScript file in the convention of the StyleGAN family's `vgg16.pt` (its forward has an argument
            `return_lpips`), or any other feature network that `load_detector` takes.
        device: where to run.
        allow_code: as for `load_detector`; TorchScript is a program.

    Raises:
        InputError: the file is missing, no such network, or a program that is not allowed.

    Attributes:
        identity: see `feature_net.Identity`.
        is_lpips: whether it is of the first kind, to which the name `ppl2_wend` belongs.
    """

    def __init__(self, source: str | os.PathLike, device: str | torch.device = "cpu", allow_code: bool = False):
        self._net = load_detector(source, device, "perceptual", allow_code)
        self.identity = self._net.identity
        self.is_lpips = self._net.lpips is not None

    def check_channels(self, channels: int) -> None:
        """Raise InputError when images with this many channels cannot be compared."""
        self._net.check_channels(channels)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return features [N, F] of float images [N, C, H, W] with values about 0..255, not rounded."""
        if self._net.lpips is None:
            return self._net.embed(images)
        return self._net.lpips(images.expand(-1, 3, -1, -1))


def has_paths(sampler: Sampler) -> TypeGuard[GeneratorSampler]:
    """Return whether a sampler's generator has a W in which paths can be measured."""
    return isinstance(sampler, GeneratorSampler) and isinstance(sampler.generator, StyleGAN2Generator)


def path_lengths(
    sampler: GeneratorSampler, perceptual: Perceptual, first: int, count: int, seed: int, epsilon: float = EPSILON
) -> np.ndarray:
    """Measure the paths with indices from `first` on: lengths, float64 [count], a pure function of index and seed.

    Args:
        sampler: a sampler over a StyleGAN2 generator (see `has_paths`); its labels and truncation apply.
        perceptual: compares images.
        first: a multiple of the batches that the paths are taken in, so that noise inputs do not depend on who asks.
        count: how many paths.
        seed: draws latents, labels and noise.
        epsilon: the step in W, relative to the path.
    """
    generator: Any = sampler.generator  # a `StyleGAN2Generator`, whose network has two parts
    net, device = generator.net, sampler.device
    indices = range(first, first + count)
    labels = sampler.labels([derive_seed(seed, i, "path") for i in indices]).to(device)
    begin, end = (
        net.mapping(
            latents([derive_seed(seed, i, "path", which) for i in indices], sampler.latent_shape).to(device),
            labels,
            truncation_psi=generator.truncation_psi,
        )
        for which in (0, 1)
    )

    def features(ws: torch.Tensor) -> torch.Tensor:
        # Both images of a pair get the same noise, or its difference would drown that of the step.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(seed, first, "path noise"))
            images = net.synthesis(ws, noise_mode="random", force_fp32=True).float()
        factor = images.shape[2] // LARGEST
        if factor > 1:
            images = torch.nn.functional.avg_pool2d(images, factor)
        return perceptual((images + 1) * 127.5).cpu().double()

    with torch.no_grad():
        difference = features(torch.lerp(begin, end, epsilon)) - features(begin)
    return difference.square().sum(dim=1).numpy() / epsilon**2


def perceptual_path_length(lengths: np.ndarray) -> float:
    """Return the mean of path lengths [N] without those below the first and above the last percentile.

    Raises:
        InputError: there are none, or a value is not finite.
    """
    lengths = np.asarray(lengths, np.float64)
    if lengths.ndim != 1 or len(lengths) < 1 or not np.isfinite(lengths).all():
        raise InputError(f"path lengths must be finite numbers [N], got {list(lengths.shape)}")
    low, high = np.percentile(lengths, 1, method="lower"), np.percentile(lengths, 99, method="higher")
    return float(lengths[(lengths >= low) & (lengths <= high)].mean())
