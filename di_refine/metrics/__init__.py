"""Image metrics: feature networks, statistics, and distances between feature sets."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from di_refine.metrics.distances import (
        density_coverage,
        frechet_distance,
        inception_score,
        kernel_distance,
        precision_recall,
    )
    from di_refine.metrics.statistics import FeatureMoments, FeatureStatistics, moments

__all__ = [
    "FeatureMoments",
    "FeatureStatistics",
    "density_coverage",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "moments",
    "precision_recall",
]

_STATISTICS = ("FeatureMoments", "FeatureStatistics", "moments")


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used, so that `metrics.kinds` comes without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "statistics" if name in _STATISTICS else "distances"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
