"""Adaptive discriminator augmentation: random image transforms that do not leak into the generator.

Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data" (arXiv 2006.06676), appendix B. Every
family of transforms is skipped at random per image, with a probability below one, and that keeps the real distribution
recoverable from the augmented one. All operations are differentiable any number of times, so that an R1 penalty can be
taken through the pipe, and none of them waits for the device.

Shapes: images [N, C, H, W]; geometric maps [N, 3, 3] act on (x, y, 1), colour maps [N, 4, 4] on (r, g, b, 1).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils import persistence
from torch_utils.ops import upfirdn2d

# Low-pass decomposition filter of the symlet with six vanishing moments (Daubechies, Ten Lectures on Wavelets, 1992).
_SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip

# Expected share of an image's power in each band of the filter bank, lowest frequencies first (appendix B).
_BAND_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)

_BLIT: dict[str, float] = {"xflip": 1, "rotate90": 1, "xint": 1}
_GEOM: dict[str, float] = {"scale": 1, "rotate": 1, "aniso": 1, "xfrac": 1}
_COLOR: dict[str, float] = {"brightness": 1, "contrast": 1, "lumaflip": 1, "hue": 1, "saturation": 1}
_FILTER: dict[str, float] = {"imgfilter": 1}
_NOISE: dict[str, float] = {"noise": 1}
_CUTOUT: dict[str, float] = {"cutout": 1}

#: Constructor arguments of `AugmentPipe` by name. In 'bgcfnc' and the like, letters stand for basic presets.
PRESETS: dict[str, dict[str, float]] = {
    "blit": _BLIT,
    "geom": _GEOM,
    "color": _COLOR,
    "filter": _FILTER,
    "noise": _NOISE,
    "cutout": _CUTOUT,
    "bg": {**_BLIT, **_GEOM},
    "bgc": {**_BLIT, **_GEOM, **_COLOR},
    "bgcf": {**_BLIT, **_GEOM, **_COLOR, **_FILTER},
    "bgcfn": {**_BLIT, **_GEOM, **_COLOR, **_FILTER, **_NOISE},
    "bgcfnc": {**_BLIT, **_GEOM, **_COLOR, **_FILTER, **_NOISE, **_CUTOUT},
}


@persistence.persistent_class
class AugmentPipe(torch.nn.Module):
    """The augmentation pipe of StyleGAN2-ADA.

    A family acts on an image with probability `strength * p`. The strength is the argument with the family's name; 0
    switches the family off. `p` is a buffer, initially 1, that adaptive augmentation moves during training.

    Args:
        xflip: mirror horizontally.
        rotate90: rotate by a multiple of 90 degrees.
        xint: translate by whole pixels.
        xint_max: largest such translation, relative to the image size.
        scale: isotropic scaling by `2^N(0, scale_std)`.
        rotate: rotation by up to `rotate_max` half turns, before and after the anisotropic scaling.
        aniso: anisotropic scaling by `2^N(0, aniso_std)` along x and its inverse along y.
        xfrac: translation by `N(0, xfrac_std)` image sizes.
        scale_std, rotate_max, aniso_std, xfrac_std: see above.
        brightness: add `N(0, brightness_std)`.
        contrast: multiply by `2^N(0, contrast_std)`.
        lumaflip: mirror along the luma axis.
        hue: rotate around the luma axis by up to `hue_max` half turns.
        saturation: multiply the chroma by `2^N(0, saturation_std)`.
        brightness_std, contrast_std, hue_max, saturation_std: see above.
        imgfilter: amplify or attenuate four frequency bands.
        imgfilter_bands: strengths of the four bands, lowest frequencies first.
        imgfilter_std: log2 standard deviation of a band's gain.
        noise: add white noise of standard deviation `|N(0, noise_std)|`.
        cutout: blank a random square.
        noise_std: see above.
        cutout_size: side of the square, relative to the image size.
    """

    p: torch.Tensor
    Hz_geom: torch.Tensor
    Hz_fbank: torch.Tensor

    def __init__(
        self,
        xflip: float = 0,
        rotate90: float = 0,
        xint: float = 0,
        xint_max: float = 0.125,
        scale: float = 0,
        rotate: float = 0,
        aniso: float = 0,
        xfrac: float = 0,
        scale_std: float = 0.2,
        rotate_max: float = 1,
        aniso_std: float = 0.2,
        xfrac_std: float = 0.125,
        brightness: float = 0,
        contrast: float = 0,
        lumaflip: float = 0,
        hue: float = 0,
        saturation: float = 0,
        brightness_std: float = 0.2,
        contrast_std: float = 0.5,
        hue_max: float = 1,
        saturation_std: float = 1,
        imgfilter: float = 0,
        imgfilter_bands: Sequence[float] = (1, 1, 1, 1),
        imgfilter_std: float = 1,
        noise: float = 0,
        cutout: float = 0,
        noise_std: float = 0.1,
        cutout_size: float = 0.5,
    ):
        super().__init__()
        if len(imgfilter_bands) != len(_BAND_POWER):
            raise ValueError(f"imgfilter_bands needs {len(_BAND_POWER)} numbers, not {list(imgfilter_bands)}")
        self.xflip, self.rotate90, self.xint, self.xint_max = (
            float(xflip),
            float(rotate90),
            float(xint),
            float(xint_max),
        )
        self.scale, self.scale_std = float(scale), float(scale_std)
        self.rotate, self.rotate_max = float(rotate), float(rotate_max)
        self.aniso, self.aniso_std = float(aniso), float(aniso_std)
        self.xfrac, self.xfrac_std = float(xfrac), float(xfrac_std)
        self.brightness, self.brightness_std = float(brightness), float(brightness_std)
        self.contrast, self.contrast_std = float(contrast), float(contrast_std)
        self.lumaflip = float(lumaflip)
        self.hue, self.hue_max = float(hue), float(hue_max)
        self.saturation, self.saturation_std = float(saturation), float(saturation_std)
        self.imgfilter, self.imgfilter_std = float(imgfilter), float(imgfilter_std)
        self.imgfilter_bands = list(imgfilter_bands)
        self.noise, self.noise_std = float(noise), float(noise_std)
        self.cutout, self.cutout_size = float(cutout), float(cutout_size)
        self.register_buffer("p", torch.ones([]))
        self.register_buffer("Hz_geom", upfirdn2d.setup_filter(_SYM6))
        self.register_buffer("Hz_fbank", torch.as_tensor(filter_bank(), dtype=torch.float32))

    def forward(self, images: torch.Tensor, debug_percentile: float | None = None) -> torch.Tensor:
        """Augment a batch.

        Args:
            images: [N, C, H, W] in -1..1, float32 or float64; C is 1 or 3 if any colour family is on.
            debug_percentile: give every image the same parameters, at this quantile (above 0, below 1) of their
                distributions and regardless of `p`, instead of random ones.

        Returns:
            Augmented images, same shape and dtype.

        Raises:
            ValueError: unfit number of channels, images too small for the image filter, percentile out of range.
        """
        if images.ndim != 4:
            raise ValueError(f"AugmentPipe: images must be [N, C, H, W], not {list(images.shape)}")
        draw = _Draw(images, debug_percentile)
        p = self.p.to(images.dtype)
        maps = self._geometry(draw, p)
        if maps:
            images = _resample(images, functools.reduce(_product, maps), self.Hz_geom)
        colors = self._color(draw, p)
        if colors:
            images = _recolor(images, functools.reduce(_product, reversed(colors)))
        if self.imgfilter > 0:
            images = _filter(images, self._band_gains(draw, p) @ self.Hz_fbank.to(images.dtype))
        if self.noise > 0:
            sigma = draw.gate(draw.half_normal() * self.noise_std, self.noise * p)
            images = images + torch.randn_like(images) * sigma[:, None, None, None]
        if self.cutout > 0:
            images = images * self._cutout_mask(draw, p)
        return images

    def _geometry(self, draw: _Draw, p: torch.Tensor) -> list[torch.Tensor]:
        """Return maps [N, 3, 3] whose product leads from output to input pixels, origin at the image centre."""
        maps = []
        if self.xflip > 0:
            flip = draw.gate(draw.integer(2), self.xflip * p)
            maps.append(_map2d(draw, xx=1 - 2 * flip))
        if self.rotate90 > 0:
            maps.append(_rotation2d(draw, draw.gate(draw.integer(4), self.rotate90 * p) * (math.pi / 2)))
        if self.xint > 0:
            shift = draw.gate(draw.uniform(2) * self.xint_max, self.xint * p)
            maps.append(_map2d(draw, x=-(shift[:, 0] * draw.width).round(), y=-(shift[:, 1] * draw.height).round()))
        if self.scale > 0:
            zoom = draw.gate((draw.normal() * self.scale_std).exp2(), self.scale * p, neutral=1)
            maps.append(_map2d(draw, xx=1 / zoom, yy=1 / zoom))
        if self.rotate > 0:
            # Two rotations, each with the probability that makes at least one of them act as often as asked for.
            either = 1 - (1 - (self.rotate * p).clamp(0, 1)).sqrt()
            before, after = (draw.gate(draw.uniform() * (self.rotate_max * math.pi), either) for _ in range(2))
            maps.append(_rotation2d(draw, before))
        if self.aniso > 0:
            zoom = draw.gate((draw.normal() * self.aniso_std).exp2(), self.aniso * p, neutral=1)
            maps.append(_map2d(draw, xx=1 / zoom, yy=zoom))
        if self.rotate > 0 and draw.percentile is None:
            maps.append(_rotation2d(draw, after))
        if self.xfrac > 0:
            shift = draw.gate(draw.normal(2) * self.xfrac_std, self.xfrac * p)
            maps.append(_map2d(draw, x=-shift[:, 0] * draw.width, y=-shift[:, 1] * draw.height))
        return maps

    def _color(self, draw: _Draw, p: torch.Tensor) -> list[torch.Tensor]:
        """Return maps [N, 4, 4] of colours in the order in which they act."""
        if not any((self.brightness, self.contrast, self.lumaflip, self.hue, self.saturation)):
            return []
        if draw.channels not in (1, 3):
            raise ValueError(f"the colour augmentations need images with 1 or 3 channels, not {draw.channels}")
        eye3 = torch.eye(3, **draw.like)
        homogeneous = [0, 1, 0, 1]
        luma = F.pad(torch.full([3, 3], 1 / 3, **draw.like), homogeneous)  # projection on the axis (1, 1, 1) / sqrt(3)
        cross = F.pad((eye3.roll(1, 0) - eye3.roll(1, 1)) / math.sqrt(3), homogeneous)  # cross product with that axis
        chroma = F.pad(eye3, homogeneous) - luma
        shift = F.pad(torch.ones([3, 1], **draw.like), [3, 0, 0, 1])
        eye = torch.eye(4, **draw.like)
        maps = []
        if self.brightness > 0:
            offset = draw.gate(draw.normal(1, 1) * self.brightness_std, self.brightness * p)
            maps.append(eye + offset * shift)
        if self.contrast > 0:
            gain = draw.gate((draw.normal(1, 1) * self.contrast_std).exp2(), self.contrast * p, neutral=1)
            maps.append(eye + (gain - 1) * (luma + chroma))
        if self.lumaflip > 0:
            flip = draw.gate(draw.integer(2, 1, 1), self.lumaflip * p)
            maps.append(eye - 2 * flip * luma)
        if self.hue > 0 and draw.channels > 1:
            angle = draw.gate(draw.uniform(1, 1) * (self.hue_max * math.pi), self.hue * p)
            maps.append(eye + (angle.cos() - 1) * chroma + angle.sin() * cross)  # Rodrigues' formula
        if self.saturation > 0 and draw.channels > 1:
            gain = draw.gate((draw.normal(1, 1) * self.saturation_std).exp2(), self.saturation * p, neutral=1)
            maps.append(eye + (gain - 1) * chroma)
        return maps

    def _band_gains(self, draw: _Draw, p: torch.Tensor) -> torch.Tensor:
        """Return gains [N, 4] of the frequency bands, balanced to keep an image's expected power."""
        gains = draw.full(1, len(_BAND_POWER))
        for band, strength in enumerate(self.imgfilter_bands):
            if strength > 0:
                own = draw.full(1, len(_BAND_POWER))
                gain = (draw.normal() * self.imgfilter_std).exp2()
                own[:, band] = draw.gate(gain, self.imgfilter * strength * p, neutral=1)
                power = 1 + _BAND_POWER[band] * (own[:, band, None].square() - 1)
                gains = gains * own / power.sqrt()
        return gains

    def _cutout_mask(self, draw: _Draw, p: torch.Tensor) -> torch.Tensor:
        """Return a mask [N, 1, H, W] that is 0 inside the square and 1 elsewhere."""
        half = draw.gate(draw.full(self.cutout_size, 1), self.cutout * p) / 2
        center = (draw.uniform(2) + 1) / 2
        x, y = ((torch.arange(size, **draw.like) + 0.5) / size for size in (draw.width, draw.height))
        outside_x, outside_y = (x - center[:, :1]).abs() >= half, (y - center[:, 1:]).abs() >= half
        return (outside_x[:, None, None, :] | outside_y[:, None, :, None]).to(draw.like["dtype"])


