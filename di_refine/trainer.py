"""The alternating update of Diff-Instruct: a student score follows the generator, the generator follows the teacher.

One step draws latents, passes them through the generator once, and uses the samples twice: denoising score matching for
the student score (OpenReview of arXiv 2305.18455, algorithm 1, line 5), and the objective's gradient for the generator
(line 8). `Trainer._passes` has all of it, from top to bottom.

    trainer = Trainer(generator, teacher, TrainerConfig(batch=64))
    while trainer.nimg < 100_000:
        stats = trainer.step()
    refined = trainer.ema
"""

import contextlib
import copy
import fnmatch
import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from di_refine import denoisers, noise, ratio
from di_refine.config import TrainerConfig
from di_refine.critic import R1_INTERVAL, Critic
from di_refine.edm.augment import AugmentPipe
from di_refine.generators import Generator
from di_refine.labels import LabelLaw
from di_refine.noise import Law, by_sigma, expand_as
from torch_utils import distributed, low_rank, misc
from torch_utils.settings import SettingError
from torch_utils.training import Average, FiniteWatch, adam, compiled, load_adam, seeded

__all__ = ["Reference", "Trainer", "TrainerConfig"]

BETA2 = 0.999  # arXiv 2305.18455, appendix

STUDENT, GENERATOR, CRITIC, TEACHER = "student", "generator", "critic", "teacher"
_NAMES = {STUDENT: "student score", GENERATOR: "generator", CRITIC: "critic"}  # for messages
_REPORTED = {STUDENT: "score", GENERATOR: "generator", CRITIC: "critic"}  # in what `step` returns


Reference = Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]]
"""A stream of teacher-side samples, which the density ratio and the critic need.

Called as `reference(start_nimg)`, it returns an iterator, from that position of the stream on, of images in [-1, 1],
`[share, ...]` of the generator's or the teacher's size, and labels `[share, label_dim]`; share is this process's part
of the batch. It may have an attribute `class_frequencies`, `[label_dim]`; without one, or where it is None as for label
vectors, labels are as frequent as the generator's.
"""


