"""Reference statistics: from files, or of a data set, computed once and kept in the cache folder.

Statistics are kept under a key made of everything that they depend on. Files are written whole or not at all, so any
number of runs may share the folder; two that need the same file at the same time both compute it, and either's is
right.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from di_refine import terminal
from di_refine.errors import InputError
from di_refine.files import registry
from di_refine.files.datasets import ImageDataset
from di_refine.metrics.detectors import load_detector
from di_refine.metrics.feature_net import FeatureNet, Identity
from di_refine.metrics.parallel import Ranks
from di_refine.metrics.sources import ImageSampler
from di_refine.metrics.statistics import FeatureMoments, FeatureStatistics
from di_refine.metrics.teacher_net import TeacherReference

SMALL_FEATURES = 16 << 20  # bytes up to which reference features are kept without being asked for
LAYOUT = 1  # to be raised when statistics come to be computed in another way

ReferenceSource = str | os.PathLike | ImageDataset
"""What a user may give as a reference: the path or registry name of statistics or a data set, or an open data set."""

Reference = FeatureStatistics | ImageDataset | TeacherReference
"""A reference that was found: statistics, or the data set that they will be made of, or what draws that."""


def reference_statistics(
    dataset: ImageDataset,
    detector: FeatureNet | str | os.PathLike,
    device: str | torch.device = "cpu",
    batch: int = 128,
    keep_features: bool | None = None,
    progress: Callable[[int], None] | None = None,
    cache: bool = False,
    workers: int = 2,
    distributed: bool = False,
) -> FeatureStatistics:
    """Compute the statistics of all images of a data set.

    Args:
        dataset: the images.
        detector: a loaded feature network, or a file of one.
        device: where to run a network that is loaded here.
        batch: images per pass.
        keep_features: keep the features too; None keeps them up to 16 MB.
        progress: called with the number of images of each batch.
        cache: take the statistics from the cache folder, or keep them there.
        workers: threads that decode images.
        distributed: share the images as an `Evaluator` does. Processes other than the first get no features.

    Raises:
        InputError: the data set cannot be a reference for the network, or an image is damaged.
        RunError: the network gave values that are not finite.
    """
    net = detector if isinstance(detector, FeatureNet) else load_detector(detector, device)
    check_dataset(dataset, net)
    ranks, count = Ranks(distributed), len(dataset)
    if keep_features is None:
        keep_features = count * net.identity.feature_dim * 4 <= SMALL_FEATURES
    dataset_hash = dataset.content_hash()
    found = _cached(dataset, net.identity, keep_features, dataset_hash) if cache and ranks.is_first else None
    if ranks.on_first(lambda: found is not None):
        return _shared(found, ranks)
    stream = FeatureMoments(keep=count if keep_features else 0)
    images = ImageSampler(dataset, workers)
    for indices in ranks.batches(count, ranks.fitting(batch, dataset)):
        features, _ = net(images(indices.start, len(indices))[0], probabilities=False)
        net.check_finite(features, indices.start)
        stream.append(features)
        if progress is not None:
            progress(len(indices))
    if ranks.size > 1:
        stream = FeatureMoments.merged(ranks.gather(stream.cpu()), stream.keep)
    statistics = None
    if ranks.is_first:
        statistics = stream.statistics(
            detector=net.identity.name,
            detector_hash=net.identity.hash,
            dataset=dataset.name,
            dataset_hash=dataset_hash[:16],
            resolution=dataset.resolution,
            num_channels=dataset.num_channels,
        )
        if cache:
            _store(statistics, dataset, net.identity, dataset_hash)
    return _shared(statistics, ranks)


def check_dataset(dataset: ImageDataset, net: FeatureNet) -> None:
    """Raise InputError when a data set cannot be a reference for a feature network."""
    net.check_channels(dataset.num_channels)
    if len(dataset) < 2:
        raise InputError(f"{dataset.path}: a reference needs at least 2 images, it has {len(dataset)}")


def open_reference(source: ReferenceSource) -> FeatureStatistics | ImageDataset:
    """Load a file of statistics, or open a data set, from a path or a name in the registry.

    Raises:
        InputError: there is no such file or name, or the file is damaged or something else.
    """
    if isinstance(source, ImageDataset):
        return source
    path = registry.resolve(source, setting="ref", kind=("statistics", "dataset"))
    return FeatureStatistics.load(path) if path.suffix == ".npz" else ImageDataset(path, setting="ref")


def known_about(reference: Reference) -> dict[str, int]:
    """Return what is known of the images of a reference: their 'count', 'resolution' and 'num_channels'.

    Official files of statistics say none of these.
    """
    if isinstance(reference, TeacherReference):
        return {"count": reference.num_images}
    if isinstance(reference, ImageDataset):
        shape = {"resolution": reference.resolution, "num_channels": reference.num_channels}
        return {"count": len(reference), **shape}
    known = {} if reference.count is None else {"count": reference.count}
    identity = reference.identity
    return known | {key: int(identity[key]) for key in ("resolution", "num_channels") if key in identity}


def mismatch(statistics: FeatureStatistics, identity: Identity, wants_features: bool) -> str | None:
    """Say why statistics do not suit a feature network; None where they do.

    Official files do not say which network made them, so for these only the number of features counts.
    """
    maker = statistics.identity.get("detector", "an unnamed network")
    if statistics.feature_dim != identity.feature_dim:
        return f"holds {statistics.feature_dim} features of {maker}, but {identity.name} has {identity.feature_dim}"
    if statistics.identity.get("detector_hash", identity.hash) != identity.hash:
        return f"was made with another network ({maker}, {statistics.identity['detector_hash']}; now {identity.hash})"
    if wants_features and statistics.features is None:
        return "holds only mean and covariance, but some metrics compare single features"
    return None


def registered_statistics(net: FeatureNet) -> FeatureStatistics | None:
    """Load the statistics that the registry says belong to a feature network; None where it says nothing."""
    path = None if net.path is None else registry.companion(net.path, "statistics")
    return None if path is None else FeatureStatistics.load(path)


def _shared(statistics: FeatureStatistics | None, ranks: Ranks) -> FeatureStatistics:
    """Give the first process's statistics to all; only the first, which does the arithmetic, keeps the features."""
    light = ranks.on_first(lambda: None if statistics is None else replace(statistics, features=None))
    return light if statistics is None else statistics


