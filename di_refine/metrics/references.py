"""References: statistics in files, or those of a data set, computed or taken from the cache."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from di_refine.errors import InputError
from di_refine.files.datasets import ImageDataset
from di_refine.metrics import cache as cached
from di_refine.metrics.detectors import FeatureNet, Identity, load_detector
from di_refine.metrics.parallel import Ranks
from di_refine.metrics.sources import ImageSampler
from di_refine.metrics.statistics import FeatureMoments, FeatureStatistics

SMALL_FEATURES = 16 << 20  # bytes up to which reference features are kept without being asked for

Reference = str | os.PathLike | ImageDataset


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
    """Statistics of all images of a data set.

    Args:
        dataset: the images.
        detector: a loaded feature network, or a file of one.
        device: where to run a network that is loaded here.
        batch: images per pass.
        keep_features: keep the features too; None keeps them up to 16 MB.
        progress: called with the number of images of each batch.
        cache: take them from the cache folder, or keep them there.
        workers: threads that decode.
        distributed: share the images as an `Evaluator` does. Processes other than the first get no features.
    """
    net = detector if isinstance(detector, FeatureNet) else load_detector(detector, device)
    check_dataset(dataset, net)
    ranks, count = Ranks(distributed), len(dataset)
    if keep_features is None:
        keep_features = count * net.identity.feature_dim * 4 <= SMALL_FEATURES
    dataset_hash = dataset.content_hash()
    found = cached.find(dataset, net.identity, keep_features, dataset_hash) if cache and ranks.is_first else None
    if ranks.on_first(lambda: found is not None):
        return _shared(found, ranks)
    stream = FeatureMoments(keep=count if keep_features else 0)
    images = ImageSampler(dataset, workers)
    for indices in ranks.batches(count, batch):
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
            cached.store(statistics, dataset, net.identity, dataset_hash)
    return _shared(statistics, ranks)


def check_dataset(dataset: ImageDataset, net: FeatureNet) -> None:
    """Raise InputError when a data set cannot be a reference for a feature network."""
    net.check_channels(dataset.num_channels)
    if len(dataset) < 2:
        raise InputError(f"{dataset.path}: a reference needs at least 2 images, it has {len(dataset)}")


def open_reference(source: Reference) -> FeatureStatistics | ImageDataset:
    """Load a file of statistics, or open a data set, from a path or a name in the registry."""
    if isinstance(source, ImageDataset):
        return source
    path = Path(source)
    if not path.exists():
        from di_refine.files import registry

        path = Path(registry.resolve(source, option="--ref", kind=("statistics", "dataset")))
    return FeatureStatistics.load(path) if path.suffix == ".npz" else ImageDataset(path, option="--ref")


def mismatch(statistics: FeatureStatistics, identity: Identity, wants_features: bool) -> str | None:
    """Why statistics do not suit a feature network, or None. Official files do not say which network made them."""
    maker = statistics.identity.get("detector", "an unnamed network")
    if statistics.feature_dim != identity.feature_dim:
        return f"holds {statistics.feature_dim} features of {maker}, but {identity.name} has {identity.feature_dim}"
    if statistics.identity.get("detector_hash", identity.hash) != identity.hash:
        return f"was made with another network ({maker}, {statistics.identity['detector_hash']}; now {identity.hash})"
    if wants_features and statistics.features is None:
        return "holds only mean and covariance, but some metrics compare single features"
    return None


def registered_statistics(net: FeatureNet) -> FeatureStatistics | None:
    """The statistics that the registry says belong to a feature network, or None."""
    from di_refine.files import registry

    path = None if net.path is None else registry.companion(net.path, "statistics")
    return None if path is None else FeatureStatistics.load(path)


def _shared(statistics: FeatureStatistics | None, ranks: Ranks) -> FeatureStatistics:
    """The first process's statistics on all; only the first, which does the arithmetic, keeps the features."""
    light = ranks.on_first(lambda: replace(statistics, features=None))
    return statistics if ranks.is_first else light
