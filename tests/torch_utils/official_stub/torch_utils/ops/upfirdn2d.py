import torch
import torch.nn.functional as F


def setup_filter(f, device="cpu", normalize=True, flip_filter=False, gain=1, separable=None):
    f = torch.as_tensor(1 if f is None else f, dtype=torch.float32)
    f = f[None] if f.ndim == 0 else f
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= 8
    if f.ndim == 1 and not separable:
        f = f[:, None] * f[None, :]
    f = f / f.sum() if normalize else f
    f = f.flip(list(range(f.ndim))) if flip_filter else f
    return (f * gain ** (f.ndim / 2)).to(device)


def _padding(p):
    p = [p, p] if isinstance(p, int) else list(p)
    return [p[0], p[0], p[1], p[1]] if len(p) == 2 else p


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl="cuda"):
    n, c, h, w = x.shape
    x0, x1, y0, y1 = _padding(padding)
    zeros = x.new_zeros(n, c, h, up, w, up)
    zeros[:, :, :, 0, :, 0] = x
    x = F.pad(zeros.reshape(n, c, h * up, w * up), [x0, x1, y0, y1])
    f = torch.ones(1, 1) if f is None else f
    f = f[:, None] * f[None, :] if f.ndim == 1 else f
    f = (f if flip_filter else f.flip([0, 1])) * gain
    x = F.conv2d(x, f.to(x.dtype).expand(c, 1, *f.shape), groups=c)
    return x[:, :, ::down, ::down]


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1, impl="cuda"):
    w, p = f.shape[-1], _padding(padding)
    before, after = (w + up - 1) // 2, (w - up) // 2
    p = [p[0] + before, p[1] + after, p[2] + before, p[3] + after]
    return upfirdn2d(x, f, up=up, padding=p, flip_filter=flip_filter, gain=gain * up**2)


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1, impl="cuda"):
    w, p = f.shape[-1], _padding(padding)
    before, after = (w - down + 1) // 2, (w - down) // 2
    p = [p[0] + before, p[1] + after, p[2] + before, p[3] + after]
    return upfirdn2d(x, f, down=down, padding=p, flip_filter=flip_filter, gain=gain)
