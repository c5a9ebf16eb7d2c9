"""Loading feature networks: the 2015 Inception, our small classifiers, any TorchScript, and plug-ins."""

import os
import pickle
import warnings
import zipfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from di_refine.errors import InputError
from di_refine.files import foreign, registry
from di_refine.files.download import sha256_of
from di_refine.metrics import inception
from di_refine.metrics.feature_net import INCEPTION, FeatureNet, Identity, other_name
from di_refine.metrics.plugin import load_plugin
from di_refine.metrics.small import load_small
from torch_utils import safe_files

# SHA-256 of the files that hold the 2015 network. Only their numbers may be called FID, KID and Inception score.
INCEPTION_FILES = {
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",  # pt_inception-2015-12-05-6726825d.pth
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",  # inception-2015-12-05.pt (TorchScript)
}


def load_detector(
    source: str | os.PathLike,
    device: str | torch.device = "cpu",
    setting: str = "detector",
    allow_code: bool = False,
) -> FeatureNet:
    """Load a feature network.

    Args:
        source: a file (weights of the 2015 Inception as PyTorch state dict, safetensors or TorchScript, a file of
            `save_small`, any TorchScript module that turns images [N, 3, H, W] in 0..255 into features [N, F], or a
            plug-in, see `metrics.plugin`), a name in the registry, or the short name used in metric names (`digits` for
            `features-digits`).
        device: where to run.
        setting: what the source was given for, for messages.
        allow_code: run TorchScript files, whatever they are called, and plug-ins. These are programs, which can read
            and write files; the published TorchScript of the 2015 Inception, known by its hash, is run in any case.

    Raises:
        InputError: the source is missing, none of these, or a program that is not allowed; the message names it.
    """
    path = _locate(source, setting)
    if path.suffix == ".py":
        _check_allowed(allow_code, f"{setting}={source}", "a plug-in")
        return load_plugin(path, device)
    try:
        digest = sha256_of(path)
        if path.suffix == ".safetensors":
            safe_files.check_safetensors(path)
    except OSError as error:
        raise InputError(f"{setting}={source} cannot be read ({error.strerror})") from None
    if path.suffix == ".safetensors" and not _holds_inception(path):
        return _small(path, digest, device)
    if _is_torchscript(path):
        _check_allowed(allow_code or digest in INCEPTION_FILES, f"{setting}={source}", "TorchScript")
        return _torchscript(path, digest, device)
    return _inception(path, digest, device)


def _check_allowed(allowed: bool, what: str, kind: str) -> None:
    if not allowed:
        raise InputError(
            f"{what} is a program ({kind}), which could read, change and send any of your files; give `allow_code` if "
            "you trust whoever made it, or take weights in .safetensors"
        )


def _locate(source: str | os.PathLike, setting: str) -> Path:
    if Path(source).is_file():
        return Path(source)
    short = f"features-{source}"
    known = registry.find(short) is not None
    return registry.resolve(short if known else source, setting=setting, kind=("features", "inception"))


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
    """Return whether a safetensors file has the tensors of the 2015 network.

    A damaged file has not: it is for `load_small` to report.
    """
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
            net.load_state_dict(_read_weights(path))
    except (
        OSError,
        EOFError,
        RuntimeError,
        AttributeError,
        KeyError,
        ValueError,
        TypeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).strip().split("\n")[0]
        # Both have texts that advise to load the file without the check.
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:
            reason = "it holds more than tensors and plain values, or is no file of PyTorch"
        problem = f"{path}: not a feature network; expected Inception weights, TorchScript or .safetensors ({reason})"
        raise InputError(foreign.explained(problem, path, foreign.DETECTOR)) from None
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


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    with safe_files.open_regular(path) as file:
        safe_files.check_saved(file, os.fstat(file.fileno()).st_size)
        file.seek(0)
        with warnings.catch_warnings():  # of what is no checkpoint and will be refused
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)


class _Script(torch.nn.Module):
    """The network in a TorchScript file, called as the arguments of its forward say.

    The published files give class probabilities unless they are asked for features, and the one for LPIPS can be asked
    for features whose squared distances are LPIPS.
    """

    def __init__(self, script: torch.jit.ScriptModule):
        super().__init__()
        self.script = script
        schema = script.forward.schema  # type: ignore[attr-defined]  # TorchScript's own kind of method
        arguments = {argument.name for argument in schema.arguments}
        self.takes_return_features = "return_features" in arguments
        self.gives_probabilities = {"return_features", "no_output_bias"} <= arguments
        self.gives_lpips = "return_lpips" in arguments

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.script(images, return_features=True) if self.takes_return_features else self.script(images)

    def probabilities(self, images: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.script(images, no_output_bias=True)

    def lpips(self, images: torch.Tensor) -> torch.Tensor:
        return self.script(images, resize_images=False, return_lpips=True)


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
    probabilities = net.probabilities if net.gives_probabilities else None
    return FeatureNet(net, identity, 3, probabilities, device, path, net.lpips if net.gives_lpips else None)


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in f"/{name}" or f"/{name}".endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # it is no archive, or a damaged one, of which zipfile raises a dozen kinds
        return False
