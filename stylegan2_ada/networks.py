"""StyleGAN2-ADA generator and discriminator (Karras et al., arXiv 1912.04958 and arXiv 2006.06676).

Constructor arguments, parameter names and call signatures are those of the public stylegan2-ada-pytorch networks, so
that weights move in both directions. This file is self-contained on purpose: its text is embedded in every network
pickle written from it and must run there beside any `torch_utils` package with the same names, from Python 3.8 and
torch 1.8 on.

Shapes: images `[N, img_channels, R, R]`, roughly in [-1, 1]; latents z `[N, z_dim]`; labels c `[N, c_dim]` one-hot;
intermediate latents ws `[N, num_ws, w_dim]`. Weights stay float32; blocks marked `use_fp16` compute in float16 on
CUDA, and in float32 elsewhere or with `force_fp32=True`.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from torch_utils import misc, persistence
from torch_utils.ops import bias_act, conv2d_resample, fma, upfirdn2d

SQRT_HALF = math.sqrt(0.5)


def normalize_2nd_moment(x: torch.Tensor, dim: int = 1, eps: float = 1e-8) -> torch.Tensor:
    """Scale `x` to unit mean square along `dim`."""
    return x * (x.square().mean(dim=dim, keepdim=True) + eps).rsqrt()


def modulated_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    noise: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int = 0,
    resample_filter: torch.Tensor | None = None,
    demodulate: bool = True,
    flip_weight: bool = True,
    fused_modconv: bool = False,
) -> torch.Tensor:
    """Convolve with input channels scaled per sample (arXiv 1912.04958, section 2.2, equations 1 to 3).

    Args:
        x: `[N, C_in, H, W]`.
        weight: `[C_out, C_in, k, k]`, float32.
        styles: `[N, C_in]`, float32.
        noise: added to the result; broadcastable to it, such as `[N, 1, H_out, W_out]` or `[H_out, W_out]`.
        up: up-sampling factor.
        down: down-sampling factor.
        padding: in up-sampled pixels.
        resample_filter: float32 filter, needed when `up` or `down` is not 1.
        demodulate: scale each output channel of each sample back to unit expected variance.
        flip_weight: False for convolution, True for correlation.
        fused_modconv: scale the weights, in one grouped convolution, instead of the activations before and after. The
            same result to rounding; worth it on a GPU for few, large images.

    Returns:
        `[N, C_out, H_out, W_out]`, dtype of `x`.
    """
    batch = x.shape[0]
    out_channels, in_channels, kh, kw = weight.shape
    misc.assert_shape(x, [batch, in_channels, None, None])
    misc.assert_shape(styles, [batch, in_channels])

    if x.dtype == torch.float16 and demodulate:
        # Demodulation undoes any scale of weights and styles, so bring both to where float16 cannot overflow.
        weight = weight * (
            weight.abs().amax(dim=[1, 2, 3], keepdim=True).reciprocal() / math.sqrt(in_channels * kh * kw)
        )
        styles = styles / styles.abs().amax(dim=1, keepdim=True)

    dcoefs = None  # [N, C_out]
    if demodulate:
        # sum over (in, k, k) of (w * s)^2 needs the kernel only through its energy per channel pair.
        energy = weight.square().sum(dim=[2, 3])  # [C_out, C_in]
        dcoefs = ((styles.square().unsqueeze(1) * energy).sum(dim=2) + 1e-8).rsqrt()

    resample: dict = {"f": resample_filter, "up": up, "down": down, "padding": padding, "flip_weight": flip_weight}
    if fused_modconv:
        w = weight * styles.reshape(batch, 1, in_channels, 1, 1)  # [N, C_out, C_in, k, k]
        if dcoefs is not None:
            w = w * dcoefs.reshape(batch, out_channels, 1, 1, 1)
        x = x.reshape(1, batch * in_channels, *x.shape[2:])
        w = w.reshape(batch * out_channels, in_channels, kh, kw).to(x.dtype)
        x = conv2d_resample.conv2d_resample(x, w, groups=batch, **resample)
        x = x.reshape(batch, out_channels, *x.shape[2:])
        return x if noise is None else x + noise.to(x.dtype)

    x = x * styles.to(x.dtype).reshape(batch, in_channels, 1, 1)
    x = conv2d_resample.conv2d_resample(x, weight.to(x.dtype), **resample)
    if dcoefs is not None:
        scale = dcoefs.to(x.dtype).reshape(batch, out_channels, 1, 1)
        return x * scale if noise is None else fma.fma(x, scale, noise.to(x.dtype))
    return x if noise is None else x + noise.to(x.dtype)


@persistence.persistent_class
class FullyConnectedLayer(torch.nn.Module):
    """Dense layer with equalised learning rate: weights are stored at unit variance and scaled at run time."""

    def __init__(self, in_features, out_features, bias=True, activation="linear", lr_multiplier=1, bias_init=0):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.weight = torch.nn.Parameter(torch.randn([out_features, in_features]) / lr_multiplier)
        self.bias = torch.nn.Parameter(torch.full([out_features], float(bias_init))) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features) if in_features else 1.0
        self.bias_gain = lr_multiplier

    def forward(self, x):
        w = self.weight.to(x.dtype) * self.weight_gain
        b = None if self.bias is None else self.bias.to(x.dtype) * self.bias_gain
        if self.activation == "linear":
            return torch.nn.functional.linear(x, w, b)
        return bias_act.bias_act(torch.nn.functional.linear(x, w), b, act=self.activation)


@persistence.persistent_class
class Conv2dLayer(torch.nn.Module):
    """Convolution with equalised learning rate, optional resampling, bias, activation and clamp."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        bias=True,
        activation="linear",
        up=1,
        down=1,
        resample_filter=(1, 3, 3, 1),
        conv_clamp=None,
        channels_last=False,
        trainable=True,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.activation = activation
        self.up = up
        self.down = down
        self.conv_clamp = conv_clamp
        self.padding = kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.act_gain = bias_act.activation_funcs[activation].def_gain
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        weight = _memory_format(torch.randn([out_channels, in_channels, kernel_size, kernel_size]), channels_last)
        offset = torch.zeros([out_channels]) if bias else None
        if trainable:
            self.weight = torch.nn.Parameter(weight)
            self.bias = None if offset is None else torch.nn.Parameter(offset)
        else:  # frozen layers keep their values as buffers, out of the optimizer's sight
            self.register_buffer("weight", weight)
            if offset is None:
                self.bias = None
            else:
                self.register_buffer("bias", offset)

    def forward(self, x, gain=1):
        x = conv2d_resample.conv2d_resample(
            x,
            (self.weight * self.weight_gain).to(x.dtype),
            f=self.resample_filter,
            up=self.up,
            down=self.down,
            padding=self.padding,
            flip_weight=self.up == 1,
        )
        b = None if self.bias is None else self.bias.to(x.dtype)
        return _bias_act(self, x, b, gain)


