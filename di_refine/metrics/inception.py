"""The Inception-v3 network of 2015-12-05 that FID, KID and the Inception score are defined by.

The architecture is that of Szegedy et al., arXiv 1512.00567. Three differences from later public versions of
Inception-v3 move the features by 2 to 40 percent: average pools leave the padding out of the mean, the last block has a
max pool, and images are enlarged by TensorFlow 1's rule (no half-pixel shift).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from di_refine.errors import InputError

INPUT_SIZE = 299
FEATURE_DIM = 2048
NUM_CLASSES = 1008

# A branch is a sequence of units (name, channels, kernel height, kernel width, stride); a list in place of a unit means
# units side by side on the same input. Units of stride 1 keep the size, units of stride 2 are not padded.
Unit = tuple[str, int, int, int, int]
Branch = Sequence[Unit | list[Unit]]


class InceptionV3(nn.Module):
    """The network from images to the 2048 features after the last pooling ('pool3'), float32, without gradients.

    `load_state_dict` takes the names of pt_inception-2015-12-05-6726825d.pth, with or without batch counters
    (`num_batches_tracked`), and insists on all the rest.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, (3, 3), padding=(1, 1))
        self.maxpool1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, (3, 3))
        self.maxpool2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = _block_35(192, pool_channels=32)
        self.Mixed_5c = _block_35(256, pool_channels=64)
        self.Mixed_5d = _block_35(288, pool_channels=64)
        self.Mixed_6a = _reduction_17(288)
        self.Mixed_6b = _block_17(768, width=128)
        self.Mixed_6c = _block_17(768, width=160)
        self.Mixed_6d = _block_17(768, width=160)
        self.Mixed_6e = _block_17(768, width=192)
        self.Mixed_7a = _reduction_8(768)
        self.Mixed_7b = _block_8(1280, pool="average")
        self.Mixed_7c = _block_8(2048, pool="max")
        self.fc = nn.Linear(FEATURE_DIM, NUM_CLASSES)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # 1.8 times as fast on a CPU

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features [N, 2048] of images [N, 1 or 3, H, W] of any size with values 0..255, uint8 or float.

        Raises:
            InputError: the images have another number of axes or channels.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise InputError(f"expected images [N, 1 or 3, H, W], got {list(images.shape)}")
        x = resize_tf1(images.to(self.fc.weight.dtype), INPUT_SIZE)
        x = ((x - 128) / 128).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        for name, module in self.named_children():
            if name != "fc":
                x = module(x)
        return x.mean(dim=(2, 3))

    @torch.no_grad()
    def logits(self, features: torch.Tensor, bias: bool = False) -> torch.Tensor:
        """Return class logits [N, 1008] of features [N, 2048].

        The Inception score is defined without the output bias.
        """
        return F.linear(features, self.fc.weight, self.fc.bias if bias else None)

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """Load as `nn.Module` does, without the batch counters, which some files have and nobody needs."""
        weights = {name: value for name, value in state_dict.items() if not name.endswith(".num_batches_tracked")}
        return super().load_state_dict(weights, strict=strict, assign=assign)


