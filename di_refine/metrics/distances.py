"""The formulas of the metrics: pure functions of features, of their moments, or of class probabilities, as arrays."""

from collections.abc import Iterator

import numpy as np
import torch

from di_refine.errors import InputError
from torch_utils.misc import derive_seed

SUBSET = 1000
"""Images in a subset of a kernel distance, where there are as many."""

_TILE = 2048  # 34 MB of float64 distances at a time, whatever the sets' sizes


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Compute the squared Frechet distance of two Gaussians: |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    The trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2). That is real and non-negative whatever
    the ranks are, whereas a general matrix square root of C1 C2 turns complex on rank-deficient covariances.
    (Dowson and Landau, 1982; Heusel et al., arXiv 1706.08500.)

    Args:
        mu1, mu2: means, shape [F].
        sigma1, sigma2: covariances, shape [F, F].

    Returns:
        The distance, at least 0.

    Raises:
        InputError: the sizes differ, a value is not finite, or a covariance is not symmetric positive semi-definite.
    """
    mu1, root1, trace1 = _check_gaussian(mu1, sigma1, "first")
    mu2, root2, trace2 = _check_gaussian(mu2, sigma2, "second")
    if mu1.size != mu2.size:
        raise InputError(
            f"the two sets of statistics have {mu1.size} and {mu2.size} features; they come from different networks"
        )
    overlap = np.linalg.svd(root1 @ root2, compute_uv=False).sum()
    return float(max(np.sum((mu1 - mu2) ** 2) + trace1 + trace2 - 2 * overlap, 0.0))


def kernel_distance(
    real: np.ndarray, fake: np.ndarray, num_subsets: int = 100, max_subset_size: int = SUBSET, seed: int = 0
) -> float:
    """Compute the kernel distance: squared MMD with the kernel (x.y / F + 1)^3, unbiased, averaged over subsets.

    (Binkowski et al., arXiv 1801.01401.) The subsets are random, and no sample is drawn twice for one. The estimate of
    two equal distributions scatters around 0, so small negative values are right.

    Args:
        real, fake: features, shapes [N, F] and [M, F].
        num_subsets: how many pairs of subsets to average.
        max_subset_size: size of a subset; less where a set is smaller.
        seed: draws the subsets; the same seed gives the same ones.

    Raises:
        InputError: the feature sizes differ, there are fewer than two samples, or a value is not finite.
    """
    real, fake = _check_pair(real, fake, least=2)
    size = min(len(real), len(fake), max_subset_size)
    if num_subsets < 1 or size < 2:
        raise InputError(
            f"kernel distance needs at least one subset of two; got {num_subsets} subsets of {max_subset_size}"
        )
    rng = np.random.default_rng(derive_seed("kernel_distance", seed))
    values = []
    for _ in range(num_subsets):
        fake_part = fake[rng.choice(len(fake), size, replace=False)]
        real_part = real[rng.choice(len(real), size, replace=False)]
        values.append(squared_mmd(real_part, fake_part))
    return float(np.mean(values))


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Compute the unbiased squared maximum mean discrepancy of two sets [N, F], in float64.

    The kernel is (x.y / F + 1)^3, and the sets are equally large (Gretton et al., JMLR 13, 2012, lemma 6).
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n, num_features = x.shape
    within = 0.0
    for z in (x, y):
        kernel = (z @ z.T / num_features + 1) ** 3
        within += (kernel.sum() - np.trace(kernel)) / (n * (n - 1))
    return float(within - 2 * np.mean((x @ y.T / num_features + 1) ** 3))


def precision_recall(
    real: np.ndarray, fake: np.ndarray, k: int = 3, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

    A set's manifold is the union of balls around its samples, each reaching to the k-th nearest other sample. Precision
    is the fraction of `fake` inside the manifold of `real`, recall the reverse. The rim belongs to the inside.

    Args:
        real, fake: features, shapes [N, F] and [M, F].
        k: number of neighbours; each set needs more than k samples.
        device: where the distances are computed, in float64 tiles.

    Returns:
        Precision and recall, each in 0..1.

    Raises:
        InputError: the feature sizes differ, there are too few samples, or a value is not finite.
    """
    real, fake = _check_pair(real, fake, least=k + 1)
    fakes_inside, reals_inside, _, _ = _hits(real, fake, k, device)
    return float(fakes_inside.mean()), float(reals_inside.mean())