@persistence.persistent_class
class MappingNetwork(torch.nn.Module):
    """Maps latents and labels to intermediate latents: an embedding of c beside the normalised z, then dense layers.

    With `num_ws=None` the result is `[N, w_dim]` (the discriminator's label mapping), else `[N, num_ws, w_dim]`.
    """

    def __init__(
        self,
        z_dim,
        c_dim,
        w_dim,
        num_ws,
        num_layers=8,
        embed_features=None,
        layer_features=None,
        activation="lrelu",
        lr_multiplier=0.01,
        w_avg_beta=0.995,
    ):
        super().__init__()
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.num_ws = num_ws
        self.num_layers = num_layers
        self.w_avg_beta = w_avg_beta
        embed_features = w_dim if embed_features is None else embed_features
        layer_features = w_dim if layer_features is None else layer_features
        embed_features = embed_features if c_dim > 0 else 0
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embed_features)
        widths = [z_dim + embed_features] + [layer_features] * (num_layers - 1) + [w_dim]
        for index in range(num_layers):
            layer = FullyConnectedLayer(
                widths[index], widths[index + 1], activation=activation, lr_multiplier=lr_multiplier
            )
            setattr(self, f"fc{index}", layer)
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros([w_dim]))

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, skip_w_avg_update=False):
        parts = []
        if self.z_dim > 0:
            misc.assert_shape(z, [None, self.z_dim])
            parts.append(normalize_2nd_moment(z.to(torch.float32)))
        if self.c_dim > 0:
            misc.assert_shape(c, [None, self.c_dim])
            parts.append(normalize_2nd_moment(self.embed(c.to(torch.float32))))
        w = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        for index in range(self.num_layers):
            w = getattr(self, f"fc{index}")(w)

        if self.training and self.w_avg_beta is not None and not skip_w_avg_update:
            self.w_avg.copy_(w.detach().float().mean(dim=0).lerp(self.w_avg, self.w_avg_beta))
        if self.num_ws is None:
            return w
        ws = w.unsqueeze(1).repeat([1, self.num_ws, 1])
        if truncation_psi != 1:
            if self.w_avg_beta is None:
                raise ValueError("this mapping network keeps no average w, so truncation_psi must be 1")
            cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
            ws[:, :cutoff] = self.w_avg.lerp(ws[:, :cutoff], truncation_psi)
        return ws


