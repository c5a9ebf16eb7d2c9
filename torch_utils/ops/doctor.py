"""`python -m torch_utils.custom_ops` tells whether the operators compile here, are right, and what they gain."""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from torch_utils import custom_ops
from torch_utils.ops import bias_act, building, selftest, upfirdn2d


def main() -> None:
    """Build what can be built, test it, time it, and print all of that. The exit status is 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m torch_utils.custom_ops", description=main.__doc__)
    parser.add_argument("--no-build", action="store_true", help="Test and time only what has been built already.")
    arguments = parser.parse_args()
    _report_tools()
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    healthy = [_examine(kind, build=not arguments.no_build) for kind in kinds]
    if "cuda" not in kinds:
        print(f"\nCUDA operators: not looked at ({building.missing_tool('cuda')})")
    sys.exit(0 if all(healthy) else 1)


def _report_tools() -> None:
    cuda = torch.version.cuda or "none"
    home, compiler, found = building.cuda_home(), building.compiler(), tools()
    facts = {
        "Python": platform.python_version(),
        "PyTorch": f"{torch.__version__} (its CUDA: {cuda})",
        "GPUs": ", ".join(gpus()) or "none",
        "C++ compiler": compiler and f"{compiler}: {found['compiler']}",
        "ninja": building.ninja_folder(),
        "CUDA toolkit": home and f"{home}: nvcc {found['nvcc']}",
        "mode": custom_ops.mode() + (" (DI_REFINE_OPS)" if "DI_REFINE_OPS" in os.environ else ""),
        "kept in": building.cache_folder(),
    }
    for name, value in facts.items():
        print(f"{name + ':':14}{value or 'not found'}")


def tools() -> dict[str, str | bool | None]:
    """Return what a build needs, without paths: the versions of `compiler` and `nvcc`, or None, and whether `ninja`."""
    compiler = building.compiler()
    return {
        "compiler": compiler and _first_line(compiler, "--version"),
        "nvcc": building.nvcc_version() if building.cuda_home() else None,
        "ninja": building.ninja_folder() is not None,
    }


def state(kind: str) -> str:
    """Return 'built' or 'not built' for the library of a device type, or why it cannot be built here."""
    if kind == "cuda" and not torch.cuda.is_available():
        return building.missing_tool(kind) or "not built"
    if (building.folder(kind) / f"{building.NAME}.so").exists():
        return "built"
    return building.missing_tool(kind) or "not built"


def gpus() -> list[str]:
    """Return the names of the GPUs that PyTorch sees, with their architectures."""
    if not torch.cuda.is_available():
        return []
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [f"{name} (sm_{version.replace('.', '')})" for name, version in zip(names, building.architectures("cuda"))]


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
    except OSError as error:
        return str(error)


def _examine(kind: str, build: bool) -> bool:
    """Print a report on the operators of one device type; return whether nothing is wrong with them."""
    print(f"\n{kind.upper()} operators")
    built = (building.folder(kind) / f"{building.NAME}.so").exists()
    if not build and not built:
        print("  not built")
        return True
    start = time.perf_counter()
    try:
        custom_ops.insist(kind)
    except custom_ops.OpsUnavailable as error:
        print(f"  {error}")
        return False
    action = "loaded" if built else "built and loaded"
    print(f"  {action} in {time.perf_counter() - start:.1f} s: {building.folder(kind)}")
    try:
        results = selftest.run(kind)
    except ArithmeticError as error:
        print(f"  self-test FAILED: {error}")
        return False
    worst = max((result for result in results if result[0].endswith("float32")), key=lambda result: result[1])
    print(f"  self-test: {len(results)} comparisons passed; largest float32 difference {worst[1]:.1e} ({worst[0]})")
    _time_all(kind)
    return True


def _time_all(kind: str) -> None:
    shape = [16, 128, 256, 256] if kind == "cuda" else [32, 16, 64, 64]
    x, b = torch.randn(shape, device=kind), torch.randn(shape[1], device=kind)
    f = upfirdn2d.setup_filter([1, 3, 3, 1], device=kind)
    calls = {
        "bias_act lrelu": lambda: bias_act.bias_act(x, b, act="lrelu", clamp=256),
        "upfirdn2d up 2": lambda: upfirdn2d.upsample2d(x, f),
        "upfirdn2d down 2": lambda: upfirdn2d.downsample2d(x, f),
        "upfirdn2d filter": lambda: upfirdn2d.filter2d(x, f),
    }
    print(f"  {'milliseconds for ' + str(shape) + ' float32':44} compiled   PyTorch   ratio")
    for name, call in calls.items():
        ours, theirs = (min(_milliseconds(call, kind, mode) for _ in range(3)) for mode in ("compiled", "native"))
        print(f"  {name:44} {ours:8.3f}  {theirs:8.3f}  {theirs / ours:6.2f}")


def _milliseconds(call: Callable, kind: str, mode: str) -> float:
    with custom_ops.use(mode), torch.no_grad():
        call()
        if kind == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            call()
        if kind == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / 5 * 1000
