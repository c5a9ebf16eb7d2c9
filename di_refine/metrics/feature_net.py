"""A feature network on a device, and what identifies the numbers that are measured with it."""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from di_refine.errors import InputError, RunError
from torch_utils import misc

INCEPTION = "inception-2015-12-05"


@dataclass(frozen=True)
class Identity:
    """What identifies a feature network in every number that is measured with it.

    Attributes:
        name: what metric names call it.
        hash: first 16 hex digits of the weight file's SHA-256.
        input_size: images are brought to this height and width; None when the file does that itself.
        resize: the rule for that: 'tf1-bilinear', 'antialiased-bilinear', 'antialiased-bicubic' or 'internal'.
        feature_dim: number of features.
        num_classes: number of classes; None when the network gives no probabilities.
    """

    name: str
    hash: str
    input_size: int | None
    resize: str
    feature_dim: int
    num_classes: int | None

    @property
    def is_inception(self) -> bool:
        """Whether this is the network that FID is defined by."""
        return self.name == INCEPTION

    def as_dict(self) -> dict[str, Any]:
        """The attributes by name, for files and for the JSON result."""
        return asdict(self)


def other_name(name: str) -> str:
    """Make a name for a network that is not the 2015 Inception, fit to be part of the names of metrics and files."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    # A file may be called like the real network; its numbers may not.
    return f"{name}-other" if name == INCEPTION else name


class FeatureNet:
    """A feature network on a device, called with images.

    Args:
        net: turns images [N, C, H, W] with values 0..255 into features [N, F].
        identity: see `Identity`.
        channels: how many image channels the network takes, 1 or 3. Greyscale images are repeated for one that takes 3.
        probabilities: turns images and their features into class probabilities [N, K]; None where there are no classes.
        device: where to run.
        path: the file that the network came from, if any.
        lpips: turns float images [N, 3, H, W] with values 0..255 into features [N, F] whose squared distances are
            LPIPS; None for a network that was not made for this.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        identity: Identity,
        channels: int,
        probabilities: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        device: str | torch.device = "cpu",
        path: Path | None = None,
        lpips: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.net = net.to(device)
        self.path = path
        self.identity = identity
        self.channels = channels
        self.device = torch.device(device)
        self.lpips = lpips
        self._probabilities = probabilities

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor | np.ndarray, probabilities: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return features and class probabilities.

        Args:
            images: uint8 [N, 1 or 3, H, W].
            probabilities: False saves computing them.

        Returns:
            Features [N, F] and probabilities [N, K] or None, float32 on the network's device.

        Raises:
            InputError: the images are of another kind, or in colour for a network that takes greyscale.
        """
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise InputError(f"metrics take uint8 images [N, C, H, W], got {images.dtype} {list(images.shape)}")
        self.check_channels(images.shape[1])
        images = self._prepare(images)
        features = self._features(images)
        if not probabilities or self._probabilities is None:
            return features, None
        with _full_precision():
            return features, self._probabilities(images, features).float()

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return features [N, F] of floating-point images [N, C, H, W] with values 0..255, which are not rounded.

        Metrics of images go by whole values; this is for distances between nearly equal images.
        """
        self.check_channels(images.shape[1])
        return self._features(self._prepare(images))

    def check_finite(self, values: torch.Tensor, first: int) -> None:
        """Raise RunError naming the image, when features or probabilities of images from `first` on are not finite."""
        finite = torch.isfinite(values).all(dim=1)
        if not finite.all():
            image = first + int((~finite).nonzero()[0])
            raise RunError(f"detector {self.identity.name} gave values that are not finite for image {image}")

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Bring images to the device, the network's channels and, unless it resizes them itself, its size."""
        images = misc.to_device(images, self.device)
        if images.shape[1] < self.channels:
            images = images.expand(-1, self.channels, -1, -1)
        size, mode = self.identity.input_size, self.identity.resize.removeprefix("antialiased-")
        if size is None or mode == self.identity.resize or images.shape[2:] == (size, size):
            return images
        images = F.interpolate(images.float(), [size, size], mode=mode, antialias=True, align_corners=False)
        return images.clamp_(0, 255) if mode == "bicubic" else images  # bicubic weights may be negative

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        with _full_precision():
            features = self.net(images).float()
        if features.shape != (len(images), self.identity.feature_dim):
            raise InputError(
                f"detector {self.identity.name} gave {list(features.shape)} for {len(images)} images, "
                f"expected [{len(images)}, {self.identity.feature_dim}]"
            )
        return features

    def check_channels(self, channels: int) -> None:
        """Raise InputError when images with this many channels cannot be judged."""
        if channels not in (1, self.channels):
            raise InputError(
                f"detector {self.identity.name} takes images with {self.channels} channel(s), these have {channels}; "
                "choose another `detector`"
            )


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Turn TF32 off meanwhile: its three digits would shift FIDs of good generators visibly."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    # PyTorch 2.9 renamed the switches, and refuses to read the old ones once a program has set the new ones.
    renamed = hasattr(matmul, "fp32_precision")
    holders: list[Any] = [matmul, cudnn.conv if renamed else cudnn]  # type: ignore[attr-defined]
    name, exact = ("fp32_precision", "ieee") if renamed else ("allow_tf32", False)
    before = [getattr(holder, name) for holder in holders]
    for holder in holders:
        setattr(holder, name, exact)
    try:
        yield
    finally:
        for holder, value in zip(holders, before):
            setattr(holder, name, value)
