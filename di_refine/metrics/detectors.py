"""Feature networks behind one interface: the 2015 Inception, our small classifiers, any TorchScript, and plug-ins."""

import contextlib
import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch.nn import functional as F

from di_refine.errors import InputError, RunError
from di_refine.metrics import inception
from di_refine.metrics.small import SmallConvNet, load_small, save_small
from di_refine.pretraining.features import train_features

__all__ = ["FeatureNet", "Identity", "SmallConvNet", "load_detector", "save_small", "train_features"]

INCEPTION = "inception-2015-12-05"

# SHA-256 of the files that hold the 2015 network. Only their numbers may be called FID, KID and Inception score.
INCEPTION_FILES = {
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",  # pt_inception-2015-12-05-6726825d.pth
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",  # inception-2015-12-05.pt (TorchScript)
}


@dataclass(frozen=True)
class Identity:
    """What a number measured with a feature network must carry.

    Attributes:
        name: what metric names call it.
        hash: first 16 hex digits of the weight file's SHA-256.
        input_size: the size images are brought to, or None when the file does that itself.
        resize: by which rule: 'tf1-bilinear', 'antialiased-bilinear', 'antialiased-bicubic' or 'internal'.
        feature_dim: number of features.
        num_classes: number of classes, or None when it gives no probabilities.
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

    def as_dict(self) -> dict:
        return asdict(self)


class FeatureNet:
    """A feature network on a device, called with images.

    Args:
        net: `net(images) -> features [N, F]` for images [N, C, H, W] with values 0..255.
        identity: see `Identity`.
        channels: what the network takes, 1 or 3. Greyscale images are repeated for a network that takes 3.
        probabilities: `probabilities(images, features) -> [N, K]`, or None.
        device: where to run.
        path: the file it came from, if any.
    """

    def __init__(
        self,
        net,
        identity: Identity,
        channels: int,
        probabilities=None,
        device: str | torch.device = "cpu",
        path: Path | None = None,
    ):
        self.net = net.to(device)
        self.path = path
        self.identity = identity
        self.channels = channels
        self.device = torch.device(device)
        self._probabilities = probabilities

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor | np.ndarray, probabilities: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features and class probabilities.

        Args:
            images: uint8 [N, 1 or 3, H, W].
            probabilities: False saves computing them.

        Returns:
            Features [N, F] and probabilities [N, K] (or None), float32 on the network's device.

        Raises:
            InputError: images of another kind, or in colour for a network that takes greyscale.
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
        """Features [N, F] of floating-point images [N, C, H, W] with values 0..255 that are not rounded to whole ones.

        Numbers of images that exist are made from rounded ones; this is for distances between nearly equal images.
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
        """Images on the device with the network's channels and, unless it resizes itself, of the size it takes."""
        images = images.to(self.device)
        if images.shape[1] < self.channels:
            images = images.expand(-1, self.channels, -1, -1)
        size, mode = self.identity.input_size, self.identity.resize.removeprefix("antialiased-")
        if mode == self.identity.resize or images.shape[2:] == (size, size):
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
                "choose another --detector"
            )


def load_plugin(path: Path, device: str | torch.device) -> FeatureNet:
    """A plug-in's network, see `metrics.plugin`."""
    from di_refine.metrics import plugin  # it builds on this module

    net, identity, probabilities = plugin.load(path)
    return FeatureNet(net, identity, net.channels, probabilities, device, path)


def load_detector(
    source: str | os.PathLike, device: str | torch.device = "cpu", option: str = "--detector"
) -> FeatureNet:
    """Load a feature network.

    Args:
        source: a file (weights of the 2015 Inception as PyTorch state dict, safetensors or TorchScript, a file of
            `save_small`, any TorchScript module that turns images [N, 3, H, W] in 0..255 into features [N, F], or a
            plug-in, see `metrics.plugin`), a name in the registry, or the short name used in metric names (`digits` for
            `features-digits`). TorchScript files and plug-ins are programs: use only ones you trust.
        device: where to run.
        option: the command's option it came from, for messages.

    Raises:
        InputError: naming the file, when it is missing or none of these.
    """
    path = _locate(source, option)
    if path.suffix == ".py":
        return load_plugin(path, device)
    digest = _sha256(path)
    if path.suffix == ".safetensors" and not _holds_inception(path):
        return _small(path, digest, device)
    if _is_torchscript(path):
        return _torchscript(path, digest, device)
    return _inception(path, digest, device)


