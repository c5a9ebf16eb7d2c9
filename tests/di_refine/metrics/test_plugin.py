"""Feature networks from a user's Python file."""

import numpy as np
import pytest
import torch

from di_refine.errors import InputError
from di_refine.metrics.detectors import load_detector
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.path_length import Perceptual

PLUGIN = """
import torch

class Mean(torch.nn.Module):
    name, input_size, resize = "my net", 8, "antialiased-bicubic"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full([3], SCALE))

    def forward(self, images):
        assert images.dtype == torch.float32 and images.shape[1:] == (3, 8, 8)
        return images.mean(dim=[2, 3]) * self.scale

    def logits(self, features):
        return features[:, :2]

def detector():
    return Mean()
"""


@pytest.fixture
def plugin(tmp_path):
    def plugin(text=PLUGIN, scale="1.0"):
        path = tmp_path / "plugin.py"
        path.write_text(text.replace("SCALE", scale))
        return path

    return plugin


def test_plugin(plugin):
    detector = load_detector(plugin(), allow_code=True)
    identity = detector.identity.as_dict()
    assert len(identity.pop("hash")) == 16
    assert identity == {
        "name": "my-net",
        "input_size": 8,
        "resize": "antialiased-bicubic",
        "feature_dim": 3,
        "num_classes": 2,
    }
    images = torch.randint(0, 256, [4, 3, 8, 8], dtype=torch.uint8)
    features, probs = detector(images)
    torch.testing.assert_close(features, images.float().mean(dim=[2, 3]))
    torch.testing.assert_close(probs, features[:, :2].softmax(dim=1))
    flat = torch.full([1, 1, 20, 20], 255, dtype=torch.uint8)  # greyscale, another size
    torch.testing.assert_close(detector(flat)[0], torch.full([1, 3], 255.0))
    edge = torch.zeros([1, 3, 32, 32], dtype=torch.uint8)
    edge[..., 16:] = 255
    assert detector._prepare(edge).min() >= 0 and detector._prepare(edge).max() <= 255  # bicubic overshoots


def test_hash_covers_code_and_weights(plugin):
    hashes = [
        load_detector(path(), allow_code=True).identity.hash
        for path in (plugin, lambda: plugin(scale="1.5"), lambda: plugin(PLUGIN + "\n"), plugin)
    ]
    assert len(set(hashes)) == 3 and hashes[0] == hashes[3]


def test_hash_covers_weights_from_elsewhere(plugin, tmp_path):
    text = PLUGIN.replace("torch.full([3], SCALE)", f"torch.load('{tmp_path}/w.pt')")
    hashes = []
    for value in (1.0, 2.0):
        torch.save(torch.full([3], value), tmp_path / "w.pt")
        hashes.append(load_detector(plugin(text), allow_code=True).identity.hash)
    assert hashes[0] != hashes[1]


def test_plugin_measures(plugin, tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3))
    evaluator = Evaluator("fd1k_full@my-net", tmp_path / "ref.npz", plugin(), allow_code=True)

    def sampler(first, count, seed):
        return torch.full([count, 3, 8, 8], 2, dtype=torch.uint8), None

    sampler.num_channels, sampler.resolution, sampler.label_dim, sampler.num_images = 3, 8, 0, None
    sampler.law = None
    (result,) = evaluator(sampler)
    assert result.value == pytest.approx(3 * 2**2 + 3) and result.detector.name == "my-net"


def test_plugin_as_perceptual_network(plugin):
    perceptual = Perceptual(plugin(), allow_code=True)
    images = torch.rand([2, 3, 8, 8]) * 255
    torch.testing.assert_close(perceptual(images), images.mean(dim=[2, 3]))
    assert not perceptual.is_lpips


@pytest.mark.parametrize(
    "change, words",
    [
        (("def detector", "def something"), "no attribute 'detector'"),
        (('"antialiased-bicubic"', '"nearest"'), "resize='nearest'"),
        (("8, ", "None, "), "input_size=None"),
        (("return images.mean(dim=[2, 3])", "return images.mean(dim=3)"), "must match|features have shape"),
        (("* self.scale", "* self.nothing"), "nothing"),
        (("import torch", "import nothing_of_this_name"), "nothing_of_this_name"),
        (("import torch", "import torch ("), "invalid syntax"),
    ],
)
def test_plugin_is_refused(plugin, change, words):
    with pytest.raises(InputError, match=f"plugin.py: not a feature network plug-in.*({words})"):
        load_detector(plugin(PLUGIN.replace(*change)), allow_code=True)
