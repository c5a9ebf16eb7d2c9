"""The settings of the alternating update, each of them declared once; see `torch_utils.settings`."""

from dataclasses import dataclass

from di_refine import objectives
from torch_utils.settings import LEARNING, MACHINE, OBJECTIVE, SettingError, UpdateConfig, setting

PRECISIONS = ("fp32", "bf16", "fp16")
"""Arithmetic of a network: float32, or autocast to a half precision. Weights stay float32."""

LOGNORMAL, EDM_GRID = "lognormal", "edm-grid"
"""Laws of the noise levels, see `di_refine.noise`."""


@dataclass(kw_only=True)
class TrainerConfig(UpdateConfig):
    """What `di_refine.trainer.Trainer` can be told; the values are checked when the object is made."""

    # What is learned from -----------------------------------------------------------------------------------------

    objective: str = setting(
        "ikl",
        "Choose the divergence that the generator minimises; docs/objectives.md has the formulas.",
        choices=objectives.NAMES,
        group=OBJECTIVE,
    )
    weight: str = setting(
        "default",
        "Weigh the noise levels of the objective by this power of sigma.",
        choices=("default", *objectives.WEIGHTS),
        group=OBJECTIVE,
    )
    normalize: bool | None = setting(
        None,
        "Divide the gradient of each sample by mean|x0 - Dq|.",
        group=OBJECTIVE,
        default_text="as the objective's authors do",
    )
    alpha: float | None = setting(
        None, "Set alpha of `objective=sid`.", above=0, maximum=2, group=OBJECTIVE, default_text="1.2"
    )
    detach_ratio: bool = setting(
        False,
        "Let no gradient through the density ratio of the uni-objectives: less variance, but an approximation.",
        group=OBJECTIVE,
    )
    sigma_dist: str = setting(
        LOGNORMAL,
        "Choose the law of the objective's noise levels. The student score always trains on the log-normal law.",
        choices=(LOGNORMAL, EDM_GRID),
        group=OBJECTIVE,
    )
    sigma_mean: float = setting(-1.2, "Set the mean of ln(sigma) of the log-normal law.", group=OBJECTIVE)
    sigma_std: float = setting(
        1.2, "Set the standard deviation of ln(sigma) of the log-normal law.", minimum=0, group=OBJECTIVE
    )
    tmax: float = setting(
        800,
        "Draw no level above this many thousandths of EDM's grid, for `sigma_dist=edm-grid`.",
        above=0,
        maximum=1000,
        group=OBJECTIVE,
    )
    ratio_weight: float = setting(
        0.01,
        "Weigh the loss of the density ratio by this where it trains the encoder of the student score.",
        minimum=0,
        group=OBJECTIVE,
    )
    # exp(10) is 22026: what a classifier says beyond that is no measurement.
    ratio_clamp: float = setting(
        10.0, "Keep the log of the density ratio within plus and minus this.", above=0, group=OBJECTIVE
    )
    ratio_r1: float = setting(0.0, "Weigh an R1 penalty on the density ratio by this.", minimum=0, group=OBJECTIVE)
    ratio_spectral_norm: bool = setting(
        False, "Normalise the layers of the density ratio's head by their spectral norm.", group=OBJECTIVE
    )
    adversarial_weight: float = setting(
        0.0,
        "Add an adversarial loss with this weight, by the pickle's discriminator or else by the density ratio.",
        minimum=0,
        group=OBJECTIVE,
    )
    gamma: float = setting(0.01, "Weigh the R1 penalty of that discriminator by this.", minimum=0, group=OBJECTIVE)
    augment: float = setting(
        0.0,
        "Transform what the student score trains on by EDM's non-leaky augmentations with this probability.",
        minimum=0,
        maximum=1,
        group=OBJECTIVE,
    )
    dropout: str = setting(
        "off",
        "Switch dropout off in teacher and student score, or let both drop the same units as in the paper (matched).",
        choices=("off", "matched"),
        group=OBJECTIVE,
    )

    # How it is learned --------------------------------------------------------------------------------------------

    batch: int = 128
    lr: float = setting(1e-5, "Set Adam's learning rate for the generator.", above=0, group=LEARNING, may_change=True)
    lr_rampdown: float = setting(
        0.0,
        "Let the generator's learning rate fall linearly to 0 over this many thousand images at the end.",
        minimum=0,
        group=LEARNING,
        may_change=True,
    )
    score_lr: float = setting(
        1e-5, "Set Adam's learning rate for the student score.", above=0, group=LEARNING, may_change=True
    )
    # The head starts from nothing, so a rate that only follows small changes is too low for it.
    ratio_lr: float | None = setting(
        None,
        "Set Adam's learning rate for the head that learns the density ratio.",
        above=0,
        group=LEARNING,
        may_change=True,
        default_text="`score_lr`, but at least 1e-4",
    )
    beta1: float = setting(
        0.0, "Set Adam's first beta; the second is 0.999.", minimum=0, maximum=0.9999, group=LEARNING
    )
    score_steps: int = setting(
        1, "Update the student score this often for each update of the generator.", minimum=1, group=LEARNING
    )
    score_adapter: int | None = setting(
        None,
        "Let the student score share the teacher's weights and train changes of this rank alone, where memory is too "
        "small for a second copy of the teacher.",
        minimum=1,
        group=LEARNING,
        default_text="a whole copy is trained",
    )
    freeze: str | None = setting(
        None,
        "Do not train the generator's parameters that have such names, as in *.conv[01].weight; separate several "
        "patterns by commas.",
        group=LEARNING,
        metavar="PATTERNS",
        default_text="all are trained",
    )
    score_freeze: str | None = setting(
        None,
        "Do not train the student score's parameters that have such names.",
        group=LEARNING,
        metavar="PATTERNS",
        default_text="all are trained",
    )
    # At the start the student score equals the teacher, so the first differences of scores would be noise.
    score_warmup: float = setting(
        20.0, "Train the student score alone for this many thousand images first.", minimum=0, group=LEARNING
    )
    ema_kimg: float = setting(
        500.0,
        "Average the generator with this half-life, in thousands of images; 0 keeps no average.",
        minimum=0,
        group=LEARNING,
    )
    max_grad_norm: float | None = setting(
        None, "Shorten gradients that are longer than this.", above=0, group=LEARNING, may_change=True
    )

    # What it runs on ----------------------------------------------------------------------------------------------

    batch_gpu: int | str | None = setting(  # type: ignore[assignment]  # 'auto' besides
        None,
        "Pass this many images through the networks at once; it must divide the batch. auto takes the most that fit.",
        minimum=1,
        words=("auto",),
        metavar="auto|INTEGER",
        group=MACHINE,
        may_change=True,
        default_text="`batch`",
    )
    precision: str = setting(
        "fp32", "Compute the networks in this precision; weights stay float32.", choices=PRECISIONS, group=MACHINE
    )
    teacher_precision: str | None = setting(
        None, "Compute the teacher in another precision.", choices=PRECISIONS, group=MACHINE, default_text="`precision`"
    )
    score_precision: str | None = setting(
        None,
        "Compute the student score in another precision.",
        choices=PRECISIONS,
        group=MACHINE,
        default_text="`precision`",
    )
    generator_precision: str | None = setting(
        None,
        "Compute the generator in another precision.",
        choices=PRECISIONS,
        group=MACHINE,
        default_text="`precision`",
    )
    compile: bool = setting(
        False,
        "Compile teacher, student score and generator with torch.compile, which takes minutes once. The student score "
        "stays as it is where a density ratio is learned, or with checkpoint_score. On a CPU it gains nothing.",
        group=MACHINE,
        may_change=True,
    )
    checkpoint_score: bool = setting(
        False,
        "Save memory: compute the student score's inner results again in the backward pass.",
        group=MACHINE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.divergence()
        except ValueError as error:
            raise SettingError(str(error)) from None
        if self.tmax != 800 and self.sigma_dist != EDM_GRID:
            raise SettingError(f"tmax={self.tmax:g} belongs to sigma_dist={EDM_GRID}; give both, or leave it out")
        if self.score_freeze is not None and not self.divergence().needs_student:
            raise SettingError(f"objective={self.objective} has no student score; leave out score_freeze")
        if self.score_freeze is not None and self.score_adapter is not None:
            raise SettingError("score_adapter has frozen the student score's weights; leave out score_freeze")
        if self.compile and self.dropout == "matched":
            raise SettingError(
                "dropout=matched needs random numbers that compile draws otherwise; leave one of them out"
            )

    def divergence(self) -> objectives.Objective:
        """The objective with its settings."""
        return objectives.get(self.objective, self.weight, self.normalize, self.detach_ratio, self.alpha)

    @property
    def needs_reference(self) -> bool:
        """Whether there must be images of the teacher's side, for a density ratio or an adversarial loss."""
        return self.divergence().needs_ratio or self.adversarial_weight > 0

    @property
    def warmup_nimg(self) -> int:
        """Images for which the student score is trained alone; 0 where the objective has none."""
        return round(self.score_warmup * 1000) if self.divergence().needs_student else 0

    def precision_of(self, network: str) -> str:
        """The precision of 'teacher', 'score' or 'generator'."""
        own = {
            "teacher": self.teacher_precision,
            "score": self.score_precision,
            "generator": self.generator_precision,
        }
        return own[network] or self.precision
