"""Named metrics: names, checks before any work, results, files."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import ranks
import torch
from PIL import Image

from di_refine import metrics
from di_refine.errors import InputError, RunError
from di_refine.files.datasets import ImageDataset
from di_refine.metrics import evaluate
from di_refine.metrics.detectors import load_detector
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.feature_net import FeatureNet, Identity
from di_refine.metrics.kinds import KINDS, parse_metric, parse_metrics
from di_refine.metrics.references import reference_statistics
from di_refine.metrics.results import write_jsonl
from di_refine.metrics.small import SmallConvNet, save_small
from di_refine.metrics.statistics import FeatureStatistics

ALL = ["fd1k_full@toy", "fd2k_full@toy", "kd1k_full@toy", "pr1k3_full@toy", "dc1k3_full@toy", "is1k@toy", "acc2k@toy"]


class Sampler:
    """Random images that depend on index and seed alone."""

    resolution, num_channels, label_dim, num_images, law = 16, 1, 4, None, None

    def __init__(self, mean=140):
        self.mean = mean
        self.calls = []

    def __call__(self, first_index, count, seed):
        self.calls.append((first_index, count))
        rngs = [np.random.default_rng([seed, index]) for index in range(first_index, first_index + count)]
        images = np.stack([rng.normal(self.mean, 40, [1, 16, 16]).clip(0, 255).astype(np.uint8) for rng in rngs])
        labels = torch.eye(4)[[int(rng.integers(4)) for rng in rngs]]
        return torch.from_numpy(images), labels


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A feature network, a data set of 60 images, and the data set's statistics with and without features."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    save_small(SmallConvNet(16, 1, classes=4, width=4, feature_dim=8), folder / "toy.safetensors", "toy")
    (folder / "data").mkdir()
    for i, image in enumerate(Sampler(mean=120)(0, 60, seed=5)[0]):
        Image.fromarray(image[0].numpy()).save(folder / "data" / f"{i:03d}.png")
    statistics = reference_statistics(ImageDataset(folder / "data"), folder / "toy.safetensors")
    statistics.save(folder / "stats.npz")
    np.savez(folder / "moments.npz", mu=statistics.mu, sigma=statistics.sigma)
    return folder


@pytest.fixture(scope="module")
def evaluator(folder):
    return Evaluator(ALL, reference=folder / "stats.npz", detector=folder / "toy.safetensors", batch=100)


def test_all_metrics_in_one_pass(folder, evaluator):
    sampler, seen = Sampler(), []
    results = evaluator(sampler, seed=3, progress=seen.append)
    assert sampler.calls == [(i, 100) for i in range(0, 2000, 100)] and sum(seen) == 2000
    assert [result.name for result in results] == ALL

    net = load_detector(folder / "toy.safetensors")
    images, labels = Sampler()(0, 2000, seed=3)
    features, probs = (values.numpy() for values in net(images))
    reference = FeatureStatistics.load(folder / "stats.npz")
    target = (reference.mu, reference.sigma)
    want = {
        "fd1k_full@toy": metrics.frechet_distance(*target, *metrics.moments(features[:1000])),
        "fd2k_full@toy": metrics.frechet_distance(*target, *metrics.moments(features)),
        "kd1k_full@toy": metrics.kernel_distance(reference.features, features[:1000], seed=3),
        "pr1k3_full@toy": metrics.precision_recall(reference.features, features[:1000]),
        "dc1k3_full@toy": metrics.density_coverage(reference.features, features[:1000]),
        "is1k@toy": metrics.inception_score(probs[:1000]),
        "acc2k@toy": float((probs.argmax(axis=1) == labels.numpy().argmax(axis=1)).mean()),
    }
    for result in results:
        assert result.value == pytest.approx(want[result.name], rel=1e-5, abs=1e-7), result.name
        assert result.seed == 3 and result.resolution == 16 and result.detector.name == "toy"
        assert result.num_images == (2000 if "2k" in result.name else 1000)
    assert results[0].reference["count"] == 60 and results[0].reference["dataset"] == "data"
    assert results[-1].reference == {}


def test_any_number_of_images(folder, evaluator):
    net = load_detector(folder / "toy.safetensors")
    some = Evaluator(
        "fd437_full@toy,fd_all@toy,acc_all@toy,kd99_full@toy", reference=folder / "stats.npz", detector=net
    )
    reference = FeatureStatistics.load(folder / "stats.npz")
    features = net(Sampler()(0, 437, seed=0)[0])[0].numpy()
    expected = {
        count: metrics.frechet_distance(reference.mu, reference.sigma, *metrics.moments(features[:count]))
        for count in (60, 437)
    }
    # Of a generator, which has no end, as many as the reference has.
    results = some(Sampler())
    assert [result.num_images for result in results] == [437, 60, 60, 99] and some.num_images(Sampler()) == 437
    assert results[0].value == pytest.approx(expected[437], rel=1e-5)
    assert results[1].value == pytest.approx(expected[60], rel=1e-5)
    assert "kd99_full@toy: its subsets are of 60 images instead of 1,000" in "".join(some.warnings)
    finite = Sampler()
    finite.num_images = 437
    assert some(finite)[1].num_images == 437
    nowhere = Evaluator("acc_all@toy", detector=net)
    with pytest.raises(InputError, match="acc_all@toy takes as many images as the reference has, which no reference"):
        nowhere(Sampler())


def test_batch_size_does_not_matter(folder, evaluator):
    other = copy.copy(evaluator)
    other.batch = 333
    for a, b in zip(evaluator(Sampler()), other(Sampler())):
        assert a.value == pytest.approx(b.value, rel=1e-5, abs=1e-7), a.name
    assert evaluator(Sampler(), seed=1)[0].value != evaluator(Sampler(), seed=2)[0].value


def test_reference_from_data(folder, evaluator):
    net = load_detector(folder / "toy.safetensors")
    dataset = ImageDataset(folder / "data")
    statistics = reference_statistics(dataset, net, batch=7)
    stored = FeatureStatistics.load(folder / "stats.npz")
    np.testing.assert_allclose(statistics.mu, stored.mu, atol=1e-7)
    np.testing.assert_allclose(statistics.features, stored.features, atol=1e-6)
    assert statistics.identity == stored.identity
    assert statistics.identity["detector_hash"] == net.identity.hash and statistics.identity["resolution"] == 16
    want = [result.value for result in evaluator(Sampler())]
    # The moments alone do not serve every metric; the data set, next in the list, does.
    for reference in (dataset, folder / "data", [folder / "moments.npz", folder / "data"]):
        results = Evaluator(ALL, reference=reference, detector=net)(Sampler())
        for result, value in zip(results, want):
            assert result.value == pytest.approx(value, rel=1e-5, abs=1e-7), result.name


def test_official_statistics_suffice_for_frechet(folder, evaluator):
    official = Evaluator("fd1k_full@toy", reference=folder / "moments.npz", detector=folder / "toy.safetensors")
    assert official(Sampler())[0].value == pytest.approx(evaluator(Sampler())[0].value, rel=1e-9)


def test_two_processes_agree_with_one(folder, tmp_path):
    """Each process takes half of the batches; 1k metrics end inside the first half's images."""
    script = f"""
import sys, json, torch
sys.path[:0] = {sys.path!r}
sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
from test_evaluate import ALL, Evaluator, Sampler
torch.set_num_threads(1)
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/rendezvous", rank=rank, world_size=2)
reference, detector = "{folder}/data", "{folder}/toy.safetensors"
evaluator = Evaluator(ALL, reference, detector, batch=100, cache=False, distributed=True)
sampler = Sampler()
results = evaluator(sampler)
print(json.dumps([[list(r.values.values()), r.num_gpus, len(sampler.calls)] for r in results]))
"""
    (tmp_path / "script.py").write_text(script)
    processes = [ranks.Forked([str(tmp_path / "script.py"), str(rank)], {}) for rank in range(2)]
    outputs = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert outputs[0] == outputs[1]
    alone = Evaluator(ALL, folder / "data", folder / "toy.safetensors", batch=100, cache=False)
    for (values, num_gpus, calls), want in zip(outputs[0], alone(Sampler())):
        # Same features bit by bit; only the order of float64 sums differs.
        assert values == pytest.approx(list(want.values.values()), rel=1e-12, abs=1e-14)
        assert (num_gpus, calls) == (2, 10)


