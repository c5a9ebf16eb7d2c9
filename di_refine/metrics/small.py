"""Small classifiers as feature networks for tiny images, in which Inception would see nothing but enlarged pixels.

Distances between their features rank generators of one data set; they are no FID and are never named so.
"""

import json
import os
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from di_refine.errors import InputError
from di_refine.files import foreign
from torch_utils import safe_files
from torch_utils.misc import open_atomic

FORMAT = f"{foreign.FEATURE_FILES} 1"
MAX_RESOLUTION = 1024  # to which pictures are scaled; published feature networks take far smaller ones
MAX_SIZE = 1 << 16  # of any number in the settings of a network


class Classifier(nn.Module):
    """A classifier whose last layer but one gives the features.

    The features come from a linear layer, batch norm without free scale, and tanh: every one has about the same spread
    and none can dominate a distance.

    Args:
        resolution: image height and width, at least 8.
        channels: image channels.
        classes: number of classes, at least 2.
        width: channels of the first level.
        feature_dim: number of features.

    Attributes:
        body: turns images with values -1..1 into features [N, feature_dim] in -1..1.
        head: turns features into the logits of the classes.
        config: what the network is rebuilt from.

    Raises:
        InputError: an argument is out of its range.
    """

    body: nn.Sequential
    head: nn.Linear

    def __init__(self, resolution: int, channels: int, classes: int, width: int, feature_dim: int):
        super().__init__()
        if min(channels, width, feature_dim) < 1 or resolution < 8 or classes < 2:
            raise InputError(
                "a feature network needs resolution >= 8, classes >= 2 and at least one channel and feature"
            )
        self.config: dict[str, Any] = {
            "resolution": resolution,
            "channels": channels,
            "classes": classes,
            "width": width,
            "feature_dim": feature_dim,
        }

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features [N, feature_dim] in -1..1 of images [N, channels, R, R] with values 0..255."""
        return self.body(images.to(self.head.weight.dtype) / 127.5 - 1)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return class logits [N, classes] of features [N, feature_dim]."""
        return self.head(features)


def _feature_layers(inputs: int, feature_dim: int) -> list[nn.Module]:
    return [
        nn.Flatten(),
        nn.Linear(inputs, feature_dim, bias=False),
        nn.BatchNorm1d(feature_dim, affine=False),
        nn.Tanh(),
    ]


class SmallConvNet(Classifier):
    """A network of two convolutions per resolution, from `resolution` down to 4, then the features of all pixels.

    Args:
        resolution: image height and width, at least 8.
        channels: image channels.
        classes: number of classes.
        width: channels of the first level; later levels have 2 and at most 4 times as many.
        feature_dim: number of features.
    """

    def __init__(
        self, resolution: int = 16, channels: int = 1, classes: int = 10, width: int = 32, feature_dim: int = 64
    ):
        super().__init__(resolution, channels, classes, width, feature_dim)
        layers: list[nn.Module] = []
        size, inputs = resolution, channels
        while size > 4:
            outputs = width * min(resolution // size, 4)
            for _ in range(2):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            size = (size + 1) // 2
        self.body = nn.Sequential(*layers, *_feature_layers(inputs * size * size, feature_dim))
        self.head = nn.Linear(feature_dim, classes)


class _ResidualBlock(nn.Module):
    """Two convolutions, each after batch norm and ReLU, whose result is added to the input (arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        self.stride = stride
        self.skip = None
        if inputs != outputs or stride != 1:
            self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.norm(x))
        if self.skip is not None:
            # The skip takes every `stride`-th pixel by a slice. A 1x1 convolution with a stride does the same, but
            # oneDNN (in PyTorch 2.6 to 2.15) corrupts the heap in its backward pass on CPUs without AVX-512, for
            # float32 channels_last images of fewer than 8 channels.
            x = self.skip(active[:, :, :: self.stride, :: self.stride])
        return self.branch(active) + x


class SmallResNet(Classifier):
    """A wide residual network (Zagoruyko & Komodakis 2016, arXiv 1605.07146) of two blocks at each resolution.

    Resolutions go from `resolution` down to 8, then come the mean over the pixels and the features. It is for natural
    images, whose classes two convolutions per resolution do not tell apart.

    Args:
        resolution: image height and width, at least 8.
        channels: image channels.
        classes: number of classes.
        width: channels of the first level; later levels have 2 and at most 4 times as many.
        feature_dim: number of features.
    """

    def __init__(
        self, resolution: int = 32, channels: int = 3, classes: int = 10, width: int = 48, feature_dim: int = 64
    ):
        super().__init__(resolution, channels, classes, width, feature_dim)
        self.config["architecture"] = "residual"
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
        size, inputs = resolution, width
        while size >= 8:
            outputs = width * min(resolution // size, 4)
            layers += [
                _ResidualBlock(inputs, outputs, 1 if size == resolution else 2),
                _ResidualBlock(outputs, outputs, 1),
            ]
            inputs, size = outputs, (size + 1) // 2
        layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        self.body = nn.Sequential(*layers, *_feature_layers(inputs, feature_dim))
        self.head = nn.Linear(feature_dim, classes)


ARCHITECTURES: dict[str, type[Classifier]] = {"plain": SmallConvNet, "residual": SmallResNet}


def save_small(
    net: Classifier, path: str | os.PathLike, name: str, report: dict | None = None, half: bool = False
) -> None:
    """Write a network as safetensors, atomically, with all that is needed to rebuild it in the metadata.

    Args:
        net: the network.
        path: the file.
        name: what metric names call it, as 'digits' in fd2k_full@digits.
        report: plain values that are kept beside the weights, such as the held-out accuracy.
        half: store float16, in half the bytes. `load_small` gives float32 either way.
    """
    content = {"format": FORMAT, "name": name, "config": json.dumps(net.config), "report": json.dumps(report or {})}
    state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    if half:
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    with open_atomic(path) as file:
        file.write(safetensors.torch.save(state, metadata=content))


def _full(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value


def load_small(path: str | os.PathLike) -> tuple[Classifier, str, dict]:
    """Read a file of `save_small`.

    Returns:
        The network in eval mode without gradients, its name, and its report.

    Raises:
        InputError: the file is damaged or something else; the message names it.
    """
    try:
        safe_files.check_safetensors(path)
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            content = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    if content.get("format") != FORMAT:
        problem = f"{path}: not a feature network of this project ('pretrain.py features' makes them)"
        raise InputError(foreign.explained(problem, path, foreign.DETECTOR))
    try:
        config = safe_files.parse_json(content["config"].encode())
        architecture = ARCHITECTURES[config.pop("architecture", "plain")]
        if not all(type(value) is int and 0 < value <= MAX_SIZE for value in config.values()):
            raise ValueError(f"sizes must be whole numbers of at most {MAX_SIZE}")
        with torch.device("meta"):  # without memory, until the tensors are known to fit
            net = architecture(**config)
        if config["resolution"] > MAX_RESOLUTION:
            raise ValueError(f"a resolution of {config['resolution']}, more than {MAX_RESOLUTION}")
        places = net.state_dict()
        for key, value in state.items():
            if key in places and value.is_floating_point() != places[key].is_floating_point():
                raise ValueError(f"{key} is {value.dtype}")
        net.load_state_dict({key: _full(value) for key, value in state.items()}, assign=True)
        name, report = content["name"], safe_files.parse_json(content["report"].encode())
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]  # torch lists every tensor
        raise InputError(f"{path}: the feature network's settings and weights do not fit ({reason})") from None
    return net.eval().requires_grad_(False), name, report
