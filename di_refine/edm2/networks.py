"""The denoising network of EDM2 (Karras et al. 2024, arXiv 2312.02696), named and shaped as its published weights.

Every layer keeps the magnitude of what passes through it (section 2 and appendix B there): weights have unit norm,
activations are normalised by constants, and there are no biases. Weights are stored unnormalised; a forward pass uses
them normalised, and one in training mode also stores them so (forced weight normalisation), since their updates would
otherwise shrink in comparison as they grow.

This module imports nothing of the project but `torch_utils.persistence`: its text is written into every snapshot, where
it also has to run beside the `torch_utils` package of the official code. Constructors work under
`torch.device('meta')`.

Shapes: N batch, C channels, H W height and width, L label_dim, E embedding width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from torch_utils import persistence

# ---------------------------------------------------------------------------------------------------------------------
# Operations that keep magnitudes (arXiv 2312.02696, appendix B). They compute norms in float32.


def normalize(x: torch.Tensor, dim: Sequence[int] | None = None, eps: float = 1e-4) -> torch.Tensor:
    """Return x with a root mean square of about 1 over `dim`, by default over all but the first."""
    if dim is None:
        dim = range(1, x.ndim)
    axes = [axis % x.ndim for axis in dim]
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=torch.float32)
    count = math.prod(x.shape[axis] for axis in axes)
    return x / (eps + norm / math.sqrt(count)).to(x.dtype)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """Return SiLU, scaled to keep the magnitude of unit normals (equation 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Return the mean (1 - t) a + t b, scaled to keep the magnitude of independent a and b (equation 88)."""
    return torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Return a [N, Ca, ...] and b [N, Cb, ...] as one, with shares 1 - t and t of the magnitude (equation 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n_a)), b * (scale * t / math.sqrt(n_b))], dim=1)


def resample(x: torch.Tensor, taps: Sequence[float], mode: str) -> torch.Tensor:
    """Double ('up') or halve ('down') height and width by a separable filter of even length; 'keep' returns x."""
    if mode == "keep":
        return x
    if list(taps) == [1, 1]:  # pixel repetition and the 2x2 mean, for which torch has faster kernels
        return F.interpolate(x, scale_factor=2, mode="nearest") if mode == "up" else F.avg_pool2d(x, 2)
    line = torch.tensor(taps, dtype=torch.float32)
    outer = (torch.outer(line, line) / line.sum() ** 2).to(x.device, x.dtype)
    channels, padding = x.shape[1], (len(taps) - 1) // 2
    if mode == "up":  # zeros lie between the pixels: the gain of 4 makes up for them
        weight = (4 * outer).expand(channels, 1, -1, -1)
        return F.conv_transpose2d(x, weight, groups=channels, stride=2, padding=padding)
    return F.conv2d(x, outer.expand(channels, 1, -1, -1), groups=channels, stride=2, padding=padding)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@persistence.persistent_class
class MPFourier(torch.nn.Module):
    """Random Fourier features sqrt(2) cos(freqs x + phases), of unit magnitude (equation 75): [N] -> [N, channels]."""

    freqs: torch.Tensor
    phases: torch.Tensor

    def __init__(self, num_channels: int, bandwidth: float = 1):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels) * bandwidth)
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(x.to(torch.float32), self.freqs.to(torch.float32)) + self.phases.to(torch.float32)
        return (angles.cos() * math.sqrt(2)).to(x.dtype)


@persistence.persistent_class
class MPConv(torch.nn.Module):
    """Linear layer (empty `kernel`) or convolution with 'same' padding, whose weights have unit norm (equation 47).

    Args:
        in_channels, out_channels: widths.
        kernel: height and width of the kernel, odd; empty for a linear layer.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int]):
        super().__init__()
        self.out_channels = out_channels
        self.weight = torch.nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    @torch.no_grad()
    def force_norm(self) -> None:
        """Store the weight normalised (forced weight normalisation, equation 66); outputs stay the same."""
        self.weight.copy_(normalize(self.weight.to(torch.float32)))

    def forward(self, x: torch.Tensor, gain: torch.Tensor | float = 1) -> torch.Tensor:
        if self.training:
            self.force_norm()
        weight = normalize(self.weight.to(torch.float32))
        weight = (weight * (gain / math.sqrt(weight[0].numel()))).to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


