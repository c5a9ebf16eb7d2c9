"""2-D convolution with built-in FIR up- or down-sampling (Karras et al. 2019, arXiv 1912.04958, appendix B)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from torch_utils.ops import upfirdn2d as fir


def conv2d_resample(
    x: torch.Tensor,
    w: torch.Tensor,
    f: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> torch.Tensor:
    """Up-sample, convolve, down-sample.

    The value is that of: insert zeros, filter with `f` (only if `up` > 1, gain `up**2`), convolve with `w`, filter
    with `f` and decimate (only if `down` > 1). All of these are linear and commute, so the cheapest order is taken.

    Args:
        x: `[N, C_in, H, W]`.
        w: `[C_out, C_in // groups, kh, kw]`, dtype of `x`.
        f: float32 filter from `setup_filter`; ignored when `up` and `down` are 1.
        up: up-sampling factor.
        down: down-sampling factor.
        padding: in up-sampled pixels, one number, `[x, y]` or `[x0, x1, y0, y1]`, on top of what keeps the image
            centred.
        groups: as in `torch.nn.functional.conv2d`.
        flip_weight: True correlates (what torch calls convolution), False convolves.
        flip_filter: as in `upfirdn2d`.

    Returns:
        `[N, C_out, H_out, W_out]`; with padding `k // 2` of an odd kernel the size is `H * up // down`.

    Raises:
        ValueError: `x` or `w` not four-dimensional, or a factor below one.
    """
    if x.ndim != 4 or w.ndim != 4:
        raise ValueError(f"conv2d_resample: x and w must have four axes, not {list(x.shape)} and {list(w.shape)}")
    if up < 1 or down < 1:
        raise ValueError(f"conv2d_resample: up and down must be at least 1, not {up} and {down}")
    kh, kw = w.shape[2:]
    pads = fir.parse_padding(padding)
    if up > 1:
        pads = fir.add_padding(pads, fir.up_padding(f, (up, up)))
    if down > 1:
        pads = fir.add_padding(pads, fir.down_padding(f, (down, down)))
    x0, x1, y0, y1 = pads

    if up == 1 and down == 1:
        return _conv(x, w, pads, 1, groups, flip_weight)
    if up == 1:
        if kh == kw == 1:  # decimate first: a 1x1 kernel does not mix pixels
            x = fir.upfirdn2d(x, f, down=down, padding=pads, flip_filter=flip_filter)
            return _conv(x, w, (0, 0, 0, 0), 1, groups, flip_weight)
        x = fir.upfirdn2d(x, f, padding=pads, flip_filter=flip_filter)
        return _conv(x, w, (0, 0, 0, 0), down, groups, flip_weight)

    if kh == kw == 1:  # convolve the small image
        x = _conv(x, w, (0, 0, 0, 0), 1, groups, flip_weight)
        x = fir.upfirdn2d(x, f, up=up, padding=pads, gain=up**2, flip_filter=flip_filter)
    else:
        # The transposed convolution starts kernel-1 samples earlier and ends up-1 zeros earlier than a valid one on the
        # zero-inserted image; what can be cropped there is not computed, the filter's padding takes the rest.
        left, right, top, bottom = x0 - (kw - 1), x1 - kw + up, y0 - (kh - 1), y1 - kh + up
        crop_x, crop_y = max(min(-left, -right), 0), max(min(-top, -bottom), 0)
        w = w if not flip_weight else w.flip([2, 3])
        w = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # [C_in, C_out // groups, kh, kw]
        x = F.conv_transpose2d(x, w, stride=up, padding=(crop_y, crop_x), groups=groups)
        rest = (left + crop_x, right + crop_x, top + crop_y, bottom + crop_y)
        x = fir.upfirdn2d(x, f, padding=rest, gain=up**2, flip_filter=flip_filter)
    return x if down == 1 else fir.upfirdn2d(x, f, down=down, flip_filter=flip_filter)


def _conv(x, w, pads, stride, groups, flip_weight):
    x0, x1, y0, y1 = pads
    w = w if flip_weight else w.flip([2, 3])
    if x0 == x1 >= 0 and y0 == y1 >= 0:
        return F.conv2d(x, w, stride=stride, padding=(y0, x0), groups=groups)
    return F.conv2d(F.pad(x, [x0, x1, y0, y1]), w, stride=stride, groups=groups)
