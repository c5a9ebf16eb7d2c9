"""Reference statistics computed once: kept in the cache folder under a key made of everything they depend on.

Files are written whole or not at all, so any number of runs may share the folder; two that need the same file at the
same time both compute it, and either's is right.
"""

import hashlib
import json
import sys
from pathlib import Path

from di_refine.errors import InputError
from di_refine.files import registry
from di_refine.files.datasets import ImageDataset
from di_refine.metrics.detectors import Identity
from di_refine.metrics.statistics import FeatureStatistics

LAYOUT = 1  # to be raised when statistics come to be computed in another way


def cache_path(dataset: ImageDataset, detector: Identity, with_features: bool, dataset_hash: str | None = None) -> Path:
    """Where the statistics of a data set under a feature network are kept.

    The key holds the data set's content hash, the network's identity (name, hash, input size, resize rule), resolution,
    channels and mirroring.
    """
    key = {
        "layout": LAYOUT,
        "dataset": dataset_hash or dataset.content_hash(),
        "detector": detector.as_dict(),
        "resolution": dataset.resolution,
        "num_channels": dataset.num_channels,
        "mirror": dataset.mirror,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    kept = "features" if with_features else "moments"
    return registry.cache_folder() / "statistics" / f"{detector.name}-{digest}-{kept}.npz"


def find(dataset: ImageDataset, detector: Identity, with_features: bool, dataset_hash: str) -> FeatureStatistics | None:
    """The kept statistics, or None. A damaged file (every entry has a checksum) is reported on stderr and passed over.

    Args:
        dataset, detector: whose.
        with_features: only with all features; otherwise these are welcome but not needed.
        dataset_hash: `dataset.content_hash()`.
    """
    for kept in (True,) if with_features else (False, True):
        path = cache_path(dataset, detector, kept, dataset_hash)
        if not path.is_file():
            continue
        try:
            statistics = FeatureStatistics.load(path)
        except InputError as error:
            print(f"note: the cached statistics are damaged and made anew: {error}", file=sys.stderr)
            continue
        expected = {"detector_hash": detector.hash, "dataset_hash": dataset_hash[:16], "resolution": dataset.resolution}
        fits = all(statistics.identity.get(name) == value for name, value in expected.items())
        if fits and statistics.count == len(dataset) and (statistics.features is not None or not kept):
            return statistics
        print(f"note: the cached statistics in {path} belong to something else and are made anew", file=sys.stderr)
    return None


def store(statistics: FeatureStatistics, dataset: ImageDataset, detector: Identity, dataset_hash: str) -> None:
    """Keep statistics; where the folder cannot be written to, say so on stderr and go on."""
    path = cache_path(dataset, detector, statistics.features is not None, dataset_hash)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(path, compress=False)
    except OSError as error:
        print(f"note: cannot keep reference statistics in {path} ({error.strerror or error})", file=sys.stderr)
