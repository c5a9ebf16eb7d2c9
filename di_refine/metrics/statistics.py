"""Mean and covariance of feature sets: streamed, merged over processes, stored as .npz files."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from di_refine.errors import InputError
from di_refine.files import arrays, foreign
from di_refine.metrics.distances import is_symmetric
from torch_utils.misc import open_atomic

# Fields that say where statistics come from; every one may be missing, as in the official files.
IDENTITY = ("detector", "detector_hash", "dataset", "dataset_hash", "resolution", "num_channels")
_NUMBERS = ("count", "resolution", "num_channels")
LARGEST = 1e100  # of a mean or covariance; squares of larger ones would not be finite


def moments(features: np.ndarray, ddof: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [F] and covariance [F, F] of features [N, F], in float64.

    Args:
        features: shape [N, F], N > ddof.
        ddof: the covariance divides by N - ddof. 1 (unbiased) is what the EDM, pytorch-fid and torch-fidelity tools and
            their reference files use, and what this project uses everywhere. 0 is the StyleGAN2-ADA convention; at 50k
            samples the two differ by 2e-5 of the covariance.

    Raises:
        InputError: there are too few features, or they have another shape.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) <= ddof:
        raise InputError(f"mean and covariance need features [N, F] with N > {ddof}, got {list(features.shape)}")
    mu = features.mean(axis=0)
    centred = features - mu
    return mu, centred.T @ centred / (len(features) - ddof)


@dataclass
class FeatureStatistics:
    """Statistics of one set of images under one feature network.

    Attributes:
        mu, sigma: mean [F] and covariance [F, F], float64.
        count: number of images; None when the file does not say.
        identity: those of the fields `IDENTITY` that are known.
        features: the features themselves [count, F], where they were kept (kernel distance and precision need them).
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None
    identity: dict[str, str | int] = field(default_factory=dict)
    features: np.ndarray | None = None

    @property
    def feature_dim(self) -> int:
        """The number of features."""
        return self.mu.size

    def content_hash(self) -> str:
        """The SHA-256 of all numbers."""
        parts = [part for part in (self.mu, self.sigma, self.features) if part is not None]
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()

    def save(self, path: str | os.PathLike, features_dtype: str = "float32", compress: bool = True) -> None:
        """Write an .npz with the official keys `mu` and `sigma`, our identity fields, and the features if kept.

        Args:
            path: the file, which is replaced atomically.
            features_dtype: 'float32', or 'float16' for half the size (3 digits, which is enough for the kernel
                distance; precision and recall may change in close cases).
            compress: False writes 50,000 features of 2048 in a second instead of half a minute, a tenth larger.
        """
        content: dict[str, Any] = {"mu": self.mu, "sigma": self.sigma}
        content |= {key: np.array(value) for key, value in self.identity.items()}
        if self.count is not None:
            content["count"] = np.array(self.count)
        if self.features is not None:
            content["features"] = self.features.astype(features_dtype)
        with open_atomic(path) as file:
            (np.savez_compressed if compress else np.savez)(file, **content)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FeatureStatistics":
        """Read an .npz of `save`, or any with `mu` and `sigma` as the EDM and pytorch-fid tools write.

        Raises:
            InputError: the file, which the message names, is missing, no .npz, incomplete, damaged or contradictory.
        """
        path = Path(path)
        try:
            content, others = arrays.read(path, ("mu", "sigma", "count", "features", *IDENTITY))
        except FileNotFoundError:
            raise InputError(f"{path}: no such statistics file") from None
        except arrays.ERRORS as error:
            reason = getattr(error, "strerror", None) or error
            problem = f"{path}: not a readable .npz of statistics ({reason})"
            raise InputError(foreign.explained(problem, path, foreign.STATISTICS)) from None
        missing = {"mu", "sigma"} - content.keys()
        if missing:
            there = ", ".join([*content, *others][:20]) or "nothing"
            problem = f"{path}: lacks {' and '.join(sorted(missing))}; it holds {there}"
            raise InputError(foreign.explained(problem, path, foreign.STATISTICS))
        _check_kinds(content, path)
        mu, sigma = content["mu"].astype(np.float64, copy=False), content["sigma"].astype(np.float64, copy=False)
        if mu.ndim != 1 or mu.size == 0 or sigma.shape != (mu.size, mu.size):
            raise InputError(f"{path}: mu {list(mu.shape)} and sigma {list(sigma.shape)} do not fit together")
        if not (np.abs(mu).max() < LARGEST and np.abs(sigma).max() < LARGEST):
            raise InputError(f"{path}: mu or sigma holds values that are not finite, or beyond {LARGEST:g}")
        if not is_symmetric(sigma):
            raise InputError(f"{path}: sigma is no covariance, as it is not symmetric")
        features = content.get("features")
        if features is not None:
            features = features.astype(np.float32, copy=False)
            if features.ndim != 2 or features.shape[1] != mu.size:
                raise InputError(f"{path}: features {list(features.shape)} do not fit mu of size {mu.size}")
            if not np.isfinite(features).all():  # in the precision they are kept in
                raise InputError(f"{path}: features hold values that are not finite")
        return cls(
            mu=mu,
            sigma=sigma,
            count=content["count"].item() if "count" in content else None,
            identity={key: content[key].item() for key in IDENTITY if key in content},
            features=features,
        )