# ----------------------------------------------------------------------------------------------------------------------
# The cache


def cache_path(dataset: ImageDataset, detector: Identity, with_features: bool, dataset_hash: str | None = None) -> Path:
    """Return where the statistics of a data set under a feature network are kept.

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


def _cached(
    dataset: ImageDataset, detector: Identity, with_features: bool, dataset_hash: str
) -> FeatureStatistics | None:
    """Return the kept statistics, or None.

    A damaged file (every entry has a checksum) is reported on stderr and passed over. Features that are not asked for
    are welcome.
    """
    for kept in (True,) if with_features else (False, True):
        path = cache_path(dataset, detector, kept, dataset_hash)
        if not path.is_file():
            continue
        try:
            statistics = FeatureStatistics.load(path)
        except InputError as error:
            terminal.say(f"note: the cached statistics are damaged and made anew: {error}")
            continue
        expected = {"detector_hash": detector.hash, "dataset_hash": dataset_hash[:16], "resolution": dataset.resolution}
        fits = all(statistics.identity.get(name) == value for name, value in expected.items())
        if fits and statistics.count == len(dataset) and (statistics.features is not None or not kept):
            return statistics
        terminal.say(f"note: the cached statistics in {path} belong to something else and are made anew")
    return None


def _store(statistics: FeatureStatistics, dataset: ImageDataset, detector: Identity, dataset_hash: str) -> None:
    """Keep statistics; where the folder cannot be written to, say so on stderr and go on."""
    path = cache_path(dataset, detector, statistics.features is not None, dataset_hash)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(path, compress=False)
    except OSError as error:
        terminal.say(f"note: cannot keep reference statistics in {path} ({error.strerror or error})")
