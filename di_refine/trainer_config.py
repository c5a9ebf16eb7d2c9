"""The settings of `di_refine.trainer.Trainer`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from di_refine.noise import EdmGrid, LogNormal

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass
class TrainerConfig:
    """Settings of `Trainer`; checked on creation.

    Attributes:
        objective: a name from `di_refine.objectives.NAMES`.
        weight: w(s) of the objective, see `objectives.get`.
        normalize: per-sample normalisation of the objective; None is the objective's own choice.
        alpha: of the objective 'sid'; None is its authors' choice.
        detach_ratio: of the objectives 'uni-<div>': less variance, but biased.
        lr: Adam's learning rate for the generator.
        score_lr: Adam's learning rate for the student score.
        ratio_lr: Adam's learning rate for the head that learns the density ratio; None is `score_lr`, but at least
            1e-4, as the head starts from nothing.
        betas: Adam's betas for all (arXiv 2305.18455, appendix: 0 and 0.999).
        batch: images per step.
        batch_gpu: images per forward pass; None is the whole batch. Must divide `batch`. Of the random draws,
            it changes only those inside the networks (noise inputs, dropout, augmentation).
        sigma: law of the noise levels at which the objective is taken.
        score_sigma: law of those at which the student score is trained; None lets the same noised samples serve both.
        score_steps: updates of the student score per update of the generator, each but the last on samples of its own.
        score_warmup: images for which only the student score is trained. At the start it equals the teacher, so the
            first differences of scores would be noise.
        ratio_weight: weight of the ratio's logistic loss beside the score's loss in the encoder they share.
        ratio_clamp: log ratios are kept within plus and minus this: exp(10) is 22026, and a classifier's word beyond it
            is no measurement. Objectives that square the ratio want less.
        ratio_r1: weight of an R1 penalty on the ratio at the noised teacher-side samples; 0 is none.
        ratio_spectral_norm: bound the layers of the ratio's head.
        adversarial_weight: weight of the adversarial loss, see `Trainer`; 0 is none.
        ema_nimg: half-life of the generator's average, in images; 0 keeps no average.
        dropout: 'off', or 'matched': teacher and student score share their dropout masks.
        precision: 'fp32', 'bf16' or 'fp16' (autocast; weights stay float32). Of 'fp16' losses are scaled.
        teacher_precision, score_precision, generator_precision: of one network; None is `precision`.
        max_grad_norm: longer gradients are shortened to it; None leaves them.
        checkpoint_score: keep less of the student's forward pass and compute it again; for EDM networks.
        class_probs: frequencies labels are drawn with; None is uniform.
        sigma_data: standard deviation of the data, for the score's loss weighting.
        seed: every draw is a function of it and the number of images seen.
    """

    objective: str = "ikl"
    weight: str = "default"
    normalize: bool | None = None
    alpha: float | None = None
    detach_ratio: bool = False
    lr: float = 1e-5
    score_lr: float = 1e-5
    ratio_lr: float | None = None
    betas: tuple[float, float] = (0.0, 0.999)
    batch: int = 64
    batch_gpu: int | None = None
    sigma: LogNormal | EdmGrid = field(default_factory=LogNormal)
    score_sigma: LogNormal | EdmGrid | None = None
    score_steps: int = 1
    score_warmup: int = 0
    ratio_weight: float = 0.01
    ratio_clamp: float = 10.0
    ratio_r1: float = 0.0
    ratio_spectral_norm: bool = False
    adversarial_weight: float = 0.0
    ema_nimg: float = 500_000
    dropout: str = "off"
    precision: str = "fp32"
    teacher_precision: str | None = None
    score_precision: str | None = None
    generator_precision: str | None = None
    max_grad_norm: float | None = None
    checkpoint_score: bool = False
    class_probs: Sequence[float] | None = None
    sigma_data: float = 0.5
    seed: int = 0

    def __post_init__(self):
        self.batch_gpu = self.batch_gpu or self.batch
        self.ratio_lr = self.ratio_lr or max(self.score_lr, 1e-4)
        if self.batch < 1 or self.batch % self.batch_gpu:
            raise ValueError(f"batch={self.batch} is not a multiple of batch_gpu={self.batch_gpu}")
        if self.score_steps < 1:
            raise ValueError(f"score_steps must be at least 1, not {self.score_steps}")
        if self.dropout not in ("off", "matched"):
            raise ValueError(f"dropout must be 'off' or 'matched', not {self.dropout!r}")
        for network in ("teacher", "score", "generator"):
            if self.precision_of(network) not in PRECISIONS:
                raise ValueError(f"precision must be one of {PRECISIONS}, not {self.precision_of(network)!r}")
        if self.lr <= 0 or self.score_lr <= 0:
            raise ValueError("lr and score_lr must be positive")

    def precision_of(self, network: str) -> str:
        """Of 'teacher', 'score' or 'generator'."""
        return getattr(self, f"{network}_precision") or self.precision
