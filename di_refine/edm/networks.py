"""The denoising networks of EDM (Karras et al. 2022, arXiv 2206.00364), named and shaped as its published weights.

Two U-Nets, `SongUNet` (DDPM++ and NCSN++, Song et al. 2021, arXiv 2011.13456) and `DhariwalUNet` (ADM, Dhariwal and
Nichol 2021, arXiv 2105.05233), under one of four preconditioners (EDM, VP, VE, iDDPM) that turn them into denoisers
D(x; sigma).

This module imports nothing of the project but `torch_utils.persistence`: its text is written into every snapshot, where
it also has to run beside the `torch_utils` package of the official EDM code, from Python 3.8 and torch 1.8 on.
Constructors work under `torch.device('meta')`.

Shapes: N batch, C channels, H W height and width, T = H * W tokens, L label_dim, E embedding width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils import persistence

# Older releases (before 2.4) say in other words whether autocast is on. There it stays on, as in the official code.
_KNOWS_AUTOCAST = hasattr(torch, "get_autocast_dtype")

# ---------------------------------------------------------------------------------------------------------------------
# Layers. Each casts its float32 weights to its input's dtype, so one network runs in float32 and in half precision.


def _init(shape: Sequence[int], mode: str, scale: float, fan_in: int, fan_out: int) -> torch.nn.Parameter:
    """Return a parameter of `shape` drawn by the Glorot ('xavier_*') or He ('kaiming_*') rule, times `scale`."""
    variance = {"xavier": 2 / (fan_in + fan_out), "kaiming": 1 / fan_in}
    family, _, law = mode.partition("_")
    if family not in variance or law not in ("uniform", "normal"):
        raise ValueError(f"init_mode '{mode}' is unknown; use xavier_ or kaiming_ followed by uniform or normal")
    std = math.sqrt(variance[family])
    if law == "normal":
        draw = torch.randn(shape) * std
    else:
        draw = (torch.rand(shape) * 2 - 1) * (math.sqrt(3) * std)
    return torch.nn.Parameter(draw * float(scale))


@persistence.persistent_class
class Linear(torch.nn.Module):
    """Computes y = x W^T + b with `weight` [out_features, in_features]; `bias` is None when switched off."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1,
        init_bias: float = 0,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        fans = {"fan_in": in_features, "fan_out": out_features}
        self.weight = _init([out_features, in_features], init_mode, init_weight, **fans)
        self.bias = _init([out_features], init_mode, init_bias, **fans) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


