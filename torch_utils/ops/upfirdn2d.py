"""Pad, up-sample, FIR-filter and down-sample images in one operator (Karras et al. 2019, arXiv 1912.04958, appendix B).

The order is fixed: insert `up - 1` zeros after every sample, pad (or crop, when negative), convolve with the filter,
keep every `down`-th sample. Filters are float32 tensors made by `setup_filter`: `[fh, fw]`, or `[taps]` for a
separable one that is applied along both axes. All functions take NCHW images and are differentiable any number of
times.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils import custom_ops

MAX_TAPS = 32  # along an axis; the compiled form keeps the filter in shared memory
_TILED = ((2, 2, 1, 1), (1, 1, 2, 2), (1, 1, 1, 1))  # factors with a fast path for filters of at most 4x4


def setup_filter(
    f: torch.Tensor | np.ndarray | Sequence | float | None,
    device: torch.device | str | None = None,
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> torch.Tensor:
    """Make a filter for the other functions of this module.

    Args:
        f: taps `[taps]`, a matrix `[fh, fw]`, one number, or None for the identity.
        device: of the filter (default: torch's current default device).
        normalize: divide by the sum, so that constant images keep their value.
        flip_filter: reverse the filter.
        gain: factor on the image's magnitude.
        separable: keep 1-D taps 1-D. Default: only from 8 taps on, below which one 2-D pass is faster.

    Returns:
        float32 `[fh, fw]`, or `[taps]` when separable.
    """
    f = torch.as_tensor(1 if f is None else f, dtype=torch.float32, device=device)
    if f.ndim > 2 or f.numel() == 0:
        raise ValueError(f"a filter has one or two axes and at least one tap, not shape {list(f.shape)}")
    f = f.reshape(1) if f.ndim == 0 else f
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= 8
    if f.ndim == 1 and not separable:
        f = torch.outer(f, f)
    if separable and f.ndim != 1:
        raise ValueError(f"separable=True needs a 1-D filter, not shape {list(f.shape)}")
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return f * gain ** (f.ndim / 2)


def upfirdn2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Zero-insert, pad, filter and decimate a batch of images.

    Args:
        x: `[N, C, H, W]`, any floating dtype.
        f: filter from `setup_filter` of at most 32x32 taps, on the device of `x`; None is the one-tap identity.
        up: zero-insertion factor, one number or `[x, y]`.
        down: decimation factor, one number or `[x, y]`.
        padding: in up-sampled pixels, one number, `[x, y]` or `[x0, x1, y0, y1]`; negative values crop.
        flip_filter: False convolves, True correlates.
        gain: factor on the result.
        impl: 'auto', 'ref' or 'cuda', see `torch_utils.custom_ops.pick`.

    Returns:
        `[N, C, (H*up + y0 + y1 - fh) // down + 1, ...]`, dtype of `x`.

    Raises:
        ValueError: wrong shapes, dtypes or factors, a filter that is too large, or a result without pixels.
    """
    if x.ndim != 4:
        raise ValueError(f"upfirdn2d: x must be [N, C, H, W], not {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"upfirdn2d: x must have a floating dtype, not {x.dtype}")
    (up_x, up_y), (down_x, down_y) = _pair(up, "up"), _pair(down, "down")
    x0, x1, y0, y1 = parse_padding(padding)
    fw, fh = filter_size(f)
    if max(fw, fh) > MAX_TAPS:
        raise ValueError(f"upfirdn2d: a filter has at most {MAX_TAPS}x{MAX_TAPS} taps, not {fw}x{fh}")
    if f is not None and f.device != x.device:
        raise ValueError(f"upfirdn2d: the filter is on {f.device}, x on {x.device}; move one of them")
    out_w = (x.shape[3] * up_x + x0 + x1 - fw) // down_x + 1
    out_h = (x.shape[2] * up_y + y0 + y1 - fh) // down_y + 1
    if out_w < 1 or out_h < 1:
        raise ValueError(
            f"upfirdn2d: a {x.shape[3]}x{x.shape[2]} image with padding {[x0, x1, y0, y1]} is smaller than the "
            f"{fw}x{fh} filter"
        )
    problem = custom_ops.unfit(x.dtype) or (
        "a filter that requires a gradient" if f is not None and f.requires_grad else None
    )
    # As measured, see docs/ops.md: small images fit the caches whatever one does, and PyTorch's start-up is quicker.
    faster_on_cpu = (
        x.device.type == "cpu"
        and max(fw, fh) <= 4
        and (up_x, up_y, down_x, down_y) in _TILED
        and x.shape[2] * x.shape[3] >= (32 * 32 if up_x == 2 else 256 * 256)
    )
    run = custom_ops.pick("upfirdn2d", _upfirdn2d_ref, impl, x.device, problem, faster_on_cpu)
    return run(x, f, (up_x, up_y), (down_x, down_y), (x0, x1, y0, y1), bool(flip_filter), float(gain))


def filter2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Filter images `[N, C, H, W]` without changing their size where `padding` is 0.

    The arguments are those of `upfirdn2d`; `padding` is added to what the filter itself needs.
    """
    fw, fh = filter_size(f)
    own = fw // 2, (fw - 1) // 2, fh // 2, (fh - 1) // 2
    return upfirdn2d(x, f, padding=add_padding(padding, own), flip_filter=flip_filter, gain=gain, impl=impl)


def upsample2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Enlarge images `[N, C, H, W]` by the factor `up` and keep their magnitude.

    The arguments are those of `upfirdn2d`; `padding` counts pixels of the result.
    """
    up_x, up_y = _pair(up, "up")
    padding = add_padding(padding, up_padding(f, (up_x, up_y)))
    return upfirdn2d(
        x, f, up=(up_x, up_y), padding=padding, flip_filter=flip_filter, gain=gain * up_x * up_y, impl=impl
    )


def downsample2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    down: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Shrink images `[N, C, H, W]` by the factor `down`.

    The arguments are those of `upfirdn2d`; `padding` counts pixels of the source.
    """
    factors = _pair(down, "down")
    padding = add_padding(padding, down_padding(f, factors))
    return upfirdn2d(x, f, down=factors, padding=padding, flip_filter=flip_filter, gain=gain, impl=impl)


def filter_size(f: torch.Tensor | None) -> tuple[int, int]:
    """Return (width, height) of a filter, which is (1, 1) for None."""
    if f is None:
        return 1, 1
    if f.ndim not in (1, 2) or f.dtype != torch.float32:
        raise ValueError(f"a filter is a float32 tensor [taps] or [fh, fw], not {f.dtype} {list(f.shape)}")
    return f.shape[-1], f.shape[0]


def up_padding(f: torch.Tensor | None, up: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the padding (x0, x1, y0, y1) that keeps an up-sampled image centred."""
    (fw, fh), (up_x, up_y) = filter_size(f), up
    return (fw + up_x - 1) // 2, (fw - up_x) // 2, (fh + up_y - 1) // 2, (fh - up_y) // 2


def down_padding(f: torch.Tensor | None, down: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the padding (x0, x1, y0, y1) that keeps a down-sampled image centred."""
    (fw, fh), (down_x, down_y) = filter_size(f), down
    return (fw - down_x + 1) // 2, (fw - down_x) // 2, (fh - down_y + 1) // 2, (fh - down_y) // 2


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < 1 for v in pair):
        raise ValueError(f"upfirdn2d: {name} must be a positive integer or two of them, not {value!r}")
    return pair


def parse_padding(value: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Return one, two ([x, y]) or four padding values as (x0, x1, y0, y1)."""
    values = (value,) if isinstance(value, int) else tuple(value)
    if len(values) not in (1, 2, 4) or any(not isinstance(v, int) for v in values):
        raise ValueError(f"upfirdn2d: padding must be one, two or four integers, not {value!r}")
    if len(values) == 1:
        return values[0], values[0], values[0], values[0]
    if len(values) == 2:
        return values[0], values[0], values[1], values[1]
    return values[0], values[1], values[2], values[3]


def add_padding(padding: int | Sequence[int], own: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return the sum of a padding of one, two or four values and the padding (x0, x1, y0, y1)."""
    x0, x1, y0, y1 = parse_padding(padding)
    return x0 + own[0], x1 + own[1], y0 + own[2], y1 + own[3]


def _upfirdn2d_ref(x, f, up, down, padding, flip_filter, gain):
    if custom_ops.autocast_is_on(x.device.type):  # it would change the dtype of float32 images
        with torch.autocast(x.device.type, enabled=False):
            return _upfirdn2d_ref(x, f, up, down, padding, flip_filter, gain)
    if f is None:
        f = torch.ones([1, 1], dtype=torch.float32, device=x.device)
    f = f.to(x.dtype)
    if f.ndim == 2:
        return _fir(x, f * gain, up, down, padding, flip_filter)
    root = abs(gain) ** 0.5  # each of the two passes carries half of the gain
    x = _fir(x, f[None, :] * root, (up[0], 1), (down[0], 1), (*padding[:2], 0, 0), flip_filter)
    f = f[:, None] * (root if gain > 0 else -root)
    return _fir(x, f, (1, up[1]), (1, down[1]), (0, 0, *padding[2:]), flip_filter)


def _fir(x, f, up, down, padding, flip_filter):
    """Filter once; `f` is [fh, fw], and the gain is in it already."""
    channels = x.shape[1]
    (fh, fw), (up_x, up_y), (down_x, down_y), (x0, x1, y0, y1) = f.shape, up, down, padding
    if up_x == up_y == 1:
        # conv2d correlates; its stride skips the samples that decimation would drop.
        weight = (f if flip_filter else f.flip([0, 1])).expand(channels, 1, fh, fw)
        if x0 == x1 >= 0 and y0 == y1 >= 0:
            return F.conv2d(x, weight, stride=(down_y, down_x), padding=(y0, x0), groups=channels)
        return F.conv2d(F.pad(x, [x0, x1, y0, y1]), weight, stride=(down_y, down_x), groups=channels)
    # A strided transposed convolution is zero-insertion followed by a full convolution, without touching the zeros. Its
    # result starts fh-1 (fw-1) samples earlier than the valid one and lacks the zeros after the last sample.
    weight = (f.flip([0, 1]) if flip_filter else f).expand(channels, 1, fh, fw)
    left, right = x0 - (fw - 1), x1 - (fw - 1) + up_x - 1
    top, bottom = y0 - (fh - 1), y1 - (fh - 1) + up_y - 1
    crop_x, crop_y = max(min(-left, -right), 0), max(min(-top, -bottom), 0)
    x = F.conv_transpose2d(x, weight, stride=(up_y, up_x), padding=(crop_y, crop_x), groups=channels)
    rest = [left + crop_x, right + crop_x, top + crop_y, bottom + crop_y]
    if any(rest):
        x = F.pad(x, rest)
    return x[:, :, ::down_y, ::down_x] if (down_x, down_y) != (1, 1) else x
