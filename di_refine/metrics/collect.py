"""What the metrics of one measurement are computed from, collected while the generated images go by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from di_refine.errors import InputError
from di_refine.metrics.feature_net import FeatureNet
from di_refine.metrics.kinds import MetricSpec, Needs
from di_refine.metrics.parallel import Ranks
from di_refine.metrics.statistics import FeatureMoments, FeatureStatistics


class Collector:
    """What the metrics of one feature network need to know of the generated images.

    Args:
        net: the feature network.
        specs: the metrics, all with a number of images.

    Attributes:
        moments: of the features of the first so many images, by their number.
        probabilities: of the classes, batch by batch.
        hits: whether images are recognised as the class asked for, batch by batch.
    """

    def __init__(self, net: FeatureNet, specs: Sequence[MetricSpec]):
        self.net = net
        self.moments: dict[int, FeatureMoments] = {}
        for spec in specs:
            if spec.needs & Needs.REFERENCE:
                moments = self.moments.setdefault(spec.num_images, FeatureMoments())
                if spec.needs & Needs.FEATURES:
                    moments.keep = spec.num_images
        self.probabilities: list[np.ndarray] = []
        self.hits: list[np.ndarray] = []
        self._wants_probabilities = any(spec.needs & Needs.PROBABILITIES for spec in specs)
        self._wants_hits = any(spec.needs & Needs.CLASSES for spec in specs)
        self._limit = max(spec.num_images for spec in specs)

    def append(self, first: int, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Take in images with indices from `first` on.

        Args:
            first: index of the first image.
            images: uint8 [n, C, R, R].
            labels: one-hot, [n, label_dim]; None without labels.

        Raises:
            InputError: there are label vectors where classes are needed.
            RunError: the network gave values that are not finite.
        """
        images = images[: max(self._limit - first, 0)]
        if len(images) == 0:
            return
        features, probabilities = self.net(images, self._wants_probabilities)
        self.net.check_finite(features, first)
        for num_images, moments in self.moments.items():
            moments.append(features[: max(num_images - first, 0)])
        if probabilities is None:
            return
        self.net.check_finite(probabilities, first)
        self.probabilities.append(probabilities.cpu().numpy())
        if self._wants_hits:
            asked = torch.as_tensor(labels)[: len(images)].cpu()
            wanted = asked.argmax(dim=1)
            if not torch.equal(asked, torch.nn.functional.one_hot(wanted, asked.shape[1]).to(asked.dtype)):
                raise InputError(f"acc{'@' + self.net.identity.name} needs images of one class each, not label vectors")
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


@dataclass(frozen=True)
class Collected:
    """The `kinds.Inputs` of one metric.

    Attributes:
        spec: the metric.
        collectors: what was collected, by the feature networks' names in the metrics' names.
        references: the reference statistics, likewise.
        lengths: of as many paths as any metric asks for.
        seed, device: see `kinds.Inputs`.
    """

    spec: MetricSpec
    collectors: Mapping[str | None, Collector]
    references: Mapping[str | None, FeatureStatistics]
    lengths: np.ndarray
    seed: int
    device: torch.device

    @property
    def _fake(self) -> FeatureMoments:
        return self.collectors[self.spec.detector].moments[self.spec.num_images]

    def gaussians(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return mean and covariance of the reference's features, then of the generated images'."""
        real = self.references[self.spec.detector]
        return (real.mu, real.sigma, *self._fake.moments())

    def features(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of the reference and of the generated images."""
        real = self.references[self.spec.detector].features
        if real is None:
            raise InputError(f"{self.spec.name} compares single features, and the reference holds none")
        return real, self._fake.features

    def probabilities(self) -> np.ndarray:
        """Return the class probabilities of the generated images."""
        return np.concatenate(self.collectors[self.spec.detector].probabilities)[: self.spec.num_images]

    def hits(self) -> np.ndarray:
        """Return whether each generated image is recognised as of the class asked for."""
        return np.concatenate(self.collectors[self.spec.detector].hits)[: self.spec.num_images]

    def path_lengths(self) -> np.ndarray:
        """Return the lengths of paths."""
        return self.lengths[: self.spec.num_images]
