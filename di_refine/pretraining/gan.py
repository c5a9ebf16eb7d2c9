"""The networks and the trainer of a StyleGAN2-ADA (Karras et al. 2020, arXiv 2006.06676)."""

from typing import Any

import torch

from di_refine.errors import InputError
from di_refine.files.networks import NetworkFile
from di_refine.pretraining import warm_start
from di_refine.pretraining.config import GanConfig
from di_refine.pretraining.warm_start import Copied
from stylegan2_ada.adversarial import AdaController, AdversarialTrainer, Data
from stylegan2_ada.augment import PRESETS, AugmentPipe, filter_bank
from stylegan2_ada.config import AdversarialConfig
from stylegan2_ada.networks import Discriminator, Generator
from torch_utils import distributed, misc


def is_size(resolution: int) -> bool:
    """Say whether StyleGAN2 makes images of this size."""
    return resolution >= 8 and resolution & (resolution - 1) == 0


def check(sizes: GanConfig, config: AdversarialConfig, resolution: int) -> None:
    """Check settings and images, before anything is built.

    Raises:
        InputError: the images have a size that StyleGAN2 does not make, or the settings do not fit each other.
    """
    if not is_size(resolution):
        raise InputError(f"`data`: StyleGAN2 needs a power of two from 8 on, the images are {resolution} pixels wide")
    reach = filter_bank().shape[-1] // 2
    if sizes.augment != "none" and "imgfilter" in PRESETS[sizes.augment] and resolution <= reach:
        raise InputError(
            f"augment={sizes.augment} filters images, which needs more than {reach} pixels, and the images are "
            f"{resolution} pixels wide; use augment=bgc"
        )
    micro = distributed.micro_batch(config.batch, config.batch_gpu)
    if micro % min(sizes.mbstd_group, micro):
        raise InputError(
            f"mbstd_group={sizes.mbstd_group} does not divide the {micro} images of a forward pass; use a divisor"
        )


def build(
    sizes: GanConfig,
    config: AdversarialConfig,
    resolution: int,
    channels: int,
    label_dim: int,
    data: Data,
    device: torch.device,
    start: NetworkFile | None = None,
) -> tuple[AdversarialTrainer, list[Copied]]:
    """A trainer of untrained networks, or of those in a file.

    Args:
        sizes: of the networks.
        config: how they are trained.
        resolution, channels, label_dim: of the images.
        data: the images.
        device: where to train.
        start: a file with a StyleGAN2 generator, whose architecture goes before `sizes`.

    Returns:
        The trainer, and what was copied from the file.

    Raises:
        InputError: as `check`.
    """
    check(sizes, config, resolution)
    torch.manual_seed(misc.derive_seed(config.seed, "weights"))
    image = {"img_resolution": resolution, "img_channels": channels}
    shared = {
        "channel_base": sizes.channel_base,
        "channel_max": sizes.channel_max,
        "num_fp16_res": sizes.fp16_res,
        "conv_clamp": 256 if sizes.fp16_res else None,
    }
    G_ema: Generator | None = None
    copied: list[Copied] = []
    if start is not None:
        G, D, G_ema, copied = warm_start.gan(start, resolution, channels, label_dim, sizes.freeze_d, config.seed)
    else:
        D = None
        G = Generator(
            z_dim=sizes.z_dim,
            c_dim=label_dim,
            w_dim=sizes.z_dim,
            **image,
            mapping_kwargs={"num_layers": sizes.mapping_layers},
            synthesis_kwargs={**shared, "architecture": sizes.g_arch},
        )
    if D is None and sizes.freeze_d:
        raise InputError(
            f"freeze_d={sizes.freeze_d} keeps layers of a trained discriminator, and there is none; "
            + ("give `start_from`" if start is None else f"{start.path} holds a generator alone")
        )
    if D is None:
        D = Discriminator(
            c_dim=label_dim,
            **image,
            architecture=sizes.d_arch,
            **shared,
            epilogue_kwargs={"mbstd_group_size": sizes.mbstd_group},
        )
    pipe = ada = None
    if sizes.augment != "none":
        families: dict[str, Any] = {**PRESETS[sizes.augment]}
        pipe = AugmentPipe(**families).to(device)
        ada = AdaController(target=sizes.target, kimg=sizes.ada_kimg)
    average = None if G_ema is None else G_ema.to(device)
    return AdversarialTrainer(G.to(device), D.to(device), pipe, ada, config, G_ema=average, data=data), copied
