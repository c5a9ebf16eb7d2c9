"""Models of the Hugging Face hub, `hf:organisation/name`, kept in that library's own cache."""

import re
from pathlib import Path

from di_refine import terminal
from di_refine.errors import InputError
from di_refine.files import download

PREFIX = "hf:"
INSTALL = "pip install 'di-refine[diffusers]'"
_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_SETTINGS = ["model_index.json", "config.json", "scheduler_config.json", "di-refine.json"]
_SETTINGS += ["unet/config.json", "scheduler/scheduler_config.json"]


def short_name(path: Path) -> str:
    """Return what people call a network file, or a folder of that library's cache, which has a hash for a name."""
    model = path.parents[1].name if path.parent.name == "snapshots" else ""
    return model.rpartition("--")[2] if model.startswith("models--") else path.stem


def fetch(source: str, setting: str, offline: bool = False) -> Path:
    """Return the folder of a model, downloaded unless it is in the cache.

    Only settings and weights are fetched, and of those safetensors where there are any.

    Args:
        source: `hf:organisation/name`, which `@revision` may follow.
        setting: what it was given for, for messages.
        offline: take it only from this machine.

    Raises:
        InputError: the name is malformed, the library is missing, or the model cannot be had.
    """
    name = source.removeprefix(PREFIX)
    if not _NAME.fullmatch(name):
        raise InputError(f"{setting}={source} is no model of the Hugging Face hub, as in hf:google/ddpm-cifar10-32")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise InputError(f"{setting}={source} needs the library huggingface_hub: {INSTALL}") from None
    repository, _, revision = name.partition("@")
    offline = offline or download.offline()

    def get(patterns: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=patterns, local_files_only=offline
            )
        )

    weights = [f"{place}diffusion_pytorch_model*.{{}}" for place in ("", "unet/")]
    try:
        folder = get(_SETTINGS + [pattern.format("safetensors") for pattern in weights])
        if not any(folder.glob("**/*.safetensors")):
            folder = get(_SETTINGS + [pattern.format("bin") for pattern in weights])
        return folder
    except errors.LocalEntryNotFoundError:
        why = (
            "is not in its cache and downloading is off" if offline else "cannot be downloaded, and is not in its cache"
        )
    except errors.RepositoryNotFoundError:
        why = "is not there, or is private (then log in with the library's own command)"
    except errors.RevisionNotFoundError:
        why = f"has no revision {revision}"
    except Exception as error:  # whatever a connection can come to; the library has no common class for it
        why = f"cannot be downloaded ({type(error).__name__}: {terminal.clean(error)})".splitlines()[0]
    raise InputError(f"{setting}={source} {why}")
