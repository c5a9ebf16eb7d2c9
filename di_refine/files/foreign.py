"""What a file is that a reader did not expect: found out from its first bytes, and the names in it."""

import os
import zipfile
from pathlib import Path
from typing import Any

from di_refine.files import decoding, diffusers_folder, torch_file
from torch_utils import persistence
from torch_utils.persistence import Opaque, Record, unknown_in

NETWORK, IMAGES, STATISTICS, DETECTOR = "network", "images", "statistics", "detector"
"""What readers expect: a network, a folder or archive of images, feature statistics, a feature network."""

_READ_ELSEWHERE = {
    NETWORK: "a network file, which --network takes",
    IMAGES: "a file of images, which --data and --images take",
    STATISTICS: "feature statistics, which --ref takes",
    DETECTOR: "a feature network, which --detector takes",
}
FEATURE_FILES = "di-refine features"
"""What the metadata of our feature networks' files begin with."""

_NONE = "no command here reads it"
_ARRAYS = f"arrays of NumPy (.npz) without mu and sigma or arr_0; {_NONE}"
_CHECKPOINT = f"a torch.save checkpoint; {_NONE}"
_UNSURE = {(DETECTOR, _CHECKPOINT), (STATISTICS, _ARRAYS), (IMAGES, _ARRAYS)}
"""Of these the reader knows better what is wrong: Inception's weights are a checkpoint, too, and it lists arrays."""


def explained(error: object, path: str | os.PathLike, expected: str = NETWORK) -> str:
    """What a file is that could not be read, where it is recognised; else the error itself.

    Args:
        error: what the reader has to say.
        path: the file.
        expected: what the reader reads.
    """
    what = identify(path, expected)
    return str(error) if what is None else f"{path} is {what}"


def identify(path: str | os.PathLike, expected: str = NETWORK) -> str | None:
    """Say what a file or folder is, and which option takes it, or that no command does.

    Nothing in it is executed, imported or built.

    Returns:
        None where it is not recognised, or is what was expected.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _folder(path)
        if not path.is_file():
            return None
        with open(path, "rb") as file:
            head = file.read(1024)
        what = _bytes(path, head) or (_pickle(path) if head[:1] == b"\x80" else None)
    except Exception:  # its reader has said what is wrong, and may have been the wrong one for a damaged file
        return None
    if what == expected or (expected, what) in _UNSURE:
        return None
    return _READ_ELSEWHERE.get(what or "", what)


def _folder(path: Path) -> str | None:
    return "a diffusers folder, which --teacher and --network take" if diffusers_folder.is_folder(path) else None


def _bytes(path: Path, head: bytes) -> str | None:
    if head.lstrip().startswith(b"<"):
        return "a web page; the download went wrong, so fetch the file again"
    if head.startswith(torch_file.OLD_FORM):
        return f"a torch.save checkpoint in the form before PyTorch 1.6; {_NONE}"
    if head.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/data.pkl") for name in names):
            return _CHECKPOINT
        if {"mu.npy", "sigma.npy"} <= set(names):
            return STATISTICS
        if "arr_0.npy" in names:
            return IMAGES
        if any(name.endswith(".npy") for name in names):
            return _ARRAYS
        return IMAGES if any(name.lower().endswith(decoding.EXTENSIONS) for name in names) else None
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        if FEATURE_FILES.encode() in head:
            return DETECTOR
        if path.with_suffix(".json").is_file():
            return None  # it may be ours, and what is wrong with it has been said
        return f"safetensors without the JSON that belongs to ours, perhaps of diffusers; {_NONE}"
    return None


def _pickle(path: Path) -> str | None:
    content = persistence.load_records(path)
    if {"capture_all", "capture_mean_cov", "num_features"} <= content.keys():
        return f"a metric cache of the StyleGAN family; {_NONE}"
    net = next((content[key] for key in ("G_ema", "ema", "net", "G") if content.get(key) is not None), None)
    if not isinstance(net, Record):
        return None
    if net.class_name == "SuperresGenerator":
        return f"a StyleGAN-XL generator; {_NONE}"
    synthesis = _layers(net).get("synthesis")
    if net.class_name == "Generator" and isinstance(synthesis, Record):
        if "input" in _layers(synthesis):
            unknown = unknown_in(content["D"]) if isinstance(content.get("D"), Opaque) else None
            is_xl = unknown is not None and unknown.module.startswith("pg_modules")
            return f"a {'StyleGAN-XL' if is_xl else 'StyleGAN3'} generator; {_NONE}"
        names = [str(name) for name in _layers(synthesis)]
        if names and not any(name.startswith("b") for name in names):  # as StyleGAN2's blocks are called
            return f"a FastGAN generator; {_NONE}"
    return NETWORK


def _layers(record: Record) -> dict[str, Any]:
    layers = record.state.get("_modules")
    return layers if isinstance(layers, dict) else {}
