"""Measurements that are kept in the cache folder: of networks in files, which come out the same the next time."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from di_refine import terminal
from di_refine.files import registry
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.feature_net import Identity
from di_refine.metrics.results import MetricResult
from torch_utils import safe_files
from torch_utils.misc import open_atomic

LAYOUT = 1  # to be raised when metrics come to be computed in another way


def key(evaluator: Evaluator, sampler: Mapping[str, Any], seed: int) -> str:
    """A name for a measurement, made of everything that it depends on.

    Args:
        evaluator: measures.
        sampler: what the images depend on: the digest of the network's files, the labels, the steps, the device.
        seed: of the images.
    """
    content = {"layout": LAYOUT, "evaluator": evaluator.identity, "sampler": sampler, "seed": seed}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:24]


def load(name: str) -> list[MetricResult] | None:
    """What is kept under a name; None where there is nothing, or a damaged file."""
    try:
        found = safe_files.read_json(_path(name))
        return [MetricResult(**{**item, "detector": Identity(**item["detector"])}) for item in found]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def store(name: str, results: list[MetricResult]) -> None:
    """Keep results under a name; where the folder cannot be written to, say so on stderr and go on."""
    path = _path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(path, "w") as file:
            json.dump([asdict(result) for result in results], file)
    except OSError as error:
        terminal.say(f"note: cannot keep measurements in {path.parent} ({error.strerror or error})")


def _path(name: str) -> Path:
    return registry.cache_folder() / "measured" / f"{name}.json"