@dataclass
class _Draws:
    """The random numbers of one batch, and the teacher-side samples that belong to it.

    They are drawn for the whole batch and then cut, so that they do not depend on batch_gpu; the normals are drawn at
    their first use, when their shape is known.
    """

    turn: int
    z: torch.Tensor
    labels: torch.Tensor
    score_sigma: torch.Tensor
    sigma: torch.Tensor
    normals: Callable[[str, torch.Size], torch.Tensor]  # (purpose, shape of one sample) -> [batch, *shape]
    reference: tuple[torch.Tensor, torch.Tensor] | None  # of this process's share alone
    first: int  # where that share begins

    def of_reference(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference images and labels that go with a part of the batch."""
        if self.reference is None:
            raise ValueError("there is no reference")
        images, labels = self.reference
        mine = slice(part.start - self.first, part.stop - self.first)
        return images[mine], labels[mine]


class Trainer:
    """Trains any differentiable generator towards the distribution of a diffusion model.

    With several processes (`torch_utils.distributed`), each makes one trainer of the same networks and settings and
    takes every step on its share of the batch; all but the draws inside the networks is the same as with one.

    Args:
        generator: a module that is a `di_refine.generators.Generator`. It is trained in place.
        teacher: a module that is a `di_refine.denoisers.Denoiser`. It is frozen.
        config: the settings.
        student: the student score, called like the teacher, where the objective needs one; None is a copy of the
            teacher, or of the first of an `Ensemble`. Matched dropout needs the teacher's architecture. With `augment`
            it has to take `augment_labels`.
        bridge: converts the generator's images to the teacher's, see `di_refine.bridge`; None where they agree.
        reference: teacher-side samples, for a density ratio or a critic.
        ratio_layer: where in the student the ratio finds features, see `di_refine.ratio.DensityRatio`.
        critic: gives the adversarial loss; None leaves that to the density ratio.
        labels: what labels are drawn from; None draws all classes equally often.
        total: length of the training, in images, which a falling learning rate needs to know.
        sigma, score_sigma: laws of the noise levels of the objective and of the student score, in place of those that
            the settings name. A `score_sigma` of None lets the same noised samples serve both.
        backend: of `torch.compile`, for the setting `compile`.

    Raises:
        ValueError: settings, networks or the lack of a reference that do not fit together.
        DistributedError: the processes do not divide the batch, or `batch_gpu` does not divide their shares.

    Attributes:
        generator, teacher, student: the three networks; the student is None where the objective needs none.
        latent_shape, label_dim: of the generator.
        labels: what labels are drawn from.
        ratio: the density ratio, where one is learned.
        ema: running average of the generator (the generator itself when `ema_kimg` is 0).
        nimg: images seen, warm-up included.
        optimizers: of 'generator' and, where there are such, 'student' and 'critic'.
        by_sigma: of the last step, `score_loss_by_sigma` and `score_gap_by_sigma`: the means of `step()` in bins of the
            noise level, `[6]` with the edges `noise.SIGMA_EDGES`, NaN where no level fell.
    """

    def __init__(
        self,
        generator: torch.nn.Module,
        teacher: torch.nn.Module,
        config: TrainerConfig,
        student: torch.nn.Module | None = None,
        bridge: torch.nn.Module | None = None,
        reference: Reference | None = None,
        ratio_layer: torch.nn.Module | None = None,
        critic: Critic | None = None,
        labels: LabelLaw | None = None,
        total: int | None = None,
        sigma: Law | None = None,
        score_sigma: Law | None = None,
        backend: str = "inductor",
    ):
        self.config, self._total = config, total
        if config.lr_rampdown and total is None:
            raise ValueError("`lr_rampdown` needs to know the end of the training: give total as well")
        if isinstance(config.batch_gpu, str):
            raise ValueError(f"batch_gpu={config.batch_gpu} has to be chosen before the trainer is made; give a number")
        self.share = distributed.share(config.batch)
        self.micro_batch = distributed.micro_batch(config.batch, config.batch_gpu)
        self.objective = config.divergence()
        learns_ratio = self.objective.needs_ratio or (config.adversarial_weight > 0 and critic is None)
        if reference is None and learns_ratio:
            what = "adversarial_weight" if not self.objective.needs_ratio else f"objective={config.objective}"
            raise ValueError(f"{what} needs a density ratio, which is learned from a reference: samples of the teacher")
        if reference is None and critic is not None:
            raise ValueError("a critic needs a reference: real images")
        made = cast(Generator, generator)
        self.latent_shape, self.label_dim = made.latent_shape, made.label_dim
        self.labels = LabelLaw(self.label_dim) if labels is None else labels
        if self.labels.label_dim != self.label_dim:
            raise ValueError(f"labels of {self.labels.label_dim} classes are for a generator of {self.label_dim}")
        if sigma is None:
            model = cast(denoisers.Denoiser, teacher)
            sigma, score_sigma = noise.laws(config, model.sigma_min, model.sigma_max)
        self._sigma, self._score_sigma = sigma, score_sigma
        self.device = next(generator.parameters()).device
        self.generator = generator.train().requires_grad_(True)
        _freeze(generator, "generator", "freeze", config.freeze)
        self.teacher = teacher.to(self.device).requires_grad_(False)
        if student is not None and not self.objective.needs_student:
            raise ValueError(f"objective={config.objective} has no student score, but a student is given; leave it out")
        self.student = self._make_student(student) if self.objective.needs_student else None
        self._score_parameters = torch.nn.ParameterList()
        # Dropout is active in train mode; the normalisations of the networks are the same in both modes.
        self.teacher.train(config.dropout == "matched")
        self.optimizers = {GENERATOR: adam(low_rank.trained(generator), config.lr, (config.beta1, BETA2))}
        if self.student is not None:
            self._score_parameters = low_rank.trained(self.student)
            self.optimizers[STUDENT] = adam(self._score_parameters, config.score_lr, (config.beta1, BETA2))
            denoisers.keep_norms(self.student, self.optimizers[STUDENT])
        denoisers.keep_norms(generator, self.optimizers[GENERATOR])
        self._average = Average(generator) if config.ema_kimg > 0 else None
        self.ema: Any = generator if self._average is None else self._average.module
        self.bridge = torch.nn.Identity() if bridge is None else bridge.to(self.device)
        self.critic = critic
        self._augment = AugmentPipe.edm(config.augment) if config.augment else None
        self._reference = reference
        self._reference_stream: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.nimg = 0
        self.ratio = self._make_ratio(ratio_layer) if learns_ratio else None
        self._log_prior = self._make_log_prior() if learns_ratio else None

        # What runs the networks. The ratio listens to the student's inner layers, and memory is saved between them.
        self._call: dict[str, Callable[..., Any]] = {GENERATOR: generator, TEACHER: self.teacher}
        if self.student is not None:
            self._call[STUDENT] = self.student
        if config.compile:
            plain = {STUDENT} if self.ratio is not None or config.checkpoint_score else set()
            for name in self._call.keys() - plain:
                self._call[name] = compiled(self._call[name], backend)

        # What the generator's loss flows through without leaving gradients there.
        self._others = [*self._score_parameters]
        if self.ratio is not None:
            group = {"params": list(self.ratio.parameters()), "lr": self._ratio_lr}
            self.optimizers[STUDENT].add_param_group(group)
            self._others += self.ratio.parameters()
        if critic is not None:
            self.optimizers[CRITIC] = adam(critic.net.parameters(), config.lr, (config.beta1, BETA2))
            self._others += critic.net.parameters()
        # A scaler does nothing unless it is enabled; each optimizer has its own, as their gradients differ in size.
        half = "fp16" in {config.precision_of(name) for name in ("generator", "score", "teacher")}
        self._scalers = {
            name: torch.amp.GradScaler(self.device.type, enabled=half) for name in (STUDENT, GENERATOR, CRITIC)
        }
        self._finite = FiniteWatch(list(_NAMES.values()), self.device)
        self._agreed = False
        self.by_sigma: dict[str, torch.Tensor] = {}

    def _make_student(self, student: torch.nn.Module | None) -> torch.nn.Module:
        """The student score: the given one, or a copy of the teacher, or changes of it."""
        cfg = self.config
        if student is None:
            first: Any = self.teacher.teachers[0] if isinstance(self.teacher, denoisers.Ensemble) else self.teacher
            rank = cfg.score_adapter
            student = copy.deepcopy(first) if rank is None else low_rank.adapted(first, rank, cfg.seed)
        elif cfg.score_adapter is not None:
            raise ValueError("`score_adapter` makes the student score of the teacher, but a student is given")
        if cfg.score_adapter is None:
            student.requires_grad_(True)
            _freeze(student, "student score", "score_freeze", cfg.score_freeze)
        student = student.to(self.device).train(cfg.dropout == "matched")
        if cfg.checkpoint_score:
            denoisers.recompute_blocks(student)
        return student

    # ------------------------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, torch.Tensor]:
        """One update on `config.batch` images.

        Returns:
            Scalars on the device, of the whole batch and the same on all processes: `score_loss`, `score_grad_norm`,
            and after the warm-up `generator_loss` (a surrogate without meaning of its own), `generator_grad_norm`,
            `score_gap` (mean |Dp - Dq| over pixels), and with a student score `score_margin` (by how much its loss on
            the generator's samples is below the teacher's). With `max_grad_norm`, `..._clipped` is 1 where a gradient
            was too long. With a density ratio `ratio_loss` (2 log 2 = 1.386 where nothing can be told apart); with an
            adversarial loss `adversarial_loss`, and with a critic `critic_loss` and `critic_grad_norm`. Every sixteenth
            update of the generator has `ema_distance`, from the average to the weights, relative to the weights.
        """
        cfg = self.config
        self._agree()
        moves, rank = self.nimg >= cfg.warmup_nimg, distributed.rank()
        totals: dict[str, torch.Tensor] = {}
        for turn in reversed(range(cfg.score_steps)):  # turn 0, the last, serves the generator as well
            draws = self._draw(turn)
            purpose: list[int | str] = ["networks"]
            purpose += [turn] if turn else []
            purpose += ["rank", rank] if rank else []
            with seeded(self.device, cfg.seed, self.nimg, *purpose):
                parts = [
                    self._passes(draws, slice(start, start + self.micro_batch), moves and turn == 0)
                    for start in range(self.share.start, self.share.stop, self.micro_batch)
                ]
            totals = self._summed(parts)
            if self.objective.needs_student:
                totals |= self._update(STUDENT, totals["score_loss"] + totals.get("ratio_loss", 0))
        if moves:
            for name in (GENERATOR, CRITIC) if cfg.lr_rampdown else ():
                for group in self.optimizers[name].param_groups if name in self.optimizers else ():
                    group["lr"] = self._lr
            totals |= self._update(GENERATOR, totals["generator_loss"])
            if self.critic is not None:
                totals |= self._update(CRITIC, totals["critic_loss"])
        distributed.average_buffers(self.generator)  # such as StyleGAN2's mean w, which has seen this share alone
        if moves and self._average is not None:
            self._average.update(cfg.batch, cfg.ema_kimg * 1000)
            if self.nimg // cfg.batch % 16 == 0:
                totals["ema_distance"] = self._average.distance()
        self.nimg += cfg.batch
        return totals

    def _passes(self, draws: _Draws, part: slice, moves: bool) -> dict[str, Any]:
        """All passes through networks of one update, on a part of the batch. They leave gradients.

        Args:
            draws: the random numbers.
            part: of the batch.
            moves: whether the generator is updated, and the critic.

        Returns:
            Scalars of the part by name; under names that end in `_by_sigma`, noise levels `[N]` and values `[N]`.
        """
        cfg, objective = self.config, self.objective
        labels = draws.labels[part]
        stats: dict[str, Any] = {}

        # The generator makes samples, which serve every network below.
        with self._autocast("generator"), torch.set_grad_enabled(moves):
            images = self._call[GENERATOR](draws.z[part], labels).float()
            x0 = self.bridge(images)

        # The student score learns to denoise them, and its encoder to tell them from the teacher's.
        random_state = dp = log_ratio = None
        if objective.needs_student:
            sigma = draws.score_sigma[part]
            sample, told = self._augmented(x0.detach(), "score", draws, part)
            x_s = sample + expand_as(sigma, x0) * draws.normals("score", x0.shape[1:])[part]
            random_state = self._rng_state()
            dp, logits = self._score(x_s, sigma, labels, **told)
            squares = expand_as(denoisers.loss_weight(self.teacher, sigma), x0) * (dp - sample) ** 2
            loss = squares.mean()
            stats |= {"score_loss": loss.detach(), "score_loss_by_sigma": (sigma, _per_sample(squares))}
            if logits is not None:
                ratio_loss = self._ratio_loss(logits, x0.shape, draws, part)
                stats["ratio_loss"] = ratio_loss.detach()
                loss = loss + cfg.ratio_weight * ratio_loss
            self._backward(STUDENT, loss)
            dp, log_ratio = dp.detach(), self._log_ratio(logits)
        if not moves:
            return stats

        # The critic learns to tell the samples from real images.
        if self.critic is not None:
            real, real_labels = draws.of_reference(part)
            penalty = self.nimg // cfg.batch % R1_INTERVAL == 0
            loss = self.critic.loss(real, real_labels, images.detach(), labels, penalty)
            stats["critic_loss"] = loss.detach()
            self._backward(CRITIC, loss)

        # Teacher and student score denoise the samples. The noised samples that the student was trained on serve here,
        # too: the gradient needs its output at *some* noised samples, and that output is at hand, from before the
        # student is updated. It saves a third of the student's passes.
        same_noise = self._score_sigma is None and self._augment is None
        sigma = draws.sigma[part]
        added = expand_as(sigma, x0) * draws.normals("score" if same_noise else "generator", x0.shape[1:])[part]
        x_s = (x0.detach() if objective.detached else x0) + added
        if random_state is None or not same_noise:
            random_state = self._rng_state()
        with _frozen(self._others):
            with torch.set_grad_enabled(not objective.detached):
                with self._replayed(random_state), self._autocast("teacher"):
                    dq = self._call[TEACHER](x_s, sigma, labels).float()
                if objective.needs_student and not (same_noise and objective.detached):
                    with self._replayed(random_state):
                        dp, logits = self._score(x_s, sigma, labels)
                    log_ratio = self._log_ratio(logits, detach=False)

            # The generator follows the objective, and the adversarial loss where there is one.
            loss = objective.loss(x0, sigma, dq, dp, log_ratio).mean()
            stats["generator_loss"] = loss.detach()
            if cfg.adversarial_weight > 0:
                adversarial = self._adversarial_loss(images, x0 + added, sigma, labels)
                stats["adversarial_loss"] = adversarial.detach()
                loss = loss + cfg.adversarial_weight * adversarial
            self._backward(GENERATOR, loss)
        dq, known = dq.detach(), (x0 if dp is None else dp).detach()
        gap = (known - dq).abs()
        if dp is not None:
            weight = expand_as(denoisers.loss_weight(self.teacher, sigma), x0)
            stats["score_margin"] = (weight * ((dq - x0.detach()) ** 2 - (known - x0.detach()) ** 2)).mean()
        return {**stats, "score_gap": gap.mean(), "score_gap_by_sigma": (sigma, _per_sample(gap))}

    def _score(
        self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The student's denoised samples, float32, and the logits `[N]` of the density ratio, where one is learned."""
        if self.student is None:
            raise ValueError("this objective has no student score")
        if self.ratio is None:
            with self._autocast("score"):
                return self._call[STUDENT](x, sigma, labels, **kwargs).float(), None
        with self.ratio.watching() as features, self._autocast("score"):
            dp = self.student(x, sigma, labels, **kwargs).float()
        return dp, self.ratio(features[-1])

    def _log_ratio(self, logits: torch.Tensor | None, detach: bool = True) -> torch.Tensor | None:
        """The log ratio that objectives may take the exponential of."""
        if logits is None:
            return None
        return (logits.detach() if detach else logits).clamp(-self.config.ratio_clamp, self.config.ratio_clamp)

    def _ratio_loss(self, logits: torch.Tensor, shape: torch.Size, draws: _Draws, part: slice) -> torch.Tensor:
        """Logistic loss of the generator's logits and of teacher-side samples at the same noise levels."""
        cfg, sigma = self.config, draws.score_sigma[part]
        if self.ratio is None or self._log_prior is None:
            raise ValueError("no density ratio is learned")
        images, labels = draws.of_reference(part)
        if images.shape[1:] != shape[1:]:
            images = self.bridge(images)
        images, told = self._augmented(images, "reference", draws, part)
        x_s = images + expand_as(sigma, images) * draws.normals("reference", shape[1:])[part]
        x_s = x_s.detach().requires_grad_(cfg.ratio_r1 > 0)
        # The fused attention kernels have no second derivative, which R1 is made of.
        plain = sdpa_kernel(SDPBackend.MATH) if cfg.ratio_r1 > 0 else contextlib.nullcontext()
        with self._autocast("score"), plain:
            features = self.ratio.features(x_s, sigma, labels, **told)
        teacher_logits = self.ratio(features)
        # The head learns the ratio within a class. Where the reference has other class frequencies than the generator,
        # the classifier's logit is that plus the log ratio of the frequencies.
        generator_prior, teacher_prior = (c @ self._log_prior for c in (draws.labels[part], labels))
        loss = ratio.logistic_loss(logits + generator_prior, teacher_logits + teacher_prior).mean()
        if cfg.ratio_r1 > 0:
            (gradient,) = torch.autograd.grad(teacher_logits.sum(), x_s, create_graph=True)
            loss = loss + cfg.ratio_r1 / 2 * gradient.flatten(1).square().sum(dim=1).mean()
        return loss

    def _adversarial_loss(
        self, images: torch.Tensor, x_s: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """The critic's mean loss on images; without a critic, that of the density ratio on noised samples."""
        if self.critic is not None:
            return self.critic.generator_loss(images, labels)
        if self.ratio is None:
            raise ValueError("an adversarial loss needs a critic or a density ratio")
        with self._autocast("score"):
            features = self.ratio.features(x_s, sigma, labels)
        return F.softplus(-self.ratio(features)).mean()

    def _augmented(
        self, images: torch.Tensor, purpose: str, draws: _Draws, part: slice
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Images transformed as they would be with the whole batch at once, and what the student is told of it."""
        if self._augment is None:
            return images, {}
        seed = misc.derive_seed(self.config.seed, self.nimg, "augmentation", draws.turn, purpose)
        rng = torch.Generator().manual_seed(seed)
        images, labels = self._augment(images, generator=rng, part=(part.start, self.config.batch))
        return images, {"augment_labels": labels}

    # Drawing ----------------------------------------------------------------------------------------------------------

    def draw(self, n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `[n, *latent_shape]` and labels `[n, label_dim]`."""
        z = torch.randn([n, *self.latent_shape], generator=rng, device=self.device)
        return z, self.labels.draw(n, rng)

    def _draw(self, turn: int) -> _Draws:
        """The random numbers of this step's turn; turn 0 is the one that the generator shares."""
        cfg = self.config
        seed = (cfg.seed, self.nimg) if turn == 0 else (cfg.seed, self.nimg, "score", turn)
        rng = torch.Generator(self.device).manual_seed(misc.derive_seed(*seed))
        z, labels = self.draw(cfg.batch, rng)
        score_sigma = sigma = (self._score_sigma or self._sigma)(cfg.batch, rng)
        if self._score_sigma is not None:
            sigma = self._sigma(cfg.batch, rng)
        reference = None
        if self._reference is not None:
            if self._reference_stream is None:
                self._reference_stream = self._reference(self.nimg * cfg.score_steps)
            reference = next(self._reference_stream)

        @functools.cache
        def normals(purpose: str, shape: torch.Size) -> torch.Tensor:
            return torch.randn([cfg.batch, *shape], generator=rng, device=self.device)

        return _Draws(turn, z, labels, score_sigma, sigma, normals, reference, self.share.start)

    def _make_ratio(self, layer: torch.nn.Module | None) -> ratio.DensityRatio:
        cfg = self.config
        with seeded(self.device, cfg.seed, self.nimg, "networks", "ratio"), torch.no_grad():
            z, labels = self.draw(1, torch.Generator(self.device).manual_seed(0))
            x = self.bridge(self.ema(z, labels).float())
            if self.student is None:
                raise ValueError("the density ratio is learned from the student score's features, and there is none")
            layer = denoisers.encoder_layer(self.student) if layer is None else layer
            return ratio.DensityRatio(self.student, x, labels, layer, spectral_norm=cfg.ratio_spectral_norm)

    def _make_log_prior(self) -> torch.Tensor:
        """log(frequency in the reference / frequency of the generator's labels) `[label_dim]`."""
        frequencies = getattr(self._reference, "class_frequencies", None)
        if frequencies is None or not self.labels.has_classes:
            return torch.zeros(self.label_dim, device=self.device)
        reference = torch.as_tensor(frequencies, dtype=torch.float32, device=self.device)
        drawn = self.labels.weights(self.device)
        quotient = (reference / reference.sum()) / (drawn / drawn.sum())
        # A class that one side never has teaches nothing about the others, and its infinite logarithm would spoil them.
        return torch.where((reference > 0) & (drawn > 0), quotient, 1).log()

    def _rng_state(self) -> torch.Tensor | None:
        """The random state that dropout draws from, where teacher and student score are to draw the same."""
        if self.config.dropout == "off":
            return None
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    @contextlib.contextmanager
    def _replayed(self, state: torch.Tensor | None) -> Iterator[None]:
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

    # Updating ---------------------------------------------------------------------------------------------------------

    @property
    def _lr(self) -> float:
        """The generator's learning rate at this step. That of the student score, which follows, stays as it is."""
        if not self.config.lr_rampdown or self._total is None:
            return self.config.lr
        left = max(self._total - self.nimg, self.config.batch)
        return self.config.lr * min(left / (self.config.lr_rampdown * 1000), 1)

    @property
    def _ratio_lr(self) -> float:
        return self.config.ratio_lr or max(self.config.score_lr, 1e-4)

    @property
    def _fraction(self) -> float:
        """How much of this process's share one pass is."""
        return self.micro_batch / (self.share.stop - self.share.start)

    def _backward(self, network: str, loss: torch.Tensor) -> None:
        self._scalers[network].scale(loss * self._fraction).backward()

    def _summed(self, parts: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """What `_passes` returned, as means over the whole batch; sets `by_sigma`."""
        names = list(parts[0])
        totals = {
            name: sum(part[name] * self._fraction for part in parts) for name in names if not name.endswith("_by_sigma")
        }
        bins = {
            name: by_sigma(*map(torch.cat, zip(*(part[name] for part in parts))))
            for name in names
            if name.endswith("_by_sigma")
        }
        distributed.average([*totals.values(), *bins.values()])
        self.by_sigma = {name: sums / counts for name, (sums, counts) in bins.items()}
        return totals

    def _update(self, network: str, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Let a network's optimizer take the gradients that have accumulated; `loss` is watched with their norm."""
        optimizer, scaler = self.optimizers[network], self._scalers[network]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        distributed.average_gradients(params)
        scaler.unscale_(optimizer)
        grads = [p.grad for p in params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).detach()
        stats = {f"{_REPORTED[network]}_grad_norm": norm}
        if self.config.max_grad_norm is not None:
            excess = norm / self.config.max_grad_norm
            torch._foreach_div_(grads, excess.clamp(min=1))
            stats[f"{_REPORTED[network]}_clipped"] = (excess > 1).float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        # A scaler meets infinite gradients in search of its scale, and leaves such steps out.
        self._finite.note(_NAMES[network], loss if scaler.is_enabled() else loss + norm, self.nimg)
        return stats

    def _autocast(self, network: str) -> torch.autocast:
        precision = self.config.precision_of(network)
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=precision != "fp32")

    def _agree(self) -> None:
        """Check, before the first step, that all processes have the same settings and networks."""
        if self._agreed:
            return
        distributed.check_equal("settings", asdict(self.config))
        distributed.check_equal("networks", {**self.state_dict(), "teacher": self.teacher})
        distributed.check_equal("labels", [self.labels.content, self._log_prior])
        self._agreed = True

    # State ------------------------------------------------------------------------------------------------------------

    def check_finite(self, last_good: str = "none yet") -> None:
        """Raise if any step so far had a non-finite loss or gradient (costs one synchronisation).

        Raises:
            NotFiniteError: naming the network, the images seen, and `last_good`, the snapshot to go back to.
        """
        self._finite.check(self.config.batch, last_good, "Lower the learning rates, or use `precision=fp32`.")

    def state_dict(self) -> dict[str, Any]:
        """Everything stateful, as tensors and plain values that `torch.load(weights_only=True)` reads."""
        state = {name: part.state_dict() for name, part in self._stateful().items()}
        scalers = {name: scaler.state_dict() for name, scaler in self._scalers.items()}
        return {**state, "scalers": scalers, "nimg": self.nimg}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of the same networks; learning rates are those of this trainer's settings."""
        for name, part in self._stateful().items():
            if isinstance(part, torch.optim.Adam):
                load_adam(part, state[name])
            else:
                part.load_state_dict(state[name])
        for name, scaler in self._scalers.items():
            if state["scalers"][name]:  # empty where float16 was not used
                scaler.load_state_dict(state["scalers"][name])
        self.nimg = state["nimg"]
        self._reference_stream, self._agreed = None, False
        self._finite.reset()

    def _stateful(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"generator": self.generator, "ema": self.ema}
        if self.student is not None:
            parts["student"] = self.student
        if self.student is not None and self.config.score_adapter is not None:  # the rest is the teacher's
            parts["student"] = self._score_parameters
        if self.ratio is not None:
            parts["ratio"] = self.ratio
        if self.critic is not None:
            parts["critic"] = self.critic.net
        return parts | {f"{name}_optimizer": optimizer for name, optimizer in self.optimizers.items()}


@contextlib.contextmanager
def _frozen(params: list[torch.nn.Parameter]) -> Iterator[None]:
    """Keep the generator's loss from leaving gradients in networks that it flows through."""
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


def _freeze(net: torch.nn.Module, name: str, setting: str, patterns: str | None) -> None:
    """Freeze the parameters whose names match, as GDD does with most convolutions (arXiv 2405.20750).

    Raises:
        SettingError: no name matches, or all do.
    """
    if patterns is None:
        return
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    named = dict(net.named_parameters())
    frozen = [p for key, p in named.items() if any(fnmatch.fnmatchcase(key, pattern) for pattern in wanted)]
    if len(frozen) in (0, len(named)):
        what = "matches no parameter" if not frozen else "leaves no parameter to train"
        raise SettingError(f"{setting}={patterns} {what} of the {name}; one of its names is {next(iter(named))}")
    for p in frozen:
        p.requires_grad_(False)


def _per_sample(values: torch.Tensor) -> torch.Tensor:
    """Means `[N]` over all but the first dimension, without their graph."""
    return values.detach().flatten(1).mean(dim=1)
