"""A small classifier as feature network for tiny images, where Inception would see nothing but enlarged pixels.

Distances between its features rank generators of one data set; they are no FID and are never named so.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from di_refine.errors import InputError, RunError
from torch_utils.misc import derive_seed, open_atomic

FORMAT = "di-refine features 1"


class SmallConvNet(nn.Module):
    """Convolutional classifier with a bounded, normalised feature layer.

    Two convolutions per resolution from `resolution` down to 4, then a linear layer, batch norm without free scale, and
    tanh: every feature has about the same spread and none can dominate a distance.

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
        super().__init__()
        if min(channels, width, feature_dim) < 1 or resolution < 8 or classes < 2:
            raise InputError(
                "a feature network needs resolution >= 8, classes >= 2 and at least one channel and feature"
            )
        self.config = {
            "resolution": resolution,
            "channels": channels,
            "classes": classes,
            "width": width,
            "feature_dim": feature_dim,
        }
        layers, size, inputs = [], resolution, channels
        while size > 4:
            outputs = width * min(resolution // size, 4)
            for _ in range(2):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            size = (size + 1) // 2
        layers += [nn.Flatten(), nn.Linear(inputs * size * size, feature_dim, bias=False)]
        layers += [nn.BatchNorm1d(feature_dim, affine=False), nn.Tanh()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(feature_dim, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, feature_dim] in -1..1 of images [N, channels, resolution, resolution] with values 0..255."""
        return self.body(images.to(self.head.weight.dtype) / 127.5 - 1)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Class logits [N, classes] of features [N, feature_dim]."""
        return self.head(features)


def save_small(net: SmallConvNet, path: str | os.PathLike, name: str, report: dict | None = None) -> None:
    """Write a network as safetensors, atomically, with all that is needed to rebuild it in the metadata.

    Args:
        net: the network.
        path: the file.
        name: what metric names call it, as 'digits' in fd2k_full@digits.
        report: plain values to keep beside the weights, such as the held-out accuracy.
    """
    content = {"format": FORMAT, "name": name, "config": json.dumps(net.config), "report": json.dumps(report or {})}
    state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    with open_atomic(path) as file:
        file.write(safetensors.torch.save(state, metadata=content))


def load_small(path: str | os.PathLike) -> tuple[SmallConvNet, str, dict]:
    """Read a file of `save_small`: the network in eval mode without gradients, its name, its report.

    Raises:
        InputError: naming the file, when it is damaged or something else.
    """
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            content = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: not a feature network of this project ('pretrain.py features' makes them)")
    try:
        net = SmallConvNet(**json.loads(content["config"]))
        net.load_state_dict(state)
        name, report = content["name"], json.loads(content["report"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: the feature network's settings and weights do not fit ({error})") from None
    return net.eval().requires_grad_(False), name, report


def train_features(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    width: int = 32,
    feature_dim: int = 64,
    epochs: int = 60,
    batch: int = 64,
    lr: float = 3e-3,
    weight_decay: float = 0.05,
    mirror: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[SmallConvNet, dict]:
    """Train a `SmallConvNet` on nine tenths of the images and judge it on the rest.

    The same arguments give the same network (on a CPU with the same number of threads). 1,797 digits of 16 x 16 take
    about a minute on one core.

    Args:
        images: uint8 [N, C, R, R].
        labels: class numbers, integer [N]; the classes are 0 to the largest.
        width, feature_dim: of the network.
        epochs: passes over the images, each time shifted, turned and scaled anew.
        batch, lr, weight_decay: of AdamW; the rate falls to zero along a cosine.
        mirror: also flip images left to right; wrong for digits.
        seed: of the split, the first weights, the order and the augmentation.
        device: where to train.
        progress: called after each epoch with (epochs done, epochs, mean loss).

    Returns:
        The network on the CPU in eval mode, and a report: held-out accuracy (0..1), counts, settings.

    Raises:
        InputError: arrays that do not fit together, or too few images.
        RunError: the loss is no longer finite.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[2] != images.shape[3]:
        raise InputError(f"features are trained on uint8 images [N, C, R, R], got {images.dtype} {list(images.shape)}")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise InputError(f"features need one class number per image, got labels {labels.dtype} {list(labels.shape)}")
    if len(images) < 20:
        raise InputError(f"features need at least 20 labelled images, got {len(images)}")
    classes = int(labels.max()) + 1

    generator = torch.Generator().manual_seed(derive_seed("features", seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("features weights", seed))
        net = SmallConvNet(images.shape[2], images.shape[1], classes, width, feature_dim).to(device)

    order = torch.randperm(len(images), generator=generator)
    held_out, training = order[: len(order) // 10], order[len(order) // 10 :]
    pixels = torch.from_numpy(images).to(device)
    classes_of = torch.from_numpy(labels.astype(np.int64)).to(device)
    batch = min(batch, len(training))
    steps = len(training) // batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.15)
    with _deterministic_convolutions():
        for epoch in range(epochs):
            order = training[torch.randperm(len(training), generator=generator)]
            total = torch.zeros([], device=device)
            for index in order[: steps * batch].reshape(steps, batch).to(device):
                warped = _augment(pixels[index].float(), mirror, generator)
                loss = F.cross_entropy(net.logits(net(warped)), classes_of[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach()
            mean_loss = float(total) / steps
            if not np.isfinite(mean_loss):
                raise RunError(f"the loss of the feature network is {mean_loss} after epoch {epoch + 1}; lower lr")
            if progress is not None:
                progress(epoch + 1, epochs, mean_loss)
    net.eval().requires_grad_(False)
    accuracy = _accuracy(net, pixels, classes_of, held_out.to(device))
    report = {
        "held_out_accuracy": accuracy,
        "held_out_images": len(held_out),
        "training_images": len(training),
        "epochs": epochs,
        "seed": seed,
    }
    return net.cpu(), report


@contextlib.contextmanager
def _deterministic_convolutions() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _accuracy(net: SmallConvNet, pixels: torch.Tensor, classes: torch.Tensor, index: torch.Tensor) -> float:
    right = 0
    with torch.no_grad():
        for part in index.split(256):
            right += int((net.logits(net(pixels[part])).argmax(dim=1) == classes[part]).sum())
    return right / max(len(index), 1)


def _augment(images: torch.Tensor, mirror: bool, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to 8 percent of the size, turn by up to 10 degrees, scale by up to 10 percent, and maybe flip."""
    count = len(images)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand([count], generator=generator) * 2 - 1) * limit

    angle, scale = uniform(np.pi / 18), 2 ** uniform(0.14)
    flip = torch.where(torch.rand([count], generator=generator) < 0.5, -1.0, 1.0) if mirror else torch.ones([count])
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack(
        [
            torch.stack([cos * flip, -sin, uniform(0.16)], dim=1),  # grid coordinates run over -1..1: 0.16 is 8 percent
            torch.stack([sin * flip, cos, uniform(0.16)], dim=1),
        ],
        dim=1,
    ).to(images.device)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