@persistence.persistent_class
class SynthesisLayer(torch.nn.Module):
    """Modulated convolution, followed by noise, bias and activation.

    `noise_mode`: 'random' draws one field per sample, 'const' uses the stored field, 'none' adds nothing.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        w_dim,
        resolution,
        kernel_size=3,
        up=1,
        use_noise=True,
        activation="lrelu",
        resample_filter=(1, 3, 3, 1),
        conv_clamp=None,
        channels_last=False,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.w_dim = w_dim
        self.resolution = resolution
        self.up = up
        self.use_noise = use_noise
        self.activation = activation
        self.conv_clamp = conv_clamp
        self.padding = kernel_size // 2
        self.act_gain = bias_act.activation_funcs[activation].def_gain
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        weight = torch.randn([out_channels, in_channels, kernel_size, kernel_size])
        self.weight = torch.nn.Parameter(_memory_format(weight, channels_last))
        if use_noise:
            self.register_buffer("noise_const", torch.randn([resolution, resolution]))
            self.noise_strength = torch.nn.Parameter(torch.zeros([]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))

    def forward(self, x, w, noise_mode="random", fused_modconv=False, gain=1):
        if noise_mode not in ("random", "const", "none"):
            raise ValueError(f"noise_mode must be 'random', 'const' or 'none', not {noise_mode!r}")
        noise = None
        if self.use_noise and noise_mode == "random":
            size = [x.shape[0], 1, self.resolution, self.resolution]
            noise = torch.randn(size, device=x.device) * self.noise_strength
        elif self.use_noise and noise_mode == "const":
            noise = self.noise_const * self.noise_strength
        x = modulated_conv2d(
            x,
            self.weight,
            self.affine(w),
            noise=noise,
            up=self.up,
            padding=self.padding,
            resample_filter=self.resample_filter,
            flip_weight=self.up == 1,
            fused_modconv=fused_modconv,
        )
        return _bias_act(self, x, self.bias.to(x.dtype), gain)


@persistence.persistent_class
class ToRGBLayer(torch.nn.Module):
    """Maps features to an image by a modulated 1x1 convolution, not demodulated; the styles carry the weight gain."""

    def __init__(self, in_channels, out_channels, w_dim, kernel_size=1, conv_clamp=None, channels_last=False):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.w_dim = w_dim
        self.conv_clamp = conv_clamp
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        weight = torch.randn([out_channels, in_channels, kernel_size, kernel_size])
        self.weight = torch.nn.Parameter(_memory_format(weight, channels_last))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))

    def forward(self, x, w, fused_modconv=False):
        styles = self.affine(w) * self.weight_gain
        x = modulated_conv2d(x, self.weight, styles, demodulate=False, fused_modconv=fused_modconv)
        return bias_act.bias_act(x, self.bias.to(x.dtype), clamp=self.conv_clamp)


@persistence.persistent_class
class SynthesisBlock(torch.nn.Module):
    """All layers at one resolution; `in_channels=0` makes the first block, which starts from a learned constant."""

    def __init__(
        self,
        in_channels,
        out_channels,
        w_dim,
        resolution,
        img_channels,
        is_last,
        architecture="skip",
        resample_filter=(1, 3, 3, 1),
        conv_clamp=None,
        use_fp16=False,
        fp16_channels_last=False,
        **layer_kwargs,
    ):
        super().__init__()
        _check_architecture(architecture)
        self.in_channels = in_channels
        self.w_dim = w_dim
        self.resolution = resolution
        self.img_channels = img_channels
        self.is_last = is_last
        self.architecture = architecture
        self.use_fp16 = use_fp16
        self.channels_last = use_fp16 and fp16_channels_last
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        shared = {"w_dim": w_dim, "conv_clamp": conv_clamp, "channels_last": self.channels_last}
        layer = {"resolution": resolution, **shared, **layer_kwargs}
        self.num_conv = 0
        self.num_torgb = 0
        if in_channels == 0:
            self.const = torch.nn.Parameter(torch.randn([out_channels, resolution, resolution]))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, up=2, resample_filter=resample_filter, **layer)
            self.num_conv += 1
        self.conv1 = SynthesisLayer(out_channels, out_channels, **layer)
        self.num_conv += 1
        if is_last or architecture == "skip":
            self.torgb = ToRGBLayer(out_channels, img_channels, **shared)
            self.num_torgb += 1
        if in_channels != 0 and architecture == "resnet":
            self.skip = Conv2dLayer(
                in_channels,
                out_channels,
                kernel_size=1,
                bias=False,
                up=2,
                resample_filter=resample_filter,
                channels_last=self.channels_last,
            )

    def forward(self, x, img, ws, force_fp32=False, fused_modconv=None, noise_mode="random"):
        misc.assert_shape(ws, [None, self.num_conv + self.num_torgb, self.w_dim])
        dtype, memory_format = _compute_format(self, ws.device, force_fp32)
        if fused_modconv is None:
            # Grouped convolution pays on a GPU when no weight gradients are wanted; float16 with groups is slow above
            # one.
            fused_modconv = ws.is_cuda and not self.training and (dtype == torch.float32 or len(ws) == 1)
        w_iter = iter(ws.unbind(dim=1))
        layer = {"noise_mode": noise_mode, "fused_modconv": fused_modconv}

        if self.in_channels == 0:
            x = self.const.to(dtype=dtype).expand(ws.shape[0], -1, -1, -1).contiguous(memory_format=memory_format)
            x = self.conv1(x, next(w_iter), **layer)
        else:
            misc.assert_shape(x, [None, self.in_channels, self.resolution // 2, self.resolution // 2])
            x = x.to(dtype=dtype, memory_format=memory_format)
            if self.architecture == "resnet":
                y = self.skip(x, gain=SQRT_HALF)
                x = self.conv0(x, next(w_iter), **layer)
                x = y + self.conv1(x, next(w_iter), gain=SQRT_HALF, **layer)
            else:
                x = self.conv0(x, next(w_iter), **layer)
                x = self.conv1(x, next(w_iter), **layer)

        if img is not None:
            img = upfirdn2d.upsample2d(img, self.resample_filter)
        if self.is_last or self.architecture == "skip":
            y = self.torgb(x, next(w_iter), fused_modconv=fused_modconv).to(torch.float32)
            img = y if img is None else img + y
        return x, img


@persistence.persistent_class
class SynthesisNetwork(torch.nn.Module):
    """Maps intermediate latents to images, block by block from 4x4 to `img_resolution`."""

    def __init__(
        self, w_dim, img_resolution, img_channels, channel_base=32768, channel_max=512, num_fp16_res=0, **block_kwargs
    ):
        super().__init__()
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_resolution_log2 = _log2(img_resolution)
        self.img_channels = img_channels
        self.num_fp16_res = num_fp16_res
        self.block_resolutions = [2**i for i in range(2, self.img_resolution_log2 + 1)]
        self.num_ws = 0
        channels = {res: min(channel_base // res, channel_max) for res in self.block_resolutions}
        for res in self.block_resolutions:
            block = SynthesisBlock(
                channels[res // 2] if res > 4 else 0,
                channels[res],
                w_dim=w_dim,
                resolution=res,
                img_channels=img_channels,
                is_last=res == img_resolution,
                use_fp16=_uses_fp16(res, self.img_resolution_log2, num_fp16_res),
                **block_kwargs,
            )
            self.num_ws += block.num_conv
            setattr(self, f"b{res}", block)
        self.num_ws += 1  # the last torgb; every other one shares its w with the next block's first layer

    def forward(self, ws, **block_kwargs):
        misc.assert_shape(ws, [None, self.num_ws, self.w_dim])
        ws = ws.to(torch.float32)
        x = img = None
        start = 0
        for res in self.block_resolutions:
            block = getattr(self, f"b{res}")
            x, img = block(x, img, ws.narrow(1, start, block.num_conv + block.num_torgb), **block_kwargs)
            start += block.num_conv
        return img


@persistence.persistent_class
class Generator(torch.nn.Module):
    """StyleGAN2 generator: `generator(z, c, truncation_psi=1, truncation_cutoff=None, noise_mode='random') ->
    images`.
    """

    def __init__(self, z_dim, c_dim, w_dim, img_resolution, img_channels, mapping_kwargs=None, synthesis_kwargs=None):
        super().__init__()
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.synthesis = SynthesisNetwork(w_dim, img_resolution, img_channels, **(synthesis_kwargs or {}))
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, num_ws=self.num_ws, **(mapping_kwargs or {}))

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, **synthesis_kwargs):
        ws = self.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        return self.synthesis(ws, **synthesis_kwargs)


@persistence.persistent_class
class DiscriminatorBlock(torch.nn.Module):
    """The discriminator's layers at one resolution; `in_channels=0` makes the first block, which reads only the
    image.
    """

    def __init__(
        self,
        in_channels,
        tmp_channels,
        out_channels,
        resolution,
        img_channels,
        first_layer_idx,
        architecture="resnet",
        activation="lrelu",
        resample_filter=(1, 3, 3, 1),
        conv_clamp=None,
        use_fp16=False,
        fp16_channels_last=False,
        freeze_layers=0,
    ):
        super().__init__()
        _check_architecture(architecture)
        self.in_channels = in_channels
        self.resolution = resolution
        self.img_channels = img_channels
        self.first_layer_idx = first_layer_idx
        self.architecture = architecture
        self.use_fp16 = use_fp16
        self.channels_last = use_fp16 and fp16_channels_last
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self.num_layers = 0

        def layer_kwargs():  # freezing counts layers in the order they are made
            index = first_layer_idx + self.num_layers
            self.num_layers += 1
            return {"trainable": index >= freeze_layers, "channels_last": self.channels_last}

        act = {"activation": activation, "conv_clamp": conv_clamp}
        if in_channels == 0 or architecture == "skip":
            self.fromrgb = Conv2dLayer(img_channels, tmp_channels, kernel_size=1, **act, **layer_kwargs())
        self.conv0 = Conv2dLayer(tmp_channels, tmp_channels, kernel_size=3, **act, **layer_kwargs())
        down = {"down": 2, "resample_filter": resample_filter}
        self.conv1 = Conv2dLayer(tmp_channels, out_channels, kernel_size=3, **act, **down, **layer_kwargs())
        if architecture == "resnet":
            self.skip = Conv2dLayer(tmp_channels, out_channels, kernel_size=1, bias=False, **down, **layer_kwargs())

    def forward(self, x, img, force_fp32=False):
        dtype, memory_format = _compute_format(self, (img if x is None else x).device, force_fp32)
        if x is not None:
            misc.assert_shape(x, [None, self.in_channels, self.resolution, self.resolution])
            x = x.to(dtype=dtype, memory_format=memory_format)
        if self.in_channels == 0 or self.architecture == "skip":
            misc.assert_shape(img, [None, self.img_channels, self.resolution, self.resolution])
            img = img.to(dtype=dtype, memory_format=memory_format)
            y = self.fromrgb(img)
            x = y if x is None else x + y
            img = upfirdn2d.downsample2d(img, self.resample_filter) if self.architecture == "skip" else None
        if self.architecture == "resnet":
            y = self.skip(x, gain=SQRT_HALF)
            return y + self.conv1(self.conv0(x), gain=SQRT_HALF), img
        return self.conv1(self.conv0(x)), img


@persistence.persistent_class
class MinibatchStdLayer(torch.nn.Module):
    """Appends the standard deviation within groups of samples as `num_channels` constant planes."""

    def __init__(self, group_size, num_channels=1):
        super().__init__()
        self.group_size = group_size
        self.num_channels = num_channels

    def forward(self, x):
        n, c, h, w = x.shape
        group = n if self.group_size is None else min(self.group_size, n)
        if n % group:
            raise ValueError(f"minibatch standard deviation: batch {n} is not a multiple of the group size {group}")
        y = x.reshape(group, n // group, self.num_channels, c // self.num_channels, h, w)
        # Spelled out, because the double backward pass of `var` loses half of float32's digits in the R1 penalty.
        y = y - y.mean(dim=0)
        y = (y.square().mean(dim=0) + 1e-8).sqrt().mean(dim=[2, 3, 4])  # [n // group, num_channels]
        y = y.repeat(group, 1)[:, :, None, None].expand(-1, -1, h, w)
        return torch.cat([x, y], dim=1)


@persistence.persistent_class
class DiscriminatorEpilogue(torch.nn.Module):
    """Maps 4x4 features to `[N, cmap_dim or 1]`; with labels, that is projected on the mapped label."""

    def __init__(
        self,
        in_channels,
        cmap_dim,
        resolution,
        img_channels,
        architecture="resnet",
        mbstd_group_size=4,
        mbstd_num_channels=1,
        activation="lrelu",
        conv_clamp=None,
    ):
        super().__init__()
        _check_architecture(architecture)
        self.in_channels = in_channels
        self.cmap_dim = cmap_dim
        self.resolution = resolution
        self.img_channels = img_channels
        self.architecture = architecture
        if architecture == "skip":
            self.fromrgb = Conv2dLayer(img_channels, in_channels, kernel_size=1, activation=activation)
        self.mbstd = MinibatchStdLayer(mbstd_group_size, mbstd_num_channels) if mbstd_num_channels > 0 else None
        self.conv = Conv2dLayer(
            in_channels + mbstd_num_channels, in_channels, kernel_size=3, activation=activation, conv_clamp=conv_clamp
        )
        self.fc = FullyConnectedLayer(in_channels * resolution**2, in_channels, activation=activation)
        self.out = FullyConnectedLayer(in_channels, cmap_dim if cmap_dim > 0 else 1)

    def forward(self, x, img, cmap):
        misc.assert_shape(x, [None, self.in_channels, self.resolution, self.resolution])
        x = x.to(torch.float32)
        if self.architecture == "skip":
            x = x + self.fromrgb(img.to(torch.float32))
        if self.mbstd is not None:
            x = self.mbstd(x)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        if self.cmap_dim > 0:
            misc.assert_shape(cmap, [None, self.cmap_dim])
            x = (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x


@persistence.persistent_class
class Discriminator(torch.nn.Module):
    """StyleGAN2 discriminator: `discriminator(images, c) -> logits [N, 1]`, positive for real."""

    def __init__(
        self,
        c_dim,
        img_resolution,
        img_channels,
        architecture="resnet",
        channel_base=32768,
        channel_max=512,
        num_fp16_res=0,
        conv_clamp=None,
        cmap_dim=None,
        block_kwargs=None,
        mapping_kwargs=None,
        epilogue_kwargs=None,
    ):
        super().__init__()
        self.c_dim = c_dim
        self.img_resolution = img_resolution
        self.img_resolution_log2 = _log2(img_resolution)
        self.img_channels = img_channels
        self.block_resolutions = [2**i for i in range(self.img_resolution_log2, 2, -1)]
        channels = {res: min(channel_base // res, channel_max) for res in [*self.block_resolutions, 4]}
        if cmap_dim is None:
            cmap_dim = channels[4]
        if c_dim == 0:
            cmap_dim = 0
        shared = {"img_channels": img_channels, "architecture": architecture, "conv_clamp": conv_clamp}
        first_layer_idx = 0
        for res in self.block_resolutions:
            block = DiscriminatorBlock(
                channels[res] if res < img_resolution else 0,
                channels[res],
                channels[res // 2],
                resolution=res,
                first_layer_idx=first_layer_idx,
                use_fp16=_uses_fp16(res, self.img_resolution_log2, num_fp16_res),
                **shared,
                **(block_kwargs or {}),
            )
            setattr(self, f"b{res}", block)
            first_layer_idx += block.num_layers
        if c_dim > 0:
            mapping = {"num_ws": None, "w_avg_beta": None, **(mapping_kwargs or {})}
            self.mapping = MappingNetwork(z_dim=0, c_dim=c_dim, w_dim=cmap_dim, **mapping)
        self.b4 = DiscriminatorEpilogue(
            channels[4], cmap_dim=cmap_dim, resolution=4, **shared, **(epilogue_kwargs or {})
        )

    def forward(self, img, c, **block_kwargs):
        x = None
        for res in self.block_resolutions:
            x, img = getattr(self, f"b{res}")(x, img, **block_kwargs)
        cmap = self.mapping(None, c) if self.c_dim > 0 else None
        return self.b4(x, img, cmap)


def _bias_act(layer, x, b, gain):
    """Apply bias and activation of a layer, with the block's gain on both the activation and the clamp."""
    clamp = None if layer.conv_clamp is None else layer.conv_clamp * gain
    return bias_act.bias_act(x, b, act=layer.activation, gain=layer.act_gain * gain, clamp=clamp)


