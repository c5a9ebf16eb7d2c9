"""Diffusion models of other code bases as denoisers D(x; sigma) of EDM's convention (variance exploding).

`ADMPrecond` has the U-Net of ADM (Dhariwal and Nichol 2021, arXiv 2105.05233) with the names and shapes of the weights
that guided-diffusion, improved-diffusion and consistency_models publish; `DiffusersPrecond` has one that the library
diffusers builds. What a network was trained to predict, and from what, is its parameterisation:

    vp    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) n at steps t = 0, 1, ... (Ho et al. 2020, arXiv 2006.11239), so
          sigma_t = sqrt((1 - abar_t) / abar_t), and the network sees x / sqrt(1 + sigma^2) and t
    edm   EDM's preconditioning (arXiv 2206.00364, table 1)
    ve    a score of images in [0, 1] (Song et al. 2021, arXiv 2011.13456)

This module imports nothing of the project but `torch_utils.persistence`: its text is written into every snapshot.

Shapes: N batch, C channels, H W height and width, T = H * W tokens, L label_dim, E embedding width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from torch_utils import persistence

# ---------------------------------------------------------------------------------------------------------------------
# The U-Net of ADM. Layers are torch's own under the published names; autocast chooses their precision.


class _Resample(torch.nn.Module):
    """Doubles or halves height and width: pixel repetition and the 2x2 mean, or with a convolution of its own."""

    def __init__(self, channels: int, up: bool, convolve: bool):
        super().__init__()
        self.up = up
        if convolve and up:
            self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1)
        elif convolve:
            self.op = torch.nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        if not self.up:
            return self.op(x) if hasattr(self, "op") else F.avg_pool2d(x, 2)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


class _ResBlock(torch.nn.Module):
    """Two normalised 3x3 convolutions beside a skip path, modulated by the embedding.

    Args:
        in_channels, out_channels, emb_channels: widths.
        scale_shift: the embedding scales and shifts the second norm's output instead of being added before it.
        dropout: probability before the second convolution, in training mode only.
        resample: None, 'up' or 'down': before the first convolution, and in the skip path.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        scale_shift: bool,
        dropout: float,
        resample: str | None = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = torch.nn.Sequential(
            torch.nn.GroupNorm(32, in_channels),
            torch.nn.SiLU(),
            torch.nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = torch.nn.Sequential(
            torch.nn.SiLU(), torch.nn.Linear(emb_channels, out_channels * (2 if scale_shift else 1))
        )
        self.out_layers = torch.nn.Sequential(
            torch.nn.GroupNorm(32, out_channels),
            torch.nn.SiLU(),
            torch.nn.Dropout(dropout),
            torch.nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.resample = None if resample is None else _Resample(in_channels, resample == "up", convolve=False)
        self.skip_connection = (
            torch.nn.Identity() if in_channels == out_channels else torch.nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Map features [N, in_channels, H, W] and an embedding [N or 1, E] to [N, out_channels, H', W']."""
        norm, activate, conv = self.in_layers
        h = activate(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)
        params = self.emb_layers(emb)[:, :, None, None]
        norm, activate, drop, conv = self.out_layers
        if self.scale_shift:
            scale, shift = params.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + params)
        return self.skip_connection(x) + conv(drop(activate(h)))


class _Attention(torch.nn.Module):
    """Self-attention of the pixels, with its residual connection.

    Args:
        channels, heads: width, and into how many heads it is divided.
        parts_first: the rows of `qkv` run (part, head, channel) instead of (head, part, channel).
        kernel_dims: of the 1x1 convolutions' kernels as published: 1 or 2.
    """

    def __init__(self, channels: int, heads: int, parts_first: bool, kernel_dims: int):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"{channels} channels of an attention layer cannot be divided into {heads} heads")
        self.heads, self.parts_first = heads, parts_first
        kind = torch.nn.Conv2d if kernel_dims == 2 else torch.nn.Conv1d
        self.norm = torch.nn.GroupNorm(32, channels)
        self.qkv = kind(channels, 3 * channels, 1)
        self.proj_out = kind(channels, channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        n, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = F.linear(tokens, self.qkv.weight.flatten(1), self.qkv.bias)
        if self.parts_first:
            q, k, v = qkv.view(n, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = qkv.view(n, h * w, self.heads, 3, c // self.heads).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        y = F.linear(y, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + y.transpose(1, 2).unflatten(2, (h, w))


class _Stage(torch.nn.Sequential):
    """Layers in a row, those of which that take an embedding are given it."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x) if isinstance(layer, torch.nn.Conv2d) else layer(x, emb)
        return x


class ADMUNet(torch.nn.Module):
    """The U-Net of ADM and of its predecessor (Nichol and Dhariwal 2021, arXiv 2102.09672).

    Args:
        in_channels, out_channels: colour channels in and out.
        label_dim: number of classes, 0 for an unconditional network.
        model_channels: base width, from which the embedding's follows.
        widths: of each level, highest resolution first.
        num_blocks: residual blocks per level.
        attention: for each level, whether it has attention.
        num_heads, head_channels: heads of each attention layer, or where it is not None, channels of one head.
        num_heads_up: heads in the second half; None: as `num_heads`.
        parts_first, kernel_dims: see `_Attention`.
        scale_shift: see `_ResBlock`.
        resample_blocks: levels are joined by residual blocks instead of single convolutions.
        dropout: probability inside the blocks, in training mode only.

    Raises:
        ValueError: for widths that cannot be divided.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        label_dim: int,
        model_channels: int,
        widths: Sequence[int],
        num_blocks: int,
        attention: Sequence[bool],
        num_heads: int = 4,
        head_channels: int | None = None,
        num_heads_up: int | None = None,
        parts_first: bool = False,
        kernel_dims: int = 1,
        scale_shift: bool = True,
        resample_blocks: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        emb = 4 * model_channels

        def block(width: int, new_width: int, resample: str | None = None) -> torch.nn.Module:
            return _ResBlock(width, new_width, emb, scale_shift, dropout, resample)

        def attend(width: int, heads: int) -> torch.nn.Module:
            return _Attention(
                width, heads if head_channels is None else width // head_channels, parts_first, kernel_dims
            )

        def resampler(width: int, way: str) -> torch.nn.Module:
            return block(width, width, way) if resample_blocks else _Resample(width, way == "up", convolve=True)

        self.model_channels = model_channels
        self.time_embed = torch.nn.Sequential(
            torch.nn.Linear(model_channels, emb), torch.nn.SiLU(), torch.nn.Linear(emb, emb)
        )
        self.label_emb = torch.nn.Embedding(label_dim, emb) if label_dim else None
        x = widths[0]
        self.input_blocks = torch.nn.ModuleList([_Stage(torch.nn.Conv2d(in_channels, x, 3, padding=1))])
        saved = [x]
        for level, width in enumerate(widths):
            if level:
                self.input_blocks.append(_Stage(resampler(x, "down")))
                saved.append(x)
            for _ in range(num_blocks):
                layers = [block(x, width)] + ([attend(width, num_heads)] if attention[level] else [])
                self.input_blocks.append(_Stage(*layers))
                x = width
                saved.append(x)
        self.middle_block = _Stage(block(x, x), attend(x, num_heads), block(x, x))
        self.output_blocks = torch.nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_blocks + 1):
                layers = [block(x + saved.pop(), width)]
                layers += [attend(width, num_heads_up or num_heads)] if attention[level] else []
                layers += [resampler(width, "up")] if level and i == num_blocks else []
                self.output_blocks.append(_Stage(*layers))
                x = width
        self.out = torch.nn.Sequential(
            torch.nn.GroupNorm(32, x), torch.nn.SiLU(), torch.nn.Conv2d(x, out_channels, 3, padding=1)
        )

    def forward(self, x: torch.Tensor, time: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Map images [N, in_channels, H, W], times [N or 1] and labels [N or 1, L] to [N, out_channels, H, W]."""
        half = self.model_channels // 2
        angle = time[:, None] * torch.exp(-math.log(10000) / half * torch.arange(half, device=x.device))
        emb = self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=1))
        if self.label_emb is not None and labels is not None:
            emb = emb + labels @ self.label_emb.weight
        saved = []
        for stage in self.input_blocks:
            x = stage(x, emb)
            saved.append(x)
        x = self.middle_block(x, emb)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, saved.pop()], dim=1), emb)
        return self.out(x)


