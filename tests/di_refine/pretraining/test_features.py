"""Training a small classifier for its features: that it learns, repeats, stops and goes on, and refuses bad input."""

import numpy as np
import pytest
import torch

from di_refine import metrics
from di_refine.errors import InputError, RunError
from di_refine.pretraining.features import AUGMENTATIONS, train_features


@pytest.fixture(scope="module")
def digits():
    """1,797 handwritten digits, uint8 [N, 1, 16, 16], and their classes."""
    data = pytest.importorskip("sklearn.datasets", reason="needs the optional package sklearn").load_digits()
    images = data.images.repeat(2, axis=1).repeat(2, axis=2)
    return np.round(images * 255 / 16).astype(np.uint8)[:, None], data.target


@pytest.fixture(scope="module")
def trained(digits):
    losses = []
    images, labels = digits
    net, report = train_features(
        images, labels, epochs=6, width=16, progress=lambda done, total, loss: losses.append((done, total, loss))
    )
    return net, report, losses


def test_training_learns(trained):
    net, report, losses = trained
    assert report["held_out_accuracy"] > 0.93 and report["held_out_images"] == 179
    assert [done for done, *_ in losses] == [1, 2, 3, 4, 5, 6] and losses[-1][2] < losses[0][2] / 2
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())


def test_features_measure_damage(digits, trained):
    """The Frechet distance between features grows with noise, blur and missing classes; halves of one set are near."""
    images, labels = digits
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    detector = torch.from_numpy(images[order]), labels[order]

    def gaussian(pixels):
        with torch.no_grad():
            return metrics.moments(trained[0](pixels).numpy())

    whole = gaussian(detector[0])
    near = metrics.frechet_distance(*gaussian(detector[0][:900]), *gaussian(detector[0][900:]))
    noisy = [
        metrics.frechet_distance(*whole, *gaussian((detector[0] + scale * torch.randn(detector[0].shape)).clip(0, 255)))
        for scale in (10, 40, 160)
    ]
    missing = metrics.frechet_distance(*whole, *gaussian(detector[0][torch.from_numpy(detector[1] != 3)]))
    assert near < 0.5 and noisy[0] < noisy[1] < noisy[2] and noisy[2] > 10 * near and missing > 3 * near


def test_training_is_reproducible(digits):
    images, labels = (values[:200] for values in digits)
    first, again, other = (train_features(images, labels, epochs=1, width=4, seed=seed)[0] for seed in (0, 0, 1))
    for a, b in zip(first.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_training_leaves_the_global_seed_alone(digits):
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    train_features(digits[0][:40], digits[1][:40], epochs=1, width=4)
    assert torch.equal(torch.rand(2), want)


def test_a_residual_net_learns_and_is_judged_by_what_is_given(digits):
    images, labels = digits
    net, report = train_features(
        images[200:],
        labels[200:],
        held_out=(images[:200], labels[:200]),
        architecture="residual",
        augment="shift",
        width=8,
        epochs=3,
        precision="bf16",
    )
    assert report["held_out_accuracy"] > 0.8 and report["held_out_images"] == 200
    assert report["training_images"] == len(images) - 200
    with torch.no_grad():
        right = (net.logits(net(torch.from_numpy(images[:200]))).argmax(dim=1).numpy() == labels[:200]).mean()
    assert right == pytest.approx(report["held_out_accuracy"])


def test_a_stop_of_the_training_changes_nothing(digits, tmp_path):
    images, labels = (values[:100] for values in digits)
    settings = {"architecture": "residual", "augment": "shift", "width": 4, "epochs": 3, "mirror": True}
    whole, report = train_features(images, labels, **settings)
    state = tmp_path / "state.pt"
    for done in (1, 2):
        net, partial = train_features(images, labels, **settings, state=state, max_seconds=0)
        assert net is None and partial == {"epochs": 3, "epochs_done": done} and state.is_file()
    with pytest.raises(InputError, match="other options"):
        train_features(images, labels, **{**settings, "epochs": 4}, state=state)
    parts, again = train_features(images, labels, **settings, state=state, max_seconds=0)
    assert again == report and not state.exists()
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values()):
        assert torch.equal(a, b)


def test_shift_moves_and_flips_whole_pixels():
    images = torch.arange(2 * 16 * 16, dtype=torch.float32).reshape(1, 2, 16, 16).repeat(200, 1, 1, 1)
    shifted = AUGMENTATIONS["shift"](images, True, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[:1], [2, 2, 2, 2], mode="reflect")
    crops = {}
    for row in range(5):
        for column in range(5):
            crop = padded[0, :, row : row + 16, column : column + 16]
            crops[row, column, False], crops[row, column, True] = crop, crop.flip(2)
    found = {next(key for key, crop in crops.items() if torch.equal(crop, image)) for image in shifted}
    assert len(found) > 45 and not torch.equal(shifted, images)
    plain = AUGMENTATIONS["shift"](images, False, torch.Generator().manual_seed(0))
    assert all(any(torch.equal(crops[r, c, False], image) for r in range(5) for c in range(5)) for image in plain)


def test_training_refuses(digits):
    images, labels = (values[:60] for values in digits)
    with pytest.raises(InputError, match="uint8 images"):
        train_features(images.astype(np.float32), labels)
    with pytest.raises(InputError, match="one class number per image"):
        train_features(images, labels[:-1])
    with pytest.raises(InputError, match="at least 20"):
        train_features(images[:19], labels[:19])
    with pytest.raises(RunError, match="lower lr"):
        train_features(images, labels, epochs=2, width=4, lr=1e30)