@persistence.persistent_class
class Block(torch.nn.Module):
    """Residual block, modulated by an embedding, then optional self-attention.

    Args:
        in_channels, out_channels, emb_channels: widths of input, output and embedding.
        flavor: 'enc' normalises each pixel before both paths, 'dec' does not.
        resample_mode: 'keep', 'up' or 'down', done first.
        resample_filter: its taps.
        attention: add self-attention.
        channels_per_head: width of a head; there are out_channels // channels_per_head, and without one no attention.
        dropout: probability before the second convolution, in training mode only.
        res_balance, attn_balance: the share t of the residual path and of attention in `mp_sum`.
        clip_act: activations are clipped to this at the end; None does not.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        flavor: str = "enc",
        resample_mode: str = "keep",
        resample_filter: Sequence[float] = (1, 1),
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ):
        super().__init__()
        self.out_channels = out_channels
        self.flavor = flavor
        self.resample_filter = list(resample_filter)
        self.resample_mode = resample_mode
        self.num_heads = out_channels // channels_per_head if attention else 0
        self.dropout = dropout
        self.res_balance = res_balance
        self.attn_balance = attn_balance
        self.clip_act = clip_act
        self.emb_gain = torch.nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, kernel=[3, 3])
        self.emb_linear = MPConv(emb_channels, out_channels, kernel=[])
        self.conv_res1 = MPConv(out_channels, out_channels, kernel=[3, 3])
        self.conv_skip = MPConv(in_channels, out_channels, kernel=[1, 1]) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, out_channels * 3, kernel=[1, 1]) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, kernel=[1, 1]) if self.num_heads else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Map features x [N, in_channels, H, W] and an embedding [N or 1, E] to [N, out_channels, H', W']."""
        x = resample(x, self.resample_filter, self.resample_mode)
        if self.flavor == "enc":
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), dim=[1])
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * scale[:, :, None, None].to(y.dtype))
        y = self.conv_res1(F.dropout(y, p=self.dropout, training=self.training))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, t=self.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            x = mp_sum(x, self.attn_proj(self._attention(self.attn_qkv(x))), t=self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def _attention(self, qkv: torch.Tensor) -> torch.Tensor:
        """Return the attended values [N, C, H, W] of [N, 3 C, H, W], whose channels run (head, channel, part)."""
        n, _, height, width = qkv.shape
        parts = normalize(qkv.reshape(n, self.num_heads, -1, 3, height * width), dim=[2])
        q, k, v = (part.transpose(2, 3) for part in parts.unbind(3))  # [N, heads, T, width of a head]
        if hasattr(F, "scaled_dot_product_attention"):
            y = F.scaled_dot_product_attention(q, k, v)
        else:  # torch before 2.0
            weight = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1, dtype=torch.float32)
            y = weight.to(v.dtype) @ v
        return y.transpose(2, 3).reshape(n, -1, height, width)


