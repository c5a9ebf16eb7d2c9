"""Perceptual path length of StyleGAN2 generators (Karras et al., arXiv 1812.04948, section 4.1; arXiv 1912.04958).

Two latents span a path in W; the generator's images at its beginning and a step of epsilon further are compared by a
perceptual network, and the distance is divided by epsilon squared. The extreme percent at either end is left out.
"""

import os

import numpy as np
import torch

from di_refine.errors import InputError
from di_refine.generators import NetworkSampler, latents
from di_refine.metrics.detectors import FeatureNet, load_detector
from torch_utils.misc import derive_seed

EPSILON = 1e-4
LARGEST = 256  # pixels; larger images are averaged down to this before they are compared


class Perceptual:
    """A network whose squared feature distances say how different two images look.

    Args:
        source: a TorchScript file in the convention of the StyleGAN family's `vgg16.pt` (its forward has an argument
            `return_lpips`), or any other feature network that `load_detector` takes.
        device: where to run.

    Attributes:
        identity: see `features.Identity`.
        is_lpips: whether it is of the first kind, to which the name `ppl2_wend` belongs.
    """

    def __init__(self, source: str | os.PathLike, device: str | torch.device = "cpu"):
        self._net: FeatureNet = load_detector(source, device, option="--perceptual")
        self.identity = self._net.identity
        self.is_lpips = "return_lpips" in getattr(self._net.net, "arguments", ())

    def check_channels(self, channels: int) -> None:
        self._net.check_channels(channels)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, F] of float images [N, C, H, W] with values about 0..255, not rounded."""
        if not self.is_lpips:
            return self._net.embed(images)
        images = images.expand(-1, 3, -1, -1)
        return self._net.net.script(images, resize_images=False, return_lpips=True)


def path_lengths(
    sampler: NetworkSampler, perceptual: Perceptual, first: int, count: int, seed: int, epsilon: float = EPSILON
) -> np.ndarray:
    """Lengths of the paths with indices from `first` on, float64 [count]; a pure function of index and seed.

    Args:
        sampler: over a StyleGAN2 generator; its labels and truncation apply.
        perceptual: the distance.
        first: a multiple of the batches that the paths are taken in, so that noise inputs do not depend on who asks.
        count: how many paths.
        seed: of latents, labels and noise.
        epsilon: step in W, relative to the path.
    """
    net, device = sampler.net, sampler.device
    indices = range(first, first + count)
    labels = sampler.labels([derive_seed(seed, i, "path") for i in indices]).to(device)
    begin, end = (
        net.mapping(
            latents([derive_seed(seed, i, "path", which) for i in indices], sampler.latent_shape).to(device),
            labels,
            truncation_psi=sampler.truncation_psi,
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
    """Mean of path lengths [N] without those below the first and above the last percentile.

    Raises:
        InputError: none, or a value that is not finite.
    """
    lengths = np.asarray(lengths, np.float64)
    if lengths.ndim != 1 or len(lengths) < 1 or not np.isfinite(lengths).all():
        raise InputError(f"path lengths must be finite numbers [N], got {list(lengths.shape)}")
    low, high = np.percentile(lengths, 1, method="lower"), np.percentile(lengths, 99, method="higher")
    return float(lengths[(lengths >= low) & (lengths <= high)].mean())