class _Draw:
    """Random parameters, one per image, or the same quantile of each distribution for all images."""

    def __init__(self, images: torch.Tensor, percentile: float | None):
        if percentile is not None and not 0 < percentile < 1:
            raise ValueError(f"debug_percentile must lie strictly between 0 and 1, not {percentile}")
        self.num, self.channels, self.height, self.width = images.shape
        self.like: dict = {"device": images.device, "dtype": images.dtype}
        self.percentile = percentile

    def full(self, value: float, *shape: int) -> torch.Tensor:
        """Return [N, *shape] filled with a number, made on the device: copying a constant there would wait for it."""
        return torch.full([self.num, *shape], value, **self.like)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Draw [N, *shape] uniformly from -1..1."""
        if self.percentile is not None:
            return self.full(2 * self.percentile - 1, *shape)
        return torch.rand([self.num, *shape], **self.like) * 2 - 1

    def integer(self, count: int, *shape: int) -> torch.Tensor:
        """Draw [N, *shape] uniformly from 0, 1, ..., count - 1, as floats."""
        if self.percentile is not None:
            return self.full(math.floor(self.percentile * count), *shape)
        return (torch.rand([self.num, *shape], **self.like) * count).floor()

    def normal(self, *shape: int) -> torch.Tensor:
        """Draw unit normals [N, *shape]. The quantiles lack a factor of sqrt(2), as in the published pipe."""
        if self.percentile is not None:
            return self.full(NormalDist().inv_cdf(self.percentile) / math.sqrt(2), *shape)
        return torch.randn([self.num, *shape], **self.like)

    def half_normal(self) -> torch.Tensor:
        """Draw absolute values [N] of unit normals; the quantiles are as in `normal`."""
        if self.percentile is not None:
            return self.full(NormalDist().inv_cdf((1 + self.percentile) / 2) / math.sqrt(2))
        return torch.randn([self.num], **self.like).abs()

    def gate(self, value: torch.Tensor, probability: torch.Tensor, neutral: float = 0) -> torch.Tensor:
        """Return `value` [N, ...] for a random share of the images, or for all at a percentile, and else `neutral`."""
        if self.percentile is not None:
            return value
        chosen = torch.rand([self.num] + [1] * (value.ndim - 1), **self.like) < probability
        return torch.where(chosen, value, torch.full_like(value, neutral))


def filter_bank() -> np.ndarray:
    """Return the four zero-phase band filters [4, 43] of the image-space filtering, lowest frequencies first.

    H(z)H(1/z)/2, where H is the symlet with two vanishing moments, separates low from high frequencies. The low half is
    cut again with the filters stretched by 2, then by 4. The four bands add up to the identity.
    """
    root = math.sqrt(3)
    sym2 = np.array([1 + root, 3 + root, 3 - root, 1 - root]) / 8  # normalised to sum 1, which absorbs the 1/2
    low = np.convolve(sym2, sym2[::-1])
    high = low * [-1, 1, -1, 1, -1, 1, -1]
    bands: list[np.ndarray] = []
    rest = np.ones(1)  # what the cuts so far have left at the low end
    for octave in range(3):
        bands.insert(0, np.convolve(rest, _stretch(high, 2**octave)))
        rest = np.convolve(rest, _stretch(low, 2**octave))
    bands.insert(0, rest)
    return np.stack([np.pad(band, (len(rest) - len(band)) // 2) for band in bands])


def _stretch(taps: np.ndarray, factor: int) -> np.ndarray:
    """Return the taps of F(z^factor) for those of F(z)."""
    stretched = np.zeros((len(taps) - 1) * factor + 1)
    stretched[::factor] = taps
    return stretched


def _map2d(draw: _Draw, xx=1.0, xy=0.0, x=0.0, yx=0.0, yy=1.0, y=0.0) -> torch.Tensor:
    """Return maps [N, 3, 3] of (u, v) to (xx u + xy v + x, yx u + yy v + y), from numbers or [N] tensors."""
    entries = [xx, xy, x, yx, yy, y, 0.0, 0.0, 1.0]
    entries = [entry if isinstance(entry, torch.Tensor) else draw.full(entry) for entry in entries]
    return torch.stack(entries, dim=1).reshape(-1, 3, 3)


def _rotation2d(draw: _Draw, angle: torch.Tensor) -> torch.Tensor:
    return _map2d(draw, xx=angle.cos(), xy=-angle.sin(), yx=angle.sin(), yy=angle.cos())


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply [N, K, K] maps term by term: a matmul may round to TF32, which shifts pixels visibly."""
    return (a[:, :, :, None] * b[:, None, :, :]).sum(2)


