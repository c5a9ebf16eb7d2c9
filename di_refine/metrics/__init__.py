"""Image metrics: feature networks, statistics, and distances between feature sets."""

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