def test_failure_of_the_first_process_reaches_all(folder, tmp_path):
    script = f"""
import sys, torch
sys.path[:0] = {sys.path!r}
from di_refine.errors import InputError
from di_refine.metrics.parallel import Ranks
torch.distributed.init_process_group(
    "gloo", init_method="file://{tmp_path}/rendezvous", rank=int(sys.argv[1]), world_size=2
)
def fail():
    raise InputError("nothing fits")
try:
    Ranks(distributed=True).on_first(fail)
except InputError as error:
    print(error)
"""
    (tmp_path / "script.py").write_text(script)
    processes = [ranks.Forked([str(tmp_path / "script.py"), str(rank)], {}) for rank in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == ["nothing fits"] * 2


def test_rank_deficiency_is_said(folder, evaluator):
    assert [warning.split(":")[0] for warning in evaluator.warnings] == ["kd1k_full@toy"]
    identity = Identity("wide", "0" * 16, 16, "internal", 2048, None)

    class Wide(torch.nn.Module):
        def forward(self, images):
            return images.float().flatten(1).repeat(1, 8)

    wide = FeatureNet(Wide(), identity, 1)
    np.savez(folder / "many.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (warning,) = Evaluator("fd1k_full@wide,fd3k_full@wide", folder / "many.npz", wide).warnings
    assert "fd1k_full@wide: 1000 images leave the covariance of 2048 features rank-deficient" in warning
    warnings = Evaluator("fd3k_full@wide", ImageDataset(folder / "data"), wide, cache=False).warnings
    assert len(warnings) == 1 and "the reference has 60 images for 2048 features" in warnings[0]


def test_jsonl(evaluator, tmp_path):
    results = {result.name: result for result in evaluator(Sampler())}
    result = results["pr1k3_full@toy"]
    write_jsonl(tmp_path, result, tmp_path / "network-snapshot-000010.pkl")
    write_jsonl(tmp_path, result)
    lines = (tmp_path / "metric-pr1k3_full@toy.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert list(first)[:7] == [
        "results",
        "metric",
        "total_time",
        "total_time_str",
        "num_gpus",
        "snapshot_pkl",
        "timestamp",
    ]
    assert first["results"] == {
        "pr1k3_full@toy_precision": result.value[0],
        "pr1k3_full@toy_recall": result.value[1],
    }
    assert first["snapshot_pkl"] == "network-snapshot-000010.pkl" and second["snapshot_pkl"] is None
    assert first["detector"]["hash"] == result.detector.hash and first["reference"]["count"] == 60
    write_jsonl(tmp_path, results["fd1k_full@toy"], "relative.pkl")
    line = json.loads((tmp_path / "metric-fd1k_full@toy.jsonl").read_text())
    assert line["results"] == {"fd1k_full@toy": results["fd1k_full@toy"].value}
    assert line["snapshot_pkl"] == "relative.pkl"


# Names


def test_names():
    spec = parse_metric("fid50k_full")
    assert (spec.kind.name, spec.num_images, spec.detector) == ("fid", 50_000, None)
    assert parse_metric("pr50k3_full").result_keys == ("pr50k3_full_precision", "pr50k3_full_recall")
    assert parse_metric("is50k").result_keys == ("is50k_mean", "is50k_std")
    spec = parse_metric("dc5k3_full")
    assert (spec.kind.name, spec.detector) == ("dc", None)
    for name, count, detector in [
        ("ppl2_wend", 50_000, None),
        ("ppl5k_wend", 5000, None),
        ("ppl2_wend@a", 50_000, "a"),
    ]:
        spec = parse_metric(name)
        assert (spec.name, spec.kind.name, spec.num_images, spec.detector) == (name, "ppl", count, detector)
        assert spec.result_keys == (name,) and not spec.higher_is_better
    spec = parse_metric("kd5k_full@my-net_2.0")
    assert (spec.kind.name, spec.num_images, spec.detector) == ("kd", 5000, "my-net_2.0")
    for name, kind, count in [("fd437_full@a", "fd", 437), ("pr437_3_full", "pr", 437), ("acc12@a", "acc", 12)]:
        assert (parse_metric(name).kind.name, parse_metric(name).num_images) == (kind, count)
    for name in ("fd_all@a", "fid_all", "pr_all", "is_all", "acc_all@a"):
        assert parse_metric(name).num_images == 0 and parse_metric(name).kind.name == name.partition("_")[0]
    assert [spec.name for spec in parse_metrics("is2k, fid2k_full,is2k,")] == ["is2k", "fid2k_full"]
    assert {name for name, kind in KINDS.items() if kind.higher_is_better} == {"is", "pr", "dc", "acc"}


def test_names_and_formulas_come_without_pytorch():
    """Commands print their help before anything slow is imported."""
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
import di_refine.metrics.kinds, di_refine.metrics.config
print([name for name in ("torch", "numpy", "PIL") if name in sys.modules])
from di_refine import metrics
print(sorted(name for name in metrics.__all__ if not callable(getattr(metrics, name))))
"""
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert completed.stdout.splitlines() == ["[]", "[]"], completed.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = metrics.nothing


@pytest.mark.parametrize(
    "name, words",
    [
        ("fid", "unknown metric 'fid'; known are fid<N>k_full"),
        ("fid50k", "unknown metric"),
        ("fid2000full", "unknown metric"),
        ("fd_all_full@a", "unknown metric"),
        ("pr4373_full", "unknown metric"),
        ("ppl_all", "no end of paths"),
        ("fd1_full@a", "asks for 1 images, and takes at least 2"),
        ("pr50k_full", "unknown metric"),
        ("ppl50k_full", "unknown metric"),
        ("ppl2_zend", "unknown metric"),
        ("fd2k_full@", "unknown metric"),
        ("fd2k_full@a/b", "unknown metric"),
        ("fid0k_full", "asks for no images"),
        ("fd2k_full", "name its feature network, as in fd2k_full@digits"),
        ("acc2k", "name its feature network"),
        ("fid2k_full@digits", "2015 Inception network; with another one write fd2k_full@digits"),
        ("kid5k_full@digits", "write kd5k_full@digits"),
        ("", "names no metric"),
    ],
)
def test_bad_names(name, words):
    with pytest.raises(InputError, match=words):
        parse_metrics(name)


# Everything is checked before the first image


def refused(words, *args, **kwargs):
    with pytest.raises(InputError, match=words):
        Evaluator(*args, **kwargs)


def test_references_are_checked(folder, tmp_path):
    toy = folder / "toy.safetensors"
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    statistics = FeatureStatistics.load(folder / "stats.npz")
    statistics.identity["detector_hash"] = "0" * 16
    statistics.save(tmp_path / "foreign.npz")
    (tmp_path / "empty").mkdir()
    refused("fd1k_full@toy needs a reference; give `ref`", "fd1k_full@toy", detector=toy)
    refused(
        "holds 2048 features of an unnamed network, but toy has 8",
        "fd1k_full@toy",
        tmp_path / "wide.npz",
        detector=toy,
    )
    refused("another network", "fd1k_full@toy", tmp_path / "foreign.npz", detector=toy)
    refused("only mean and covariance", "kd1k_full@toy", folder / "moments.npz", detector=toy)
    refused("ref=.*nothing.npz", "fd1k_full@toy", tmp_path / "nothing.npz", detector=toy)
    refused("`ref`: .*empty holds no images", "fd1k_full@toy", tmp_path / "empty", detector=toy)


def test_detectors_are_checked(folder, tmp_path):
    toy, stats = folder / "toy.safetensors", folder / "stats.npz"
    refused("`detector` is called toy, and .* fd2k_full@toy", "fid1k_full", stats, detector=toy)
    refused("`detector` is called toy, and no metric uses it", "fd1k_full@digits", stats, detector=toy)
    refused("nobody", "fd1k_full@nobody", stats)
    identity = Identity("plain", "0" * 16, 16, "internal", 8, None)
    plain = FeatureNet(torch.nn.Flatten(), identity, 1)
    refused("needs class probabilities", "is1k@plain", detector=plain)


def test_offline_is_said_at_once(folder, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    refused("detector.*pt_inception", "fid5k_full", folder / "moments.npz")


def test_references_are_made_after_the_checks(folder, monkeypatch):
    """A mistake in what is to be measured must not come to light after 50,000 reference images."""
    evaluator = Evaluator("fd2k_full@toy", folder / "data", folder / "toy.safetensors")
    monkeypatch.setattr(evaluate, "reference_statistics", None)
    sampler = Sampler()
    for sampler.resolution in (32, 16):
        with pytest.raises((InputError, TypeError)) as caught:
            evaluator(sampler)
        assert ("resolution 16, these have 32" in str(caught.value)) == (sampler.resolution == 32)


def test_samplers_are_checked(folder, evaluator):
    for attribute, value, words in [
        (
            "num_images",
            1999,
            "fd2k_full@toy needs 2000 images and there are 1999; make more, or measure all .* with fd_all@toy",
        ),
        ("num_images", 12, "there are 12; make more"),
        ("num_channels", 3, "toy takes images with 1 channel"),
        ("resolution", 32, "resolution 16, these have 32"),
        ("label_dim", 0, "acc2k@toy compares"),
    ]:
        sampler = Sampler()
        setattr(sampler, attribute, value)
        with pytest.raises(InputError, match=words):
            evaluator(sampler)
        assert sampler.calls == []


def test_not_finite_features_are_reported(folder, evaluator):
    broken = copy.copy(evaluator)
    net = copy.copy(evaluator.detectors["toy"])
    net.net = lambda images: torch.where(images.flatten(1)[:, :8] == 77, torch.nan, 0.0)
    broken.detectors = {"toy": net}

    def sampler(first_index, count, seed):
        images, labels = Sampler()(first_index, count, seed)
        images[images == 77] = 78
        if first_index <= 321 < first_index + count:
            images[321 - first_index, 0, 0, 0] = 77
        return images, labels

    for name in ("resolution", "num_channels", "label_dim", "num_images", "law"):
        setattr(sampler, name, getattr(Sampler, name))
    with pytest.raises(RunError, match="toy gave values that are not finite for image 321"):
        broken(sampler)


def test_collapsed_generator_is_measured(evaluator):
    """A generator that makes one image over and over gets bad numbers, not an error."""

    class Collapsed(Sampler):
        def __call__(self, first_index, count, seed):
            return torch.full([count, 1, 16, 16], 9, dtype=torch.uint8), torch.eye(4)[[0] * count]

    values = {result.name: result.value for result in evaluator(Collapsed())}
    assert all(np.isfinite(value).all() for value in values.values())
    assert values["is1k@toy"] == pytest.approx((1.0, 0.0)) and values["acc2k@toy"] in (0.0, 1.0)
    assert values["pr1k3_full@toy"][1] == 0.0


def test_real_inception_is_required(folder, tmp_path, monkeypatch):
    """A file under the real network's name but with another content is not trusted."""
    identity = Identity("pt_inception-2015-12-05-6726825d", "0" * 16, 299, "tf1-bilinear", 2048, 1008)
    fake = FeatureNet(torch.nn.Flatten(), identity, 3)
    monkeypatch.setattr(evaluate, "load_detector", lambda *args: fake)
    refused("needs the 2015 Inception network, but the content", "is1k")
