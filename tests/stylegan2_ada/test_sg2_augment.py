"""The augmentation pipe against golden images, its own distributions, and finite differences."""

import math

import pytest
import torch
from golden_io import assert_close, cases, load_npz

from stylegan2_ada.augment import PRESETS, AugmentPipe

GOLDEN = "stylegan2/augment.npz"
CASES = {case["case"]: case for case in cases(GOLDEN) if "kwargs" in case}
GEOMETRIC = {"xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac"}


def golden(name):
    return torch.from_numpy(load_npz(GOLDEN)[name].copy())


def image_batch(num=2, channels=3, size=16, dtype=torch.float32, seed=0):
    return torch.rand([num, channels, size, size], generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def test_buffers():
    pipe = AugmentPipe()
    assert pipe.p == 1 and set(pipe.state_dict()) == {"p", "Hz_geom", "Hz_fbank"}
    for name in ("Hz_geom", "Hz_fbank"):
        assert_close(getattr(pipe, name), golden(f"buffers/{name}"), 1e-7)


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    case = CASES[name]
    tol = 1e-4 if GEOMETRIC & set(case["kwargs"]) else 1e-5
    pipe = AugmentPipe(**case["kwargs"])
    pipe.p.fill_(case["p"])
    x = golden("input/x")
    x = (x[:, 1:2] if case["channels"] == 1 else x).requires_grad_()
    y = pipe(x, debug_percentile=case["debug_percentile"])
    assert_close(y[: case["first_samples"]], golden(f"{name}/y"), tol)
    if "dx" in case["arrays"]:
        (dx,) = torch.autograd.grad(y, x, golden("input/dy"))
        assert_close(dx, golden(f"{name}/dx"), tol)


def test_golden_covers_every_family_but_noise():
    assert len(CASES) == 37
    assert {family for case in CASES.values() for family in case["kwargs"]} == set(PRESETS["bgcfnc"]) - {"noise"}


@pytest.mark.parametrize("name", ["bgc", "filter", "cutout"])
@pytest.mark.parametrize("percentile", [None, 0.7])
def test_differentiable_twice(name, percentile):
    size = 22 if name == "filter" else 5
    x = image_batch(1, 3 if name == "bgc" else 1, size, torch.float64).requires_grad_()
    pipe = AugmentPipe(**PRESETS[name])

    def run(x):
        torch.manual_seed(1)
        return pipe(x, debug_percentile=percentile)

    assert torch.autograd.gradcheck(run, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, x, fast_mode=True)


def test_second_derivative_through_a_nonlinear_critic():
    """What R1 does: the derivative of a gradient norm, against finite differences in a weight."""
    pipe, x = AugmentPipe(**PRESETS["bgc"]), image_batch(size=8, dtype=torch.float64)

    def penalty(weight):
        torch.manual_seed(1)
        images = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad((weight * pipe(images)).tanh().sum(), images, create_graph=True)
        return grad.square().sum()

    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(penalty(weight), weight)
    step = 1e-5
    numeric = (penalty(weight + step) - penalty(weight - step)) / (2 * step)
    assert slope.item() == pytest.approx(numeric.item(), rel=1e-6)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("channels", [1, 3])
def test_presets_run_and_act(name, channels):
    x = image_batch(3, channels, 24)
    torch.manual_seed(0)
    y = AugmentPipe(**PRESETS[name])(x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
    assert (y - x).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["color", "filter", "noise", "cutout"])
def test_p_zero_is_the_identity(name):
    pipe, x = AugmentPipe(**PRESETS[name]), image_batch(3, 3, 24)
    pipe.p.zero_()
    assert_close(pipe(x), x, 1e-6)


def test_p_is_the_share_of_changed_images():
    pipe, x = AugmentPipe(brightness=0.5), torch.zeros([4000, 1, 1, 1])
    pipe.p.fill_(0.6)
    torch.manual_seed(0)
    assert (pipe(x) != 0).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_either_rotation_acts_with_probability_p():
    pipe, x = AugmentPipe(rotate=1), image_batch(1, 1, 4).repeat(3000, 1, 1, 1)
    pipe.p.fill_(0.5)
    torch.manual_seed(0)
    turned = (pipe(x) - x).abs().amax(dim=[1, 2, 3]) > 1e-4
    assert turned.float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_parameter_distributions():
    """Brightness and contrast of a constant image show their random parameters directly."""
    torch.manual_seed(0)
    x = torch.full([4000, 1, 1, 1], 0.5)
    offset = AugmentPipe(brightness=1)(x) - x
    assert offset.mean().item() == pytest.approx(0, abs=0.02) and offset.std().item() == pytest.approx(0.2, rel=0.05)
    octaves = (AugmentPipe(contrast=1)(x) / x).log2()
    assert octaves.mean().item() == pytest.approx(0, abs=0.04) and octaves.std().item() == pytest.approx(0.5, rel=0.05)


def test_noise_strength_at_a_percentile():
    torch.manual_seed(0)
    noise = AugmentPipe(noise=1)(torch.zeros([1, 1, 200, 200]), debug_percentile=0.6)
    expected = torch.erfinv(torch.tensor(0.6)).item() * 0.1
    assert noise.std().item() == pytest.approx(expected, rel=0.02)


def test_whole_pixel_moves_equal_indexing():
    """Integer shifts resample exactly; mirrors only nearly, because the wavelet is not quite symmetric."""
    x = image_batch(2, 3, 16)
    shifted = AugmentPipe(xint=1)(x, debug_percentile=0.999)  # by 2 of 16 pixels
    assert_close(shifted[:, :, 2:, 2:], x[:, :, :-2, :-2], 1e-5)
    x = torch.nn.functional.interpolate(image_batch(2, 3, 4), size=16, mode="bicubic")
    assert_close(AugmentPipe(xflip=1)(x, debug_percentile=0.9), x.flip(3), 0.06)
    assert_close(AugmentPipe(rotate90=1)(x, debug_percentile=0.6), x.flip([2, 3]), 0.06)


def test_sample_does_not_depend_on_its_batch():
    pipe, x = AugmentPipe(**PRESETS["bgcf"]), image_batch(4, 3, 24)
    assert_close(pipe(x, debug_percentile=0.8)[:1], pipe(x[:1], debug_percentile=0.8), 1e-5)


def test_non_square_images():
    x = image_batch(1, 3, 24)[:, :, :, :12]
    for name in ("bgc", "cutout"):
        assert AugmentPipe(**PRESETS[name])(x).shape == x.shape
    shifted = AugmentPipe(xint=1)(x, debug_percentile=0.999)  # 3 of 24 rows, 1.497 of 12 columns
    assert_close(shifted[:, :, 3:, 1:], x[:, :, :-3, :-1], 1e-5)


def test_cutout_size():
    y = AugmentPipe(cutout=1, cutout_size=0.5)(torch.ones([1, 1, 16, 16]), debug_percentile=0.5)
    assert (y == 0).sum() == 64 and (y[0, 0, 4:12, 4:12] == 0).all()


def test_constructs_on_meta():
    with torch.device("meta"):
        pipe = AugmentPipe(**PRESETS["bgcfnc"])
    shapes = {name: list(buffer.shape) for name, buffer in pipe.named_buffers()}
    assert shapes == {"p": [], "Hz_geom": [12], "Hz_fbank": [4, 43]}
    assert all(buffer.is_meta for buffer in pipe.buffers())


def test_filter_bands_sum_to_the_identity():
    identity = torch.zeros(43)
    identity[21] = 1
    torch.testing.assert_close(AugmentPipe().Hz_fbank.sum(0), identity, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "shape", "percentile", "message"),
    [
        ({"hue": 1}, [1, 2, 8, 8], None, "1 or 3 channels"),
        ({"imgfilter": 1}, [1, 3, 21, 21], None, "larger than 21 pixels"),
        ({"xflip": 1}, [1, 3, 8, 8], 1.0, "debug_percentile"),
        ({"xflip": 1}, [3, 8, 8], None, "must be"),
    ],
)
def test_errors(kwargs, shape, percentile, message):
    with pytest.raises(ValueError, match=message):
        AugmentPipe(**kwargs)(torch.zeros(shape), debug_percentile=percentile)


def test_band_count():
    with pytest.raises(ValueError, match="imgfilter_bands"):
        AugmentPipe(imgfilter_bands=[1, 1])


def test_nan_free_at_extreme_draws():
    """Zooming out far beyond one reflection reads black, not garbage."""
    y = AugmentPipe(scale=1, scale_std=10)(torch.ones([1, 1, 8, 8]), debug_percentile=0.01)
    assert y.isfinite().all() and y.abs().max() < 1.5 and math.isclose(y[0, 0, 0, 0].item(), 0, abs_tol=1e-3)


@pytest.mark.gpu
def test_gpu_matches_cpu_without_waiting():
    x = image_batch(4, 3, 32)
    pipe = AugmentPipe(**{**PRESETS["bgcf"], "cutout": 1})
    expected = pipe(x, debug_percentile=0.8)
    x, pipe = x.cuda(), pipe.cuda()
    pipe(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = pipe(x, debug_percentile=0.8)
        pipe(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(y.cpu(), expected, 1e-4)
