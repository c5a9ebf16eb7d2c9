"""The alternating update of Diff-Instruct: a student score follows the generator, the generator follows the teacher.

One step draws latents, passes them through the generator once, and uses the samples twice: denoising score matching for
the student score (OpenReview of arXiv 2305.18455, algorithm 1, line 5), and the objective's gradient for the generator
(line 8).

    trainer = Trainer(generator, teacher, TrainerConfig(batch=64))
    while trainer.nimg < 100_000:
        stats = trainer.step()
    refined = trainer.ema
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from di_refine import objectives
from di_refine.edm.loss import edm_weight
from di_refine.errors import RunError
from di_refine.noise import LogNormal, expand_as
from torch_utils import misc


@dataclass
class TrainerConfig:
    """Settings of `Trainer`; checked on creation.

    Attributes:
        objective: a name from `di_refine.objectives.NAMES` that needs no density ratio.
        weight: w(s) of the objective, see `objectives.get`.
        normalize: per-sample normalisation of the objective; None is the objective's own choice.
        alpha: of the objective 'sid'; None is its authors' choice.
        lr: Adam's learning rate for the generator.
        score_lr: Adam's learning rate for the student score.
        betas: Adam's betas for both (arXiv 2305.18455, appendix: 0 and 0.999).
        batch: images per step.
        batch_gpu: images per forward pass; None is the whole batch. Must divide `batch`. Of the random draws,
            it changes only those inside the networks (noise inputs, dropout).
        sigma: law of the noise levels.
        score_warmup: images for which only the student score is trained. At the start it equals the teacher, so the
            first differences of scores would be noise.
        ema_nimg: half-life of the generator's average, in images; 0 keeps no average.
        dropout: 'off', or 'matched': teacher and student score share their dropout masks.
        precision: 'fp32' or 'bf16' (autocast; weights stay float32).
        class_probs: frequencies labels are drawn with; None is uniform.
        sigma_data: standard deviation of the data, for the score's loss weighting.
        seed: every draw is a function of it and the number of images seen.
    """

    objective: str = "ikl"
    weight: str = "default"
    normalize: bool | None = None
    alpha: float | None = None
    lr: float = 1e-5
    score_lr: float = 1e-5
    betas: tuple[float, float] = (0.0, 0.999)
    batch: int = 64
    batch_gpu: int | None = None
    sigma: LogNormal = field(default_factory=LogNormal)
    score_warmup: int = 0
    ema_nimg: float = 500_000
    dropout: str = "off"
    precision: str = "fp32"
    class_probs: Sequence[float] | None = None
    sigma_data: float = 0.5
    seed: int = 0

    def __post_init__(self):
        self.batch_gpu = self.batch_gpu or self.batch
        if self.batch < 1 or self.batch % self.batch_gpu:
            raise ValueError(f"batch={self.batch} is not a multiple of batch_gpu={self.batch_gpu}")
        if self.dropout not in ("off", "matched"):
            raise ValueError(f"dropout must be 'off' or 'matched', not {self.dropout!r}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', not {self.precision!r}")
        if self.lr <= 0 or self.score_lr <= 0:
            raise ValueError("lr and score_lr must be positive")


class Trainer:
    """Trains any differentiable generator towards the distribution of a diffusion model.

    Args:
        generator: a module `(z [N, *latent_shape], labels [N, label_dim]) -> x0 [N, ...]` with the attributes
            `latent_shape` and `label_dim`. It is trained in place.
        teacher: a module `(x, sigma [N], labels [N, label_dim]) -> denoised`, of the same sample shape. It is frozen.
        config: settings.
        student: the student score, called like the teacher; None is a copy of the teacher. Matched dropout needs the
            teacher's architecture.

    Raises:
        ValueError: the objective is unknown or needs a density ratio, or `class_probs` does not fit the generator.

    Attributes:
        generator, teacher, student: the three networks.
        ema: running average of the generator (the generator itself when `ema_nimg` is 0).
        nimg: images seen, warm-up included.
    """

    def __init__(
        self,
        generator: torch.nn.Module,
        teacher: torch.nn.Module,
        config: TrainerConfig,
        student: torch.nn.Module | None = None,
    ):
        self.config = config
        self.objective = objectives.get(config.objective, config.weight, config.normalize, alpha=config.alpha)
        if self.objective.needs_ratio:
            raise ValueError(f"objective {config.objective!r} needs a density ratio, which this trainer does not learn")
        if config.class_probs is not None and len(config.class_probs) != generator.label_dim:
            raise ValueError(
                f"class_probs has {len(config.class_probs)} entries and the generator {generator.label_dim} classes"
            )
        self.device = next(generator.parameters()).device
        self.generator = generator.train().requires_grad_(True)
        self.teacher = teacher.to(self.device).requires_grad_(False)
        student = copy.deepcopy(teacher) if student is None else student
        self.student = student.to(self.device).requires_grad_(True)
        # Dropout is active in train mode; the normalisations of the networks are the same in both modes.
        for net in (self.teacher, self.student):
            net.train(config.dropout == "matched")
        self.ema = copy.deepcopy(generator).eval().requires_grad_(False) if config.ema_nimg > 0 else generator
        fused = self.device.type in ("cuda", "cpu")
        adam = {"betas": config.betas, "eps": 1e-8, "fused": fused}
        self._generator_params = list(generator.parameters())
        self._student_params = list(self.student.parameters())
        self.generator_optimizer = torch.optim.Adam(self._generator_params, lr=config.lr, **adam)
        self.student_optimizer = torch.optim.Adam(self._student_params, lr=config.score_lr, **adam)
        self.nimg = 0
        probs = torch.ones(generator.label_dim) if config.class_probs is None else torch.tensor(config.class_probs)
        self._class_probs = probs.to(self.device, torch.float32)
        self._ema_pairs = _pairs(self.ema.parameters(), self.generator.parameters())
        self._ema_buffers = _pairs(self.ema.buffers(), self.generator.buffers())
        # Step (in images) at which each network first went wrong, -1 for never; on the device, so that watching costs
        # no synchronisation.
        self._bad = torch.full([2], -1, dtype=torch.int64, device=self.device)

    # ------------------------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, torch.Tensor]:
        """One update on `config.batch` images.

        Returns:
            Scalars on the device: `score_loss`, `score_grad_norm`, and after the warm-up `generator_loss` (a
            surrogate without meaning of its own), `generator_grad_norm`, `score_gap` (mean |Dp - Dq| over pixels).
        """
        cfg = self.config
        warmup = self.nimg < cfg.score_warmup
        rng = torch.Generator(self.device).manual_seed(misc.derive_seed(cfg.seed, self.nimg))
        share = cfg.batch_gpu / cfg.batch
        totals: dict[str, torch.Tensor] = {}
        # Draws are made for the whole batch and then cut, so that they do not depend on batch_gpu; the noise at its
        # first use, when its shape is known.
        z, labels = self.draw(cfg.batch, rng)
        sigma = cfg.sigma(cfg.batch, rng)
        noise = functools.cache(lambda shape: torch.randn([cfg.batch, *shape], generator=rng, device=self.device))
        with self._seeded():
            for start in range(0, cfg.batch, cfg.batch_gpu):
                part = slice(start, start + cfg.batch_gpu)
                stats = self._accumulate(part, z, labels, sigma, noise, warmup)
                for name, value in stats.items():
                    totals[name] = totals.get(name, 0) + value * share
        totals["score_grad_norm"] = self._update(self.student_optimizer, self._student_params)
        self._watch(0, totals["score_loss"] + totals["score_grad_norm"])
        if not warmup:
            totals["generator_grad_norm"] = self._update(self.generator_optimizer, self._generator_params)
            self._watch(1, totals["generator_loss"] + totals["generator_grad_norm"])
            self._average()
        self.nimg += cfg.batch
        return totals

    def draw(self, n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `[n, *latent_shape]` and one-hot labels `[n, label_dim]`."""
        z = torch.randn([n, *self.generator.latent_shape], generator=rng, device=self.device)
        classes = self.generator.label_dim
        labels = torch.zeros([n, classes], device=self.device)
        if classes:
            index = torch.multinomial(self._class_probs, n, replacement=True, generator=rng)
            labels.scatter_(1, index[:, None], 1)
        return z, labels

    def check_finite(self, last_good: str = "none yet") -> None:
        """Raise if any step so far had a non-finite loss or gradient (costs one synchronisation).

        Nothing is repaired on the way: from such a step on the networks may hold non-finite weights.

        Raises:
            RunError: naming the network, the images seen, and `last_good`, the snapshot to go back to.
        """
        for name, nimg in zip(("student score", "generator"), self._bad.tolist()):
            if nimg >= 0:
                raise RunError(
                    f"the {name}'s loss or gradient is not finite at {nimg / 1000:.3f} kimg "
                    f"(step {nimg // self.config.batch}); last good snapshot: {last_good}. Lower the learning rates, "
                    "or use --precision=fp32."
                )

    def state_dict(self) -> dict:
        """Everything stateful, as tensors and plain values that `torch.load(weights_only=True)` reads."""
        return {
            "generator": self.generator.state_dict(),
            "ema": self.ema.state_dict(),
            "student": self.student.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "student_optimizer": self.student_optimizer.state_dict(),
            "nimg": self.nimg,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()` of the same networks; learning rates are those of this trainer's settings."""
        for name in ("generator", "ema", "student", "generator_optimizer", "student_optimizer"):
            getattr(self, name).load_state_dict(state[name])
        # The optimizers' states bring the rates they were saved with; the settings of this trainer count.
        self.generator_optimizer.param_groups[0]["lr"] = self.config.lr
        self.student_optimizer.param_groups[0]["lr"] = self.config.score_lr
        self.nimg = state["nimg"]
        self._bad.fill_(-1)

    # ------------------------------------------------------------------------------------------------------------------

    def _accumulate(
        self,
        part: slice,
        z: torch.Tensor,
        labels: torch.Tensor,
        sigma: torch.Tensor,
        noise: Callable[[torch.Size], torch.Tensor],
        warmup: bool,
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of a part of the batch; `noise(shape)` makes normals for the whole batch."""
        cfg, objective = self.config, self.objective
        share = cfg.batch_gpu / cfg.batch
        z, labels, sigma = z[part], labels[part], sigma[part]
        with self._autocast(), torch.set_grad_enabled(not warmup):
            x0 = self.generator(z, labels).float()
        s = expand_as(sigma, x0)
        scaled_noise = s * noise(x0.shape[1:])[part]

        # The score's noised samples serve the generator too: its gradient needs the student's output at *some* noised
        # samples, and this output is at hand before the student is updated. That saves a third of the student's passes.
        sample = x0.detach()
        x_s = sample + scaled_noise
        dropout_state = self._rng_state()
        with self._autocast():
            dp = self.student(x_s, sigma, labels).float()
        weight = expand_as(edm_weight(sigma, cfg.sigma_data), sample)
        score_loss = (weight * (dp - sample) ** 2).mean()
        (score_loss * share).backward()
        stats = {"score_loss": score_loss.detach()}
        if warmup:
            return stats

        if objective.detached:
            dp = dp.detach()

            def student(x, sigma):
                return dp
        else:
            x_s = x0 + scaled_noise

            def student(x, sigma):
                with self._replayed(dropout_state), self._autocast():
                    return self.student(x, sigma, labels).float()

        gap = []

        def teacher(x, sigma):
            with self._replayed(dropout_state), self._autocast():
                dq = self.teacher(x, sigma, labels).float()
            gap.append((dp.detach() - dq.detach()).abs().mean())
            return dq

        self._freeze_student(not objective.detached)
        loss = objective(x0, x_s, sigma, teacher, student).mean()
        (loss * share).backward()
        self._freeze_student(False)
        return {**stats, "generator_loss": loss.detach(), "score_gap": gap[0]}

    def _update(self, optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> torch.Tensor:
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    @torch.no_grad()
    def _average(self) -> None:
        if self.config.ema_nimg <= 0:
            return
        averages, current = self._ema_pairs
        torch._foreach_lerp_(averages, current, 1 - 0.5 ** (self.config.batch / self.config.ema_nimg))
        for average, value in zip(*self._ema_buffers):
            average.copy_(value)

    def _watch(self, network: int, value: torch.Tensor) -> None:
        now = torch.where(torch.isfinite(value), -1, self.nimg)
        self._bad[network] = torch.where(self._bad[network] >= 0, self._bad[network], now)

    def _freeze_student(self, frozen: bool) -> None:
        """Keep the generator's objective from filling the student's gradients when it flows through the student."""
        for p in self._student_params:
            p.requires_grad_(not frozen)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _seeded(self):
        """Random draws inside the networks (noise inputs, dropout) also depend on seed and images seen alone."""
        stack = contextlib.ExitStack()
        stack.enter_context(torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []))
        torch.manual_seed(misc.derive_seed(self.config.seed, self.nimg, "networks"))
        return stack

    def _rng_state(self):
        if self.config.dropout == "off":
            return None
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    @contextlib.contextmanager
    def _replayed(self, state):
        """Run with the random state of the student's pass, so that both networks drop the same units."""
        if state is None:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state, self.device)
            else:
                torch.set_rng_state(state)
            yield


def _pairs(averages, current) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [t.detach() for t in averages], [t.detach() for t in current]
