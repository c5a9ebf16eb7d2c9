"""The command `python -m di_refine doctor`: what a report of a fault should say of the machine, and what would help."""

import os
import platform
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from di_refine import terminal
from di_refine.commands import cli

EXTRAS = {
    "tensorboard": (("tensorboard",), "runs also write TensorBoard events"),
    "datasets": (("sklearn",), "dataset_tool.py reads scikit-learn's digits"),
    "plots": (("matplotlib",), "curves are drawn"),
    "diffusers": (("diffusers",), "folders of diffusers and hf:org/name can teach"),
    "video": (("imageio_ffmpeg",), "generate.py writes films as MP4, too"),
    "view": (("gradio",), "python -m di_refine view compares networks on a local page"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "python -m di_refine convert writes ONNX"),
}
"""The optional dependencies of the package: modules, and what they give."""

PACKAGES = ("torch", "numpy", "scipy", "pillow", "click", "safetensors")

FREE_GIB = 2
"""Less free space than this in the cache's file system is worth a word: the networks of CIFAR-10 take that much."""


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print only the JSON object.")
def main(as_json):
    """Say what is installed here, what this machine has, and what would help. Reports of faults should contain it.

    \b
    python -m di_refine doctor
    python -m torch_utils.custom_ops

    The second also builds, tests and times the compiled operators. No path is shown but that of the cache.
    """
    found = {
        "versions": _versions(),
        "machine": _machine(),
        "operators": _operators(),
        "extras": {name: all(map(find_spec, modules)) for name, (modules, _) in EXTRAS.items()},
        "cache": _cache(),
    }
    found["advice"] = advice(found)
    if not as_json:
        for heading in ("versions", "machine", "operators", "extras", "cache"):
            terminal.show(heading)
            for name, value in found[heading].items():
                terminal.show(f"  {name:16}{_words(value)}")
        terminal.show("what would help")
        for sentence in found["advice"] or ["nothing: all is there"]:
            terminal.show(f"  {sentence}")
    terminal.print_result(found)


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _versions() -> dict[str, Any]:
    import torch

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {
        "di-refine": version("di-refine") or "a checkout that is not installed",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "cuda_of_torch": torch.version.cuda,
    }


def _machine() -> dict[str, Any]:
    import torch

    from torch_utils.ops import doctor

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in os.sysconf_names else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": pages and round(pages / 2**30, 1),
        "gpus": doctor.gpus(),
        "gpu_memory_gib": [
            round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1)
            for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        ],
        "mps": torch.backends.mps.is_available(),
        "device": str(cli.pick_device()),
    }


def _operators() -> dict[str, Any]:
    from torch_utils import custom_ops
    from torch_utils.ops import doctor

    return {"mode": custom_ops.mode(), **doctor.tools(), **{kind: doctor.state(kind) for kind in ("cpu", "cuda")}}


def _cache() -> dict[str, Any]:
    from di_refine.files import registry

    folder = registry.cache_folder()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    home = str(Path.home())
    shown = str(folder)
    return {
        "folder": shown.replace(home, "~", 1) if shown.startswith(home + os.sep) else shown,
        "writable": nearest.is_dir() and os.access(nearest, os.W_OK),
        "free_gib": round(shutil.disk_usage(nearest).free / 2**30, 1),
        "files": sorted(name for name in registry.registry() if registry.state(name) == "cached"),
        "offline": bool(os.environ.get("DI_REFINE_OFFLINE")),
    }


def advice(found: dict[str, Any]) -> list[str]:
    """Return what would help, a sentence each, for the facts that the command has found."""
    machine, operators, cache = found["machine"], found["operators"], found["cache"]
    sentences = []
    if not machine["gpus"] and shutil.which("nvidia-smi"):
        sentences.append(
            "nvidia-smi is here, but PyTorch sees no GPU: install a CUDA build of PyTorch that fits the driver"
        )
    if machine["threads"] < machine["cores"]:
        sentences.append(
            f"PyTorch uses {machine['threads']} of {machine['cores']} cores: set OMP_NUM_THREADS={machine['cores']}, "
            "or leave it unset"
        )
    for kind in ("cuda", "cpu") if machine["gpus"] else ("cpu",):
        if operators[kind] == "not built":
            sentences.append(
                f"compiled {kind.upper()} operators are faster: python -m torch_utils.custom_ops builds them"
            )
        elif operators[kind] != "built":
            sentences.append(f"compiled {kind.upper()} operators are faster, but {operators[kind]}")
    if not cache["writable"]:
        sentences.append(f"{cache['folder']} cannot be written to: name another folder in DI_REFINE_CACHE")
    if cache["free_gib"] < FREE_GIB:
        sentences.append(f"{cache['free_gib']} GiB are free for {cache['folder']}: make room, or set DI_REFINE_CACHE")
    sentences += [
        f"pip install 'di-refine[{name}]': {gives}" for name, (_, gives) in EXTRAS.items() if not found["extras"][name]
    ]
    return sentences


if __name__ == "__main__":
    main()