def _compute_format(block, device, force_fp32):
    """Return dtype and memory format that a block computes in; float16 off CUDA is emulated, slow and of no use."""
    fp16 = block.use_fp16 and not force_fp32 and device.type == "cuda"
    channels_last = block.channels_last and fp16
    return (
        torch.float16 if fp16 else torch.float32,
        torch.channels_last if channels_last else torch.contiguous_format,
    )


def _memory_format(weight, channels_last):
    return weight.to(memory_format=torch.channels_last) if channels_last else weight


def _uses_fp16(resolution, img_resolution_log2, num_fp16_res):
    """Return whether a block uses float16: those of the `num_fp16_res` highest resolutions do, never below 8x8."""
    return num_fp16_res > 0 and resolution >= max(2 ** (img_resolution_log2 + 1 - num_fp16_res), 8)


def _log2(img_resolution):
    log2 = int(np.log2(img_resolution)) if img_resolution > 0 else 0
    if img_resolution < 4 or 2**log2 != img_resolution:
        raise ValueError(f"img_resolution must be a power of two of at least 4, not {img_resolution}")
    return log2


def _check_architecture(architecture):
    if architecture not in ("orig", "skip", "resnet"):
        raise ValueError(f"architecture must be 'orig', 'skip' or 'resnet', not {architecture!r}")
