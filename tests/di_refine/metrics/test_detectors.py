"""Feature networks: loading, identities, refusals, and training one."""

import hashlib
import json

import pytest
import safetensors.torch
import torch

from di_refine.errors import InputError
from di_refine.metrics import detectors, feature_net
from di_refine.metrics.detectors import load_detector
from di_refine.metrics.inception import InceptionV3
from di_refine.metrics.small import SmallConvNet, SmallResNet, load_small, save_small


@pytest.fixture
def small_file(tmp_path):
    torch.manual_seed(0)
    net = SmallConvNet(resolution=16, channels=1, classes=4, width=4, feature_dim=8).eval()
    save_small(net, tmp_path / "toy.safetensors", "toy", {"held_out_accuracy": 0.5})
    return tmp_path / "toy.safetensors"


class Plain(torch.nn.Module):
    """Features without classes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=[2, 3])


class Published(torch.nn.Module):
    """The calling convention of the published TorchScript files."""

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        features = img.float().mean(dim=[2, 3])
        if return_features:
            return features
        bias = 0.0 if no_output_bias else 50.0
        return torch.softmax(features[:, :2] / 255 + torch.tensor([bias, 0.0]), dim=1)


# Our own classifier


@pytest.mark.parametrize("resolution, channels", [(8, 1), (28, 1), (32, 3), (64, 3)])
def test_small_net_sizes(resolution, channels):
    net = SmallConvNet(resolution, channels, classes=7, width=4, feature_dim=12).eval()
    values = net(torch.randint(0, 256, [2, channels, resolution, resolution], dtype=torch.uint8))
    assert values.shape == (2, 12) and values.abs().max() <= 1 and net.logits(values).shape == (2, 7)


@pytest.mark.parametrize("resolution", [8, 15, 32])
def test_residual_net_sizes(resolution, tmp_path):
    net = SmallResNet(resolution, 3, classes=7, width=4, feature_dim=12).eval()
    pixels = torch.randint(0, 256, [2, 3, resolution, resolution], dtype=torch.uint8)
    values = net(pixels)
    assert values.shape == (2, 12) and values.abs().max() <= 1 and net.logits(values).shape == (2, 7)
    for half, tolerance in [(False, 0), (True, 2e-2)]:
        save_small(net, tmp_path / "net.safetensors", "net", half=half)
        read = load_small(tmp_path / "net.safetensors")[0]
        assert isinstance(read, SmallResNet) and read.head.weight.dtype == torch.float32
        torch.testing.assert_close(read(pixels), values, atol=tolerance, rtol=0)


def test_precision_switches_are_restored(small_file):
    torch.set_float32_matmul_precision("high")
    try:
        load_detector(small_file)(torch.zeros([1, 1, 16, 16], dtype=torch.uint8))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# Files


def test_small_round_trip(small_file):
    net, name, report = load_small(small_file)
    assert name == "toy" and report == {"held_out_accuracy": 0.5} and net.config["feature_dim"] == 8
    images = torch.randint(0, 256, [3, 1, 16, 16], dtype=torch.uint8)
    detector = load_detector(small_file)
    values, probs = detector(images)
    torch.testing.assert_close(values, net(images))
    torch.testing.assert_close(probs, net.logits(net(images)).softmax(dim=1))
    assert values.dtype == torch.float32 and detector(images, probabilities=False)[1] is None
    identity = detector.identity.as_dict()
    assert identity.pop("hash") == hashlib.sha256(small_file.read_bytes()).hexdigest()[:16]
    assert identity == {
        "name": "toy",
        "input_size": 16,
        "resize": "antialiased-bilinear",
        "feature_dim": 8,
        "num_classes": 4,
    }


def test_other_sizes_are_resized(small_file):
    detector = load_detector(small_file)
    images = torch.randint(0, 256, [2, 1, 16, 16], dtype=torch.uint8)
    big = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert detector(big)[0].shape == (2, 8)
    flat = torch.full([1, 1, 64, 64], 99, dtype=torch.uint8)
    torch.testing.assert_close(detector(flat)[0], detector(flat[:, :, :16, :16])[0])


def test_a_name_is_not_enough_to_be_inception(tmp_path):
    net = SmallConvNet(resolution=16, channels=1, classes=4, width=4, feature_dim=8)
    save_small(net, tmp_path / "toy.safetensors", feature_net.INCEPTION)
    assert not load_detector(tmp_path / "toy.safetensors").identity.is_inception


def test_images_need_not_be_rounded(small_file):
    detector = load_detector(small_file)
    images = torch.randint(0, 256, [2, 1, 16, 16], dtype=torch.uint8)
    torch.testing.assert_close(detector.embed(images.float()), detector(images)[0])
    assert not torch.equal(detector.embed(images + 0.25), detector(images)[0])


def test_images_are_checked(small_file):
    detector = load_detector(small_file)
    with pytest.raises(InputError, match="toy takes images with 1 channel"):
        detector(torch.zeros([1, 3, 16, 16], dtype=torch.uint8))
    with pytest.raises(InputError, match="uint8 images"):
        detector(torch.zeros([1, 1, 16, 16]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_torchscript(tmp_path):
    images = torch.randint(0, 256, [4, 3, 8, 8], dtype=torch.uint8)
    torch.jit.script(Plain()).save(tmp_path / "my net.pt")
    detector = load_detector(tmp_path / "my net.pt", allow_code=True)
    assert detector.identity.name == "my-net" and detector.identity.num_classes is None
    values, probs = detector(images)
    torch.testing.assert_close(values, images.float().mean(dim=(2, 3)))
    assert probs is None and detector(images[:, :1])[0].shape == (4, 3)
    torch.jit.script(Published()).save(tmp_path / "inception-2015-12-05.pt")
    detector = load_detector(tmp_path / "inception-2015-12-05.pt", allow_code=True)
    values, probs = detector(images)
    torch.testing.assert_close(values, images.float().mean(dim=(2, 3)))
    torch.testing.assert_close(probs, (values[:, :2] / 255).softmax(dim=1))
    assert not detector.identity.is_inception and detector.identity.name == "inception-2015-12-05-other"


def test_inception_is_known_by_its_content(tmp_path, monkeypatch):
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save(InceptionV3().state_dict(), path)
    detector = load_detector(path)
    assert detector.identity.name == "weights" and not detector.identity.is_inception
    values, probs = detector(torch.zeros([1, 1, 20, 20], dtype=torch.uint8))
    assert values.shape == (1, 2048) and probs.shape == (1, 1008) and probs.sum() == pytest.approx(1, abs=1e-5)
    state = {name: value.contiguous() for name, value in InceptionV3().state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "inception-2015-12-05.safetensors")
    other = load_detector(tmp_path / "inception-2015-12-05.safetensors")
    assert other.identity.name == "inception-2015-12-05-other" and other.identity.num_classes == 1008
    monkeypatch.setattr(detectors, "INCEPTION_FILES", {hashlib.sha256(path.read_bytes()).hexdigest()})
    assert load_detector(path).identity.is_inception


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_files_are_refused(tmp_path, small_file):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save(Plain(), tmp_path / "pickle.pth")
    (tmp_path / "text.pt").write_text("no network")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(small_file.read_bytes()[:-10])
    (tmp_path / "head.safetensors").write_bytes(small_file.read_bytes().replace(b"features 1", b"features 9"))
    (tmp_path / "config.safetensors").write_bytes(small_file.read_bytes().replace(b"feature_dim", b"feature_dix"))
    torch.jit.script(torch.nn.Linear(3, 3)).save(tmp_path / "linear.pt")
    for name in (
        "other.pth",
        "pickle.pth",
        "text.pt",
        "empty.pth",
        "cut.safetensors",
        "head.safetensors",
        "config.safetensors",
        "linear.pt",
    ):
        with pytest.raises(InputError, match=name):
            load_detector(tmp_path / name)


def test_unknown_name_is_refused(tmp_path):
    with pytest.raises(InputError, match="^detector=nowhere"):
        load_detector("nowhere")


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.safetensors", "net.py"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.(script|trace)")
def test_programs_are_not_run_unless_that_is_allowed(tmp_path, name, monkeypatch):
    path = tmp_path / name
    if name.endswith(".py"):
        path.write_text("raise AssertionError('it ran')")
    else:
        torch.jit.script(Plain()).save(path)
        monkeypatch.setattr(torch.jit, "load", None)
    with pytest.raises(InputError, match="is a program .*`allow_code`|cannot be read"):
        load_detector(path)


def test_settings_that_ask_for_more_than_the_file_has_allocate_nothing(small_file, tmp_path):
    with safetensors.safe_open(small_file, framework="pt") as file:
        metadata = file.metadata()
    config = json.dumps({**json.loads(metadata["config"]), "width": 1 << 16, "feature_dim": 1 << 16})
    state = safetensors.torch.load_file(small_file)
    for changed, words in (({"config": config}, "size mismatch"), ({"config": "[" * 9999}, "nests too deeply")):
        safetensors.torch.save_file(state, tmp_path / "x.safetensors", {**metadata, **changed})
        with pytest.raises(InputError, match=f"settings and weights do not fit .*({words})"):
            load_detector(tmp_path / "x.safetensors")
