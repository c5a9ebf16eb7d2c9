"""Reference statistics: kept in the cache under what they depend on, remade when damaged, safe among several runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from PIL import Image

from di_refine.errors import InputError
from di_refine.files.datasets import ImageDataset
from di_refine.metrics.detectors import load_detector
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.parallel import Ranks
from di_refine.metrics.references import cache_path, reference_statistics
from di_refine.metrics.small import SmallConvNet, save_small
from di_refine.metrics.sources import ImageSampler
from di_refine.metrics.statistics import FeatureStatistics


def write_images(folder: Path, count: int, size: int = 16):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, [size, size], np.uint8)).save(folder / f"{i:03d}.png")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images, a feature network, and an empty cache folder."""
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    save_small(SmallConvNet(16, 1, classes=4, width=4, feature_dim=8), tmp_path / "toy.safetensors", "toy")
    write_images(tmp_path / "data", 40)
    return tmp_path


class Counted:
    """A feature network that counts the images it sees."""

    def __init__(self, path):
        self.net, self.seen = load_detector(path), 0
        self.net.net.register_forward_hook(self._count)

    def _count(self, module, inputs, output):
        self.seen += len(output)

    def statistics(self, dataset, **options) -> FeatureStatistics:
        return reference_statistics(dataset, self.net, cache=True, **options)


def test_second_run_reads_the_cache(folder):
    toy, dataset = Counted(folder / "toy.safetensors"), ImageDataset(folder / "data")
    first = toy.statistics(dataset, keep_features=True)
    assert toy.seen == 40
    for keep in (True, False):  # features that are there do not hurt
        again = toy.statistics(dataset, keep_features=keep)
        np.testing.assert_array_equal(again.mu, first.mu)
        np.testing.assert_array_equal(again.sigma, first.sigma)
        np.testing.assert_array_equal(again.features, first.features)
        assert again.identity == first.identity and again.count == 40
    assert toy.seen == 40
    reference_statistics(dataset, toy.net)
    assert toy.seen == 80  # the cache was not asked for
    values = [Evaluator("kd1k_full@toy", dataset, toy.net, cache=cache).references["toy"].mu for cache in (True, False)]
    assert toy.seen == 120
    np.testing.assert_array_equal(*values)


def test_moments_do_not_serve_where_features_are_needed(folder):
    toy, dataset = Counted(folder / "toy.safetensors"), ImageDataset(folder / "data")
    assert toy.statistics(dataset, keep_features=False).features is None
    assert toy.statistics(dataset, keep_features=True).features.shape == (40, 8) and toy.seen == 80
    assert len(list((folder / "cache" / "statistics").iterdir())) == 2


def test_key_covers_everything(folder):
    toy, dataset = load_detector(folder / "toy.safetensors").identity, ImageDataset(folder / "data")
    paths = [cache_path(dataset, toy, False), cache_path(ImageDataset(folder / "data", mirror=True), toy, False)]
    torch.manual_seed(1)
    save_small(SmallConvNet(16, 1, classes=4, width=4, feature_dim=8), folder / "other.safetensors", "toy")
    paths.append(cache_path(dataset, load_detector(folder / "other.safetensors").identity, False))
    (folder / "data" / "039.png").write_bytes((folder / "data" / "038.png").read_bytes())
    paths.append(cache_path(ImageDataset(folder / "data"), toy, False))
    assert len(set(paths)) == 4
    # The folder's name is not part of the content.
    (folder / "data").rename(folder / "renamed")
    assert cache_path(ImageDataset(folder / "renamed"), toy, False) == paths[3]


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip(content: bytes) -> bytes:
    middle = content.index(b"NUMPY") + 300  # inside the numbers of the first array
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda content: b"", lambda content: b"no archive"])
def test_damaged_cache_is_made_anew(folder, damage, capfd):
    toy, dataset = Counted(folder / "toy.safetensors"), ImageDataset(folder / "data")
    first = toy.statistics(dataset)
    (path,) = (folder / "cache" / "statistics").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again = toy.statistics(dataset)
    assert toy.seen == 80 and "cached statistics are damaged" in capfd.readouterr().err
    np.testing.assert_array_equal(again.sigma, first.sigma)
    toy.statistics(dataset)
    assert toy.seen == 80 and path.read_bytes() == whole


def test_statistics_of_something_else_are_made_anew(folder, capfd):
    toy, dataset = Counted(folder / "toy.safetensors"), ImageDataset(folder / "data")
    statistics = toy.statistics(dataset)
    (path,) = (folder / "cache" / "statistics").iterdir()
    statistics.identity["dataset_hash"] = "0" * 16
    statistics.save(path)
    toy.statistics(dataset)
    assert toy.seen == 80 and "belong to something else" in capfd.readouterr().err


def test_cache_that_cannot_be_written(folder, capfd):
    (folder / "cache").write_text("a file where the folder should be")
    toy = Counted(folder / "toy.safetensors")
    assert toy.statistics(ImageDataset(folder / "data")).count == 40
    assert "cannot keep reference statistics" in capfd.readouterr().err


def test_concurrent_runs(folder, tmp_path):
    script = f"""
import json, torch
torch.set_num_threads(1)
from di_refine.files.datasets import ImageDataset
from di_refine.metrics.references import reference_statistics
for _ in range(5):
    data = ImageDataset("{folder}/data")
    statistics = reference_statistics(data, "{folder}/toy.safetensors", cache=True, keep_features=True)
    import shutil; shutil.rmtree("{folder}/cache/statistics", ignore_errors=True)
print(json.dumps(statistics.mu.tolist()))
"""
    (tmp_path / "script.py").write_text(script)
    processes = [ranks.Forked([str(tmp_path / "script.py")], {}) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    mu, other = (json.loads(out) for out, _ in outputs)
    assert mu == other
    assert not list(folder.glob("cache/**/*.tmp"))


def test_reference_of_one_image(folder):
    write_images(folder / "one", 1)
    with pytest.raises(InputError, match="at least 2 images, it has 1"):
        reference_statistics(ImageDataset(folder / "one"), folder / "toy.safetensors")


@pytest.mark.parametrize("workers", [1, 3])
def test_images_are_decoded_ahead(folder, workers):
    dataset = ImageDataset(folder / "data")
    sampler = ImageSampler(dataset, workers)
    want = torch.from_numpy(dataset.decode_all())
    parts = [sampler(first, min(16, 40 - first), 0)[0] for first in range(0, 40, 16)]
    assert torch.equal(torch.cat(parts), want)
    assert torch.equal(sampler(5, 3, 0)[0], want[5:8])  # out of turn
    (folder / "data" / "020.png").write_bytes(b"\x89PNG")
    assert torch.equal(sampler(0, 20, 0)[0], want[:20])  # what comes after is none of its business
    with pytest.raises(InputError, match="020.png"):
        sampler(20, 20, 0)


def test_batches_of_large_pictures_are_smaller():
    for resolution, batch in ((32, 128), (1024, 128), (4096, 10), (100_000, 1)):
        assert Ranks.fitting(128, SimpleNamespace(num_channels=3, resolution=resolution)) == batch
