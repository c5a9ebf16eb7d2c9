"""Feature networks that users bring as a Python file, such as CLIP or DINOv2: `detector=dinov2.py`.

The file defines a function `detector()` that returns a `torch.nn.Module`:

    forward(images)     features [N, F] of float32 images [N, 3, S, S] with values 0..255
    name                what metric names call it: fd50k_full@dinov2
    input_size          S, or None when forward takes any size
    resize              'antialiased-bilinear' or 'antialiased-bicubic' to S; 'internal' when forward does it
    channels            optional: 1 for a greyscale network
    logits(features)    optional: class logits [N, K], for is<N>k@ and acc<N>k@

Such a file is a program and is run: use only ones you trust. Its hash covers the file and every tensor of the module,
so another version of the weights is another network, however they were fetched.
"""

import hashlib
import importlib.util
from pathlib import Path

import torch

from di_refine.errors import InputError
from di_refine.metrics.feature_net import FeatureNet, Identity, other_name

RESIZE_RULES = ("antialiased-bilinear", "antialiased-bicubic", "internal")


class _Plugin(torch.nn.Module):
    """A user's module that sees float images and has no gradients."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images.float())

    def probabilities(self, images: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.net.logits(features).softmax(dim=1)  # type: ignore[operator]  # a method that the user wrote


def load_plugin(path: Path, device: str | torch.device = "cpu") -> FeatureNet:
    """Run a plug-in and try its network on a black image.

    Raises:
        InputError: the file lacks something or fails; the message names the file and the reason.
    """
    try:
        given = _run(path)
        name, size, resize, channels = given.name, given.input_size, given.resize, getattr(given, "channels", 3)
        if resize not in RESIZE_RULES or (size is None and resize != "internal"):
            raise ValueError(f"resize={resize!r} with input_size={size!r}; known are {', '.join(RESIZE_RULES)}")
        net = _Plugin(given)
        probe = torch.zeros([1, channels, size or 64, size or 64])
        with torch.no_grad():
            features = net(probe)
            if features.ndim != 2:
                raise ValueError(f"features have shape {list(features.shape)}, not [N, F]")
            probabilities = net.probabilities if hasattr(given, "logits") else None
            num_classes = None if probabilities is None else probabilities(probe, features).shape[1]
    except Exception as error:  # somebody else's program may fail in any way
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a feature network plug-in, see docs/metrics.md ({reason})") from None
    identity = Identity(other_name(str(name)), _digest(path, net), size, resize, features.shape[1], num_classes)
    return FeatureNet(net, identity, channels, probabilities, device, path)


def _run(path: Path):
    """Run the file and return what its `detector()` returns."""
    spec = importlib.util.spec_from_file_location(f"di_refine_plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError("Python cannot import a file of this name")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.detector()


def _digest(path: Path, net: torch.nn.Module) -> str:
    """Return 16 hex digits of a hash of the file and of all tensors of the network."""
    digest = hashlib.sha256(path.read_bytes())
    for name, value in net.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
