"""The settings of adversarial training, each of them declared once; see `torch_utils.settings`."""

from dataclasses import dataclass

from torch_utils.settings import LEARNING, OBJECTIVE, SettingError, UpdateConfig, setting


@dataclass(kw_only=True)
class AdversarialConfig(UpdateConfig):
    """What `stylegan2_ada.adversarial.AdversarialTrainer` can be told; the defaults are ADA's for CIFAR-10.

    Attributes:
        betas, eps: of Adam.
        d_reg_interval: steps between two R1 penalties; None: in every step, in one backward pass with the loss.
        g_reg_interval: steps between two path-length penalties; None: in every step, likewise.
        pl_decay: share of the newest path lengths in their running mean.
        pl_batch_shrink: the path-length penalty uses one in so many images of the batch.
        noise_mode: noise of the synthesis network while training: 'random', 'const' or 'none'.
        ema_rampup: limit of the average's half-life relative to the images seen so far, so that the start is
            forgotten; None: no limit.
    """

    lr: float = setting(2.5e-3, "Set Adam's learning rate.", above=0, group=LEARNING, may_change=True)
    d_lr: float | None = setting(
        None,
        "Set another learning rate for the discriminator.",
        above=0,
        group=LEARNING,
        may_change=True,
        default_text="`lr`",
    )
    ema_kimg: float = setting(
        500.0,
        "Average the generator with this half-life, in thousands of images; 0 makes the average a copy.",
        minimum=0,
        group=LEARNING,
    )
    gamma: float = setting(0.01, "Weigh the R1 penalty by this; 0 switches it off.", minimum=0, group=OBJECTIVE)
    pl_weight: float = setting(
        0.0, "Weigh path-length regularisation by this; 0 switches it off.", minimum=0, group=OBJECTIVE
    )
    style_mixing: float = setting(
        0.0,
        "Let an image take its later layers' w from another latent with this probability.",
        minimum=0,
        maximum=1,
        group=OBJECTIVE,
    )

    betas: tuple[float, float] = (0.0, 0.99)
    eps: float = 1e-8
    d_reg_interval: int | None = 16
    g_reg_interval: int | None = 4
    pl_decay: float = 0.01
    pl_batch_shrink: int = 2
    noise_mode: str = "random"
    ema_rampup: float | None = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps > 0:
            raise SettingError(f"eps={self.eps} is not possible; it must be greater than 0")
        if not 0 <= self.pl_decay <= 1:
            raise SettingError(f"pl_decay={self.pl_decay} is not possible; it must be between 0 and 1")
        for name in ("d_reg_interval", "g_reg_interval", "pl_batch_shrink"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name}={value} is not possible; it must be at least 1")
