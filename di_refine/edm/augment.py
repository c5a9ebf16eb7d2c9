"""EDM's non-leaky augmentation (arXiv 2206.00364, appendix F.2; operations from arXiv 2006.06676).

Images are transformed at random and the network is told how, so that at label zero it makes untouched images. All
random numbers and matrices live on the CPU: the device only receives work, and nothing waits for it.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

from di_refine.errors import InputError
from torch_utils import misc

# Decomposition low-pass filter of the 'sym6' wavelet; its sum is sqrt(2).
_SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
_MARGIN = len(_SYM6) // 2  # pixels a resampled image needs around it

_LABELS = {  # operation: number of its labels, in their order
    "xflip": 1,
    "yflip": 1,
    "rotate_int": 2,
    "translate_int": 2,
    "scale": 1,
    "rotate_frac": 2,
    "aniso": 2,
    "translate_frac": 2,
    "brightness": 1,
    "contrast": 1,
    "lumaflip": 1,
    "hue": 2,
    "saturation": 1,
}


class _Draws:
    """Random numbers on the CPU, new ones or those of a recorded list; the last axis is that of the images."""

    def __init__(
        self,
        recorded: Iterable[torch.Tensor] | None,
        generator: torch.Generator | None,
        part: tuple[int, int] | None = None,
    ):
        self.recorded: Iterator[torch.Tensor] | None = None if recorded is None else iter(recorded)
        self.generator, self.part = generator, part

    def _next(self, shape: list[int], make: Callable[..., torch.Tensor]) -> torch.Tensor:
        if self.recorded is None:
            if self.part is None:
                return make(shape, generator=self.generator)
            start, total = self.part
            return make([*shape[:-1], total], generator=self.generator)[..., start : start + shape[-1]]
        return next(self.recorded).to("cpu", torch.float32).reshape(shape)

    def normal(self, *shape: int) -> torch.Tensor:
        return self._next(list(shape), torch.randn)

    def uniform(self, *shape: int) -> torch.Tensor:
        return self._next(list(shape), torch.rand)

    def integer(self, end: int, *shape: int) -> torch.Tensor:
        return self._next(list(shape), lambda shape, generator: torch.randint(end, shape, generator=generator).float())


class AugmentPipe:
    """Random transformations of images, with labels that tell which.

    The argument named like an operation is the multiplier of `p` that gives its probability; operations at 0 are absent
    and have no labels. Labels come in the order of this list.

    Args:
        p: overall probability.
        xflip, yflip: mirror (when applied, with probability one half). Labels: 1 if mirrored.
        rotate_int: rotation by quarter turns. Two labels.
        translate_int: shift by whole pixels, up to `translate_int_max` of the size. Two labels.
        scale: zoom by 2^(scale_std * normal). One label.
        rotate_frac: rotation by any angle up to `rotate_frac_max` half turns. Two labels.
        aniso: stretch by 2^(aniso_std * normal) along an axis that is rotated with probability `aniso_rotate_prob`. Two
            labels.
        translate_frac: shift by translate_frac_std * normal of the size. Two labels.
        brightness: plus brightness_std * normal. One label.
        contrast: times 2^(contrast_std * normal). One label.
        lumaflip: negative of the luma, with probability one half. One label.
        hue: hue rotation up to `hue_max` half turns. Two labels.
        saturation: saturation times 2^(saturation_std * normal). One label.

    EDM trains with `AugmentPipe.edm()`, which has nine labels.
    """

    def __init__(
        self,
        p: float = 1,
        xflip: float = 0,
        yflip: float = 0,
        rotate_int: float = 0,
        translate_int: float = 0,
        translate_int_max: float = 0.125,
        scale: float = 0,
        rotate_frac: float = 0,
        aniso: float = 0,
        translate_frac: float = 0,
        scale_std: float = 0.2,
        rotate_frac_max: float = 1,
        aniso_std: float = 0.2,
        aniso_rotate_prob: float = 0.5,
        translate_frac_std: float = 0.125,
        brightness: float = 0,
        contrast: float = 0,
        lumaflip: float = 0,
        hue: float = 0,
        saturation: float = 0,
        brightness_std: float = 0.2,
        contrast_std: float = 0.5,
        hue_max: float = 1,
        saturation_std: float = 1,
    ):
        self.p = float(p)
        self.xflip = float(xflip)
        self.yflip = float(yflip)
        self.rotate_int = float(rotate_int)
        self.translate_int = float(translate_int)
        self.translate_int_max = float(translate_int_max)
        self.scale = float(scale)
        self.rotate_frac = float(rotate_frac)
        self.aniso = float(aniso)
        self.translate_frac = float(translate_frac)
        self.scale_std = float(scale_std)
        self.rotate_frac_max = float(rotate_frac_max)
        self.aniso_std = float(aniso_std)
        self.aniso_rotate_prob = float(aniso_rotate_prob)
        self.translate_frac_std = float(translate_frac_std)
        self.brightness = float(brightness)
        self.contrast = float(contrast)
        self.lumaflip = float(lumaflip)
        self.hue = float(hue)
        self.saturation = float(saturation)
        self.brightness_std = float(brightness_std)
        self.contrast_std = float(contrast_std)
        self.hue_max = float(hue_max)
        self.saturation_std = float(saturation_std)

    @classmethod
    def edm(cls, p: float = 0.12) -> "AugmentPipe":
        """The set EDM trains with: always a random xflip, the other geometric operations with probability p each."""
        return cls(p=p, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)

    @property
    def label_dim(self) -> int:
        """The number of augmentation labels, which the network's `augment_dim` has to be."""
        return sum(width for op, width in _LABELS.items() if getattr(self, op) > 0)

    def __call__(
        self,
        images: torch.Tensor,
        draws: Iterable[torch.Tensor] | None = None,
        generator: torch.Generator | None = None,
        part: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform a batch.

        Args:
            images: [N, C, H, W] in [-1, 1]; square for `rotate_int`; 1 or 3 channels for the colour operations, of
                which hue and saturation leave a single channel as it is.
            draws: recorded random numbers in call order, instead of new ones.
            generator: CPU generator of new ones; None means torch's default.
            part: (start, total): these images are a larger batch's from number `start` on, and get the transformations
                that they would get in it, for the same state of the generator. None: they are the whole batch.

        Returns:
            Images shaped as before, and labels [N, label_dim] on the same device.

        Raises:
            InputError: if the images do not fit the operations.
        """
        draw = _Draws(draws, generator, part)
        labels: list[torch.Tensor] = []
        images = self._blit(images, draw, labels)
        images = self._geometry(images, draw, labels)
        images = self._colour(images, draw, labels)
        n = images.shape[0]
        told = torch.cat([x.reshape(-1, n).t() for x in labels] or [torch.zeros([n, 0])], dim=1)
        return images, misc.to_device(told, images.device)

    def _gate(self, value: torch.Tensor, multiplier: float, draw: _Draws) -> torch.Tensor:
        """Return `value` [..., N] where a uniform number per sample falls below multiplier * p, else 0."""
        return torch.where(draw.uniform(value.shape[-1]) < multiplier * self.p, value, 0)

    def _blit(self, images: torch.Tensor, draw: _Draws, labels: list[torch.Tensor]) -> torch.Tensor:
        """Apply the operations that move whole pixels."""
        n, _, height, width = images.shape

        def where(condition: torch.Tensor, changed: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
            return torch.where(misc.to_device(condition.reshape(-1, 1, 1, 1), images.device), changed, otherwise)

        if self.xflip > 0:
            w = self._gate(draw.integer(2, n), self.xflip, draw)
            images = where(w == 1, images.flip(3), images)
            labels.append(w)
        if self.yflip > 0:
            w = self._gate(draw.integer(2, n), self.yflip, draw)
            images = where(w == 1, images.flip(2), images)
            labels.append(w)
        if self.rotate_int > 0:
            if height != width:
                raise InputError(f"rotate_int needs square images, not {height}x{width}; switch it off")
            w = self._gate(draw.integer(4, n), self.rotate_int, draw)
            images = where((w == 1) | (w == 2), images.flip(3), images)
            images = where((w == 2) | (w == 3), images.flip(2), images)
            images = where((w == 1) | (w == 3), images.transpose(2, 3), images)
            labels += [((w == 1) | (w == 2)).float(), ((w == 2) | (w == 3)).float()]
        if self.translate_int > 0:
            w = self._gate(draw.uniform(2, n) * 2 - 1, self.translate_int, draw)
            tx = w[0].mul(width * self.translate_int_max).round()
            ty = w[1].mul(height * self.translate_int_max).round()
            columns = misc.to_device(_mirror(torch.arange(width) - tx[:, None], width), images.device)
            rows = misc.to_device(_mirror(torch.arange(height) + ty[:, None], height), images.device)
            samples = torch.arange(n, device=images.device)[:, None, None, None]
            channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
            images = images[samples, channels, rows[:, None, :, None], columns[:, None, None, :]]
            labels += [tx / (width * self.translate_int_max), ty / (height * self.translate_int_max)]
        return images

    def _geometry(self, images: torch.Tensor, draw: _Draws, labels: list[torch.Tensor]) -> torch.Tensor:
        """Apply the operations that resample, by one matrix from output to input pixels around the image's centre."""
        n, _, height, width = images.shape
        inverse = torch.eye(3).repeat(n, 1, 1)
        if self.scale > 0:
            w = self._gate(draw.normal(n), self.scale, draw)
            zoom = torch.exp2(w * self.scale_std)
            inverse = inverse @ _scaling(1 / zoom, 1 / zoom)
            labels.append(w)
        if self.rotate_frac > 0:
            w = self._gate((draw.uniform(n) * 2 - 1) * (math.pi * self.rotate_frac_max), self.rotate_frac, draw)
            inverse = inverse @ _rotation(w)
            labels += [w.cos() - 1, w.sin()]
        if self.aniso > 0:
            w = draw.normal(n)
            r = (draw.uniform(n) * 2 - 1) * math.pi
            w = self._gate(w, self.aniso, draw)
            r = torch.where(draw.uniform(n) < self.aniso_rotate_prob, r, 0)
            stretch = torch.exp2(w * self.aniso_std)
            inverse = inverse @ _rotation(-r) @ _scaling(1 / stretch, stretch) @ _rotation(r)
            labels += [w * r.cos(), w * r.sin()]
        if self.translate_frac > 0:
            w = self._gate(draw.normal(2, n), self.translate_frac, draw)
            shift = w * self.translate_frac_std
            inverse = inverse @ _translation(-shift[0] * width, -shift[1] * height)
            labels.append(w)
        resampling = self.scale > 0 or self.rotate_frac > 0 or self.aniso > 0 or self.translate_frac > 0
        return _resample(images, inverse) if resampling else images

    def _colour(self, images: torch.Tensor, draw: _Draws, labels: list[torch.Tensor]) -> torch.Tensor:
        """Apply the operations on the colour of each pixel, by one affine matrix on RGB."""
        n, channels = images.shape[:2]
        matrix = torch.eye(4).repeat(n, 1, 1)
        luma = torch.tensor([1.0, 1.0, 1.0, 0.0]) / math.sqrt(3)
        along = luma.outer(luma)
        if self.brightness > 0:
            w = self._gate(draw.normal(n), self.brightness, draw)
            matrix[:, :3, 3] += (w * self.brightness_std)[:, None]
            labels.append(w)
        if self.contrast > 0:
            w = self._gate(draw.normal(n), self.contrast, draw)
            matrix[:, :3] *= torch.exp2(w * self.contrast_std)[:, None, None]
            labels.append(w)
        if self.lumaflip > 0:
            w = self._gate(draw.integer(2, n), self.lumaflip, draw)
            matrix = (torch.eye(4) - 2 * along * w[:, None, None]) @ matrix
            labels.append(w)
        if self.hue > 0:
            w = self._gate((draw.uniform(n) * 2 - 1) * (math.pi * self.hue_max), self.hue, draw)
            matrix = _hue_rotation(w) @ matrix
            labels += [w.cos() - 1, w.sin()]
        if self.saturation > 0:
            w = self._gate(draw.normal(n), self.saturation, draw)
            matrix = (along + (torch.eye(4) - along) * torch.exp2(w * self.saturation_std)[:, None, None]) @ matrix
            labels.append(w)

        if not any(op > 0 for op in (self.brightness, self.contrast, self.lumaflip, self.hue, self.saturation)):
            return images
        if channels == 1:  # a grey pixel is (g, g, g); the mean projects the result back on grey
            matrix = matrix[:, :3].mean(dim=1, keepdim=True)
            matrix = torch.cat([matrix[..., :3].sum(dim=2, keepdim=True), matrix[..., 3:]], dim=2)
        elif channels != 3:
            raise InputError(f"colour augmentation needs 1 or 3 channels, not {channels}; switch it off")
        matrix = misc.to_device(matrix.to(images.dtype), images.device)
        return (matrix[:, :channels, :channels] @ images.flatten(2) + matrix[:, :channels, channels:]).view(
            images.shape
        )


def _mirror(index: torch.Tensor, size: int) -> torch.Tensor:
    """Reflect indices outside 0..size-1 at the border pixels, which are not repeated."""
    period = max(2 * (size - 1), 1)
    return (size - 1 - (size - 1 - index % period).abs()).long()


def _resample(images: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Warp images [N, C, H, W] by matrices [N, 3, 3] from output to input pixels, both counted from the centre.

    Reflection padding, 2x upsampling by a wavelet filter, bilinear lookup, 2x downsampling by the same filter.
    """
    n, channels, height, width = images.shape
    cx, cy = (width - 1) / 2, (height - 1) / 2
    corners = torch.tensor([[-cx, -cy, 1], [cx, -cy, 1], [cx, cy, 1], [-cx, cy, 1]]).t()
    reach = (inverse @ corners)[:, :2].permute(1, 0, 2).flatten(1)  # [xy, corners of the whole batch]
    reach = torch.stack([-reach, reach]).amax(dim=2)  # [low / high side, xy]
    room = torch.tensor([width - 1, height - 1])
    pads = (reach - torch.tensor([cx, cy]) + _MARGIN).clamp(min=0).minimum(room).ceil().int().tolist()
    (left, top), (right, bottom) = pads
    images = F.pad(images, [left, right, top, bottom], mode="reflect")
    inverse = _translation(torch.tensor((left - right) / 2), torch.tensor((top - bottom) / 2)) @ inverse

    taps = misc.to_device(torch.tensor(_SYM6, dtype=images.dtype), images.device)
    images = images.reshape(n * channels, 1, *images.shape[2:])
    images = F.conv_transpose2d(images, taps[None, None, None, :], stride=(1, 2), padding=(0, _MARGIN - 1))
    images = F.conv_transpose2d(images, taps[None, None, :, None], stride=(2, 1), padding=(_MARGIN - 1, 0))
    images = images.reshape(n, channels, *images.shape[2:])

    # Pixel centres of the doubled image lie half a (doubled) pixel off. Then to grid_sample's normalised coordinates.
    two, half = torch.tensor(2.0), torch.tensor(0.5)
    inverse = _scaling(two, two) @ inverse @ _scaling(half, half)
    inverse = _translation(-half, -half) @ inverse @ _translation(half, half)
    out_h, out_w = (height + _MARGIN) * 2, (width + _MARGIN) * 2
    inverse = (
        _scaling(torch.tensor(2 / images.shape[3]), torch.tensor(2 / images.shape[2]))
        @ inverse
        @ _scaling(torch.tensor(out_w / 2), torch.tensor(out_h / 2))
    )
    theta = misc.to_device(inverse[:, :2].to(images.dtype), images.device)
    grid = F.affine_grid(theta, [n, channels, out_h, out_w], align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    images = images.reshape(n * channels, 1, out_h, out_w)[:, :, 1:-1, 1:-1]
    images = F.conv2d(images, taps[None, None, None, :], stride=(1, 2))
    images = F.conv2d(images, taps[None, None, :, None], stride=(2, 1))
    return images.reshape(n, channels, height, width)


def _stack(rows: list[list[torch.Tensor | float]]) -> torch.Tensor:
    """Return matrices [..., rows, columns] of elements that are tensors of one shape [...] or numbers."""
    shape = next(x for row in rows for x in row if isinstance(x, torch.Tensor)).shape
    elements = [[torch.as_tensor(x, dtype=torch.float32).expand(shape) for x in row] for row in rows]
    return torch.stack([torch.stack(row, dim=-1) for row in elements], dim=-2)


def _translation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _stack([[1, 0, x], [0, 1, y], [0, 0, 1]])


def _scaling(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _stack([[x, 0, 0], [0, y, 0], [0, 0, 1]])


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    cos, sin = angle.cos(), angle.sin()
    return _stack([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def _hue_rotation(angle: torch.Tensor) -> torch.Tensor:
    """Return the matrices that rotate RGB about the grey axis."""
    cos, turn = angle.cos(), angle.sin() / math.sqrt(3)
    grey = (1 - cos) / 3
    a, b, c = grey + cos, grey - turn, grey + turn
    return _stack([[a, b, c, 0], [c, a, b, 0], [b, c, a, 0], [0, 0, 0, 1]])