@persistence.persistent_class
class Conv2d(torch.nn.Module):
    """Convolution with 'same' padding, optionally with a 2x up- or downsampling FIR filter before it.

    Args:
        in_channels, out_channels: channel counts.
        kernel: odd kernel size; 0 for resampling alone, without weights.
        bias: whether there is a bias.
        up, down: double or halve height and width.
        resample_filter: 1-D taps of the separable resampling filter, normalised to a sum of 1.
        fused_resample: filter on the convolution's other side (after it when going down), with all padding in the first
            of the two operations. Interior values stay the same, borders differ.
        init_mode, init_weight, init_bias: initialisation rule and scales, see `_init`.
    """

    weight: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None
    resample_filter: torch.Tensor  # registered as None where nothing is resampled

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused_resample: bool = False,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1,
        init_bias: float = 0,
    ):
        if up and down:
            raise ValueError("Conv2d resamples either up or down, not both")
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.up = up
        self.down = down
        self.fused_resample = fused_resample
        fans = {"fan_in": in_channels * kernel**2, "fan_out": out_channels * kernel**2}
        self.weight = self.bias = None
        if kernel:
            self.weight = _init([out_channels, in_channels, kernel, kernel], init_mode, init_weight, **fans)
            self.bias = _init([out_channels], init_mode, init_bias, **fans) if bias else None
        taps = np.asarray(resample_filter, dtype=np.float32)
        outer = torch.tensor(np.outer(taps, taps) / taps.sum() ** 2)[None, None] if up or down else None
        self.register_buffer("resample_filter", outer)
        # Two equal taps are pixel repetition and the 2x2 mean, for which torch has faster kernels than convolution.
        self.box_filter = len(taps) == 2 and bool(taps[0] == taps[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if not (self.up or self.down):
            return x if weight is None else self._convolve(x, weight, weight.shape[-1] // 2)
        if self.box_filter and not self.fused_resample:
            return self._box(x)
        filter_pad = (self.resample_filter.shape[-1] - 1) // 2
        if weight is None:
            return self._resample(x, filter_pad)
        conv_pad = weight.shape[-1] // 2
        if not self.fused_resample:
            return self._convolve(self._resample(x, filter_pad), weight, conv_pad)
        if self.down:
            return self._resample(self._convolve(x, weight, conv_pad + filter_pad), 0)
        return self._convolve(self._resample(x, max(filter_pad - conv_pad, 0)), weight, max(conv_pad - filter_pad, 0))

    def _box(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if weight is None:
            return F.avg_pool2d(x, 2) if self.down else F.interpolate(x, scale_factor=2, mode="nearest")
        padding = weight.shape[-1] // 2
        if self.down:
            return self._convolve(F.avg_pool2d(x, 2), weight, padding)
        if padding == 0:  # a 1x1 convolution commutes with pixel repetition, and has a quarter of the pixels before it
            return F.interpolate(self._convolve(x, weight, 0), scale_factor=2, mode="nearest")
        return self._convolve(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding)

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, weight.to(x.dtype), bias, padding=padding)

    def weights(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias, of a layer that has both, in a dtype."""
        if self.weight is None or self.bias is None:
            raise ValueError("this Conv2d has no weight or no bias")
        return self.weight.to(dtype), self.bias.to(dtype)

    def _resample(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype)
        if self.up:  # zeros lie between the pixels: the filter's gain of 4 makes up for them
            taps = (taps * 4).expand(channels, -1, -1, -1)
            return F.conv_transpose2d(x, taps, groups=channels, stride=2, padding=padding)
        return F.conv2d(x, taps.expand(channels, -1, -1, -1), groups=channels, stride=2, padding=padding)


@persistence.persistent_class
class GroupNorm(torch.nn.Module):
    """Group normalisation with min(num_groups, num_channels // min_channels_per_group) groups."""

    def __init__(self, num_channels: int, num_groups: int = 32, min_channels_per_group: int = 4, eps: float = 1e-5):
        super().__init__()
        self.num_groups = min(num_groups, num_channels // min_channels_per_group)
        self.eps = eps
        if self.num_groups < 1 or num_channels % self.num_groups:
            raise ValueError(
                f"{num_channels} channels cannot be split into {self.num_groups} groups of equal size; "
                "change model_channels or channel_mult"
            )
        self.weight = torch.nn.Parameter(torch.ones(num_channels))
        self.bias = torch.nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


@persistence.persistent_class
class UNetBlock(torch.nn.Module):
    """Residual block: two normalised 3x3 convolutions, modulated by an embedding, then optional self-attention.

    Args:
        in_channels, out_channels, emb_channels: widths of input, output and embedding.
        up, down: resample in the first convolution and in the skip path.
        attention: add self-attention, with `num_heads` heads or, when that is None, out_channels // channels_per_head
            (which may be 0: then there is none).
        dropout: probability before the second convolution, in training mode only.
        skip_scale: factor on the sum of branch and skip path, and again on the sum after attention.
        eps: of the group norms.
        resample_filter: see `Conv2d`.
        resample_proj: give the skip path a 1x1 convolution whenever it resamples.
        adaptive_scale: the embedding scales and shifts the second norm's output (ADM) instead of being added before it.
        init, init_zero, init_attn: `Conv2d` initialisation of, respectively, conv0 / affine / skip, conv1 / proj, qkv
            (None: as `init`).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0,
        skip_scale: float = 1,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: dict | None = None,
        init_zero: dict | None = None,
        init_attn: dict | None = None,
    ):
        super().__init__()
        init = init or {}
        init_zero = {"init_weight": 0} if init_zero is None else init_zero
        init_attn = init if init_attn is None else init_attn
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.emb_channels = emb_channels
        self.num_heads = 0
        if attention:
            self.num_heads = num_heads if num_heads is not None else out_channels // channels_per_head
        self.dropout = dropout
        self.skip_scale = float(skip_scale)
        self.adaptive_scale = adaptive_scale

        resample: dict = {"up": up, "down": down, "resample_filter": resample_filter}
        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, **resample, **init)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), **init)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, **init_zero)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, **resample, **init)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, kernel=1, **init_attn)
            self.proj = Conv2d(out_channels, out_channels, kernel=1, **init_zero)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Map features x [N, in_channels, H, W] and an embedding [N or 1, E] to [N, out_channels, H', W']."""
        skip = x if self.skip is None else self.skip(x)
        x = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb).to(x.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            x = torch.addcmul(shift, self.norm1(x), scale + 1)
        else:
            x = self.norm1(x + params)
        x = self.conv1(F.dropout(F.silu(x), p=self.dropout, training=self.training))
        x = self._merge(x, skip)
        return self._merge(self._attention(self.norm2(x)), x) if self.num_heads else x

    def _merge(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = skip + x  # the sum takes the memory format of its first term, and attention returns channels last
        return x if self.skip_scale == 1 else x.mul_(self.skip_scale)

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        """Apply self-attention to the pixels of x [N, C, H, W], softmax in float32, without the residual connection.

        Every kernel behind `scaled_dot_product_attention` accumulates its softmax in float32. Second derivatives and
        forward-mode ones need its MATH backend (`torch.nn.attention.sdpa_kernel`).
        """
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        # Stored output channels run (head, channel, part). Reordering the weights to (part, head, channel) is cheap and
        # leaves q, k, v with contiguous channels, which the fast attention kernels require.
        weight, bias = self.qkv.weights(x.dtype)
        weight = weight.view(c, 3, c).transpose(0, 1).reshape(3 * c, c)
        bias = bias.view(c, 3).t().reshape(3 * c)
        qkv = F.linear(tokens, weight, bias).view(n, h * w, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = _attend(q, k, v)
        y = y.transpose(1, 2).reshape(n, h * w, c)
        weight, bias = self.proj.weights(x.dtype)
        y = F.linear(y, weight.view(c, c), bias)
        return y.transpose(1, 2).unflatten(2, (h, w))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(d)) v for [N, heads, T, d]."""
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(q, k, v)
    # Releases before 2.0 have no such function. The scale goes onto q, or products of float16 could overflow.
    weight = ((q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)).softmax(dim=-1, dtype=torch.float32)
    return weight.to(v.dtype) @ v


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings of the noise level.


@persistence.persistent_class
class PositionalEmbedding(torch.nn.Module):
    """Computes cos(f x), sin(f x) at num_channels / 2 frequencies f, which fall from 1 towards 1 / max_positions.

    They fall geometrically. With `endpoint` the last one is 1 / max_positions (DDPM++); without, the next one would be
    (ADM).
    """

    def __init__(self, num_channels: int, max_positions: int = 10000, endpoint: bool = False):
        super().__init__()
        self.num_channels = num_channels
        self.max_positions = max_positions
        self.endpoint = endpoint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N] -> [N, num_channels], cosines first."""
        half = self.num_channels // 2
        exponent = torch.arange(half, dtype=torch.float32, device=x.device) / (half - (1 if self.endpoint else 0))
        angle = x[:, None] * ((1 / self.max_positions) ** exponent).to(x.dtype)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


@persistence.persistent_class
class FourierEmbedding(torch.nn.Module):
    """Computes cos(2 pi f x), sin(2 pi f x) at num_channels / 2 fixed frequencies f, drawn as `scale` unit normals."""

    freqs: torch.Tensor

    def __init__(self, num_channels: int, scale: float = 16):
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N] -> [N, num_channels], cosines first."""
        angle = x[:, None] * (2 * np.pi * self.freqs).to(x.dtype)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# U-Nets.


class _UNet(torch.nn.Module):
    """What both U-Nets share: the levels of resolution, and the passes down and up through them."""

    label_dropout: float

    def _build(
        self,
        img_resolution: int,
        in_channels: int,
        first_width: int,
        widths: Sequence[int],
        num_blocks: int,
        attn_resolutions: Sequence[int],
        attn_every_block: bool,
        block: dict,
        init: dict,
        resample_filter: Sequence[float] = (1, 1),
        residual_image: bool = False,
    ) -> int:
        """Fill `self.enc` and `self.dec`; return the width in front of the output layers.

        `widths` has one entry per level, highest resolution first. Encoder blocks attend at `attn_resolutions`; so does
        the last decoder block of such a level, or every one with `attn_every_block`. `block` holds further arguments of
        `UNetBlock`. `residual_image` adds the downsampled image to the features of every lower level (NCSN++).
        """
        if img_resolution % 2 ** (len(widths) - 1):
            raise ValueError(
                f"img_resolution {img_resolution} cannot be halved {len(widths) - 1} times; shorten channel_mult"
            )
        resolutions = [img_resolution >> level for level in range(len(widths))]
        self.enc = torch.nn.ModuleDict()
        saved = []
        x = image = in_channels
        for level, (res, width) in enumerate(zip(resolutions, widths)):
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(x, first_width, kernel=3, **init)
                x = first_width
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(x, x, down=True, resample_filter=resample_filter, **block)
                if residual_image:
                    self.enc[f"{res}x{res}_aux_residual"] = Conv2d(
                        image, x, kernel=3, down=True, resample_filter=resample_filter, fused_resample=True, **init
                    )
                    image = x
            saved.append(x)
            for i in range(num_blocks):
                attention = res in attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = UNetBlock(x, width, attention=attention, **block)
                x = width
                saved.append(x)

        self.dec = torch.nn.ModuleDict()
        for level, (res, width) in reversed(list(enumerate(zip(resolutions, widths)))):
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(x, x, attention=True, **block)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(x, x, **block)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(x, x, up=True, resample_filter=resample_filter, **block)
            for i in range(num_blocks + 1):
                attention = res in attn_resolutions and (attn_every_block or i == num_blocks)
                self.dec[f"{res}x{res}_block{i}"] = UNetBlock(x + saved.pop(), width, attention=attention, **block)
                x = width
        return x

    def _features(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Map image [N, in_channels, H, W] and embedding [N or 1, E] to features [N, C, H, W] for the output layers."""
        saved: list[torch.Tensor] = []
        image = x
        for name, module in self.enc.items():
            if name.endswith("_aux_residual"):
                image = x = saved[-1] = (x + module(image)) * math.sqrt(0.5)
            else:
                x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
                saved.append(x)
        for module in self.dec.values():
            if isinstance(module, UNetBlock):
                if module.in_channels != x.shape[1]:
                    x = torch.cat([x, saved.pop()], dim=1)
                x = module(x, emb)
        return x

    def _drop_labels(self, class_labels: torch.Tensor | None) -> torch.Tensor:
        """Set whole rows of the labels to zero with probability `label_dropout`, in training mode only."""
        if class_labels is None:
            raise ValueError("a network with class labels needs class_labels; zeros stand for no class")
        if not (self.training and self.label_dropout):
            return class_labels
        keep = torch.rand([class_labels.shape[0], 1], device=class_labels.device) >= self.label_dropout
        return class_labels * keep


@persistence.persistent_class
class SongUNet(_UNet):
    """DDPM++ and NCSN++ (Song et al. 2021, arXiv 2011.13456) as used in EDM.

    DDPM++ is the default. NCSN++ is embedding_type 'fourier', encoder_type 'residual', channel_mult_noise 2,
    resample_filter [1, 3, 3, 1].

    Args:
        img_resolution: height and width.
        in_channels, out_channels: colour channels in and out.
        label_dim: class-label entries, 0 for an unconditional network.
        augment_dim: augmentation-label entries, 0 for none.
        model_channels: base width.
        channel_mult: width of each level, highest resolution first, in units of model_channels.
        channel_mult_emb: width of the embedding in the same units.
        num_blocks: blocks per level.
        attn_resolutions: resolutions with self-attention (one head).
        dropout: probability inside the blocks, in training mode only.
        label_dropout: probability of zeroing a sample's class label, in training mode only.
        embedding_type: 'positional' or 'fourier'.
        channel_mult_noise: width of the noise embedding in units of model_channels.
        encoder_type: 'standard' or 'residual'.
        decoder_type: 'standard'.
        resample_filter: taps of the resampling filter.

    Raises:
        ValueError: for other types than the above, or widths and sizes that do not divide.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ):
        for name, value, known in [
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "residual")),
            ("decoder_type", decoder_type, ("standard",)),
        ]:
            if value not in known:
                raise ValueError(f"{name} '{value}' is not supported; use {' or '.join(known)}")
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        init: dict = {"init_mode": "xavier_uniform"}
        init_zero: dict = {"init_mode": "xavier_uniform", "init_weight": 1e-5}
        block = {
            "emb_channels": emb_channels,
            "num_heads": 1,
            "dropout": dropout,
            "skip_scale": math.sqrt(0.5),
            "eps": 1e-6,
            "resample_proj": True,
            "adaptive_scale": False,
            "init": init,
            "init_zero": init_zero,
            "init_attn": {"init_mode": "xavier_uniform", "init_weight": math.sqrt(0.2)},
        }

        self.map_noise: torch.nn.Module
        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, **init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, **init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        width = self._build(
            img_resolution,
            in_channels,
            first_width=model_channels,
            widths=[model_channels * mult for mult in channel_mult],
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
            attn_every_block=False,
            block=block,
            init=init,
            resample_filter=resample_filter,
            residual_image=encoder_type == "residual",
        )
        output = f"{img_resolution}x{img_resolution}_aux"
        self.dec[f"{output}_norm"] = GroupNorm(width, eps=1e-6)
        self.dec[f"{output}_conv"] = Conv2d(width, out_channels, kernel=3, **init_zero)

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map x [N, in_channels, H, W], c_noise [N or 1], labels [N or 1, L], augment labels [N, augment_dim] to F.

        Returns:
            [N, out_channels, H, W], in the dtype of x.
        """
        emb = self.map_noise(noise_labels)
        emb = emb.roll(emb.shape[1] // 2, dims=1)  # these weights expect sines first
        if self.map_label is not None:
            labels = self._drop_labels(class_labels)
            emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

        x = self._features(x, emb)
        norm, conv = list(self.dec.values())[-2:]
        return conv(F.silu(norm(x)))


@persistence.persistent_class
class DhariwalUNet(_UNet):
    """ADM (Dhariwal & Nichol 2021, arXiv 2105.05233) as used in EDM.

    Args:
        img_resolution: height and width.
        in_channels, out_channels: colour channels in and out.
        label_dim: class-label entries, 0 for an unconditional network.
        augment_dim: augmentation-label entries, 0 for none.
        model_channels: base width.
        channel_mult: width of each level, highest resolution first, in units of model_channels.
        channel_mult_emb: width of the embedding in the same units.
        num_blocks: blocks per level.
        attn_resolutions: resolutions with self-attention, one head per 64 channels (none below 64).
        dropout: probability inside the blocks, in training mode only.
        label_dropout: probability of zeroing a sample's class label, in training mode only.

    Raises:
        ValueError: for widths and sizes that do not divide.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0,
    ):
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        third = math.sqrt(1 / 3)
        init: dict = {"init_mode": "kaiming_uniform", "init_weight": third, "init_bias": third}
        init_zero: dict = {"init_mode": "kaiming_uniform", "init_weight": 0, "init_bias": 0}
        block = {
            "emb_channels": emb_channels,
            "channels_per_head": 64,
            "dropout": dropout,
            "init": init,
            "init_zero": init_zero,
        }

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, **init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        self.map_label = None
        if label_dim:
            self.map_label = Linear(
                label_dim, emb_channels, bias=False, init_mode="kaiming_normal", init_weight=math.sqrt(label_dim)
            )
        widths = [model_channels * mult for mult in channel_mult]
        width = self._build(
            img_resolution,
            in_channels,
            first_width=widths[0],
            widths=widths,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
            attn_every_block=True,
            block=block,
            init=init,
        )
        self.out_norm = GroupNorm(width)
        self.out_conv = Conv2d(width, out_channels, kernel=3, **init_zero)

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map x [N, in_channels, H, W], c_noise [N or 1], labels [N or 1, L], augment labels [N, augment_dim] to F.

        Returns:
            [N, out_channels, H, W], in the dtype of x.
        """
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self._drop_labels(class_labels))
        x = self._features(x, F.silu(emb))
        return self.out_conv(F.silu(self.out_norm(x)))


# ---------------------------------------------------------------------------------------------------------------------
# Preconditioners: D(x; s) = c_skip x + c_out F(c_in x; c_noise), arXiv 2206.00364 table 1.

_UNETS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


class _Precond(torch.nn.Module):
    """A U-Net made into a denoiser by the four coefficients that a subclass has.

    Attributes:
        img_resolution, img_channels, label_dim: what the network takes.
        use_fp16: run the U-Net in half precision on CUDA.
        sigma_min, sigma_max: the noise levels it supports.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool,
        model_type: str,
        out_channels: int,
        model_kwargs: dict,
    ):
        if model_type not in _UNETS:
            raise ValueError(f"model_type '{model_type}' is unknown; use {' or '.join(_UNETS)}")
        super().__init__()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.model = _UNETS[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=out_channels,
            label_dim=label_dim,
            **model_kwargs,
        )

    def _coefficients(self, sigma: torch.Tensor) -> tuple:
        """Return c_skip, c_out, c_in, c_noise for `sigma` [N or 1, 1, 1, 1]: numbers or tensors of that shape."""
        raise NotImplementedError

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        force_fp32: bool = False,
        **model_kwargs,
    ) -> torch.Tensor:
        """Denoise x = clean image + sigma * unit normal.

        The U-Net runs in half precision when `use_fp16` is set and x is on CUDA, or in autocast's dtype where autocast
        is enabled; its embeddings, the attention softmax and everything outside it stay in float32.

        Args:
            x: [N, img_channels, img_resolution, img_resolution], clean images being in [-1, 1].
            sigma: noise level, one number or one per sample.
            class_labels: [N, label_dim], usually one-hot; None means all zero. Ignored by an unconditional network.
            force_fp32: run in float32 whatever the above says.
            model_kwargs: passed to the U-Net: `augment_labels` [N, augment_dim], None meaning all zero.

        Returns:
            Denoised images, float32, shaped as x.
        """
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, device=x.device).to(torch.float32).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        else:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)

        c_skip, c_out, c_in, c_noise = self._coefficients(sigma)
        dtype, context = self._precision(x.device.type, force_fp32)
        with context:
            F_x = self.model((c_in * x).to(dtype), c_noise.flatten(), class_labels, **model_kwargs)
        return c_skip * x + c_out * F_x[:, : self.img_channels].to(torch.float32)

    def _precision(self, device_type: str, force_fp32: bool) -> tuple[torch.dtype, contextlib.AbstractContextManager]:
        """Return the dtype for the U-Net and a context to run it in.

        The layers follow the dtype of what enters them, so autocast itself is switched off inside: it would take the
        embeddings down and the group norms up, at a cost in accuracy and in speed.
        """
        available = _KNOWS_AUTOCAST and torch.amp.is_autocast_available(device_type)
        if available and torch.is_autocast_enabled(device_type):
            dtype = torch.float32 if force_fp32 else torch.get_autocast_dtype(device_type)
            return dtype, torch.autocast(device_type, enabled=False)
        half = self.use_fp16 and not force_fp32 and device_type == "cuda"
        return torch.float16 if half else torch.float32, contextlib.nullcontext()

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Return the nearest noise level that the network knows: `sigma` itself, since it knows any level."""
        return torch.as_tensor(sigma)


@persistence.persistent_class
class EDMPrecond(_Precond):
    """EDM preconditioning (arXiv 2206.00364, table 1): unit variance at input and training target for every sigma.

    Args:
        img_resolution, img_channels, label_dim: image size, colour channels, class-label entries (0: unconditional).
        use_fp16: run the U-Net in half precision on CUDA.
        sigma_min, sigma_max: supported noise levels.
        sigma_data: standard deviation of the training images.
        model_type: 'DhariwalUNet' or 'SongUNet'.
        model_kwargs: further arguments of that class.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0,
        sigma_max: float = float("inf"),
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **model_kwargs,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, img_channels, model_kwargs)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data

    def _coefficients(self, sigma: torch.Tensor) -> tuple:
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


@persistence.persistent_class
class VPPrecond(_Precond):
    """Variance-preserving preconditioning (arXiv 2206.00364, table 1), for DDPM++ weights trained in continuous time.

    Args:
        img_resolution, img_channels, label_dim: image size, colour channels, class-label entries (0: unconditional).
        use_fp16: run the U-Net in half precision on CUDA.
        beta_d, beta_min: slope and start of the noise schedule.
        M: number of noise levels the U-Net's noise input is scaled to.
        epsilon_t: smallest time of the schedule.
        model_type: 'DhariwalUNet' or 'SongUNet'.
        model_kwargs: further arguments of that class.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        model_type: str = "SongUNet",
        **model_kwargs,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, img_channels, model_kwargs)
        self.beta_d = beta_d
        self.beta_min = beta_min
        self.M = M
        self.epsilon_t = epsilon_t
        self.sigma_min, self.sigma_max = (
            float(self.sigma(torch.tensor(t, dtype=torch.float32, device="cpu"))) for t in (epsilon_t, 1.0)
        )

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Return the noise level at time t in [epsilon_t, 1]."""
        return ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt()

    def sigma_inv(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the time at a noise level; 1 + sigma^2 is rounded as when published weights were trained: no log1p."""
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d

    def _coefficients(self, sigma: torch.Tensor) -> tuple:
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)


@persistence.persistent_class
class VEPrecond(_Precond):
    """Variance-exploding preconditioning (arXiv 2206.00364, table 1), for NCSN++ weights trained in continuous time.

    Args:
        img_resolution, img_channels, label_dim: image size, colour channels, class-label entries (0: unconditional).
        use_fp16: run the U-Net in half precision on CUDA.
        sigma_min, sigma_max: supported noise levels.
        model_type: 'DhariwalUNet' or 'SongUNet'.
        model_kwargs: further arguments of that class.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.02,
        sigma_max: float = 100,
        model_type: str = "SongUNet",
        **model_kwargs,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, img_channels, model_kwargs)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def _coefficients(self, sigma: torch.Tensor) -> tuple:
        return 1, sigma, 1, (0.5 * sigma).log()


@persistence.persistent_class
class iDDPMPrecond(_Precond):
    """Improved-DDPM preconditioning (arXiv 2206.00364, table 1): M discrete noise levels, cosine schedule.

    The U-Net has twice the image channels, of which the first half is used (the rest are the learned variances of
    Nichol & Dhariwal 2021, arXiv 2102.09672).

    Args:
        img_resolution, img_channels, label_dim: image size, colour channels, class-label entries (0: unconditional).
        use_fp16: run the U-Net in half precision on CUDA.
        C_1, C_2: constants of the schedule.
        M: number of noise levels; `u` holds them in falling order, u[M] being 0.
        model_type: 'DhariwalUNet' or 'SongUNet'.
        model_kwargs: further arguments of that class.
    """

    u: torch.Tensor

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        model_type: str = "DhariwalUNet",
        **model_kwargs,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, img_channels * 2, model_kwargs)
        self.C_1 = C_1
        self.C_2 = C_2
        self.M = M
        # In float32 throughout, the sines by torch: published weights hold a table made like this, errors included.
        step = torch.arange(M + 1, device="cpu")
        alpha_bar = (0.5 * np.pi * step / M / (C_2 + 1)).sin() ** 2
        ratio = (alpha_bar[:-1] / alpha_bar[1:]).clip(min=C_1)
        u = torch.zeros(M + 1, device="cpu")
        for j in range(M, 0, -1):
            u[j - 1] = ((u[j] ** 2 + 1) / ratio[j - 1] - 1).sqrt()
        self.register_buffer("u", torch.tensor(u.numpy()))
        self.sigma_min = float(u[M - 1])
        self.sigma_max = float(u[0])

    def _coefficients(self, sigma: torch.Tensor) -> tuple:
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), self.M - 1 - self._nearest(sigma).to(torch.float32)

    def _nearest(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma.flatten()[:, None] - self.u.to(sigma.device)).abs().argmin(dim=1)

    def round_sigma(self, sigma: torch.Tensor | float, return_index: bool = False) -> torch.Tensor:
        """Return the nearest noise level of the table `u`, with the dtype and shape of `sigma`, or its index in `u`."""
        sigma = torch.as_tensor(sigma)
        index = self._nearest(sigma)
        if return_index:
            return index.reshape(sigma.shape)
        return self.u.to(sigma.device)[index].to(sigma.dtype).reshape(sigma.shape)