def density_coverage(
    real: np.ndarray, fake: np.ndarray, k: int = 3, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Compute density and coverage (Naeem et al., arXiv 2002.09797) by the balls of `precision_recall` around `real`.

    Density is the number of balls that an average fake sample lies in, divided by k (about 1 for equal distributions,
    but not bounded by 1). Coverage is the fraction of balls that hold a fake sample.

    Args:
        real, fake, k, device: as for `precision_recall`.

    Returns:
        Density, at least 0, and coverage, in 0..1.

    Raises:
        InputError: as for `precision_recall`.
    """
    real, fake = _check_pair(real, fake, least=k + 1)
    _, _, covered, num_inside = _hits(real, fake, k, device)
    return num_inside / (k * len(fake)), float(covered.mean())


def inception_score(probs: np.ndarray, num_splits: int = 10) -> tuple[float, float]:
    """Compute the Inception score: exp of the rows' mean KL divergence from the mean of their chunk (arXiv 1606.03498).

    Args:
        probs: class probabilities, shape [N, K], rows summing to 1. Chunk i holds rows floor(i N / S) to
            floor((i+1) N / S), in the order given.
        num_splits: number of chunks S.

    Returns:
        Mean and population standard deviation over the chunks.

    Raises:
        InputError: there are fewer rows than chunks, or the rows are not probabilities.
    """
    probs = np.asarray(probs, np.float64)
    if probs.ndim != 2 or num_splits < 1 or len(probs) < num_splits:
        raise InputError(f"inception score over {num_splits} splits needs [N, K] with N >= {num_splits}: {probs.shape}")
    if not np.isfinite(probs).all() or probs.min() < 0 or np.abs(probs.sum(axis=1) - 1).max() > 1e-3:
        raise InputError("inception score needs class probabilities: finite, not negative, each row summing to 1")
    scores = []
    for i in range(num_splits):
        chunk = probs[i * len(probs) // num_splits : (i + 1) * len(probs) // num_splits]
        # x log x is 0 at x = 0, so zeros may be replaced by any positive number inside the logarithms.
        log_probs = np.log(np.where(chunk > 0, chunk, 1.0))
        mean = chunk.mean(axis=0, keepdims=True)
        divergence = np.sum(chunk * (log_probs - np.log(np.where(mean > 0, mean, 1.0))), axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def is_symmetric(sigma: np.ndarray) -> bool:
    """Whether a covariance `[F, F]` is symmetric, but for the rounding of float32."""
    return bool(np.abs(sigma - sigma.T).max(initial=0.0) <= 1e-4 * np.abs(sigma).max(initial=0.0))


def _check_gaussian(mu: np.ndarray, sigma: np.ndarray, which: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the mean, the symmetric root of the covariance, and the covariance's trace, all in float64."""
    mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise InputError(f"{which} statistics: expected mean [F] and covariance [F, F], got {mu.shape}, {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{which} statistics: the mean or covariance holds values that are not finite")
    size = np.abs(sigma).max(initial=0.0)
    if not is_symmetric(sigma):
        raise InputError(f"{which} statistics: the covariance is not symmetric")
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    # Rounding, at worst that of statistics stored as float32, leaves eigenvalues a little below zero, also where all
    # samples are equal and nothing but rounding is left; anything more is a broken file.
    if values.min(initial=0.0) < -1e-4 * size - 1e-7 * (mu @ mu):
        raise InputError(
            f"{which} statistics: the covariance has the eigenvalue {values.min():.3g}; it may not be negative"
        )
    # Rounding noise in a null direction would enter the distance as its square root, about 1e-8: cut it off.
    noise = values.max(initial=0.0) * mu.size * np.finfo(np.float64).eps
    roots = np.sqrt(np.where(values > noise, values, 0.0))
    return mu, (vectors * roots) @ vectors.T, float(np.trace(sigma))


def _check_pair(real: np.ndarray, fake: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    real, fake = np.asarray(real), np.asarray(fake)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise InputError(f"expected features [N, F] and [M, F], got {list(real.shape)} and {list(fake.shape)}")
    for name, features in (("real", real), ("fake", fake)):
        if len(features) < least:
            raise InputError(f"this metric needs at least {least} {name} samples, got {len(features)}")
        if not np.isfinite(features).all():
            raise InputError(f"the {name} features hold values that are not finite")
    return real, fake


def _hits(
    real: np.ndarray, fake: np.ndarray, k: int, device: str | torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Compare each set with the other's balls.

    Returns:
        Which fakes lie in a ball around a real [M], which reals lie in a ball around a fake [N], which balls around
        reals hold a fake [N], and how many pairs there are of a fake and a ball around a real that holds it.
    """
    if k < 1:
        raise InputError(f"the number of neighbours must be at least 1, got {k}")
    # Distances do not change under a shift, and smaller numbers cancel less in |x|^2 + |y|^2 - 2 x.y.
    centre = real.mean(axis=0, dtype=np.float64)
    real_radii = _squared_radii(real, centre, k, device)
    fake_radii = _squared_radii(fake, centre, k, device)
    fakes_inside = torch.zeros(len(fake), dtype=torch.bool, device=device)
    reals_inside, covered = (torch.zeros(len(real), dtype=torch.bool, device=device) for _ in range(2))
    num_inside = 0
    for rows, columns, distances in _squared_distances(real, fake, centre, device):
        inside = distances <= real_radii[rows, None]
        fakes_inside[columns] |= inside.any(dim=0)
        covered[rows] |= inside.any(dim=1)
        num_inside += int(torch.count_nonzero(inside))
        reals_inside[rows] |= (distances <= fake_radii[None, columns]).any(dim=1)
    return fakes_inside.cpu().numpy(), reals_inside.cpu().numpy(), covered.cpu().numpy(), num_inside


def _squared_radii(features: np.ndarray, centre: np.ndarray, k: int, device: str | torch.device) -> torch.Tensor:
    """Return the squared distance of each sample to its k-th nearest other, [N]; the sample itself is the nearest."""
    nearest = torch.full([len(features), k + 1], torch.inf, dtype=torch.float64, device=device)

    def consider(rows: slice, distances: torch.Tensor) -> None:
        candidates = distances.topk(min(k + 1, distances.shape[1]), dim=1, largest=False).values
        candidates = torch.cat([nearest[rows], candidates], dim=1)
        nearest[rows] = candidates.topk(k + 1, dim=1, largest=False).values

    for rows, columns, distances in _squared_distances(features, features, centre, device, upper=True):
        consider(rows, distances)
        if columns != rows:  # the tile below the diagonal is this one's transpose
            consider(columns, distances.T)
    return nearest.amax(dim=1)


def _squared_distances(
    x: np.ndarray, y: np.ndarray, centre: np.ndarray, device: str | torch.device, upper: bool = False
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield tiles of the matrix of squared distances: (rows of x, rows of y, float64 tensor).

    Args:
        x, y: features, shapes [N, F] and [M, F].
        centre: a point [F] that is subtracted first.
        device: where the distances are computed.
        upper: leave out the tiles below the diagonal.
    """

    def part(features: np.ndarray, first: int) -> tuple[slice, torch.Tensor, torch.Tensor]:
        chosen = slice(first, min(first + _TILE, len(features)))
        values = torch.from_numpy(features[chosen] - centre).to(device)  # float64, as the centre is
        return chosen, values, values.square().sum(dim=1, keepdim=True)

    for i in range(0, len(x), _TILE):
        rows, a, a_norms = part(x, i)
        # One product gives |a|^2 + |b|^2 - 2 a.b without passing over the large tile again.
        left = torch.cat([-2 * a, a_norms, torch.ones_like(a_norms)], dim=1)
        for j in range(i if upper else 0, len(y), _TILE):
            columns, b, b_norms = part(y, j)
            distances = left @ torch.cat([b, torch.ones_like(b_norms), b_norms], dim=1).T
            # Equal samples must be at distance 0, or collapsed sets would be judged by rounding noise.
            noise = 1e-12 * float(a_norms.max() + b_norms.max())
            yield rows, columns, torch.threshold_(distances, noise, 0.0)