@persistence.persistent_class
class UNet(torch.nn.Module):
    """The U-Net of EDM2: F(x; c_noise, labels), whose raw output has unit magnitude once `out_gain` has grown.

    Args:
        img_resolution, img_channels: of the images.
        label_dim: class-label entries; 0 for an unconditional network.
        model_channels: the unit of all widths.
        channel_mult: width of each level, from full resolution down, in this unit.
        channel_mult_noise, channel_mult_emb: width of the noise features and of the embedding; None is that of the
            first level and of the widest.
        num_blocks: blocks per level of the encoder; the decoder has one more.
        attn_resolutions: resolutions with self-attention.
        label_balance, concat_balance: the share t of labels in the embedding, and of skip connections in the decoder.
        block_kwargs: further arguments of `Block`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        **block_kwargs,
    ):
        super().__init__()
        widths = [model_channels * mult for mult in channel_mult]
        noise_width = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        emb_width = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        self.label_balance = label_balance
        self.concat_balance = concat_balance
        self.out_gain = torch.nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_width)
        self.emb_noise = MPConv(noise_width, emb_width, kernel=[])
        self.emb_label = MPConv(label_dim, emb_width, kernel=[]) if label_dim else None

        def block(inner: int, outer: int, flavor: str, **kwargs) -> Block:
            return Block(inner, outer, emb_width, flavor=flavor, **kwargs, **block_kwargs)

        self.enc, self.dec = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        sizes = [img_resolution >> level for level in range(len(widths))]
        width, saved = img_channels + 1, []
        for level, (size, wider) in enumerate(zip(sizes, widths)):
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = MPConv(width, wider, kernel=[3, 3])
                width = wider
            else:
                self.enc[f"{size}x{size}_down"] = block(width, width, "enc", resample_mode="down")
            saved.append(width)
            for index in range(num_blocks):
                self.enc[f"{size}x{size}_block{index}"] = block(width, wider, "enc", attention=size in attn_resolutions)
                width = wider
                saved.append(width)
        for level, (size, wider) in reversed(list(enumerate(zip(sizes, widths)))):
            if level == len(widths) - 1:
                self.dec[f"{size}x{size}_in0"] = block(width, width, "dec", attention=True)
                self.dec[f"{size}x{size}_in1"] = block(width, width, "dec")
            else:
                self.dec[f"{size}x{size}_up"] = block(width, width, "dec", resample_mode="up")
            for index in range(num_blocks + 1):
                inner = width + saved.pop()
                self.dec[f"{size}x{size}_block{index}"] = block(inner, wider, "dec", attention=size in attn_resolutions)
                width = wider
        self.out_conv = MPConv(width, img_channels, kernel=[3, 3])

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """Map x [N, img_channels, H, W], c_noise [N or 1] and labels [N or 1, L] to F, shaped and typed as x."""
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None and class_labels is not None:
            labels = class_labels * math.sqrt(class_labels.shape[1])
            emb = mp_sum(emb, self.emb_label(labels), t=self.label_balance)
        emb = mp_silu(emb)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # takes the place of biases
        saved = []
        for name, layer in self.enc.items():
            x = layer(x) if "conv" in name else layer(x, emb)
            saved.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                x = mp_cat(x, saved.pop(), t=self.concat_balance)
            x = layer(x, emb)
        return self.out_conv(x, gain=self.out_gain)


@persistence.persistent_class
class Precond(torch.nn.Module):
    """EDM's preconditioning (arXiv 2206.00364, table 1) of the U-Net of EDM2, and the log variance of its loss.

    Args:
        img_resolution, img_channels, label_dim: image size, colour channels, class-label entries (0: unconditional).
        use_fp16: run the U-Net in half precision on CUDA.
        sigma_data: standard deviation of the training images.
        logvar_channels: width of the features that the log variance is linear in.
        unet_kwargs: further arguments of `UNet`.

    Attributes:
        sigma_min, sigma_max: the noise levels it supports, which are all.
    """

    sigma_min, sigma_max = 0.0, math.inf

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool = True,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        **unet_kwargs,
    ):
        super().__init__()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.sigma_data = sigma_data
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet_kwargs)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, kernel=[])

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        force_fp32: bool = False,
        return_logvar: bool = False,
        **unet_kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Denoise x = clean image + sigma * unit normal.

        The U-Net runs in half precision when `use_fp16` is set and x is on CUDA, or in autocast's dtype where autocast
        is enabled; its embeddings and everything outside it stay in float32.

        Args:
            x: [N, img_channels, img_resolution, img_resolution], clean images being in [-1, 1].
            sigma: noise level, one number or one per sample.
            class_labels: [N, label_dim], usually one-hot; None means all zero. Ignored by an unconditional network.
            force_fp32: run in float32 whatever the above says.
            return_logvar: return the log variance u(sigma) [N or 1, 1, 1, 1] as well.
            unet_kwargs: passed to the U-Net.

        Returns:
            Denoised images, float32, shaped as x; with `return_logvar` a pair.
        """
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, device=x.device).to(torch.float32).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        else:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        total = sigma**2 + self.sigma_data**2
        c_skip, c_out, c_in = self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt()
        c_noise = sigma.flatten().log() / 4
        dtype, context = self._precision(x.device.type, force_fp32)
        with context:
            F_x = self.unet((c_in * x).to(dtype), c_noise, class_labels, **unet_kwargs)
        D_x = c_skip * x + c_out * F_x.to(torch.float32)
        if not return_logvar:
            return D_x
        return D_x, self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)

    def _precision(self, device_type: str, force_fp32: bool) -> tuple[torch.dtype, contextlib.AbstractContextManager]:
        """Return the dtype for the U-Net and a context to run it in.

        The layers follow the dtype of what enters them, so autocast itself is switched off inside: it would take the
        embeddings down, and norms up. Older releases (before 2.4) say in other words whether autocast is on; there it
        stays on.
        """
        available = hasattr(torch, "get_autocast_dtype") and torch.amp.is_autocast_available(device_type)
        if available and torch.is_autocast_enabled(device_type):
            dtype = torch.float32 if force_fp32 else torch.get_autocast_dtype(device_type)
            return dtype, torch.autocast(device_type, enabled=False)
        half = self.use_fp16 and not force_fp32 and device_type == "cuda"
        return torch.float16 if half else torch.float32, contextlib.nullcontext()

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Return the nearest noise level that the network knows: `sigma` itself, since it knows any level."""
        return torch.as_tensor(sigma)
