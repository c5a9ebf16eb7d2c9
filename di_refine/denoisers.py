"""Diffusion models as teachers and student scores: what they must be, how they are loaded, and several as one.

What U-Nets have besides (blocks, an encoder, augmentation labels) is known in this module alone.
"""

import functools
import os
import re
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
import torch.utils.checkpoint

from di_refine.ddpm.networks import ADMPrecond, DiffusersPrecond
from di_refine.edm.loss import edm_weight
from di_refine.edm.networks import DhariwalUNet, SongUNet, VEPrecond, VPPrecond, iDDPMPrecond
from di_refine.edm2.networks import MPConv
from di_refine.edm2.networks import Precond as EDM2Precond
from di_refine.errors import InputError
from di_refine.files import networks, registry
from di_refine.labels import LabelLaw


class Denoiser(Protocol):
    """A module that removes noise from images: `D(x; s) = E[x0 | x0 + s n = x]`.

    Called as `denoiser(x [N, C, R, R], sigma [N], labels [N, label_dim])`, it returns denoised images, `[N, C, R, R]`.
    Clean images lie in [-1, 1], and `x` is such an image plus sigma times unit normals (variance exploding).

    Attributes:
        img_resolution, img_channels: of the images.
        label_dim: length of a label; 0 without labels.
        sigma_min, sigma_max: the noise levels that it knows.
    """

    img_resolution: int
    img_channels: int
    label_dim: int
    sigma_min: float
    sigma_max: float

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor: ...


def load_denoiser(
    source: str | os.PathLike, config: networks.Config | None = None, setting: str = "teacher"
) -> torch.nn.Module:
    """The averaged network of a diffusion model.

    Args:
        source: a name of the registry, an EDM pickle, a diffusers folder with a `UNet2DModel`, or weights (.pt) of
            guided-diffusion, improved-diffusion or an EDM teacher of consistency_models.
        config: what a .pt file does not say, as the flags of its training: a dictionary, or a JSON file; None takes the
            JSON file of the same name, if there is one. For a folder, the scheduler's settings in place of its own.
        setting: what the source was given for, for messages.

    Returns:
        A `Denoiser` on the CPU, in eval mode.

    Raises:
        InputError: naming the setting, when the file holds no diffusion model, or one that was distilled.
    """
    return networks.load(registry.resolve(source, setting), setting, config).require(networks.EDM, setting).average


