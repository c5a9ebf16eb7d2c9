import torch.nn.functional as F

from . import upfirdn2d


def conv2d_resample(x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False):
    fw = 1 if f is None else f.shape[-1]
    x0, x1, y0, y1 = upfirdn2d._padding(padding)
    if up > 1:
        x0, x1, y0, y1 = x0 + (fw + up - 1) // 2, x1 + (fw - up) // 2, y0 + (fw + up - 1) // 2, y1 + (fw - up) // 2
    if down > 1:
        x0, y0 = x0 + (fw - down + 1) // 2, y0 + (fw - down + 1) // 2
        x1, y1 = x1 + (fw - down) // 2, y1 + (fw - down) // 2
    taps = f if up > 1 else None
    x = upfirdn2d.upfirdn2d(x, taps, up=up, padding=[x0, x1, y0, y1], gain=up**2, flip_filter=flip_filter)
    x = F.conv2d(x, w if flip_weight else w.flip([2, 3]), groups=groups)
    return upfirdn2d.upfirdn2d(x, f, down=down, flip_filter=flip_filter) if down > 1 else x
