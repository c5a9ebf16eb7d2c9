"""Measure a generator: one pass over its images serves all metrics asked for.

A sampler is called as `sampler(first_index, count, seed) -> (uint8 images [n, C, H, W], labels [n, L] or None)` and is
a pure function of image index and seed, so results do not depend on the batch size. It has `num_channels`,
`resolution`, `label_dim`, and `num_images` if it can only give so many.
"""

import functools
import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from di_refine import terminal
from di_refine.errors import InputError
from di_refine.files.datasets import ImageDataset
from di_refine.metrics import distances
from di_refine.metrics.detectors import FeatureNet, Identity, load_detector
from di_refine.metrics.kinds import MetricSpec, parse_metric, parse_metrics
from di_refine.metrics.parallel import Ranks
from di_refine.metrics.references import (
    Reference,
    check_dataset,
    mismatch,
    open_reference,
    reference_statistics,
    registered_statistics,
)
from di_refine.metrics.results import MetricResult, write_jsonl
from di_refine.metrics.statistics import FeatureMoments, FeatureStatistics

__all__ = ["Evaluator", "MetricResult", "MetricSpec", "parse_metric", "write_jsonl"]

INCEPTION_WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
PATH_BATCH = 32  # paths per pass; fixed, as the noise inputs of a pass depend on it


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
        perceptual: the network for path lengths (see `metrics.path_length`), a file.
        cache: keep statistics of data sets in the cache folder, and take them from there.
        workers: threads that decode a data set.
        distributed: share all work among the processes of `torch.distributed`, which all must make and call the same
            evaluator.

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
        perceptual: str | os.PathLike | None = None,
        cache: bool = True,
        workers: int = 2,
        distributed: bool = False,
    ):
        self.specs = parse_metrics(metrics)
        self.device, self.batch = torch.device(device), batch
        self.cache, self.workers, self.distributed = cache, workers, distributed
        self.perceptual = self._load_perceptual(perceptual)
        self.detectors = self._load_detectors(detector)
        sources = [] if reference is None else [reference] if isinstance(reference, Reference) else list(reference)
        sources = [open_reference(source) for source in sources]
        self._sources = {
            name: self._find_reference(net, self._specs_of(name), sources)
            for name, net in self.detectors.items()
            if any("reference" in spec.needs for spec in self._specs_of(name))
        }

    @functools.cached_property
    def references(self) -> dict[str | None, FeatureStatistics]:
        """The reference statistics of each feature network. Those of data sets are made when first asked for, which is
        after everything has been checked.
        """
        return {
            name: self._statistics_of(source, self.detectors[name]) if isinstance(source, ImageDataset) else source
            for name, source in self._sources.items()
        }

    @property
    def num_images(self) -> int:
        """How many images a measurement takes: one pass for all metrics of images, and two for each path."""
        paths = max((spec.num_images for spec in self.specs if "generator" in spec.needs), default=0)
        return self._num_in_pass + 2 * paths

    @property
    def _num_in_pass(self) -> int:
        return max((spec.num_images for spec in self.specs if "generator" not in spec.needs), default=0)

    @property
    def warnings(self) -> list[str]:
        """What a reader of the numbers must know and cannot see from them, a sentence each."""
        found = []
        for spec in self.specs:
            if spec.kind not in ("fid", "fd"):
                continue
            size = self.detectors[spec.detector].identity.feature_dim
            source = self._sources[spec.detector]
            count = len(source) if isinstance(source, ImageDataset) else source.count
            if spec.num_images <= size:
                found.append(
                    f"{spec.name}: {spec.num_images} images leave the covariance of {size} features rank-deficient; "
                    "compare only with values from as many images"
                )
            if count is not None and count <= size:
                found.append(
                    f"{spec.name}: the reference has {count} images for {size} features, a rank-deficient covariance; "
                    "compare only with values against the same reference"
                )
        return found

    def check(self, sampler) -> None:
        """Check, before any image is made, that a sampler suits the metrics.

        Raises:
            InputError: too few images, other channels or resolution than the reference, no or other classes.
        """
        limit = getattr(sampler, "num_images", None)
        for spec in self.specs:
            if "generator" in spec.needs:
                if not hasattr(getattr(sampler, "net", None), "mapping"):
                    raise InputError(
                        f"--metrics: {spec.name} is a property of StyleGAN2 generators; measure one of them"
                    )
                self.perceptual.check_channels(sampler.num_channels)
                continue
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
            source = self._sources.get(spec.detector)
            for key in ("resolution", "num_channels") if source is not None else ():
                of_images = isinstance(source, ImageDataset)
                wanted, given = getattr(source, key) if of_images else source.identity.get(key), getattr(sampler, key)
                if wanted is not None and wanted != given:
                    raise InputError(
                        f"{spec.name}: the reference was made from images with {key} {wanted}, these have {given}; "
                        "give another --ref or --data"
                    )

    def prepare(self) -> None:
        """Make the reference statistics of data sets now, which the first measurement would do otherwise."""
        _ = self.references

    def __call__(
        self, sampler, seed: int = 0, progress: Callable[[int], None] | None = None, distributed: bool | None = None
    ) -> list[MetricResult]:
        """Measure a generator.

        Args:
            sampler: see the module's text.
            seed: of the sampler and of random subsets.
            progress: called with the number of images of each batch that this process makes.
            distributed: share the images among all processes of `torch.distributed`, all of which must call this; each
                gets all results. None: as the evaluator was made.

        Returns:
            A result per metric, in the order of the names.

        Raises:
            InputError: as `check`.
            RunError: a feature network gave values that are not finite.
        """
        self.check(sampler)
        self.prepare()
        start = time.monotonic()
        ranks = Ranks(self.distributed if distributed is None else distributed)
        collectors = {name: _Collector(net, self._specs_of(name)) for name, net in self.detectors.items()}
        batch = self.batch or getattr(sampler, "chunk", 128)
        for indices in ranks.batches(self._num_in_pass, batch):
            images, labels = sampler(indices.start, len(indices), seed)
            for collector in collectors.values():
                collector.append(indices.start, images, labels)
            if progress is not None:
                progress(len(indices))
        for collector in collectors.values():
            collector.gather(ranks)
        lengths = self._path_lengths(sampler, seed, progress, ranks)
        values = ranks.on_first(
            lambda: [self._measure(spec, collectors.get(spec.detector), lengths, seed) for spec in self.specs]
        )
        seconds = time.monotonic() - start
        return [
            MetricResult(
                name=spec.name,
                values=dict(zip(spec.result_keys, value if isinstance(value, tuple) else (value,))),
                num_images=spec.num_images,
                seed=seed,
                resolution=sampler.resolution,
                num_channels=sampler.num_channels,
                detector=self._identity(spec),
                reference=self._describe_reference(spec),
                seconds=seconds,
                num_gpus=ranks.size,
            )
            for spec, value in zip(self.specs, values)
        ]

    reference_statistics = staticmethod(reference_statistics)

    def _specs_of(self, detector: str | None) -> list[MetricSpec]:
        return [spec for spec in self.specs if spec.detector == detector and "generator" not in spec.needs]

    def _load_perceptual(self, given: str | os.PathLike | None):
        specs = [spec for spec in self.specs if "generator" in spec.needs]
        if not specs:
            if given is not None:
                raise InputError("--perceptual is for path lengths, and --metrics names none, such as ppl2_wend")
            return None
        if given is None:
            raise InputError(
                f"--metrics: {specs[0].name} needs a perceptual network (LPIPS as TorchScript, or any feature "
                "network); give calc_metrics.py --perceptual"
            )
        from di_refine.metrics.path_length import Perceptual  # builds networks: not needed for images alone

        perceptual = Perceptual(given, self.device)
        name = None if perceptual.is_lpips else perceptual.identity.name
        for spec in specs:
            if spec.detector not in (name, perceptual.identity.name):
                proper = spec.name.split("@")[0] + (f"@{name}" if name else "")
                raise InputError(
                    f"--perceptual is called {perceptual.identity.name}"
                    f"{'' if name is None else ' and is no LPIPS network'}; write {proper} for {spec.name}"
                )
        return perceptual

    def _load_detectors(self, given: str | os.PathLike | FeatureNet | None) -> dict[str | None, FeatureNet]:
        """The feature networks by the name in the metrics' names; None stands for the 2015 Inception."""
        if given is not None and not isinstance(given, FeatureNet):
            given = load_detector(given, self.device)
        detectors, wanted = {}, [spec for spec in self.specs if "generator" not in spec.needs]
        if given is not None:
            name = None if given.identity.is_inception else given.identity.name
            if all(spec.detector not in (name, given.identity.name) for spec in wanted):
                raise InputError(
                    f"--detector is called {given.identity.name}, and no metric uses it; write names such as "
                    f"{'fid50k_full' if name is None else f'fd2k_full@{name}'}"
                )
            detectors = {name: given, given.identity.name: given}
        for name in dict.fromkeys(spec.detector for spec in wanted):
            if name not in detectors:
                option = "--detector" if name is None else "--metrics"
                detectors[name] = load_detector(name or INCEPTION_WEIGHTS, self.device, option)
        detectors = {spec.detector: detectors[spec.detector] for spec in wanted}
        if None in detectors and not detectors[None].identity.is_inception:
            raise InputError(
                f"--metrics needs the 2015 Inception network, but the content of {INCEPTION_WEIGHTS} is something "
                "else; download it again"
            )
        for spec in wanted:
            if "probabilities" in spec.needs and detectors[spec.detector].identity.num_classes is None:
                raise InputError(f"--metrics: {spec.name} needs class probabilities, which its detector does not give")
        return detectors

    def _find_reference(
        self, net: FeatureNet, specs: list[MetricSpec], sources: list[FeatureStatistics | ImageDataset]
    ) -> FeatureStatistics | ImageDataset:
        names = ", ".join(spec.name for spec in specs if "reference" in spec.needs)
        if not sources:
            known = registered_statistics(net)
            if known is None:
                raise InputError(f"--metrics: {names} needs a reference; give --ref (statistics) or --data (images)")
            sources = [known]
        reasons = []
        for source in sources:
            if isinstance(source, ImageDataset):
                check_dataset(source, net)
                return source
            reason = mismatch(source, net.identity, _wants_features(specs))
            if reason is None:
                return source
            reasons.append(reason)
        raise InputError(f"--metrics: {names}: the reference {'; '.join(reasons)}; give another --ref, or --data")

    def _statistics_of(self, dataset: ImageDataset, net: FeatureNet) -> FeatureStatistics:
        specs = [spec for spec in self.specs if self.detectors.get(spec.detector) is net]
        shown = Ranks(self.distributed).is_first
        with terminal.progress(len(dataset), f"reference {dataset.name}", "img", enabled=shown) as bar:
            return self.reference_statistics(
                dataset,
                net,
                batch=self.batch or 128,
                keep_features=_wants_features(specs) or None,
                progress=bar.update,
                cache=self.cache,
                workers=self.workers,
                distributed=self.distributed,
            )

    def _path_lengths(self, sampler, seed: int, progress: Callable[[int], None] | None, ranks: Ranks) -> np.ndarray:
        """The lengths of as many paths as any metric asks for, on the first process."""
        count = max((spec.num_images for spec in self.specs if "generator" in spec.needs), default=0)
        if not count:
            return np.zeros(0)
        from di_refine.metrics.path_length import path_lengths

        mine = []
        for indices in ranks.batches(count, PATH_BATCH):
            mine.append(path_lengths(sampler, self.perceptual, indices.start, len(indices), seed))
            if progress is not None:
                progress(2 * len(indices))
        return np.concatenate([np.zeros(0), *(part for parts in ranks.gather(mine) for part in parts)])

    def _measure(
        self, spec: MetricSpec, collected: "_Collector | None", lengths: np.ndarray, seed: int
    ) -> float | tuple[float, float]:
        if spec.kind == "ppl":
            from di_refine.metrics.path_length import perceptual_path_length

            return perceptual_path_length(lengths[: spec.num_images])
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

    def _identity(self, spec: MetricSpec) -> Identity:
        net = self.perceptual if "generator" in spec.needs else self.detectors[spec.detector]
        return net.identity

    def _describe_reference(self, spec: MetricSpec) -> dict:
        statistics = self.references.get(spec.detector) if "reference" in spec.needs else None
        return {} if statistics is None else {**statistics.identity, "count": statistics.count}


def _wants_features(specs: list[MetricSpec]) -> bool:
    return any("reference features" in spec.needs for spec in specs)


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
        self.net.check_finite(features, first)
        for num_images, moments in self.moments.items():
            moments.append(features[: max(num_images - first, 0)])
        if probabilities is not None:
            self.net.check_finite(probabilities, first)
            self.probabilities.append(probabilities.cpu().numpy())
        if self.wants_hits:
            wanted = torch.as_tensor(labels)[: len(images)].argmax(dim=1).cpu()
            self.hits.append((probabilities.argmax(dim=1).cpu() == wanted).numpy())

    def gather(self, ranks: Ranks) -> None:
        """Replace what this process has by what all have, in the order of their ranks, on the first."""
        if ranks.size == 1:
            return
        mine = ({count: moments.cpu() for count, moments in self.moments.items()}, self.probabilities, self.hits)
        everyone = ranks.gather(mine)
        self.moments = {
            count: FeatureMoments.merged([moments[count] for moments, _, _ in everyone], moments.keep)
            for count, moments in self.moments.items()
        }
        self.probabilities = [part for _, probabilities, _ in everyone for part in probabilities]
        self.hits = [part for _, _, hits in everyone for part in hits]