class Ensemble(torch.nn.Module):
    """A teacher whose score is the weighted mean of several teachers' scores.

    With one noise level for all, the mean of the scores `(D_i - x) / s^2` is the score of `D = sum of w_i D_i`; so this
    module's output is that sum. At the noise level s its score is that of the product of experts

        q_s(x) proportional to  prod of q_{i,s}(x)^{w_i},     q_{i,s}: what teacher i knows, noised to level s,

    the normalised geometric mean: images likely under all teachers, not under any of them. Note the order: it is the
    product of the noised densities at EACH level, not the noised product of the clean densities. The two agree where s
    is small or the experts are Gaussians of one covariance, and differ otherwise; the noised product is not available
    from the teachers' scores. A refined generator therefore minimises, at each level, its divergence from that level's
    product; these need not be noised versions of one clean density.

    A negative weight guides away from a teacher: weights w and 1 - w are classifier-free guidance (arXiv 2207.12598)
    where the second teacher is unconditional, and autoguidance (arXiv 2406.02507) where it is a worse one.

    May be copied, moved and trained as any module. Weights of exactly 0 leave a teacher out at no cost.

    Args:
        teachers: denoisers called as `(x, sigma, labels)`, for instance `di_refine.edm.networks.EDMPrecond`.
        weights: one for each, with sum 1; None makes them equal.

    Raises:
        InputError: no teachers; they differ in resolution, channels or classes, save for unconditional ones after the
            first; they have no noise levels in common; or the weights are wrong.

    Attributes:
        teachers: the `ModuleList`, in order.
        weights: floats.
        img_resolution, img_channels, label_dim: what all teachers take.
        sigma_min, sigma_max: the levels that all teachers know.
        sigma_data: of the first teacher (0.5 where it has none), since a student score begins as its copy.
    """

    def __init__(self, teachers: Sequence[torch.nn.Module], weights: Sequence[float] | None = None):
        super().__init__()
        if not teachers:
            raise InputError("`teacher` is needed at least once")
        self.weights = check_weights(weights, len(teachers))
        for attribute, what in (
            ("img_resolution", "resolution"),
            ("img_channels", "number of channels"),
            ("label_dim", "number of classes"),
        ):
            values = [getattr(teacher, attribute) for teacher in teachers]
            if len({value for value in values if value or attribute != "label_dim"}) > 1:
                raise InputError(
                    f"`teacher`: the {what} of the teachers is {' and '.join(map(str, values))}, but a mean of their "
                    "scores needs equal ones; leave out the teachers that differ"
                )
            setattr(self, attribute, values[0])
        if not self.label_dim and any(cast(Denoiser, teacher).label_dim for teacher in teachers):
            raise InputError(
                "`teacher`: the first is unconditional, and another one has classes; name one with classes first, as "
                "the student score begins as its copy"
            )
        self.teachers = torch.nn.ModuleList(teachers)
        models = [cast(Denoiser, teacher) for teacher in teachers]
        self.sigma_min = max(model.sigma_min for model in models)
        self.sigma_max = min(model.sigma_max for model in models)
        self.sigma_data = sigma_data(teachers[0])
        if self.sigma_min > self.sigma_max:
            raise InputError(
                "`teacher`: the teachers have no noise levels in common: one begins at "
                f"{self.sigma_min:g}, another ends at {self.sigma_max:g}"
            )

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor | float, class_labels: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """The weighted mean of the teachers' outputs.

        Args:
            x: [N, C, R, R], clean images in [-1, 1] plus sigma times unit normals.
            sigma: noise level, one number or one per sample.
            class_labels: [N, label_dim], or None.
            kwargs: passed to every teacher.

        Returns:
            Denoised images, as the teachers return them; of a single teacher, exactly its own.
        """
        total: torch.Tensor | None = None
        for weight, teacher in zip(self.weights, self.teachers):
            if weight == 0:
                continue
            part = teacher(x, sigma, class_labels if cast(Denoiser, teacher).label_dim else None, **kwargs)
            part = part if weight == 1 else weight * part
            total = part if total is None else total + part
        if total is None:
            raise ValueError("the weights of all teachers are 0")
        return total

    def round_sigma(self, sigma: Any) -> torch.Tensor:
        """The nearest noise level that the teachers know.

        Each teacher in turn rounds what the one before left. That is exact while at most one of them has discrete
        levels; every teacher rounds anew on what it is given.
        """
        for teacher in self.teachers:
            sigma = cast(Any, teacher).round_sigma(sigma)
        return sigma

    def extra_repr(self) -> str:
        return f"weights={', '.join(f'{weight:g}' for weight in self.weights)}"


def check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """The weights of `count` teachers; none given are equal ones.

    Raises:
        InputError: their number differs, or their sum is not 1 (to 1e-6).
    """
    if not weights:
        return (1 / count,) * count
    given = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise InputError(
            f"`teacher_weight` is given {len(weights)} times and `teacher` {count} times; give one weight per teacher, "
            "or none for equal ones"
        )
    if not abs(sum(weights) - 1) <= 1e-6:
        raise InputError(f"`teacher_weight` must sum to 1, but {given} sum to {sum(weights):g}")
    return tuple(float(weight) for weight in weights)


def check_labels(net: torch.nn.Module, law: LabelLaw) -> None:
    """Check that a diffusion model knows such labels.

    Raises:
        InputError: they are vectors, and the network has a table of classes.
    """
    if isinstance(_first(net), (ADMPrecond, DiffusersPrecond)) and law.label_dim and not law.has_classes:
        raise InputError(
            "`labels` are vectors, and the diffusion model knows single classes alone; give other `labels`"
        )


# ----------------------------------------------------------------------------------------------------------------------
# What U-Nets have besides


def _first(net: torch.nn.Module) -> torch.nn.Module:
    """The first network of an `Ensemble`; any other module itself."""
    return net.teachers[0] if isinstance(net, Ensemble) else net


def _unet(net: torch.nn.Module) -> torch.nn.Module | None:
    """The U-Net within an EDM network, or within the first network of an `Ensemble`; None for any other module."""
    model = getattr(_first(net), "model", None)
    return model if isinstance(model, (SongUNet, DhariwalUNet)) else None


