"""Distances and statistics against golden values of the public tools, and against cases worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from di_refine import metrics
from di_refine.errors import InputError
from di_refine.metrics import distances
from di_refine.metrics.distances import squared_mmd
from di_refine.metrics.statistics import FeatureMoments, FeatureStatistics, moments

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "expected.npz") as archive:
        return {key: archive[key] for key in archive.files}


@pytest.fixture(scope="module")
def features():
    with np.load(GOLDEN / "features.npz") as archive:
        return archive["real"], archive["gen"]


@pytest.fixture(scope="module")
def probs():
    with np.load(GOLDEN / "features.npz") as archive:
        logits = archive["is_logits_int8"].astype(np.float64) * json.loads(str(archive["meta"][0]))["logit_scale"]
        exps = np.exp(logits - logits.max(axis=1, keepdims=True))
        result = exps / exps.sum(axis=1, keepdims=True)
        np.testing.assert_array_equal(result[:2].astype(np.float32), archive["probs_head"])
    return result


# Frechet distance


@pytest.mark.parametrize("ddof, key", [(0, "over_n"), (1, "over_nm1")])
def test_moments(features, expected, ddof, key):
    for name, values in zip(("real", "gen"), features):
        mu, sigma = moments(values, ddof)
        np.testing.assert_allclose(mu, expected[f"mean_{name}"], rtol=0, atol=1e-14)
        np.testing.assert_allclose(sigma, expected[f"cov_{key}_{name}"], rtol=0, atol=1e-13)


@pytest.mark.parametrize("ddof, key", [(0, "fid_nvlabs_ada"), (1, "fid_edm")])
def test_frechet_golden(features, expected, ddof, key):
    real, gen = features
    value = metrics.frechet_distance(*moments(real, ddof), *moments(gen, ddof))
    assert value == pytest.approx(float(expected[key]), rel=1e-8)
    few = metrics.frechet_distance(*moments(real[:40], ddof), *moments(gen[:40], ddof))
    assert few == pytest.approx(float(expected[f"{key}_rank_deficient"]), rel=1e-6)
    reverse = metrics.frechet_distance(*moments(gen[:40], ddof), *moments(real[:40], ddof))
    assert reverse == pytest.approx(few, rel=1e-12)


def test_frechet_of_equals_is_zero(features):
    for count in (40, 600):
        gaussian = moments(features[0][:count])
        assert 0 <= metrics.frechet_distance(*gaussian, *gaussian) < 1e-10


def test_frechet_by_hand():
    # Commuting covariances: sum of (sqrt(a) - sqrt(b))^2 plus the squared shift.
    value = metrics.frechet_distance([1.0, 0.0], np.diag([4.0, 9.0]), [0.0, 2.0], np.diag([1.0, 25.0]))
    assert value == pytest.approx(1 + 4 + 1 + 4)
    # Orthogonal directions: the covariances have no common direction, nothing overlaps.
    assert metrics.frechet_distance([0, 0], np.diag([4, 0]), [0, 0], np.diag([0, 9])) == pytest.approx(13)
    assert metrics.frechet_distance([0, 3], np.zeros([2, 2]), [4, 0], np.zeros([2, 2])) == 25


def test_frechet_of_constant_features(features):
    """A collapsed generator leaves nothing but rounding in its covariance, positive or negative."""
    mu, sigma = moments(features[0])
    stream = FeatureMoments()
    for _ in range(7):
        stream.append(np.repeat(features[1][:1], 43, axis=0))
    want = np.sum((mu - features[1][0]) ** 2) + np.trace(sigma)
    assert metrics.frechet_distance(mu, sigma, *stream.moments()) == pytest.approx(want, rel=1e-6)
    rounding = -1e-16 * np.eye(64)
    assert metrics.frechet_distance(mu, sigma, features[1][0], rounding) == pytest.approx(want, rel=1e-6)


def test_frechet_tolerates_float32_statistics(features):
    real, gen = (moments(values) for values in features)
    exact = metrics.frechet_distance(*real, *gen)
    rounded = metrics.frechet_distance(*(x.astype(np.float32) for x in real), *(x.astype(np.float32) for x in gen))
    assert rounded == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda mu, sigma: (mu[:-1], sigma[:-1, :-1]), "different networks"),
        (lambda mu, sigma: (mu[:-1], sigma), "expected mean"),
        (lambda mu, sigma: (mu * np.nan, sigma), "not finite"),
        (lambda mu, sigma: (mu, sigma + np.inf), "not finite"),
        (lambda mu, sigma: (mu, np.triu(sigma)), "not symmetric"),
        (lambda mu, sigma: (mu, sigma - 2 * np.eye(len(mu))), "may not be negative"),
    ],
)
def test_frechet_refuses(change, words):
    mu, sigma = np.zeros(3), np.eye(3) + 0.5
    with pytest.raises(InputError, match=words):
        metrics.frechet_distance(mu, sigma, *change(mu, sigma))


# Kernel distance


@pytest.mark.parametrize("case", ["kid_subsets", "kid_full"])
def test_squared_mmd_golden(features, expected, case):
    real, gen = features
    values = [
        squared_mmd(real[i], gen[j]) for i, j in zip(expected[f"{case}_index_real"], expected[f"{case}_index_gen"])
    ]
    np.testing.assert_allclose(values, expected[f"{case}_per_subset_float64"], rtol=0, atol=1e-13)
    assert np.mean(values) == pytest.approx(float(expected[f"{case}_float64"]), abs=1e-13)


def test_kernel_distance_draws(features, expected):
    real, gen = features
    # A subset as large as the smaller set is that whole set: with equal sizes only one value is possible.
    whole = metrics.kernel_distance(real[:500], gen, num_subsets=2)
    assert whole == pytest.approx(squared_mmd(real[:500], gen), abs=1e-12)
    value = metrics.kernel_distance(real, gen, num_subsets=50, max_subset_size=200)
    assert value == metrics.kernel_distance(real, gen, num_subsets=50, max_subset_size=200, seed=0)
    assert value != metrics.kernel_distance(real, gen, num_subsets=50, max_subset_size=200, seed=1)
    assert value == pytest.approx(float(expected["kid_full_float64"]), abs=0.002)


def test_kernel_distance_refuses(features):
    real, gen = features
    with pytest.raises(InputError, match=r"\[600, 64\] and \[500, 63\]"):
        metrics.kernel_distance(real, gen[:, 1:])
    with pytest.raises(InputError, match="at least 2 fake"):
        metrics.kernel_distance(real, gen[:1])
    with pytest.raises(InputError, match="not finite"):
        metrics.kernel_distance(real, np.full_like(gen, np.inf))
    with pytest.raises(InputError, match="subset"):
        metrics.kernel_distance(real, gen, num_subsets=0)


# Precision, recall, density, coverage


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_golden(features, expected, k):
    precision, recall = metrics.precision_recall(*features, k=k)
    assert precision == float(expected[f"precision_k{k}_float64"])
    assert recall == float(expected[f"recall_k{k}_float64"])


def test_manifold_golden(features, expected, monkeypatch):
    monkeypatch.setattr(distances, "_TILE", 70)
    real, gen = features
    gen_inside, real_inside, _, _ = distances._hits(real, gen, 3, "cpu")
    np.testing.assert_array_equal(gen_inside, expected["precision_k3_hits"])
    np.testing.assert_array_equal(real_inside, expected["recall_k3_hits"])
    for name, values in (("precision", real), ("recall", gen)):
        radii = distances._squared_radii(values, values.mean(axis=0), 3, "cpu").sqrt()
        np.testing.assert_allclose(radii, expected[f"{name}_k3_radii"], rtol=1e-5)


def test_density_coverage_by_definition(features):
    real, gen = (values[:150].astype(np.float64) for values in features)
    between = np.linalg.norm(real[:, None] - gen[None], axis=2)
    radii = np.sort(np.linalg.norm(real[:, None] - real[None], axis=2), axis=1)[:, 3]
    inside = between <= radii[:, None]
    density, coverage = metrics.density_coverage(real, gen, k=3)
    assert density == pytest.approx(inside.sum() / (3 * len(gen)), abs=1e-15)
    assert coverage == pytest.approx(inside.any(axis=1).mean(), abs=1e-15)


def test_manifold_by_hand():
    real = np.array([[0.0], [1], [2], [3]])
    fake = np.array([[3.0], [4], [5.5], [7]])  # radii for k=1: real 1 1 1 1, fake 1 1 1.5 1.5
    assert metrics.precision_recall(real, fake, k=1) == (0.5, 0.5)
    # Balls reach 3 (from 2 and 3) and 4 (from 3): 3 hits of 4 fakes; balls of 2 and 3 are covered.
    assert metrics.density_coverage(real, fake, k=1) == (0.75, 0.5)


def test_collapsed_sets_are_judged_exactly():
    # Far from the origin, |x|^2 + |y|^2 - 2 x.y leaves rounding noise where the distance is 0.
    point = 1000 + np.random.default_rng(0).random([1, 64])
    modes = np.repeat(np.random.default_rng(1).random([3, 64]), 50, axis=0)
    assert distances._squared_radii(modes, modes.mean(axis=0), 3, "cpu").tolist() == [0.0] * 150
    same, other = np.repeat(point, 30, axis=0), np.repeat(point + 1e-3, 30, axis=0)
    assert metrics.precision_recall(same, same) == (1.0, 1.0)
    assert metrics.precision_recall(same, other) == (0.0, 0.0)
    assert metrics.density_coverage(same, same) == (10.0, 1.0)
    assert metrics.kernel_distance(same, same) == pytest.approx(0.0, abs=1e4)  # of kernel values near 1e18: float64


def test_precision_recall_refuses(features):
    real, gen = features
    with pytest.raises(InputError, match="at least 4 fake"):
        metrics.precision_recall(real, gen[:3])
    with pytest.raises(InputError, match="neighbours"):
        metrics.precision_recall(real, gen, k=0)
    with pytest.raises(InputError, match="not finite"):
        metrics.density_coverage(np.full_like(real, np.nan), gen)


# Inception score


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_golden(probs, expected, splits):
    mean, std = metrics.inception_score(probs, num_splits=splits)
    assert mean == pytest.approx(float(expected[f"is_splits{splits}_mean_float64"]), rel=1e-12)
    assert std == pytest.approx(float(expected[f"is_splits{splits}_std_float64"]), rel=1e-12, abs=1e-12)


def test_inception_score_by_hand():
    assert metrics.inception_score(np.eye(5), num_splits=1) == pytest.approx((5.0, 0.0))  # exact zeros are fine
    assert metrics.inception_score(np.full([20, 4], 0.25)) == pytest.approx((1.0, 0.0))


def test_inception_score_refuses(probs):
    with pytest.raises(InputError, match="10 splits"):
        metrics.inception_score(probs[:9])
    for bad in (probs * 2, -probs, probs * np.nan):
        with pytest.raises(InputError, match="probabilities"):
            metrics.inception_score(bad)


# Streaming statistics


def test_stream_equals_moments(features):
    real, _ = features
    stream = FeatureMoments(keep=250)
    for batch in np.split(real, [1, 100, 301]):
        stream.append(batch)
    for ddof in (0, 1):
        for got, want in zip(stream.moments(ddof), moments(real, ddof)):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(stream.features, real[:250])


def test_merge_equals_one_stream(features):
    real, _ = features
    whole, parts = FeatureMoments(keep=400), [FeatureMoments(keep=400) for _ in range(3)]
    whole.append(real)
    for part, batch in zip(parts, np.split(real, [200, 350])):
        part.append(torch.from_numpy(batch))
    merged = FeatureMoments(keep=400)
    for part in (FeatureMoments(), *parts):
        merged.merge(part.cpu())
    assert merged.count == 600
    for got, want in zip(merged.moments(), whole.moments()):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(merged.features, whole.features)


def test_stream_refuses(features):
    stream = FeatureMoments()
    with pytest.raises(InputError, match="more than 1"):
        stream.moments()
    stream.append(features[0][:1])
    with pytest.raises(InputError, match="more than 1 images, got 1"):
        stream.moments()
    with pytest.raises(InputError, match=r"\[N, 64\]"):
        stream.append(np.zeros([2, 3]))
    with pytest.raises(InputError, match="N > 1"):
        moments(features[0][:1])


# Statistics files


def test_statistics_round_trip(features, tmp_path):
    stream = FeatureMoments(keep=1000)
    stream.append(features[0])
    identity = {"detector": "digits", "detector_hash": "0123456789abcdef", "resolution": 16}
    saved = stream.statistics(**identity)
    saved.save(tmp_path / "a.npz")
    loaded = FeatureStatistics.load(tmp_path / "a.npz")
    assert loaded.identity == identity and loaded.count == 600 and loaded.feature_dim == 64
    np.testing.assert_array_equal(loaded.mu, saved.mu)
    np.testing.assert_array_equal(loaded.sigma, saved.sigma)
    np.testing.assert_array_equal(loaded.features, features[0])
    saved.save(tmp_path / "b.npz", features_dtype="float16")
    np.testing.assert_allclose(FeatureStatistics.load(tmp_path / "b.npz").features, features[0], rtol=1e-3, atol=1e-6)
    stream.append(features[1])  # more than are kept: an incomplete set of features must not be stored
    assert stream.statistics().features is None
    with pytest.raises(ValueError, match="detectr"):
        stream.statistics(detectr="x")


def test_official_layout_loads(features, tmp_path):
    mu, sigma = moments(features[0])
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    loaded = FeatureStatistics.load(tmp_path / "ref.npz")
    assert loaded.count is None and loaded.identity == {} and loaded.features is None
    np.testing.assert_array_equal(loaded.sigma, sigma)


def test_statistics_refuse(tmp_path):
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    np.savez(tmp_path / "more.npz", mu=np.zeros(3), sigma=np.eye(3), features=np.zeros([5, 4]))
    np.savez(tmp_path / "object.npz", mu=np.array([None]), sigma=np.eye(1))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("mu sigma")
    whole = tmp_path / "cut.npz"
    np.savez(whole, mu=np.zeros(30), sigma=np.eye(30))
    whole.write_bytes(whole.read_bytes()[:-200])
    for name, words in {
        "none": "no such",
        "half.npz": "lacks sigma; it holds mu",
        "odd.npz": "do not fit",
        "nan.npz": "not finite",
        "more.npz": "features",
        "object.npz": "not a readable",
        "array.npy": "not a readable",
        "text.npz": "not a readable",
        "cut.npz": "not a readable",
    }.items():
        with pytest.raises(InputError, match=f"{name}: .*{words}"):
            FeatureStatistics.load(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mu": np.array(["a", "b", "c"])}, "mu holds no numbers, but <U1"),
        ({"mu": np.zeros(3, complex)}, "mu holds no numbers, but complex128"),
        ({"mu": np.zeros([1, 3])}, "do not fit together"),
        ({"mu": np.zeros(0), "sigma": np.zeros([0, 0])}, "do not fit together"),
        ({"sigma": np.full([3, 3], 1e200)}, "not finite, or beyond 1e"),
        ({"sigma": np.triu(np.ones([3, 3]))}, "sigma is no covariance"),
        ({"features": np.full([2, 3], "a")}, "features holds no numbers"),
        ({"features": np.full([2, 3], np.inf)}, "features hold values that are not finite"),
        ({"count": np.zeros(3, int)}, r"count is no positive whole number, but int64 \[3\]"),
        ({"count": np.array("many")}, "count is no positive whole number, but <U4 many"),
        ({"count": np.array(-1)}, "count is no positive whole number"),
        ({"resolution": np.array("x")}, "resolution is no positive whole number"),
        ({"detector": np.array(["a", "b"])}, "detector is no text"),
        ({"detector": np.array([1 << 31], "u4").view("U1")}, "detector is no text"),
    ],
)
def test_statistics_of_other_kinds_are_refused(tmp_path, change, words):
    np.savez(tmp_path / "x.npz", **({"mu": np.zeros(3), "sigma": np.eye(3)} | change))
    with pytest.raises(InputError, match=f"x.npz: .*{words}"):
        FeatureStatistics.load(tmp_path / "x.npz")