# ---------------------------------------------------------------------------------------------------------------------
# Denoisers.


class _Precond(torch.nn.Module):
    """A U-Net made into a denoiser by its parameterisation.

    Between the noise levels of two steps, `vp` takes the time that is piecewise linear in ln(sigma), so the network is
    asked at fractional steps (unless `whole_steps`). Beyond the first and last step it is asked at that step, while
    its input is still scaled by the true sigma.

    Args:
        img_resolution, img_channels, label_dim: what the network takes.
        sigma_min, sigma_max: the noise levels that its steps cover.
        unet: called as `unet(images, times, labels)`; channels of its output beyond `img_channels` are dropped.
        parameterisation: 'vp', 'edm' or 've'.
        prediction: what the output means: 'epsilon', 'sample' or 'v' of vp; 'epsilon' or 'v' (negated) of edm.
        steps: number of steps of vp, else 0. Their ln(sigma) are the buffer `log_sigmas`, rising.
        time_scale: factor on the time that the network is told: t of vp, ln(sigma) / 4 of edm.
        sigma_data: of edm.
        whole_steps: ask the network at whole steps only, the nearest in ln(sigma).

    Attributes:
        img_resolution, img_channels, label_dim, sigma_min, sigma_max, sigma_data: as given.
    """

    plain_layers = True  # network pickles hold the tensors of the layers, and the constructor makes the layers
    log_sigmas: torch.Tensor | None

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        sigma_min: float,
        sigma_max: float,
        unet: torch.nn.Module,
        parameterisation: str,
        prediction: str,
        steps: int,
        time_scale: float,
        sigma_data: float,
        whole_steps: bool,
    ):
        known = {"vp": ("epsilon", "sample", "v"), "edm": ("epsilon", "v"), "ve": ("epsilon",)}
        if prediction not in known.get(parameterisation, ()):
            raise ValueError(f"a prediction '{prediction}' in parameterisation '{parameterisation}' is not known")
        if not 0 < sigma_data < 1e6 or not 0 < time_scale < 1e6:
            raise ValueError(f"sigma_data {sigma_data:g} and time_scale {time_scale:g} make no denoiser")
        if (steps > 1) != (parameterisation == "vp"):
            raise ValueError(f"parameterisation '{parameterisation}' with {steps} steps")
        super().__init__()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data
        self.parameterisation = parameterisation
        self.prediction = prediction
        self.time_scale = time_scale
        self.whole_steps = whole_steps
        self.unet = unet
        self.register_buffer("log_sigmas", torch.zeros([steps]) if steps else None)

    def _build_layers(self) -> None:
        """Build the layers whose tensors a network pickle has, where tools that run this text have opened it."""
        tensors = self.unet.state_dict(keep_vars=True)
        arguments: Any = vars(self)
        made = type(self)(*arguments["_init_args"], **arguments["_init_kwargs"])
        made.unet.load_state_dict(tensors, assign=True)
        self.unet = made.unet.train(self.training)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        force_fp32: bool = False,
    ) -> torch.Tensor:
        """Denoise x = clean image + sigma * unit normal.

        The U-Net runs in autocast's dtype where autocast is enabled; everything outside it stays in float32.

        Args:
            x: [N, img_channels, img_resolution, img_resolution], clean images being in [-1, 1].
            sigma: noise level, one number or one per sample.
            class_labels: [N, label_dim], one-hot. Ignored by an unconditional network.
            force_fp32: run in float32 whatever the above says.

        Returns:
            Denoised images, float32, shaped as x.

        Raises:
            ValueError: a network with classes is given no labels.
        """
        if isinstance(self.unet, torch.nn.ModuleDict):
            self._build_layers()
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, device=x.device).to(torch.float32).reshape(-1, 1, 1, 1)
        labels = None
        if self.label_dim:
            if class_labels is None:
                raise ValueError("a network with classes needs class_labels, and does not know images of no class")
            labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        c_skip, c_out, c_in, time = self._coefficients(sigma)
        inputs = c_in * (x + 1 if self.parameterisation == "ve" else x)
        with torch.autocast(x.device.type, enabled=False) if force_fp32 else contextlib.nullcontext():
            output = self._unet(inputs, time.flatten(), labels)
        return c_skip * x + c_out * output[:, : self.img_channels].to(torch.float32)

    def _unet(self, x: torch.Tensor, time: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return self.unet(x, time, labels)

    def _coefficients(self, sigma: torch.Tensor) -> tuple:
        """Return c_skip, c_out, c_in and the network's time for `sigma` [N or 1, 1, 1, 1]."""
        if self.parameterisation == "ve":
            # y in [-1, 1] is u = (y + 1) / 2 in [0, 1], with half the noise: D(y, s) = 2 Du(u, s / 2) - 1, where the
            # score F gives Du(u, r) = u + r^2 F(u, r).
            return 1, sigma**2 / 2, 0.5, sigma / 2
        if self.parameterisation == "edm":
            total, sign = sigma**2 + self.sigma_data**2, -1 if self.prediction == "v" else 1
            c_out = sign * sigma * self.sigma_data / total.sqrt()
            return self.sigma_data**2 / total, c_out, 1 / total.sqrt(), self.time_scale / 4 * sigma.log()
        scale, time = (1 + sigma**2).sqrt(), self.time_scale * self.step(sigma)
        if self.prediction == "epsilon":
            return 1, -sigma, 1 / scale, time
        if self.prediction == "sample":
            return 0, 1, 1 / scale, time
        return 1 / scale**2, -sigma / scale, 1 / scale, time

    def loss_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return 1 / c_out^2 for noise levels [N], the weight of denoising score matching.

        By it errors of what the U-Net itself puts out count equally at all levels, which is how such networks were
        trained, and EDM's rule (arXiv 2206.00364, section 5). The output of `ve` is divided by the noise level inside.
        """
        if self.parameterisation == "ve":
            return 1 / sigma**2
        c_out = self._coefficients(sigma.reshape(-1, 1, 1, 1))[1]
        c_out = torch.as_tensor(c_out, dtype=sigma.dtype, device=sigma.device)
        return 1 / c_out.expand(len(sigma), 1, 1, 1).flatten() ** 2

    def step(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the step, a fraction unless `whole_steps`, that belongs to each noise level; shaped as `sigma`."""
        table = self.log_sigmas
        if table is None:
            raise ValueError(f"parameterisation '{self.parameterisation}' has no steps")
        x = sigma.log().clamp(table[0], table[-1])
        # By comparison, as ONNX has no search in a sorted table.
        low = ((x.reshape(-1, 1) >= table).sum(dim=1) - 1).clamp(0, len(table) - 2).reshape(x.shape)
        time = low + (x - table[low]) / (table[low + 1] - table[low])
        whole = time.round()
        # The levels of the table themselves belong to whole steps, which rounding of ln(sigma) would miss by a bit.
        return whole if self.whole_steps else torch.where((time - whole).abs() < 1e-3, whole, time)

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Return the nearest noise level that the network knows: `sigma` itself, or with `whole_steps` a step's."""
        sigma = torch.as_tensor(sigma)
        if not self.whole_steps or self.log_sigmas is None:
            return sigma
        table = self.log_sigmas.to(sigma.device)
        return table[self.step(sigma.to(table)).long()].exp().to(sigma.dtype)


@persistence.persistent_class
class ADMPrecond(_Precond):
    """An OpenAI diffusion model: guided-diffusion, improved-diffusion, or an EDM teacher of consistency_models.

    Args:
        img_resolution, img_channels, label_dim, sigma_min, sigma_max, parameterisation, prediction, steps, time_scale:
            see `_Precond`.
        out_channels: of the U-Net: twice `img_channels` where it was taught variances.
        model_kwargs: further arguments of `ADMUNet`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        sigma_min: float,
        sigma_max: float,
        parameterisation: str,
        prediction: str,
        steps: int,
        time_scale: float,
        out_channels: int,
        **model_kwargs,
    ):
        unet = ADMUNet(img_channels, out_channels, label_dim, **model_kwargs)
        size = (img_resolution, img_channels, label_dim, sigma_min, sigma_max)
        super().__init__(*size, unet, parameterisation, prediction, steps, time_scale, 0.5, False)


_COUNTS = {
    "layers_per_block",
    "attention_head_dim",
    "norm_num_groups",
    "attn_norm_num_groups",
    "time_embedding_dim",
    "num_class_embeds",
    "num_train_timesteps",
}
_NUMBERS = {"downsample_padding", "freq_shift", "mid_block_scale_factor", "norm_eps", "dropout"}


def _check_arguments(unet: dict) -> None:
    """Raise ValueError for arguments of a `UNet2DModel` that it would take and not work with."""
    for name, value in unet.items():
        if name in _COUNTS and value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {str(value)[:50]}, no whole number from 1 on")
        if name in _NUMBERS and (type(value) not in (int, float) or not 0 <= value < 1e6):
            raise ValueError(f"{name} is {str(value)[:50]}, no number that makes sense")
    if unet.get("downsample_padding", 1) not in (0, 1) or not unet.get("mid_block_scale_factor", 1):
        raise ValueError("downsample_padding has to be 0 or 1, and mid_block_scale_factor not 0")


@persistence.persistent_class
class DiffusersPrecond(_Precond):
    """A `UNet2DModel` of diffusers (Apache-2.0), which has to be installed.

    Args:
        img_resolution, img_channels, label_dim, sigma_min, sigma_max, parameterisation, prediction, steps, sigma_data:
            see `_Precond`.
        unet: the arguments of `diffusers.UNet2DModel`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        sigma_min: float,
        sigma_max: float,
        parameterisation: str,
        prediction: str,
        steps: int,
        sigma_data: float,
        unet: dict,
    ):
        try:
            from diffusers import UNet2DModel
        except ImportError:
            raise ImportError("it needs the library diffusers: pip install 'di-refine[diffusers]'") from None
        _check_arguments(unet)
        model: Any = UNet2DModel(**unet)
        if unet.get("time_embedding_type") == "fourier":
            # The frequencies are constants, which some releases keep under two names.
            frequencies = model.time_proj.weight.detach()
            for name in [*model.time_proj._parameters]:
                delattr(model.time_proj, name)
            model.time_proj.register_buffer("weight", frequencies)
        if label_dim:
            model.class_embedding = _Classes(label_dim, model.class_embedding.weight.shape[1])
        size = (img_resolution, img_channels, label_dim, sigma_min, sigma_max)
        whole = unet.get("time_embedding_type") == "learned"
        super().__init__(*size, model, parameterisation, prediction, steps, 1.0, sigma_data, whole)

    def _unet(self, x: torch.Tensor, time: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return self.unet(x, time.long() if self.whole_steps else time, labels, return_dict=False)[0]


class _Classes(torch.nn.Embedding):
    """An embedding of one-hot rows [N, L] in place of class numbers, which costs no look at the device's numbers."""

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return labels @ self.weight
