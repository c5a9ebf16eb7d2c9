"""The settings of the trainings in `di_refine.pretraining`, each of them declared once; see `torch_utils.settings`."""

from dataclasses import dataclass

from torch_utils.settings import LEARNING, MACHINE, NETWORK, SettingError, Settings, UpdateConfig, setting


def whole_numbers(name: str, text: str) -> list[int]:
    """'2,2,2' -> [2, 2, 2]; an empty text is an empty list.

    Raises:
        SettingError: naming the setting, when something else stands there.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise SettingError(f"{name}={text} is not possible; it must be whole numbers such as 2,2,2")
    return [int(word) for word in words]


@dataclass(kw_only=True)
class TeacherConfig(UpdateConfig):
    """What `pretraining.teacher.TeacherTrainer` can be told; the defaults are EDM's for CIFAR-10.

    Attributes:
        ema_rampup: upper limit of the average's half-life as a fraction of the images seen, so that the start is
            forgotten.
    """

    batch: int = 512
    lr: float = setting(1e-3, "Set Adam's learning rate.", above=0, group=LEARNING, may_change=True)
    lr_rampup: float = setting(
        10_000.0, "Reach the full learning rate after this many thousand images.", minimum=0, group=LEARNING
    )
    lr_rampdown: float = setting(
        0.0,
        "Let the learning rate fall to zero in this many thousand images before the end; 0 keeps it.",
        minimum=0,
        group=LEARNING,
    )
    ema_kimg: float = setting(
        500.0,
        "Average the network with this half-life, in thousands of images; 0 makes the average a copy.",
        minimum=0,
        group=LEARNING,
    )
    sigma_mean: float = setting(-1.2, "Set the mean of ln(sigma) in training.", group=LEARNING)
    sigma_std: float = setting(1.2, "Set the standard deviation of ln(sigma) in training.", minimum=0, group=LEARNING)
    augment: float = setting(
        0.12,
        "Transform training images by EDM's augmentations with this probability; 0 switches them off.",
        minimum=0,
        maximum=1,
        group=LEARNING,
    )
    precision: str = setting("fp32", "Compute the network in this precision.", choices=("fp32", "bf16"), group=MACHINE)
    compile: bool = setting(
        False, "Compile the network with torch.compile, which takes a minute once.", group=MACHINE, may_change=True
    )

    ema_rampup: float = 0.05


@dataclass(kw_only=True)
class UNetConfig(Settings):
    """The size of a diffusion model (DDPM++ U-Net); the defaults are EDM's for CIFAR-10."""

    width: int = setting(128, "Give the network this many channels at full resolution.", minimum=1, group=NETWORK)
    channel_mult: str = setting(
        "2,2,2", "Multiply the channels of each level by these; every level halves the resolution.", group=NETWORK
    )
    num_blocks: int = setting(4, "Put this many residual blocks on each level.", minimum=1, group=NETWORK)
    attn_resolutions: str = setting("16", "Put self-attention at these resolutions.", group=NETWORK)
    dropout: float = setting(
        0.13, "Drop units with this probability in training.", minimum=0, maximum=0.9, group=NETWORK
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.multipliers):
            raise SettingError(f"channel_mult={self.channel_mult} is not possible; it must be numbers from 1 on")
        whole_numbers("attn_resolutions", self.attn_resolutions)

    @property
    def multipliers(self) -> list[int]:
        """Of the channels, one per level."""
        return whole_numbers("channel_mult", self.channel_mult) or [0]


@dataclass(kw_only=True)
class GanConfig(Settings):
    """The sizes of a StyleGAN2 pair and its augmentation; the defaults are StyleGAN2-ADA's for CIFAR-10."""

    z_dim: int = setting(512, "Give the latents z and w this size.", minimum=1, group=NETWORK)
    channel_base: int = setting(
        32768, "Give layers of resolution R this many channels divided by R ...", minimum=1, group=NETWORK
    )
    channel_max: int = setting(512, "... but at most this many.", minimum=1, group=NETWORK)
    mapping_layers: int = setting(2, "Give the mapping network this many layers.", minimum=1, group=NETWORK)
    g_arch: str = setting(
        "skip", "Choose the architecture of the generator.", choices=("orig", "skip", "resnet"), group=NETWORK
    )
    d_arch: str = setting(
        "orig", "Choose the architecture of the discriminator.", choices=("orig", "skip", "resnet"), group=NETWORK
    )
    mbstd_group: int = setting(
        32, "Take the minibatch standard deviation over groups of this many images.", minimum=1, group=NETWORK
    )
    freeze_d: int = setting(
        0,
        "Keep this many layers of the discriminator as `start_from` has them, from the highest resolution on "
        "(Freeze-D, arXiv 2002.10964).",
        minimum=0,
        group=LEARNING,
    )
    fp16_res: int = setting(
        0, "Compute this many of the highest resolutions in float16, on CUDA.", minimum=0, group=MACHINE
    )
    augment: str = setting(
        "bgc",
        "Choose the augmentations of ADA.",
        choices=("none", "blit", "geom", "color", "filter", "noise", "cutout", "bg", "bgc", "bgcf", "bgcfn", "bgcfnc"),
        group=LEARNING,
    )
    target: float = setting(
        0.6,
        "Keep the mean sign of the discriminator on real images at this value, by the strength of ADA.",
        minimum=0,
        maximum=1,
        group=LEARNING,
    )
    ada_kimg: float = setting(
        500.0,
        "Let ADA move its strength from 0 to 1 in this many thousand images at the least.",
        above=0,
        group=LEARNING,
    )


@dataclass(kw_only=True)
class FeaturesConfig(Settings):
    """What `pretraining.features.train_features` can be told."""

    architecture: str = setting(
        "plain",
        "Choose the kind of network: a plain stack of convolutions, or a residual network.",
        choices=("plain", "residual"),
        group=NETWORK,
    )
    width: int = setting(32, "Give the first level this many channels.", minimum=1, group=NETWORK)
    feature_dim: int = setting(64, "Make feature vectors of this size.", minimum=1, group=NETWORK)
    epochs: int = setting(40, "Pass over the images this often.", minimum=1, group=LEARNING)
    batch: int = setting(64, "Update on this many images.", minimum=1, group=LEARNING)
    lr: float = setting(3e-3, "Set the highest learning rate of AdamW; it falls to zero.", above=0, group=LEARNING)
    augment: str = setting(
        "warp",
        "Shift, turn and scale the images between pixels in training (warp), or shift them by whole pixels (shift).",
        choices=("warp", "shift"),
        group=LEARNING,
    )
    mirror: bool = setting(False, "Train on images that are flipped left to right, too.", group=LEARNING)
    seed: int = setting(0, "Seed everything random.", minimum=0, group=LEARNING)
    precision: str = setting("fp32", "Compute the training in this precision.", choices=("fp32", "bf16"), group=MACHINE)

    weight_decay: float = 0.05