def _check_kinds(content: dict[str, np.ndarray], path: Path) -> None:
    """Raise InputError where arrays hold something else than the numbers and texts that belong there."""
    for name, array in content.items():
        if name in ("mu", "sigma", "features"):
            if array.dtype.kind not in "fiu":
                raise InputError(f"{path}: {name} holds no numbers, but {array.dtype}")
            continue
        try:
            shown: Any = array.item() if array.size == 1 else list(array.shape)
        except (SystemError, ValueError):  # a text with numbers that are no characters
            raise InputError(f"{path}: {name} is no text, but {array.dtype}") from None
        kind, what = ("iu", "positive whole number") if name in _NUMBERS else ("U", "text")
        if array.size != 1 or array.dtype.kind not in kind or (kind == "iu" and shown < 1):
            raise InputError(f"{path}: {name} is no {what}, but {array.dtype} {shown}"[:500])


class FeatureMoments:
    """Streaming mean and covariance of feature batches, in float64 on the device the features live on.

    Args:
        keep: how many of the first images' features to keep as they are.

    Attributes:
        count: number of images so far.
    """

    def __init__(self, keep: int = 0):
        self.keep = keep
        self.count = 0
        self._sum: torch.Tensor | None = None
        self._outer: torch.Tensor | None = None
        self._kept: torch.Tensor | None = None  # [keep, F], of which the first rows are filled
        self._num_kept = 0

    def append(self, features: torch.Tensor | np.ndarray) -> None:
        """Take in a batch of features, shape [N, F].

        Raises:
            InputError: the features have another size than before.
        """
        features = torch.as_tensor(features)
        if features.device.type == "mps":  # has no float64
            features = features.cpu()
        if features.ndim != 2 or (self._sum is not None and features.shape[1] != self._sum.numel()):
            expected = "F" if self._sum is None else self._sum.numel()
            raise InputError(f"expected features [N, {expected}], got {list(features.shape)}")
        double = features.double()
        batch_sum, outer = double.sum(dim=0), double.T @ double
        if self._sum is None or self._outer is None:
            self._sum, self._outer = batch_sum, outer
        else:
            self._sum, self._outer = self._sum + batch_sum, self._outer.add_(outer)
        self.count += len(features)
        if self._num_kept < self.keep:  # or nothing has to leave the device
            self._keep(features.float().cpu())

    def merge(self, other: "FeatureMoments") -> None:
        """Add what `other` has seen, as if its batches had been appended here.

        Raises:
            InputError: its features have another size.
        """
        if other._sum is None or other._outer is None:
            return
        if self._sum is None or self._outer is None:
            self._sum, self._outer = torch.zeros_like(other._sum), torch.zeros_like(other._outer)
        if self._sum.shape != other._sum.shape:
            raise InputError(f"cannot merge features of size {other._sum.numel()} into size {self._sum.numel()}")
        self._sum = self._sum + other._sum.to(self._sum.device)
        self._outer = self._outer + other._outer.to(self._outer.device)
        self.count += other.count
        self._keep(torch.from_numpy(other.features))

    @classmethod
    def merged(cls, parts: list["FeatureMoments"], keep: int) -> "FeatureMoments":
        """Join what several processes have seen, in their order, and keep the features of the first `keep` images."""
        whole = cls(keep)
        for part in parts:
            whole.merge(part)
        return whole

    def moments(self, ddof: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return mean [F] and covariance [F, F] so far, as the function `moments` does.

        Raises:
            InputError: there are fewer than ddof + 1 images so far.
        """
        if self.count <= ddof or self._sum is None or self._outer is None:
            raise InputError(f"mean and covariance need more than {ddof} images, got {self.count}")
        mu = self._sum / self.count
        sigma = (self._outer - torch.outer(mu, self._sum)) / (self.count - ddof)
        return mu.cpu().numpy(), ((sigma + sigma.T) / 2).cpu().numpy()

    @property
    def features(self) -> np.ndarray:
        """The kept features, float32, shape [min(keep, count), F], in the order they came."""
        if self._kept is None:
            return np.zeros([0, 0 if self._sum is None else self._sum.numel()], np.float32)
        return self._kept[: self._num_kept].numpy()

    def statistics(self, **identity: str | int) -> FeatureStatistics:
        """Return what was seen as `FeatureStatistics`, with the features if all of them were kept.

        Args:
            identity: any of `IDENTITY`.
        """
        unknown = identity.keys() - set(IDENTITY)
        if unknown:
            raise ValueError(f"unknown identity fields: {', '.join(sorted(unknown))}")
        mu, sigma = self.moments()
        features = self.features if self._num_kept == self.count else None
        return FeatureStatistics(mu, sigma, self.count, dict(identity), features)

    def cpu(self) -> "FeatureMoments":
        """Return a copy in main memory, fit for sending to another process."""
        copy = FeatureMoments(self._num_kept)  # no unused rows
        copy.merge(self)
        if copy._sum is not None and copy._outer is not None:
            copy._sum, copy._outer = copy._sum.cpu(), copy._outer.cpu()
        return copy

    def _keep(self, features: torch.Tensor) -> None:
        features = features[: self.keep - self._num_kept]
        if len(features):
            if self._kept is None:  # one block: joining batches at the end would hold everything twice
                self._kept = torch.empty([self.keep, features.shape[1]])
            self._kept[self._num_kept : self._num_kept + len(features)] = features
            self._num_kept += len(features)