def resize_tf1(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize [N, C, H, W] to [N, C, size, size] bilinearly by the rule of TensorFlow 1 (`align_corners=False`).

    The source position is the output index times in/out, without a half-pixel shift; the upper neighbour stops at the
    edge.
    """
    for axis in (3, 2):
        source = images.shape[axis]
        if source == size:
            continue
        # The reference computes positions in float32; rounding decides the neighbours where they fall on whole numbers.
        position = torch.arange(size, dtype=torch.float32, device=images.device) * (
            torch.tensor(source, dtype=torch.float32) / size
        ).to(images.device)
        lower = position.floor().long().clamp_(max=source - 1)
        upper = (lower + 1).clamp_(max=source - 1)
        weight = (position - lower).to(images.dtype).reshape([-1, 1] if axis == 2 else [-1])
        images = torch.lerp(images.index_select(axis, lower), images.index_select(axis, upper), weight)
    return images


class ConvUnit(nn.Module):
    """A convolution without bias, batch norm with fixed statistics, and ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False)
        self.bn = FrozenBatchNorm(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A fixed scale after a convolution is a scale of its weights: one pass over the activations less.
        scale, shift = self.bn.scale_and_shift()
        x = F.conv2d(x, self.conv.weight * scale[:, None, None, None], shift, self.conv.stride, self.conv.padding)
        return x.relu_()


class FrozenBatchNorm(nn.Module):
    """The parameters of a batch norm that only ever applies its stored statistics."""

    epsilon = 1e-3
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.weight * (self.running_var + self.epsilon).rsqrt()
        return scale, self.bias - self.running_mean * scale


class Mixed(nn.Module):
    """Branches of convolutions beside a pooling branch, whose outputs are concatenated in that order.

    Args:
        in_channels: channels of the block's input.
        branches: see `Branch`.
        pool: 'average' or 'max' (3x3, stride 1, then a 1x1 unit to `pool_channels`), or 'reduce' (3x3 max, stride 2).
        pool_channels: output channels of the pooling branch, 0 for 'reduce'.
    """

    def __init__(self, in_channels: int, branches: Sequence[Branch], pool: str, pool_channels: int = 0):
        super().__init__()
        self._branches: list[list[list[str]]] = []
        for branch in branches:
            channels, names = in_channels, []
            for step in branch:
                units = step if isinstance(step, list) else [step]
                for name, out_channels, height, width, stride in units:
                    padding = (height // 2, width // 2) if stride == 1 else (0, 0)
                    self.add_module(name, ConvUnit(channels, out_channels, (height, width), stride, padding))
                channels = sum(unit[1] for unit in units)
                names.append([unit[0] for unit in units])
            self._branches.append(names)
        self._pool = pool
        if pool != "reduce":
            self.branch_pool = ConvUnit(in_channels, pool_channels, (1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for branch in self._branches:
            y = x
            for names in branch[:-1]:
                y = self.get_submodule(names[0])(y)
            outputs += [self.get_submodule(name)(y) for name in branch[-1]]
        if self._pool == "reduce":
            outputs.append(F.max_pool2d(x, 3, stride=2))
        elif self._pool == "max":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
        return torch.cat(outputs, dim=1)


def _block_35(in_channels: int, pool_channels: int) -> Mixed:
    """A block at 35 x 35 pixels."""
    return Mixed(
        in_channels,
        [
            [("branch1x1", 64, 1, 1, 1)],
            [("branch5x5_1", 48, 1, 1, 1), ("branch5x5_2", 64, 5, 5, 1)],
            [("branch3x3dbl_1", 64, 1, 1, 1), ("branch3x3dbl_2", 96, 3, 3, 1), ("branch3x3dbl_3", 96, 3, 3, 1)],
        ],
        pool="average",
        pool_channels=pool_channels,
    )


def _reduction_17(in_channels: int) -> Mixed:
    """The block from 35 x 35 to 17 x 17 pixels."""
    return Mixed(
        in_channels,
        [
            [("branch3x3", 384, 3, 3, 2)],
            [("branch3x3dbl_1", 64, 1, 1, 1), ("branch3x3dbl_2", 96, 3, 3, 1), ("branch3x3dbl_3", 96, 3, 3, 2)],
        ],
        pool="reduce",
    )


def _block_17(in_channels: int, width: int) -> Mixed:
    """A block at 17 x 17 pixels, with 7 x 7 kernels as pairs of 1 x 7 and 7 x 1."""
    return Mixed(
        in_channels,
        [
            [("branch1x1", 192, 1, 1, 1)],
            [("branch7x7_1", width, 1, 1, 1), ("branch7x7_2", width, 1, 7, 1), ("branch7x7_3", 192, 7, 1, 1)],
            [
                ("branch7x7dbl_1", width, 1, 1, 1),
                ("branch7x7dbl_2", width, 7, 1, 1),
                ("branch7x7dbl_3", width, 1, 7, 1),
                ("branch7x7dbl_4", width, 7, 1, 1),
                ("branch7x7dbl_5", 192, 1, 7, 1),
            ],
        ],
        pool="average",
        pool_channels=192,
    )


def _reduction_8(in_channels: int) -> Mixed:
    """17 x 17 to 8 x 8 pixels."""
    return Mixed(
        in_channels,
        [
            [("branch3x3_1", 192, 1, 1, 1), ("branch3x3_2", 320, 3, 3, 2)],
            [
                ("branch7x7x3_1", 192, 1, 1, 1),
                ("branch7x7x3_2", 192, 1, 7, 1),
                ("branch7x7x3_3", 192, 7, 1, 1),
                ("branch7x7x3_4", 192, 3, 3, 2),
            ],
        ],
        pool="reduce",
    )


def _block_8(in_channels: int, pool: str) -> Mixed:
    """A block at 8 x 8 pixels, in which the last units of two branches stand side by side."""
    return Mixed(
        in_channels,
        [
            [("branch1x1", 320, 1, 1, 1)],
            [("branch3x3_1", 384, 1, 1, 1), [("branch3x3_2a", 384, 1, 3, 1), ("branch3x3_2b", 384, 3, 1, 1)]],
            [
                ("branch3x3dbl_1", 448, 1, 1, 1),
                ("branch3x3dbl_2", 384, 3, 3, 1),
                [("branch3x3dbl_3a", 384, 1, 3, 1), ("branch3x3dbl_3b", 384, 3, 1, 1)],
            ],
        ],
        pool=pool,
        pool_channels=192,
    )
