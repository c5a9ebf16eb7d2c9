"""Measuring a generator: one pass over its images serves all metrics that are asked for."""

import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from di_refine import terminal
from di_refine.errors import InputError
from di_refine.files.datasets import ImageDataset
from di_refine.generators import Sampler
from di_refine.metrics.collect import Collected, Collector
from di_refine.metrics.detectors import load_detector
from di_refine.metrics.distances import SUBSET
from di_refine.metrics.feature_net import FeatureNet, Identity
from di_refine.metrics.kinds import ALL_IMAGES, TEACHER, MetricSpec, Needs, parse_metrics
from di_refine.metrics.parallel import Ranks
from di_refine.metrics.path_length import Perceptual, has_paths, path_lengths
from di_refine.metrics.references import (
    Reference,
    ReferenceSource,
    check_dataset,
    known_about,
    mismatch,
    open_reference,
    reference_statistics,
    registered_statistics,
)
from di_refine.metrics.results import MetricResult
from di_refine.metrics.statistics import FeatureStatistics
from di_refine.metrics.teacher_net import TeacherReference

INCEPTION_WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
PATH_BATCH = 32  # paths per pass; fixed, as the noise inputs of a pass depend on it


class Evaluator:
    """Metrics with everything they need loaded and checked, to be called with samplers.

    Args:
        metrics: names (see `metrics.kinds`), as a list or separated by commas.
        reference: statistics (.npz), a data set (path or `ImageDataset`), a name in the registry, or several of these,
            where each feature network takes the first that fits. None takes what the registry says belongs to the
            network.
        detector: the feature network that the names refer to, a file or loaded; None looks the names up in the
            registry.
        device: where feature networks run.
        batch: images per pass.
        perceptual: a file of the network for path lengths (see `metrics.path_length`).
        cache: keep statistics of data sets in the cache folder, and take them from there.
        workers: threads that decode a data set.
        distributed: share all work among the processes of `torch.distributed`, which all must make and call the same
            evaluator; each gets all results.
        teacher: for metrics of the name `@teacher`.
        allow_code: let `detector` and `perceptual` be programs, see `detectors.load_detector`.

    Attributes:
        specs: the metrics, in the order of their names.
        detectors: the feature networks by their name in the metrics' names; None stands for the 2015 Inception.
        perceptual: the network for path lengths, where a metric needs one.

    Raises:
        InputError: a name is unknown, a file is missing or something else, or a reference does not fit the feature
            network.
    """

    def __init__(
        self,
        metrics: str | Sequence[str],
        reference: ReferenceSource | Sequence[ReferenceSource] | None = None,
        detector: str | os.PathLike | FeatureNet | None = None,
        device: str | torch.device = "cpu",
        batch: int = 128,
        perceptual: str | os.PathLike | None = None,
        cache: bool = True,
        workers: int = 2,
        distributed: bool = False,
        allow_code: bool = False,
        teacher: TeacherReference | None = None,
    ):
        self.specs = parse_metrics(metrics)
        self.device, self.batch = torch.device(device), batch
        self.cache, self.workers, self.distributed = cache, workers, distributed
        self._allow_code = allow_code
        self.perceptual = self._load_perceptual(perceptual)
        self._teacher = teacher
        self.detectors = self._load_detectors(detector)
        given = [] if reference is None else [reference] if isinstance(reference, ReferenceSource) else reference
        found = [open_reference(source) for source in given]
        self._sources = {
            name: self._find_reference(net, self._specs_of(name), found)
            for name, net in self.detectors.items()
            if any(spec.needs & Needs.REFERENCE for spec in self._specs_of(name))
        }

    @functools.cached_property
    def references(self) -> dict[str | None, FeatureStatistics]:
        """The reference statistics of each feature network.

        Those of data sets are made when they are first asked for, which is after everything has been checked.
        """
        found = {}
        for name, source in self._sources.items():
            data = source.draw() if isinstance(source, TeacherReference) else source
            found[name] = self._statistics_of(data, self.detectors[name]) if isinstance(data, ImageDataset) else data
        return found

    @functools.cached_property  # it reads whole data sets
    def identity(self) -> dict[str, Any]:
        """What the values depend on besides the sampler: metrics, feature networks and references, by their content."""
        nets = {str(name): net.identity.as_dict() for name, net in self.detectors.items()}
        if self.perceptual is not None:
            nets["perceptual"] = self.perceptual.identity.as_dict()
        references = {str(name): source.content_hash() for name, source in self._sources.items()}
        return {"metrics": [spec.name for spec in self.specs], "networks": nets, "references": references}

    def num_images(self, sampler: Sampler) -> int:
        """How many images a measurement takes: one pass for all metrics of images, and two images for each path."""
        specs = self._counted(sampler)
        return _most(spec for spec in specs if not spec.needs & Needs.PATHS) + 2 * _most(self._of_paths)

    def _counted(self, sampler: Sampler) -> list[MetricSpec]:
        """The metrics, those of all images with the number of them.

        Raises:
            InputError: neither the sampler nor a reference says how many that are.
        """
        return [
            spec if spec.num_images else replace(spec, num_images=self._all_of(spec, sampler)) for spec in self.specs
        ]

    def _all_of(self, spec: MetricSpec, sampler: Sampler) -> int:
        counts = [known_about(source).get("count") for source in self._sources.values()]
        if spec.detector in self._sources:
            counts.insert(0, known_about(self._sources[spec.detector]).get("count"))
        found = next((count for count in (sampler.num_images, *counts) if count), None)
        if found is None:
            raise InputError(
                f"`metrics`: {spec.name} takes as many images as the reference has, which no reference says; give a "
                f"number, as in {spec.kind.form(spec.detector is not None)}"
            )
        return found

    @property
    def _of_images(self) -> list[MetricSpec]:
        return [spec for spec in self.specs if not spec.needs & Needs.PATHS]

    @property
    def _of_paths(self) -> list[MetricSpec]:
        return [spec for spec in self.specs if spec.needs & Needs.PATHS]

    def _specs_of(self, detector: str | None) -> list[MetricSpec]:
        return [spec for spec in self._of_images if spec.detector == detector]

    @property
    def warnings(self) -> list[str]:
        """What a reader of the numbers must know and cannot see from them, a sentence each."""
        found = []
        for spec in self.specs:
            if not spec.needs & Needs.REFERENCE:
                continue
            size = self.detectors[spec.detector].identity.feature_dim
            count = known_about(self._sources[spec.detector]).get("count")
            smaller = min(spec.num_images or SUBSET, count or SUBSET)
            if spec.kind.subsets and smaller < SUBSET:
                found.append(
                    f"{spec.name}: its subsets are of {smaller} images instead of {SUBSET:,}; compare only with values "
                    "from as many images"
                )
            if not spec.needs & Needs.GAUSSIANS:
                continue
            if 0 < spec.num_images <= size:
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

    def check(self, sampler: Sampler) -> None:
        """Check, before any image is made, that a sampler suits the metrics.

        Raises:
            InputError: the sampler has too few images, other channels or another resolution than the reference, or no
                or other classes.
        """
        if self.perceptual is not None:
            if not has_paths(sampler):
                raise _no_paths(self._of_paths[0])
            self.perceptual.check_channels(sampler.num_channels)
        for spec in self._counted(sampler):
            if spec.needs & Needs.PATHS:
                continue
            net = self.detectors[spec.detector]
            net.check_channels(sampler.num_channels)
            limit = sampler.num_images
            if limit is not None and spec.num_images > limit:
                raise InputError(
                    f"{spec.name} needs {spec.num_images} images and there are {limit}; make more, or measure all that "
                    f"there are with {spec.kind.name}{ALL_IMAGES}{f'@{spec.detector}' if spec.detector else ''}"
                )
            if spec.needs & Needs.CLASSES and sampler.label_dim != net.identity.num_classes:
                raise InputError(
                    f"{spec.name} compares requested with recognised classes; there are {sampler.label_dim} and "
                    f"{net.identity.num_classes}"
                )
            if spec.needs & Needs.CLASSES and sampler.law is not None and not sampler.law.has_classes:
                raise InputError(f"{spec.name} compares one class with another, and the network has label vectors")
            if spec.detector not in self._sources:
                continue
            known = known_about(self._sources[spec.detector])
            for key, given in (("resolution", sampler.resolution), ("num_channels", sampler.num_channels)):
                if known.get(key, given) != given:
                    raise InputError(
                        f"{spec.name}: the reference was made from images with {key} {known[key]}, these have {given}; "
                        "give another `ref` or `data`"
                    )

    def prepare(self) -> None:
        """Make the reference statistics of data sets now, which the first measurement would do otherwise."""
        _ = self.references

    def __call__(
        self, sampler: Sampler, seed: int = 0, progress: Callable[[int], None] | None = None
    ) -> list[MetricResult]:
        """Measure a generator.

        Args:
            sampler: where the images come from.
            seed: seeds the sampler and random subsets.
            progress: called with the number of images of each batch that this process makes.

        Returns:
            A result per metric, in the order of the names.

        Raises:
            InputError: the sampler does not suit the metrics, as for `check`.
            RunError: a feature network gave values that are not finite.
        """
        self.check(sampler)
        self.prepare()
        start = time.monotonic()
        ranks, specs = Ranks(self.distributed), self._counted(sampler)
        of_images = [spec for spec in specs if not spec.needs & Needs.PATHS]
        collectors = {
            name: Collector(net, [spec for spec in of_images if spec.detector == name])
            for name, net in self.detectors.items()
        }
        for indices in ranks.batches(_most(of_images), ranks.fitting(self.batch, sampler)):
            images, labels = sampler(indices.start, len(indices), seed)
            for collector in collectors.values():
                collector.append(indices.start, images, labels)
            if progress is not None:
                progress(len(indices))
        for collector in collectors.values():
            collector.gather(ranks)
        lengths = self._path_lengths(sampler, seed, progress, ranks)
        device = torch.device("cpu") if self.device.type == "mps" else self.device  # mps has no float64
        values: list[float | tuple[float, ...]] = ranks.on_first(
            lambda: [
                spec.kind.measure(Collected(spec, collectors, self.references, lengths, seed, device)) for spec in specs
            ]
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
                labels=None if sampler.law is None else sampler.law.described,
            )
            for spec, value in zip(specs, values)
        ]

    def _load_perceptual(self, given: str | os.PathLike | None) -> Perceptual | None:
        if not self._of_paths:
            if given is not None:
                raise InputError("`perceptual` is for path lengths, and `metrics` names none, such as ppl2_wend")
            return None
        if given is None:
            raise InputError(
                f"`metrics`: {self._of_paths[0].name} needs a perceptual network (LPIPS as TorchScript, or any feature "
                "network); calc_metrics.py takes one as `perceptual`"
            )
        perceptual = Perceptual(given, self.device, self._allow_code)
        name = None if perceptual.is_lpips else perceptual.identity.name
        for spec in self._of_paths:
            if spec.detector not in (name, perceptual.identity.name):
                proper = spec.name.split("@")[0] + (f"@{name}" if name else "")
                raise InputError(
                    f"`perceptual` is called {perceptual.identity.name}"
                    f"{'' if name is None else ' and is no LPIPS network'}; write {proper} for {spec.name}"
                )
        return perceptual

    def _load_detectors(self, given: str | os.PathLike | FeatureNet | None) -> dict[str | None, FeatureNet]:
        if given is not None and not isinstance(given, FeatureNet):
            given = load_detector(given, self.device, allow_code=self._allow_code)
        known: dict[str | None, FeatureNet] = {}
        if given is not None:
            name = None if given.identity.is_inception else given.identity.name
            if all(spec.detector not in (name, given.identity.name) for spec in self._of_images):
                raise InputError(
                    f"`detector` is called {given.identity.name}, and no metric uses it; write names such as "
                    f"{'fid50k_full' if name is None else f'fd2k_full@{name}'}"
                )
            known = {name: given, given.identity.name: given}
        detectors = {}
        for spec in self._of_images:
            name = spec.detector
            if name == TEACHER and self._teacher is None:
                raise InputError(f"`metrics`: {spec.name} goes by a teacher's features; give `teacher`")
            if name == TEACHER and self._teacher is not None and name not in known:
                known[name] = self._teacher.detector()
            if name not in known:
                setting = "detector" if name is None else "metrics"
                known[name] = load_detector(name or INCEPTION_WEIGHTS, self.device, setting, self._allow_code)
            detectors[name] = known[name]
        if None in detectors and not detectors[None].identity.is_inception:
            raise InputError(
                f"`metrics` needs the 2015 Inception network, but the content of {INCEPTION_WEIGHTS} is something "
                "else; download it again"
            )
        for spec in self._of_images:
            if spec.needs & Needs.PROBABILITIES and detectors[spec.detector].identity.num_classes is None:
                raise InputError(f"`metrics`: {spec.name} needs class probabilities, which its detector does not give")
        return detectors

    def _find_reference(
        self, net: FeatureNet, specs: list[MetricSpec], given: Sequence[FeatureStatistics | ImageDataset]
    ) -> Reference:
        names = ", ".join(spec.name for spec in specs if spec.needs & Needs.REFERENCE)
        if net.identity.name == TEACHER and self._teacher is not None:
            return self._teacher
        if not given:
            known = registered_statistics(net)
            if known is None:
                raise InputError(f"`metrics`: {names} needs a reference; give `ref` (statistics) or `data` (images)")
            given = [known]
        reasons = []
        for source in given:
            if isinstance(source, ImageDataset):
                check_dataset(source, net)
                return source
            reason = mismatch(source, net.identity, _wants_features(specs))
            if reason is None:
                return source
            reasons.append(reason)
        raise InputError(f"`metrics`: {names}: the reference {'; '.join(reasons)}; give another `ref`, or `data`")

    def _statistics_of(self, dataset: ImageDataset, net: FeatureNet) -> FeatureStatistics:
        specs = [spec for spec in self._of_images if self.detectors[spec.detector] is net]
        shown = Ranks(self.distributed).is_first
        with terminal.progress(len(dataset), f"reference {dataset.name}", "img", enabled=shown) as bar:
            return reference_statistics(
                dataset,
                net,
                batch=self.batch,
                keep_features=_wants_features(specs) or None,
                progress=bar.update,
                cache=self.cache,
                workers=self.workers,
                distributed=self.distributed,
            )

    def _path_lengths(
        self, sampler: Sampler, seed: int, progress: Callable[[int], None] | None, ranks: Ranks
    ) -> np.ndarray:
        """Return the lengths of as many paths as any metric asks for, on the first process."""
        if self.perceptual is None:
            return np.zeros(0)
        if not has_paths(sampler):
            raise _no_paths(self._of_paths[0])
        mine = []
        for indices in ranks.batches(_most(self._of_paths), PATH_BATCH):
            mine.append(path_lengths(sampler, self.perceptual, indices.start, len(indices), seed))
            if progress is not None:
                progress(2 * len(indices))
        return np.concatenate([np.zeros(0), *(part for parts in ranks.gather(mine) for part in parts)])

    def _identity(self, spec: MetricSpec) -> Identity:
        if spec.needs & Needs.PATHS and self.perceptual is not None:
            return self.perceptual.identity
        return self.detectors[spec.detector].identity

    def _describe_reference(self, spec: MetricSpec) -> dict:
        if not spec.needs & Needs.REFERENCE:
            return {}
        statistics = self.references[spec.detector]
        return {**statistics.identity, "count": statistics.count}


def _most(specs: Iterable[MetricSpec]) -> int:
    """The largest number of images that metrics whose numbers are known ask for; 0 without metrics."""
    return max((spec.num_images for spec in specs), default=0)


def _no_paths(spec: MetricSpec) -> InputError:
    return InputError(f"`metrics`: {spec.name} is a property of StyleGAN2 generators; measure one of them")


def _wants_features(specs: Sequence[MetricSpec]) -> bool:
    return any(spec.needs & Needs.FEATURES for spec in specs)
