"""The teacher as feature network and reference, so that a run can be measured without Inception, data or labels.

`fd5k@teacher` is the Frechet distance between features of the generator's images and of the teacher's own samples. The
features are those of the last layer of the teacher's encoder, at a low noise level, averaged over the pixels. It is no
FID: the judge is the trainer, so what the teacher does not know it does not see, and a generator that is better than
the teacher counts as worse. docs/metrics.md has how well it ranks snapshots.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from di_refine import denoisers
from di_refine.denoisers import Denoiser
from di_refine.files import networks, teacher_samples
from di_refine.files.datasets import ImageDataset
from di_refine.generators import DiffusionSampler
from di_refine.labels import LabelLaw
from di_refine.metrics.feature_net import FeatureNet, Identity
from di_refine.metrics.kinds import TEACHER
from torch_utils import distributed

SIGMA = 0.25  # noise level of the features
IMAGES = 5000  # of the reference, where a metric takes all that there are
STEPS = 18  # of the reference's sampler
SEED = 10**9  # of the reference's latents; others than those of measurements, for which small seeds are used


class Encoder(torch.nn.Module):
    """Features of images: the last layer of a denoiser's encoder, averaged over the pixels.

    All images get the same noise, so that an image's features depend on it alone; labels are left out.

    Args:
        net: a `Denoiser` whose encoder is known.
    """

    noise: torch.Tensor

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net, self._layer = net, denoisers.encoder_layer(net)
        model = cast(Denoiser, net)
        rng = torch.Generator().manual_seed(0)
        noise = torch.randn([1, model.img_channels, model.img_resolution, model.img_resolution], generator=rng)
        self.register_buffer("noise", SIGMA * noise)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[N, C, R, R]` with values 0..255 -> features `[N, F]`."""
        x = images.float() / 127.5 - 1 + self.noise
        labels = x.new_zeros(len(x), cast(Denoiser, self.net).label_dim)
        features = denoisers.encode(self.net, self._layer, x, x.new_full([len(x)], SIGMA), labels)
        return features.float().flatten(2).mean(dim=2)


@dataclass(frozen=True)
class TeacherReference:
    """What metrics of the name `@teacher` compare with: samples of a diffusion model, drawn when they are needed.

    Attributes:
        net: the diffusion model.
        path: its file.
        num_images: how many samples.
        law: what their labels are drawn from.
        device: where to draw.
        config: what was given besides the file.
    """

    net: torch.nn.Module
    path: Path
    num_images: int
    law: LabelLaw
    device: torch.device
    config: networks.Config | None = None

    @functools.cached_property  # it reads the whole file
    def settings(self) -> dict[str, Any]:
        """What the samples depend on."""
        return teacher_samples.sample_settings(self.path, self.num_images, STEPS, SEED, self.law, self.config)

    def content_hash(self) -> str:
        """A hash of the settings, which the samples follow from."""
        return teacher_samples.settings_hash(self.settings)

    def draw(self) -> ImageDataset:
        """The samples, from the cache folder, or drawn into it by the first process."""
        path = teacher_samples.cached_path(self.path, self.settings, teacher_samples.REFERENCES)
        if distributed.is_first() and not teacher_samples.is_made(path, self.settings):
            sampler = DiffusionSampler(self.net, self.device, STEPS, law=self.law, name=str(self.path))
            teacher_samples.sample(sampler, path, self.num_images, SEED, self.settings)
        distributed.barrier()
        return ImageDataset(path)

    def detector(self) -> FeatureNet:
        """The feature network."""
        return feature_net(self.net, self.path, self.settings["teacher_sha256"], self.device)


def feature_net(net: torch.nn.Module, path: Path, digest: str, device: torch.device | str = "cpu") -> FeatureNet:
    """The features of an `Encoder` as a feature network.

    Args:
        net: the diffusion model, whose encoder is known.
        path: its file.
        digest: of the file, see `files.networks.digest`.
        device: where to run.
    """
    model = cast(Denoiser, net)
    encoder, size = Encoder(net).to(device).eval(), model.img_resolution
    with torch.no_grad():
        width = encoder(torch.zeros([1, model.img_channels, size, size], device=device)).shape[1]
    identity = Identity(TEACHER, digest[:16], size, "antialiased-bilinear", width, None)
    return FeatureNet(encoder, identity, model.img_channels, device=device, path=path)