def _resample(images: torch.Tensor, inverse: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Look up every output pixel at its place in the input: reflect padding, 2x wavelet filter, bilinear, and 2x back.

    The padding is all that one reflection yields, size - 1 pixels on each side; beyond it is black. Padding only as far
    as this batch reaches would need a wait for the device and let images influence the borders of their neighbours.

    Args:
        images: [N, C, H, W].
        inverse: [N, 3, 3], from output to input pixels, origin at the image centre.
        taps: low-pass wavelet filter.
    """
    height, width = images.shape[2:]
    reach = len(taps) // 4  # of the filter, in pixels: resample as much more than the image, for the way back
    x = F.pad(images, [width - 1, width - 1, height - 1, height - 1], mode="reflect")
    x = upfirdn2d.upsample2d(x, taps, up=2)
    # Zero-insertion puts pixel i at 2i, not midway between 2i and 2i + 1: u -> 2u - 1/2 in centred coordinates.
    u, v = (
        (torch.arange(2 * (size + 2 * reach), device=x.device, dtype=x.dtype) - (size + 2 * reach) + 1) / 2
        for size in (width, height)
    )
    source = [m[:, 0] * u + m[:, 1] * v[:, None] + m[:, 2] for m in inverse[:, :2, :, None, None].unbind(1)]
    grid = [(2 * position - 0.5) * (2 / size) for position, size in zip(source, (x.shape[3], x.shape[2]))]
    x = _BilinearSample.apply(x, torch.stack(grid, dim=-1))
    return upfirdn2d.downsample2d(x, taps, down=2, padding=-2 * reach, flip_filter=True)


def _sample(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class _BilinearSample(torch.autograd.Function):
    """`grid_sample` that is differentiable any number of times with respect to the image, and not to the grid.

    PyTorch's own backward of `grid_sample` has no derivative. Sampling is linear in the image: its backward pass is the
    transposed map, whose backward pass is sampling again.
    """

    @staticmethod
    def forward(ctx, x, grid):
        ctx.save_for_backward(grid)
        ctx.shape = x.shape
        return _sample(x, grid)

    @staticmethod
    def backward(ctx, dy):
        (grid,) = ctx.saved_tensors
        return _BilinearSampleTransposed.apply(dy, grid, ctx.shape), None


class _BilinearSampleTransposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, grid, shape):
        ctx.save_for_backward(grid)
        with torch.enable_grad():
            x = torch.zeros(shape, device=dy.device, dtype=dy.dtype, requires_grad=True)
            y = _sample(x, grid)
        return torch.autograd.grad(y, x, dy)[0]

    @staticmethod
    def backward(ctx, ddx):
        (grid,) = ctx.saved_tensors
        return _BilinearSample.apply(ddx, grid), None, None


def _recolor(images: torch.Tensor, color: torch.Tensor) -> torch.Tensor:
    """Apply maps [N, 4, 4] to the colours of [N, 3, H, W], or their mean over r, g, b to grey images [N, 1, H, W]."""
    matrix, offset = color[:, :3, :3], color[:, :3, 3:]
    if images.shape[1] == 1:
        matrix, offset = matrix.sum(2, keepdim=True).mean(1, keepdim=True), offset.mean(1, keepdim=True)
    return (matrix @ images.flatten(2) + offset).unflatten(2, images.shape[2:])


def _filter(images: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Filter each image [C, H, W] along both axes with its own symmetric taps [N, K]; borders are reflected."""
    num, channels, height, width = images.shape
    margin = taps.shape[1] // 2
    if min(height, width) <= margin:
        raise ValueError(f"imgfilter needs images larger than {margin} pixels, not {width}x{height}")
    x = F.pad(images, [margin] * 4, mode="reflect").flatten(0, 1)[None]
    taps = taps.repeat_interleave(channels, dim=0)[:, None, None, :]  # every image and channel is a group of its own
    x = F.conv2d(x, taps, groups=num * channels)
    x = F.conv2d(x, taps.transpose(2, 3), groups=num * channels)
    return x.reshape(images.shape)
