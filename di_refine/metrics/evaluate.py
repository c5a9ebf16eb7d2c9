"""Measure a generator: one pass over its images serves all metrics asked for.

A sampler is called as `sampler(first_index, count, seed) -> (uint8 images [n, C, H, W], labels [n, L] or None)` and is
a pure function of image index and seed, so results do not depend on the batch size. It has `num_channels`,
`resolution`, `label_dim`, and `num_images` if it can only give so many.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from di_refine.data import ImageDataset
from di_refine.errors import InputError, RunError
from di_refine.metrics import distances
from di_refine.metrics.features import FeatureNet, Identity, load_detector
from di_refine.metrics.names import MetricSpec, parse_metric, parse_metrics
from di_refine.metrics.results import MetricResult, write_jsonl
from di_refine.metrics.statistics import FeatureMoments, FeatureStatistics

__all__ = ["Evaluator", "MetricResult", "MetricSpec", "parse_metric", "write_jsonl"]

INCEPTION_WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
SMALL_FEATURES = 16 << 20  # bytes up to which reference features are kept without being asked for

Reference = str | os.PathLike | ImageDataset


class Evaluator:
    """Metrics with everything they need loaded and checked, to be called with samplers.

    Args:
        metrics: names (see `metrics.names`), as a list or separated by commas.
        reference: statistics (.npz), a data set (path or `ImageDataset`), a name in the registry, or several of these,
            where each feature network takes the first that fits. None takes what the registry says belongs to the
            network.
        detector: the feature network the names refer to, a file or loaded; None looks the names up in the registry.
        device: where feature networks run.
        batch: images per pass; None takes the sampler's own chunk, else 128.

    Raises:
        InputError: an unknown name, a missing or wrong file, or a reference that does not fit the feature network.
    """

    def __init__(
        self,
        metrics: str | Sequence[str],
        reference: Reference | Sequence[Reference] | None = None,
        detector: str | os.PathLike | FeatureNet | None = None,
        device: str | torch.device = "cpu",
        batch: int | None = None,
    ):
        self.specs = parse_metrics(metrics)
        self.device, self.batch = torch.device(device), batch
        self.detectors = self._load_detectors(detector)
        sources = [] if reference is None else [reference] if isinstance(reference, Reference) else list(reference)
        sources = [_open_reference(source) for source in sources]
        self.references = {
            name: self._find_reference(net, self._specs_of(name), sources)
            for name, net in self.detectors.items()
            if any("reference" in spec.needs for spec in self._specs_of(name))
        }

    @property
    def num_images(self) -> int:
        """How many images a pass takes."""
        return max(spec.num_images for spec in self.specs)

    def check(self, sampler) -> None:
        """Check, before any image is made, that a sampler suits the metrics.

        Raises:
            InputError: too few images, other channels or resolution than the reference, no or other classes.
        """
        limit = getattr(sampler, "num_images", None)
        for spec in self.specs:
            net = self.detectors[spec.detector]
            net.check_channels(sampler.num_channels)
            if limit is not None and spec.num_images > limit:
                raise InputError(
                    f"{spec.name} needs {spec.num_images} images and there are {limit}; "
                    + (f"measure at most {limit // 1000}k" if limit >= 1000 else "make more")
                )
            if "labels" in spec.needs and sampler.label_dim != net.identity.num_classes:
                raise InputError(
                    f"{spec.name} compares requested with recognised classes; there are {sampler.label_dim} and "
                    f"{net.identity.num_classes}"
                )
            statistics = self.references.get(spec.detector)
            for key in ("resolution", "num_channels") if statistics else ():
                wanted, given = statistics.identity.get(key), getattr(sampler, key)
                if wanted is not None and wanted != given:
                    raise InputError(
                        f"{spec.name}: the reference was made from images with {key} {wanted}, these have {given}; "
                        "give another --ref or --data"
                    )

    def __call__(
        self, sampler, seed: int = 0, progress: Callable[[int], None] | None = None, distributed: bool = False
    ) -> list[MetricResult]:
        """Measure a generator.

        Args:
            sampler: see the module's text.
            seed: of the sampler and of random subsets.
            progress: called with the number of images of each batch.
            distributed: share the images among all processes of `torch.distributed`, all of which must call this; each
                gets all results.

        Returns:
            A result per metric, in the order of the names.

        Raises:
            InputError: as `check`.
            RunError: a feature network gave values that are not finite.
        """
        self.check(sampler)
        start = time.monotonic()
        rank, world_size = 0, 1
        if distributed:
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        collectors = {name: _Collector(net, self._specs_of(name)) for name, net in self.detectors.items()}
        first, stop = (self.num_images * part // world_size for part in (rank, rank + 1))
        batch = self.batch or getattr(sampler, "chunk", 128)
        while first < stop:
            count = min(batch, stop - first)
            images, labels = sampler(first, count, seed)
            for collector in collectors.values():
                collector.append(first, images, labels)
            first += count
            if progress is not None:
                progress(count)
        if world_size > 1:
            for collector in collectors.values():
                collector.gather(world_size)
        values = [self._measure(spec, collectors[spec.detector], seed) for spec in self.specs]
        seconds = time.monotonic() - start
        return [
            MetricResult(
                name=spec.name,
                values=dict(zip(spec.result_keys, value if isinstance(value, tuple) else (value,))),
                num_images=spec.num_images,
                seed=seed,
                resolution=sampler.resolution,
                num_channels=sampler.num_channels,
                detector=self.detectors[spec.detector].identity,
                reference=self._describe_reference(spec),
                seconds=seconds,
                num_gpus=world_size,
            )
            for spec, value in zip(self.specs, values)
        ]

    @staticmethod
    def reference_statistics(
        dataset: ImageDataset,
        detector: FeatureNet | str | os.PathLike,
        device: str | torch.device = "cpu",
        batch: int = 128,
        keep_features: bool | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> FeatureStatistics:
        """Statistics of all images of a data set.

        Args:
            dataset: the images.
            detector: a loaded feature network, or a file of one.
            device: where to run a network that is loaded here.
            batch: images per pass.
            keep_features: keep the features too; None keeps them up to 16 MB.
            progress: called with the number of images of each batch.
        """
        net = detector if isinstance(detector, FeatureNet) else load_detector(detector, device)
        net.check_channels(dataset.num_channels)
        count = len(dataset)
        if keep_features is None:
            keep_features = count * net.identity.feature_dim * 4 <= SMALL_FEATURES
        stream = FeatureMoments(keep=count if keep_features else 0)
        for first in range(0, count, batch):
            indices = range(first, min(first + batch, count))
            features, _ = net(dataset.images(indices), probabilities=False)
            _check_finite(features, net, first)
            stream.append(features)
            if progress is not None:
                progress(len(indices))
        if count < 2:
            raise InputError(f"{dataset.path}: a reference needs at least 2 images, it has {count}")
        return stream.statistics(
            detector=net.identity.name,
            detector_hash=net.identity.hash,
            dataset=dataset.name,
            dataset_hash=dataset.content_hash()[:16],
            resolution=dataset.resolution,
            num_channels=dataset.num_channels,
        )

    def _specs_of(self, detector: str | None) -> list[MetricSpec]:
        return [spec for spec in self.specs if spec.detector == detector]

    def _load_detectors(self, given: str | os.PathLike | FeatureNet | None) -> dict[str | None, FeatureNet]:
        """The feature networks by the name in the metrics' names; None stands for the 2015 Inception."""
        if given is not None and not isinstance(given, FeatureNet):
            given = load_detector(given, self.device)
        detectors = {}
        if given is not None:
            name = None if given.identity.is_inception else given.identity.name
            if all(spec.detector not in (name, given.identity.name) for spec in self.specs):
                raise InputError(
                    f"--detector is called {given.identity.name}, and no metric uses it; write names such as "
                    f"{'fid50k_full' if name is None else f'fd2k_full@{name}'}"
                )
            detectors = {name: given, given.identity.name: given}
        for name in dict.fromkeys(spec.detector for spec in self.specs):
            if name not in detectors:
                option = "--detector" if name is None else "--metrics"
                detectors[name] = load_detector(name or INCEPTION_WEIGHTS, self.device, option)
        detectors = {spec.detector: detectors[spec.detector] for spec in self.specs}
        if None in detectors and not detectors[None].identity.is_inception:
            raise InputError(
                f"--metrics needs the 2015 Inception network, but the content of {INCEPTION_WEIGHTS} is something "
                "else; download it again"
            )
        for spec in self.specs:
            if "probabilities" in spec.needs and detectors[spec.detector].identity.num_classes is None:
                raise InputError(f"--metrics: {spec.name} needs class probabilities, which its detector does not give")
        return detectors

    def _find_reference(
        self, net: FeatureNet, specs: list[MetricSpec], sources: list[FeatureStatistics | ImageDataset]
    ) -> FeatureStatistics:
        names = ", ".join(spec.name for spec in specs if "reference" in spec.needs)
        wants_features = any("reference features" in spec.needs for spec in specs)
        if not sources:
            known = self._registered_statistics(net)
            if known is None:
                raise InputError(f"--metrics: {names} needs a reference; give --ref (statistics) or --data (images)")
            sources = [known]
        reasons = []
        for source in sources:
            if isinstance(source, ImageDataset):
                return self.reference_statistics(source, net, keep_features=wants_features or None)
            reason = _mismatch(source, net.identity, wants_features)
            if reason is None:
                return source
            reasons.append(reason)
        raise InputError(f"--metrics: {names}: the reference {'; '.join(reasons)}; give another --ref, or --data")

    @staticmethod
    def _registered_statistics(net: FeatureNet) -> FeatureStatistics | None:
        from di_refine import zoo

        path = None if net.path is None else zoo.companion(net.path, "statistics")
        return None if path is None else FeatureStatistics.load(path)

    def _measure(self, spec: MetricSpec, collected: "_Collector", seed: int) -> float | tuple[float, float]:
        moments, reference = collected.moments.get(spec.num_images), self.references.get(spec.detector)
        if spec.kind in ("fid", "fd"):
            return distances.frechet_distance(reference.mu, reference.sigma, *moments.moments())
        if spec.kind in ("kid", "kd"):
            return distances.kernel_distance(reference.features, moments.features, seed=seed)
        device = "cpu" if self.device.type == "mps" else self.device  # mps has no float64
        if spec.kind == "pr":
            return distances.precision_recall(reference.features, moments.features, device=device)
        if spec.kind == "dc":
            return distances.density_coverage(reference.features, moments.features, device=device)
        if spec.kind == "is":
            return distances.inception_score(np.concatenate(collected.probabilities)[: spec.num_images])
        return float(np.concatenate(collected.hits)[: spec.num_images].mean())

    def _describe_reference(self, spec: MetricSpec) -> dict:
        statistics = self.references.get(spec.detector) if "reference" in spec.needs else None
        return {} if statistics is None else {**statistics.identity, "count": statistics.count}