def _locate(source: str | os.PathLike, option: str) -> Path:
    if Path(source).is_file():
        return Path(source)
    from di_refine.files import registry  # here, so that metrics on local files need no registry

    short = f"features-{source}"
    known = registry.find(short) is not None
    return Path(registry.resolve(short if known else source, option=option, kind=("features", "inception")))


def _small(path: Path, digest: str, device: str | torch.device) -> FeatureNet:
    net, name, _ = load_small(path)
    config = net.config
    identity = Identity(
        name=other_name(name),
        hash=digest[:16],
        input_size=config["resolution"],
        resize="antialiased-bilinear",
        feature_dim=config["feature_dim"],
        num_classes=config["classes"],
    )

    def probabilities(images: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return net.logits(features).softmax(dim=1)

    return FeatureNet(net, identity, config["channels"], probabilities, device, path)


def _holds_inception(path: Path) -> bool:
    """Whether a safetensors file has the tensors of the 2015 network. Damaged files are somebody else's to report."""
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            return "Conv2d_1a_3x3.conv.weight" in file.keys()  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError):
        return False


def _inception(path: Path, digest: str, device: str | torch.device) -> FeatureNet:
    net = inception.InceptionV3()
    try:
        if path.suffix == ".safetensors":
            net.load_state_dict(safetensors.torch.load_file(path))
        else:
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, EOFError, RuntimeError, AttributeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{path}: not a feature network; expected Inception weights, TorchScript or .safetensors ({reason})"
        ) from None
    identity = Identity(
        name=INCEPTION if digest in INCEPTION_FILES else other_name(path.stem),
        hash=digest[:16],
        input_size=inception.INPUT_SIZE,
        resize="tf1-bilinear",
        feature_dim=inception.FEATURE_DIM,
        num_classes=inception.NUM_CLASSES,
    )

    def probabilities(images: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return net.logits(features).softmax(dim=1)

    return FeatureNet(net, identity, 3, probabilities, device, path)


class _Script(torch.nn.Module):
    """A TorchScript file. Those published by NVIDIA give class probabilities unless asked for features."""

    def __init__(self, script: torch.jit.ScriptModule):
        super().__init__()
        self.script = script
        self.arguments = {argument.name for argument in script.forward.schema.arguments}

    @property
    def gives_probabilities(self) -> bool:
        return {"return_features", "no_output_bias"} <= self.arguments

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.script(images, return_features=True) if "return_features" in self.arguments else self.script(images)

    def probabilities(self, images: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.script(images, no_output_bias=True)


def _torchscript(path: Path, digest: str, device: str | torch.device) -> FeatureNet:
    try:
        with warnings.catch_warnings():  # TorchScript is deprecated, but it is what the published detectors are in
            warnings.simplefilter("ignore", DeprecationWarning)
            net = _Script(torch.jit.load(path, map_location="cpu").eval())
        probe = torch.zeros([1, 3, 64, 64], dtype=torch.uint8)
        with torch.no_grad():
            features = net(probe)
            num_classes = net.probabilities(probe, features).shape[1] if net.gives_probabilities else None
        feature_dim = features.shape[1]
        if features.ndim != 2:
            raise ValueError(f"features have shape {list(features.shape)}")
    except Exception as error:  # a TorchScript program may fail in any way
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{path}: this TorchScript does not turn uint8 images [N, 3, H, W] into features [N, F] ({reason})"
        ) from None
    identity = Identity(
        name=INCEPTION if digest in INCEPTION_FILES else other_name(path.stem),
        hash=digest[:16],
        input_size=None,
        resize="internal",
        feature_dim=feature_dim,
        num_classes=num_classes,
    )
    return FeatureNet(net, identity, 3, net.probabilities if num_classes else None, device, path)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in f"/{name}" for name in archive.namelist())


def other_name(name: str) -> str:
    """A name for a network that is not the 2015 Inception, fit to be part of a metric's name and so of a file name."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    # A file may be called like the real network; its numbers may not.
    return f"{name}-other" if name == INCEPTION else name


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32: its three digits would shift FIDs of good generators visibly."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    # PyTorch 2.9 renamed the switches, and refuses to read the old ones once a program has set the new ones.
    renamed = hasattr(matmul, "fp32_precision")
    holders = [matmul, cudnn.conv] if renamed else [matmul, cudnn]
    name, exact = ("fp32_precision", "ieee") if renamed else ("allow_tf32", False)
    before = [getattr(holder, name) for holder in holders]
    for holder in holders:
        setattr(holder, name, exact)
    try:
        yield
    finally:
        for holder, value in zip(holders, before):
            setattr(holder, name, value)
