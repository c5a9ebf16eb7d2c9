"""The bridge: linear, differentiable, and the same resampling as Pillow's and so `dataset_tool.py`'s."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from di_refine.bridge import FILTERS, LUMA, Bridge, resize_matrix
from di_refine.errors import InputError

SHAPES = [(1, 8, 1, 16), (1, 16, 1, 6), (3, 12, 3, 8), (1, 8, 3, 8), (3, 8, 1, 8), (1, 10, 3, 7), (3, 9, 1, 14)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))


def images(channels: int, resolution: int, count: int = 2, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, resolution, resolution, generator=rng, dtype=dtype) * 2 - 1


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype(shape, dtype):
    out = Bridge(*shape)(images(*shape[:2], dtype=dtype))
    assert out.shape == (2, shape[2], shape[3], shape[3]) and out.dtype == dtype


@pytest.mark.parametrize("channels", [1, 3])
def test_identity_returns_its_input(channels):
    bridge, x = Bridge(channels, 8, channels, 8), images(channels, 8)
    assert bridge.is_identity and bridge(x) is x
    assert not Bridge(channels, 8, 4 - channels, 8).is_identity and not Bridge(channels, 8, channels, 9).is_identity


@shapes
def test_linear(shape):
    bridge = Bridge(*shape)
    x, y = images(*shape[:2]), images(*shape[:2], seed=1)
    torch.testing.assert_close(bridge(2 * x - 3 * y), 2 * bridge(x) - 3 * bridge(y), rtol=0, atol=1e-12)
    assert torch.equal(bridge(torch.zeros_like(x)), torch.zeros_like(bridge(x)))


@shapes
def test_first_and_second_derivatives(shape):
    bridge = Bridge(*shape)
    x = images(*shape[:2], count=1).requires_grad_()
    assert torch.autograd.gradcheck(bridge, x)
    assert torch.autograd.gradgradcheck(bridge, x)


def test_derivatives_pass_through_what_follows():
    """Second derivatives of a curved function of bridged images, as a gradient penalty takes them."""
    bridge = Bridge(1, 6, 3, 4)
    x = images(1, 6, count=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: (bridge(x) ** 3).sum(), x)


@pytest.mark.parametrize("resize_filter", FILTERS)
@pytest.mark.parametrize("size, new_size", [(32, 8), (8, 32), (16, 11)])
def test_resampling_is_pillows(resize_filter, size, new_size):
    """In floating point to rounding; of 8-bit images within the level that Pillow's two roundings can make."""
    x = images(1, size, count=1, dtype=torch.float32)
    bridged = Bridge(1, size, 1, new_size, resize_filter)(x)[0, 0].numpy()
    method = Image.Resampling[resize_filter.upper()]
    expected = np.asarray(Image.fromarray(x[0, 0].numpy()).resize((new_size, new_size), method))
    assert np.abs(bridged - expected).max() < 2e-6

    smooth = np.add.outer(np.arange(size), np.arange(size)) * (200 / (2 * size)) + 30  # so that nothing is clipped
    pixels = np.rint(smooth).astype(np.uint8)
    x = torch.from_numpy(pixels).float()[None, None]
    bridged = Bridge(1, size, 1, new_size, resize_filter)(x)[0, 0].numpy()
    eight_bit = np.asarray(Image.fromarray(pixels).resize((new_size, new_size), method)).astype(float)
    assert np.abs(bridged - eight_bit).max() <= 1.01


def test_grey_is_pillows():
    rgb = np.random.default_rng(0).integers(0, 256, [8, 8, 3], np.uint8)
    x = torch.from_numpy(rgb).permute(2, 0, 1)[None].double()
    grey = np.asarray(Image.fromarray(rgb).convert("L")).astype(float)
    assert np.abs(Bridge(3, 8, 1, 8)(x)[0, 0].numpy() - grey).max() < 0.51
    assert sum(LUMA) == pytest.approx(1, abs=1e-12)


def test_grey_to_colour_and_back_is_nothing():
    x = images(1, 8, dtype=torch.float32)
    colour = Bridge(1, 8, 3, 8)(x)
    assert torch.equal(colour, torch.cat([x, x, x], dim=1))
    torch.testing.assert_close(Bridge(3, 8, 1, 8)(colour), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("resize_filter", [None, "bilinear", "box"])
@pytest.mark.parametrize("size, new_size", [(32, 8), (8, 32), (24, 10), (32, 64)])
def test_range(resize_filter, size, new_size):
    """Flat images stay what they are; a hard edge overshoots a little, without negative weights not at all."""
    bridge = Bridge(1, size, 1, new_size, resize_filter)
    flat = torch.full([1, 1, size, size], 0.7, dtype=torch.float64)
    assert (bridge(flat) - 0.7).abs().max() < 1e-6
    steps = torch.ones(size, size).tril().double() * 2 - 1  # every row is a step from 1 to -1, each elsewhere
    edges = steps[:, None, None, :].expand(size, 1, size, size)
    overshoot = bridge(edges).abs().max().item() - 1
    assert overshoot < 1e-6 if resize_filter else 0.05 < overshoot < (0.17 if new_size < size else 0.23)


def test_default_filters():
    x = images(1, 16)
    assert torch.equal(Bridge(1, 16, 1, 7)(x), Bridge(1, 16, 1, 7, "lanczos")(x))
    assert torch.equal(Bridge(1, 16, 1, 20)(x), Bridge(1, 16, 1, 20, "bicubic")(x))


def test_shrinking_does_not_alias():
    """Stripes finer than the new pixels become grey, not stripes of another width."""
    stripes = torch.ones(1, 1, 32, 32, dtype=torch.float64)
    stripes[..., ::2] = -1
    aliased = stripes[..., ::3, ::3]
    assert aliased.std() > 0.9
    assert Bridge(1, 32, 1, 11)(stripes)[..., 2:-2, 2:-2].abs().max() < 0.05


def test_rows_sum_to_one():
    for resize_filter in FILTERS:
        rows = resize_matrix(24, 10, resize_filter).double().sum(dim=1)
        torch.testing.assert_close(rows, torch.ones(10, dtype=torch.float64), rtol=0, atol=1e-6)


def test_autocast_does_not_round():
    bridge, x = Bridge(3, 16, 1, 8), images(3, 16, dtype=torch.float32)
    plain = bridge(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bridge(x), plain)


def test_copies_and_state():
    """It has nothing to save, and a state without it is complete."""
    bridge, x = Bridge(3, 16, 1, 8), images(3, 16)
    assert bridge.state_dict() == {} and not list(bridge.parameters())
    assert torch.equal(copy.deepcopy(bridge)(x), bridge(x))
    assert "3x16x16 -> 1x8x8" in repr(bridge)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((2, 8, 1, 8), "`network` has images of 2 channels"),
        ((1, 8, 4, 8), "`teacher` has images of 4 channels"),
        ((1, 0, 1, 8), "`network` has images of 0 pixels"),
    ],
)
def test_bad_sizes(arguments, words):
    with pytest.raises(InputError, match=words):
        Bridge(*arguments)


def test_bad_calls():
    with pytest.raises(ValueError, match="unknown resize filter 'sinc'; known are lanczos"):
        Bridge(1, 8, 1, 4, "sinc")
    for shape in ([2, 3, 8, 8], [2, 1, 8, 9], [1, 8, 8]):
        with pytest.raises(AssertionError, match="expected a tensor of shape"):
            Bridge(1, 8, 1, 4)(torch.zeros(shape))
