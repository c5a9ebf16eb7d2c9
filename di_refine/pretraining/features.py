"""Training the feature networks of `metrics.smallnet`."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
import torch
from torch.nn import functional as F

from di_refine.errors import InputError, RunError
from di_refine.metrics.small import ARCHITECTURES, Classifier
from di_refine.pretraining.config import FeaturesConfig
from di_refine.runs import checkpoint
from torch_utils.misc import derive_seed


def train_features(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    held_out: tuple[np.ndarray, np.ndarray] | None = None,
    device: str | torch.device = "cpu",
    state: str | os.PathLike | None = None,
    max_seconds: float | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    **settings,
) -> tuple[Classifier | None, dict]:
    """Train a feature network on nine tenths of the images and judge it on the rest.

    The same arguments give the same network (on a CPU with the same number of threads), with or without stops between.
    1,797 digits of 16 x 16 take about a minute on one core.

    Args:
        images: uint8 [N, C, R, R].
        labels: class numbers, integer [N]; the classes are 0 to the largest.
        held_out: images and labels to judge the network by; then all of `images` are trained on.
        device: where to train.
        state: a file that the training is continued from, if it is there, and saved to where `max_seconds` ends it.
        max_seconds: stop after the epoch in which this is over.
        progress: called after each epoch with (epochs done, epochs, mean loss).
        settings: of `FeaturesConfig`.

    Returns:
        The network on the CPU in eval mode, and a report: held-out accuracy (0..1), counts, settings. Where time was
        up before the last epoch: None, and a report of the epochs that are done.

    Raises:
        InputError: arrays that do not fit together, too few images, or a state of other settings.
        RunError: the loss is no longer finite.
    """
    o = FeaturesConfig(**settings)
    images, labels = _checked(images, labels)
    if len(images) < 20:
        raise InputError(f"features need at least 20 labelled images, got {len(images)}")
    classes = int(labels.max()) + 1
    device = torch.device(device)

    generator = torch.Generator().manual_seed(derive_seed("features", o.seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("features weights", o.seed))
        net = ARCHITECTURES[o.architecture](images.shape[2], images.shape[1], classes, o.width, o.feature_dim).to(
            device
        )
    if o.precision == "bf16":
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    pixels, classes_of = _on(device, images, labels)
    if held_out is None:
        order = torch.randperm(len(images), generator=generator)
        unseen, training = order[: len(order) // 10], order[len(order) // 10 :]
        test = pixels[unseen.to(device)], classes_of[unseen.to(device)]
    else:
        test, training = _on(device, *_checked(*held_out)), torch.arange(len(images))
    batch = min(o.batch, len(training))
    steps = len(training) // batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=o.lr, weight_decay=o.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, o.lr, total_steps=o.epochs * steps, pct_start=0.15)
    saved = _Saved(state, [asdict(o), len(images)], net=net, optimizer=optimizer, schedule=schedule)
    first, clock = saved.load(generator), time.monotonic()
    if progress is not None and first:
        progress(first, o.epochs, float("nan"))
    with _deterministic_convolutions(o.precision == "fp32"):
        for epoch in range(first, o.epochs):
            order = training[torch.randperm(len(training), generator=generator)]
            total = torch.zeros([], device=device)
            for index in order[: steps * batch].reshape(steps, batch).to(device):
                changed = AUGMENTATIONS[o.augment](pixels[index].float(), o.mirror, generator)
                with torch.autocast(device.type, torch.bfloat16, enabled=o.precision == "bf16"):
                    loss = F.cross_entropy(net.logits(net(changed)), classes_of[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach()
            mean_loss = float(total) / steps
            if not np.isfinite(mean_loss):
                raise RunError(f"the loss of the feature network is {mean_loss} after epoch {epoch + 1}; lower lr")
            if progress is not None:
                progress(epoch + 1, o.epochs, mean_loss)
            if max_seconds is not None and epoch + 1 < o.epochs and time.monotonic() - clock > max_seconds:
                saved.save(generator, epoch + 1)
                return None, {"epochs": o.epochs, "epochs_done": epoch + 1}
    net.eval().requires_grad_(False)
    report = {
        "held_out_accuracy": _accuracy(net, *test),
        "held_out_images": len(test[0]),
        "training_images": len(training),
        "epochs": o.epochs,
        "seed": o.seed,
    }
    saved.remove()
    return net.to("cpu", memory_format=torch.contiguous_format), report  # type: ignore[call-overload]


class _Saved:
    """A training in a file, between two epochs; `path` None keeps nothing."""

    def __init__(self, path: str | os.PathLike | None, settings: list, **parts):
        self.path, self.settings, self.parts = path, settings, parts

    def load(self, generator: torch.Generator) -> int:
        """Continue, if there is something to continue from; returns the number of epochs that are done."""
        if self.path is None or not os.path.exists(self.path):
            return 0
        state = checkpoint.load(self.path)
        if state["settings"] != self.settings:
            raise InputError(f"{self.path} is of a training with other options; give those again, or delete it")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        return state["epochs"]

    def save(self, generator: torch.Generator, epochs: int) -> None:
        if self.path is not None:
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            own = {"settings": self.settings, "generator": generator.get_state(), "epochs": epochs}
            checkpoint.save(self.path, {**own, **parts})

    def remove(self) -> None:
        if self.path is not None and os.path.exists(self.path):
            os.unlink(self.path)


def _checked(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[2] != images.shape[3]:
        raise InputError(f"features are trained on uint8 images [N, C, R, R], got {images.dtype} {list(images.shape)}")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise InputError(f"features need one class number per image, got labels {labels.dtype} {list(labels.shape)}")
    return images, labels


def _on(device: torch.device, images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(images).to(device), torch.from_numpy(labels.astype(np.int64)).to(device)


@contextlib.contextmanager
def _deterministic_convolutions(wanted: bool) -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = wanted or before
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _accuracy(net: Classifier, pixels: torch.Tensor, classes: torch.Tensor) -> float:
    right = 0
    with torch.no_grad():
        for part, wanted in zip(pixels.split(256), classes.split(256)):
            right += int((net.logits(net(part)).argmax(dim=1) == wanted).sum())
    return right / max(len(pixels), 1)


def _warp(images: torch.Tensor, mirror: bool, generator: torch.Generator) -> torch.Tensor:
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


def _shift(images: torch.Tensor, mirror: bool, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to an eighth of the size, in whole pixels and reflected at the edges, and maybe flip."""
    count, _, height, width = images.shape
    limit = max(height // 8, 1)
    shift = torch.randint(-limit, limit + 1, [2, count, 1], generator=generator)
    rows, columns = (_reflected(torch.arange(size) + by, size) for size, by in zip((height, width), shift))
    if mirror:
        flip = torch.rand([count, 1], generator=generator) < 0.5
        columns = torch.where(flip, width - 1 - columns, columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    samples = torch.arange(count, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _reflected(index: torch.Tensor, size: int) -> torch.Tensor:
    """Indices less than a size outside of 0..size-1 reflected at the border pixels, which are not repeated."""
    return (size - 1 - (size - 1 - index.abs()).abs()).abs()


AUGMENTATIONS: dict[str, Callable[[torch.Tensor, bool, torch.Generator], torch.Tensor]] = {
    "warp": _warp,
    "shift": _shift,
}
"""How images are changed in training; called with float images [N, C, H, W], whether to flip, and a CPU generator."""
