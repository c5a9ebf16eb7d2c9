"""The augmentation pipe against recorded draws, images and labels."""

import pytest
import torch
from golden_io import assert_close, cases, load_npz

from di_refine.edm.augment import AugmentPipe
from di_refine.errors import InputError

CASES = cases("edm/augment.npz")[0]["cases"]
OPS = {"xflip": 1, "yflip": 1, "rotate_int": 2, "translate_int": 2, "scale": 1, "rotate_frac": 2, "aniso": 2}
OPS |= {"translate_frac": 2, "brightness": 1, "contrast": 1, "lumaflip": 1, "hue": 2, "saturation": 1}


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    case, a = CASES[name], load_npz("edm/augment.npz")
    images = torch.from_numpy(a[f"images_{case['images']}_uint8"]) / 127.5 - 1
    draws = iter([torch.from_numpy(a[f"{name}_draw{k:02d}"]) for k in range(len(case["draw_kinds"]))])
    pipe = AugmentPipe(**case["kwargs"])
    out, labels = pipe(images, draws=draws)
    assert next(draws, None) is None
    assert pipe.label_dim == case["label_dim"]
    torch.testing.assert_close(out, torch.from_numpy(a[f"{name}_out"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(labels, torch.from_numpy(a[f"{name}_labels"]), atol=1e-6, rtol=0)


def test_nothing_happens_at_probability_zero():
    images = torch.rand(3, 3, 12, 16) * 2 - 1
    pipe = AugmentPipe(p=0, **{op: 1 for op in OPS if op != "rotate_int"})
    out, labels = pipe(images)
    assert labels.shape == (3, pipe.label_dim)
    assert not labels.any()
    assert_close(out, images, 2e-2)  # the wavelet filters reconstruct almost, not quite
    out, labels = AugmentPipe(p=1)(images)
    assert torch.equal(out, images)
    assert labels.shape == (3, 0)


@pytest.mark.parametrize("op", OPS)
def test_single_channel(op):
    torch.manual_seed(0)
    pipe = AugmentPipe(**{op: 1})
    out, labels = pipe(torch.rand(8, 1, 16, 16))
    assert out.shape == (8, 1, 16, 16)
    assert labels.shape == (8, OPS[op]) and pipe.label_dim == OPS[op]
    assert torch.isfinite(out).all() and labels.any()


def test_grey_pixels_are_treated_as_grey_rgb():
    images = torch.rand(6, 1, 8, 8)
    pipe = AugmentPipe(brightness=1, contrast=1, lumaflip=1)
    grey, _ = pipe(images, generator=torch.Generator().manual_seed(3))
    colour, _ = pipe(images.expand(-1, 3, -1, -1), generator=torch.Generator().manual_seed(3))
    assert_close(grey.expand(-1, 3, -1, -1), colour, 1e-6)


def test_generator_decides_everything():
    images = torch.rand(4, 3, 16, 16)
    pipe = AugmentPipe.edm(p=1)
    first = pipe(images, generator=torch.Generator().manual_seed(1))
    again = pipe(images, generator=torch.Generator().manual_seed(1))
    other = pipe(images, generator=torch.Generator().manual_seed(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert not torch.equal(first[0], other[0])


def test_refusals():
    with pytest.raises(InputError, match="rotate_int"):
        AugmentPipe(rotate_int=1)(torch.zeros(1, 3, 8, 16))
    with pytest.raises(InputError, match="channels"):
        AugmentPipe(hue=1)(torch.zeros(1, 2, 8, 8))