class _Collector:
    """What the metrics of one feature network need to know of the generated images."""

    def __init__(self, net: FeatureNet, specs: list[MetricSpec]):
        self.net = net
        self.moments: dict[int, FeatureMoments] = {}
        for spec in specs:
            if "reference" in spec.needs:
                moments = self.moments.setdefault(spec.num_images, FeatureMoments())
                if "features" in spec.needs:
                    moments.keep = spec.num_images
        self.wants_probabilities = any("probabilities" in spec.needs for spec in specs)
        self.wants_hits = any("labels" in spec.needs for spec in specs)
        self.limit = max(spec.num_images for spec in specs)
        self.probabilities: list[np.ndarray] = []
        self.hits: list[np.ndarray] = []

    def append(self, first: int, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Take in images with indices from `first` on."""
        images = images[: max(self.limit - first, 0)]
        if len(images) == 0:
            return
        features, probabilities = self.net(images, self.wants_probabilities)
        _check_finite(features, self.net, first)
        for num_images, moments in self.moments.items():
            moments.append(features[: max(num_images - first, 0)])
        if probabilities is not None:
            _check_finite(probabilities, self.net, first)
            self.probabilities.append(probabilities.cpu().numpy())
        if self.wants_hits:
            wanted = torch.as_tensor(labels)[: len(images)].argmax(dim=1).cpu()
            self.hits.append((probabilities.argmax(dim=1).cpu() == wanted).numpy())

    def gather(self, world_size: int) -> None:
        """Replace what this process has by what all have, in the order of their ranks."""
        mine = ({count: moments.cpu() for count, moments in self.moments.items()}, self.probabilities, self.hits)
        everyone = [None] * world_size
        torch.distributed.all_gather_object(everyone, mine)
        self.moments = {count: FeatureMoments(moments.keep) for count, moments in self.moments.items()}
        self.probabilities, self.hits = [], []
        for moments, probabilities, hits in everyone:
            for count, part in moments.items():
                self.moments[count].merge(part)
            self.probabilities += probabilities
            self.hits += hits


def _open_reference(source: Reference) -> FeatureStatistics | ImageDataset:
    if isinstance(source, ImageDataset):
        return source
    path = Path(source)
    if not path.exists():
        from di_refine import zoo

        path = Path(zoo.resolve(source, option="--ref", kind=("statistics", "dataset")))
    return FeatureStatistics.load(path) if path.suffix == ".npz" else ImageDataset(path, option="--ref")


def _mismatch(statistics: FeatureStatistics, identity: Identity, wants_features: bool) -> str | None:
    """Why statistics do not suit a feature network, or None. Official files do not say which network made them."""
    maker = statistics.identity.get("detector", "an unnamed network")
    if statistics.feature_dim != identity.feature_dim:
        return f"holds {statistics.feature_dim} features of {maker}, but {identity.name} has {identity.feature_dim}"
    if statistics.identity.get("detector_hash", identity.hash) != identity.hash:
        return f"was made with another network ({maker}, {statistics.identity['detector_hash']}; now {identity.hash})"
    if wants_features and statistics.features is None:
        return "holds only mean and covariance, but some metrics compare single features"
    return None


def _check_finite(values: torch.Tensor, net: FeatureNet, first: int) -> None:
    if not torch.isfinite(values).all():
        row = int((~torch.isfinite(values)).any(dim=1).nonzero()[0])
        raise RunError(f"detector {net.identity.name} gave values that are not finite for image {first + row}")
