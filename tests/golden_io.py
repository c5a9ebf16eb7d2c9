"""Reading the golden vectors: arrays and the JSON that describes them."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


@cache
def load_npz(name: str) -> dict[str, np.ndarray]:
    """All arrays of `tests/golden/<name>`, without unpickling anything."""
    with np.load(GOLDEN / name, allow_pickle=False) as file:
        return dict(file)


@cache
def cases(name: str) -> list[dict]:
    """The JSON entries of a golden file: one per case, or one for the whole file."""
    return [json.loads(text) for text in load_npz(name)["meta"].reshape(-1).tolist()]


def case_arrays(name: str, case: dict) -> dict[str, torch.Tensor]:
    """The arrays of one case as tensors."""
    data = load_npz(name)
    return {key: torch.from_numpy(data[f"{case['case']}/{key}"].copy()) for key in case["arrays"]}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max|actual - expected| / max|expected|; absolute where `expected` is all zero."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.isfinite(actual).all()
    error = (actual.detach().double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return error / scale if scale else error


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tol: float, what: str = "") -> None:
    """Fail when `relative_error` exceeds `tol` (1e-6 absolute where `expected` is all zero)."""
    limit = tol if expected.abs().max() > 0 else 1e-6
    error = relative_error(actual, expected)
    assert error <= limit, f"{what}: relative error {error:.2e}, allowed {limit:.0e}"
