"""From the generator's images to the teacher's: another size, grey or colour."""

import numpy as np
import torch
from PIL import Image

from di_refine.errors import InputError
from torch_utils.misc import assert_shape

LUMA = (0.299, 0.587, 0.114)
"""Weights of R, G and B in grey (ITU-R BT.601), as in Pillow's and so `dataset_tool.py`'s conversion."""

FILTERS = ("lanczos", "bicubic", "bilinear", "box")


def resize_matrix(size: int, new_size: int, resize_filter: str) -> torch.Tensor:
    """Pillow's resampling of `size` pixels to `new_size` along one axis, as a matrix.

    Pillow's filters grow with the step between output pixels when an image shrinks, which is what keeps it from
    aliasing. Resampling is linear, so the resized identity is the matrix.

    Args:
        size, new_size: pixels before and after.
        resize_filter: one of `FILTERS`.

    Returns:
        float32 [new_size, size]; every row sums to 1.
    """
    identity = Image.fromarray(np.eye(size, dtype=np.float32))
    resized = identity.resize((size, new_size), Image.Resampling[resize_filter.upper()])
    rows = torch.from_numpy(np.array(resized)).double()
    return (rows / rows.sum(dim=1, keepdim=True)).float()


class Bridge(torch.nn.Module):
    """Images as the generator makes them -> images as the teacher knows them. Linear, and without parameters.

    The noise of the diffusion is added behind the bridge, at the teacher's size: x0 -> bridge -> x0 + s n. No noise
    passes through it, so noised samples have independent noise in every pixel, as the teacher's training images had,
    whatever the bridge does. Gradients come back through its transpose.

    Why Pillow's filters, and Lanczos for shrinking: the bridge should treat an image as the tool did that made the
    teacher's training images, here `dataset_tool.py` with its defaults. A softer filter would make the bridged images
    softer than the teacher's, and the generator would be asked to over-sharpen its own. Enlarging has no such model,
    and Lanczos rings more there than it gains: bicubic. Resizing is two small matrix products, which are deterministic
    on every device, backward passes included (`interpolate(antialias=True)` is not on CUDA), and have derivatives of
    any order.

    Both filters have negative weights, so next to hard edges the result leaves [-1, 1]: a step from -1 to 1 overshoots
    by up to 0.16 where images shrink and 0.23 where they grow. It is not clipped, because nothing would flow back from
    clipped pixels. Images enlarged for a teacher that is larger than the generator lack the detail it expects; the
    noise levels that drown such detail are then the ones to learn from.

    Args:
        from_channels, from_resolution: of the generator: 1 (grey) or 3 (RGB) channels, square images.
        to_channels, to_resolution: of the teacher, likewise.
        resize_filter: one of `FILTERS`; None is lanczos for shrinking and bicubic for enlarging.

    Raises:
        InputError: another number of channels, or a resolution below 1.
    """

    matrix: torch.Tensor | None
    luma: torch.Tensor

    def __init__(
        self,
        from_channels: int,
        from_resolution: int,
        to_channels: int,
        to_resolution: int,
        resize_filter: str | None = None,
    ):
        super().__init__()
        for setting, channels, resolution in (
            ("`network`", from_channels, from_resolution),
            ("`teacher`", to_channels, to_resolution),
        ):
            if channels not in (1, 3):
                raise InputError(
                    f"{setting} has images of {channels} channels; only 1 (grey) and 3 (RGB) can be matched"
                )
            if resolution < 1:
                raise InputError(f"{setting} has images of {resolution} pixels; they must have at least one")
        resize_filter = resize_filter or ("lanczos" if to_resolution < from_resolution else "bicubic")
        if resize_filter not in FILTERS:
            raise ValueError(f"unknown resize filter {resize_filter!r}; known are {', '.join(FILTERS)}")
        self.from_channels, self.from_resolution = from_channels, from_resolution
        self.to_channels, self.to_resolution = to_channels, to_resolution
        resizes = from_resolution != to_resolution
        matrix = resize_matrix(from_resolution, to_resolution, resize_filter) if resizes else None
        # Constants: they follow the module's device, and stay out of its state.
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("luma", torch.tensor(LUMA).reshape(1, 3, 1, 1), persistent=False)

    @property
    def is_identity(self) -> bool:
        """Nothing differs, so images are returned as they are."""
        return self.matrix is None and self.from_channels == self.to_channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Convert images.

        Args:
            images: [N, from_channels, from_resolution, from_resolution], floating point in [-1, 1].

        Returns:
            [N, to_channels, to_resolution, to_resolution] in the dtype of `images`; `images` itself where nothing
            differs.
        """
        assert_shape(images, [None, self.from_channels, self.from_resolution, self.from_resolution])
        if self.is_identity:
            return images
        with torch.autocast(images.device.type, enabled=False):  # which would round the products to bfloat16
            if self.to_channels < self.from_channels:
                images = (images * self.luma.to(images.dtype)).sum(dim=1, keepdim=True)
            if self.matrix is not None:
                matrix = self.matrix.to(images.dtype)
                images = matrix @ images @ matrix.T
            if self.to_channels > self.from_channels:
                images = images.repeat(1, 3, 1, 1)
        return images

    def extra_repr(self) -> str:
        before = f"{self.from_channels}x{self.from_resolution}x{self.from_resolution}"
        return f"{before} -> {self.to_channels}x{self.to_resolution}x{self.to_resolution}"
