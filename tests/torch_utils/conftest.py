"""Which form of the operators a test runs."""

import contextlib
import ctypes
from pathlib import Path

import pytest
import torch

from torch_utils import custom_ops
from torch_utils.ops import building

BUILD = Path(__file__).parents[2] / "build" / "ops"  # kept between runs, and apart from the user's own cache


@pytest.fixture(scope="session")
def compiled_library():
    """Return the path of the CPU library, which is built on the first run (about half a minute)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DI_REFINE_CACHE", str(BUILD))
        reason = building.missing_tool("cpu")
        if reason:
            pytest.skip(f"the compiled operators were not tested: {reason}")
        return building.ensure("cpu")


@pytest.fixture
def compiled(compiled_library, monkeypatch):
    """Run the compiled form, on whatever device and however slow it is."""
    monkeypatch.setenv("DI_REFINE_CACHE", str(BUILD))
    monkeypatch.setattr(custom_ops, "_libraries", {})
    with custom_ops.use("compiled"):
        custom_ops.insist("cpu")
        yield ctypes.CDLL(str(compiled_library))


@contextlib.contextmanager
def running(name, request):
    """Put a form in force; yields the device its tensors belong on."""
    if name in ("pytorch", "cuda"):
        with custom_ops.use("native" if name == "pytorch" else "cuda"):
            yield "cpu" if name == "pytorch" else "cuda"
        return
    library = request.getfixturevalue("compiled")
    library.di_refine_cuda_shapes(name == "cuda-shapes")
    try:
        yield "cpu"
    finally:
        library.di_refine_cuda_shapes(0)


CPU_FORMS = ["pytorch", "compiled", "cuda-shapes"]


@pytest.fixture(params=CPU_FORMS)
def cpu_form(request):
    """Run a test in every form that needs no GPU; 'cuda-shapes' walks over memory as the CUDA kernels do."""
    with running(request.param, request) as device:
        yield device


@pytest.fixture(params=[*CPU_FORMS, pytest.param("cuda", marks=pytest.mark.gpu)])
def form(request, monkeypatch):
    """Run a test in every form; its value is the device."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on CUDA the convolutions are compared, too
    with running(request.param, request) as device:
        yield device


@pytest.fixture(params=["compiled", "cuda-shapes", pytest.param("cuda", marks=pytest.mark.gpu)])
def compiled_form(request, monkeypatch):
    """Run a test in every compiled form, with new tensors full of NaN; its value is the device."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with running(request.param, request) as device:
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
        try:
            yield device
        finally:
            torch.use_deterministic_algorithms(False)