def _encoder(net: torch.nn.Module) -> torch.nn.Module | None:
    """The last layer of a denoiser's encoder; None where its layers are not known here."""
    first, unet = _first(net), _unet(net)
    inner: Any = getattr(first, "unet", None)
    if isinstance(first, EDM2Precond):
        return list(inner.enc.values())[-1]
    if isinstance(first, ADMPrecond):
        return inner.input_blocks[-1]
    if isinstance(first, DiffusersPrecond):
        return inner.mid_block  # the blocks before it return several tensors
    return None if unet is None else list(cast(torch.nn.ModuleDict, unet.enc).values())[-1]


def has_encoder(net: torch.nn.Module) -> bool:
    """Whether `encoder_layer` finds the encoder of a denoiser."""
    return _encoder(net) is not None


def encoder_layer(net: torch.nn.Module) -> torch.nn.Module:
    """The last layer of a denoiser's encoder, whose output the density ratio is made from.

    Raises:
        ValueError: the network has no encoder that is known here, so the layer has to be named.
    """
    layer = _encoder(net)
    if layer is None:
        raise ValueError(f"{type(net).__name__} has no encoder that is known here; name the layer that makes features")
    return layer


class _Encoded(Exception):
    """Carries the encoder's features out of a network whose other half is not wanted."""

    def __init__(self, features: torch.Tensor):
        self.features = features


def encode(
    net: torch.nn.Module,
    layer: torch.nn.Module,
    x: torch.Tensor,
    sigma: torch.Tensor,
    labels: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """What a layer of a denoiser gives for `x` at noise levels `sigma` `[N]`, without the cost of the layers after it.

    Raises:
        RuntimeError: the layer takes no part.
    """

    def leave(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        raise _Encoded(output)

    handle = layer.register_forward_hook(leave)
    try:
        net(x, sigma, labels, **kwargs)
    except _Encoded as found:
        return found.features
    finally:
        handle.remove()
    raise RuntimeError("the layer that makes the features was not reached")


def recompute_blocks(net: torch.nn.Module) -> None:
    """Save memory: keep what enters each block of a U-Net, and compute the rest again in the backward pass."""
    for name, block in net.named_modules():
        if re.fullmatch(r"(model|unet)\.(enc|dec)\.\w+|unet\.((in|out)put_blocks|(down|up)_blocks)\.\d+", name):
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def keep_norms(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have the weights of EDM2's layers in a network normalised now and after every update, as its training demands.

    Their own forward pass does so in training mode alone, and distilled generators, for one, stay in eval mode.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, MPConv)]

    def normalise(*_: Any) -> None:
        for layer in layers:
            layer.force_norm()

    if layers:
        normalise()
        optimizer.register_step_post_hook(normalise)


def augment_dim(net: torch.nn.Module) -> int:
    """How many augmentation labels a denoiser takes; 0 for one that takes none."""
    layer = getattr(_unet(net), "map_augment", None)
    return layer.in_features if layer is not None else 0


def has_dropout(net: torch.nn.Module) -> bool:
    """Whether a denoiser was built with dropout."""
    modules = list(net.modules())
    rates = [layer.p if isinstance(layer, torch.nn.Dropout) else vars(layer).get("dropout", 0) for layer in modules]
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def loss_weight(net: torch.nn.Module, sigma: torch.Tensor) -> torch.Tensor:
    """The weight `[N]` of a denoiser's loss at noise levels `[N]`: that of its parameterisation, or EDM's.

    It makes errors of what the network itself puts out count equally at all levels (arXiv 2206.00364, table 1).
    """
    first = _first(net)
    if isinstance(first, (VPPrecond, VEPrecond, iDDPMPrecond)):
        return 1 / sigma**2
    if isinstance(first, (ADMPrecond, DiffusersPrecond)):
        return first.loss_weight(sigma)
    return edm_weight(sigma, sigma_data(net))


def sigma_data(net: torch.nn.Module) -> float:
    """The standard deviation of the data that a denoiser's loss is weighted for (arXiv 2206.00364, table 1)."""
    return getattr(net, "sigma_data", 0.5)
