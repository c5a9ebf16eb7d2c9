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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from di_refine import objectives, ratio
from di_refine import training_tools as tools
from di_refine.critic import R1_INTERVAL, Critic
from di_refine.edm.loss import edm_weight
from di_refine.errors import RunError
from di_refine.noise import expand_as
from di_refine.trainer_config import TrainerConfig
from torch_utils import distributed, misc

__all__ = ["Trainer", "TrainerConfig"]

_WATCHED = ("score", "generator", "critic")


@dataclass
class _Draws:
    """The random numbers of one batch, and the teacher-side samples that belong to it.

    Drawn for the whole batch and then cut, so that they do not depend on batch_gpu; the normals at their first use,
    when their shape is known.
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
        return tuple(t[part.start - self.first : part.stop - self.first] for t in self.reference)


@dataclass
class _Scored:
    """What training the student score on a part of a batch leaves for the generator's update."""

    dp: torch.Tensor
    log_ratio: torch.Tensor | None
    random_state: torch.Tensor | None


class Trainer:
    """Trains any differentiable generator towards the distribution of a diffusion model.

    With several processes (`torch_utils.distributed`), each makes one trainer of the same networks and settings and
    takes every step on its share of the batch; all but the draws inside the networks is the same as with one.

    Args:
        generator: a module `(z [N, *latent_shape], labels [N, label_dim]) -> images [N, ...]` with the attributes
            `latent_shape` and `label_dim`. It is trained in place.
        teacher: a module `(x, sigma [N], labels [N, label_dim]) -> denoised`. It is frozen.
        config: settings.
        student: the student score, called like the teacher; None is a copy of the teacher. Matched dropout needs the
            teacher's architecture.
        bridge: what makes the generator's images into the teacher's, see `di_refine.bridge`; None where they agree.
        reference: teacher-side samples, which the density ratio and the critic need: `(start_nimg) -> iterator` of
            images `[share, ...]` in [-1, 1] of the generator's or the teacher's size, and labels, as many as this
            process's share of the batch. An attribute `class_frequencies` says how often its classes are, if not as the
            generator's labels.
        ratio_layer: where in the student the ratio finds features, see `di_refine.ratio.DensityRatio`.
        critic: gives the adversarial loss; None leaves that to the density ratio.
        augment: called like `di_refine.edm.augment.AugmentPipe`, `(images, generator=..., part=(start, total)) ->
            (images, augment_labels)`, on what the student score trains on. The student has to take `augment_labels`.

    Raises:
        ValueError: settings, networks or the lack of a reference that do not fit together.
        DistributedError: the processes do not divide the batch, or `batch_gpu` does not divide their shares.

    Attributes:
        generator, teacher, student: the three networks.
        ratio: the density ratio, where one is learned.
        ema: running average of the generator (the generator itself when `ema_nimg` is 0).
        nimg: images seen, warm-up included.
        by_sigma: of the last step, `score_loss_by_sigma` and `score_gap_by_sigma`: the means of `step()` in bins of the
            noise level, `[6]` with the edges `training_tools.SIGMA_EDGES`, NaN where no level fell.
    """

    def __init__(
        self,
        generator: torch.nn.Module,
        teacher: torch.nn.Module,
        config: TrainerConfig,
        student: torch.nn.Module | None = None,
        bridge: torch.nn.Module | None = None,
        reference: Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]] | None = None,
        ratio_layer: torch.nn.Module | None = None,
        critic: Critic | None = None,
        augment: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ):
        self.config = config
        self.share = distributed.share(config.batch)
        self.micro_batch = distributed.micro_batch(config.batch, config.batch_gpu)
        self.objective = objectives.get(
            config.objective, config.weight, config.normalize, config.detach_ratio, config.alpha
        )
        learns_ratio = self.objective.needs_ratio or (config.adversarial_weight > 0 and critic is None)
        if reference is None and learns_ratio:
            what = "adversarial_weight" if not self.objective.needs_ratio else f"objective {config.objective!r}"
            raise ValueError(f"{what} needs a density ratio, which is learned from a reference: samples of the teacher")
        if reference is None and critic is not None:
            raise ValueError("a critic needs a reference: real images")
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
        if config.checkpoint_score:
            tools.recompute_blocks(self.student)
        self.ema = copy.deepcopy(generator).eval().requires_grad_(False) if config.ema_nimg > 0 else generator
        self.bridge = torch.nn.Identity() if bridge is None else bridge.to(self.device)
        self.critic, self._augment = critic, augment
        self._reference, self._reference_stream = reference, None
        self.nimg = 0
        probs = torch.ones(generator.label_dim) if config.class_probs is None else torch.tensor(config.class_probs)
        self._class_probs = probs.to(self.device, torch.float32)
        self.ratio = self._make_ratio(ratio_layer) if learns_ratio else None
        self._log_prior = self._make_log_prior() if learns_ratio else None

        fused = self.device.type in ("cuda", "cpu")
        adam = {"betas": config.betas, "eps": 1e-8, "fused": fused}
        self._generator_params = list(generator.parameters())
        self._student_params = list(self.student.parameters())
        self._ratio_params = list(self.ratio.parameters()) if self.ratio is not None else []
        self._critic_params = list(critic.net.parameters()) if critic is not None else []
        self.generator_optimizer = torch.optim.Adam(self._generator_params, lr=config.lr, **adam)
        self.student_optimizer = torch.optim.Adam(self._student_params, lr=config.score_lr, **adam)
        if self.ratio is not None:
            self.student_optimizer.add_param_group({"params": self._ratio_params, "lr": config.ratio_lr})
        if critic is not None:
            self.critic_optimizer = torch.optim.Adam(self._critic_params, lr=config.lr, **adam)
        # A scaler does nothing unless it is enabled; each optimizer has its own, as their gradients differ in size.
        names = ("student", "generator", "critic")
        half = "fp16" in {config.precision_of(name) for name in ("generator", "score", "teacher")}
        self._scalers = {name: torch.amp.GradScaler(self.device.type, enabled=half) for name in names}
        self._ema_pairs = tools.pairs(self.ema.parameters(), self.generator.parameters())
        self._ema_buffers = tools.pairs(self.ema.buffers(), self.generator.buffers())
        # Step (in images) at which each network first went wrong, -1 for never; on the device, so that watching costs
        # no synchronisation.
        self._bad = torch.full([3], -1, dtype=torch.int64, device=self.device)
        self._agreed = False
        self.by_sigma: dict[str, torch.Tensor] = {}

    # ------------------------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, torch.Tensor]:
        """One update on `config.batch` images.

        Returns:
            Scalars on the device, of the whole batch and the same on all processes: `score_loss`, `score_grad_norm`,
            and after the warm-up `generator_loss` (a surrogate without meaning of its own), `generator_grad_norm`,
            `score_gap` (mean |Dp - Dq| over pixels). With `max_grad_norm`, `..._clipped` is 1 where a gradient was too
            long. With a density ratio `ratio_loss` (2 log 2 = 1.386 where nothing can be told apart); with an
            adversarial loss `adversarial_loss`, and with a critic `critic_loss` and `critic_grad_norm`. Every sixteenth
            update of the generator has `ema_distance`, from the average to the weights, relative to the weights.
        """
        cfg = self.config
        if not self._agreed:
            distributed.check_equal("settings", asdict(cfg))
            distributed.check_equal("networks", {**self.state_dict(), "teacher": self.teacher})
            distributed.check_equal("class frequencies", [self._class_probs, self._log_prior])
            self._agreed = True
        moves, rank = self.nimg >= cfg.score_warmup, distributed.rank()
        totals: dict[str, torch.Tensor] = {}
        for turn in reversed(range(cfg.score_steps)):  # turn 0, the last, serves the generator as well
            totals, samples = {}, {}
            draws = self._draws(turn)
            with self._seeded(*([turn] if turn else []), *(["rank", rank] if rank else [])):
                for start in range(self.share.start, self.share.stop, self.micro_batch):
                    part = slice(start, start + self.micro_batch)
                    for name, value in self._accumulate(draws, part, moves and turn == 0).items():
                        if name.endswith("_by_sigma"):
                            samples.setdefault(name, []).append(value)
                        else:
                            totals[name] = totals.get(name, 0) + value * self._fraction
            bins = {name: tools.by_sigma(*map(torch.cat, zip(*pairs))) for name, pairs in samples.items()}
            distributed.average([*totals.values(), *bins.values()])
            self.by_sigma = {name: sums / counts for name, (sums, counts) in bins.items()}
            if self.objective.needs_student:
                totals |= self._update("student", "score", totals["score_loss"] + totals.get("ratio_loss", 0))
        if moves:
            totals |= self._update("generator", "generator", totals["generator_loss"])
            if self.critic is not None:
                totals |= self._update("critic", "critic", totals["critic_loss"])
        distributed.average_buffers(self.generator)  # such as StyleGAN2's mean w, which has seen this share alone
        if moves and self.ema is not self.generator:
            self._average()
            if self.nimg // cfg.batch % 16 == 0:
                totals["ema_distance"] = tools.relative_distance(*self._ema_pairs)
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
        for name, nimg in zip(_WATCHED, self._bad.tolist()):
            name = "student score" if name == "score" else name
            if nimg >= 0:
                raise RunError(
                    f"the {name}'s loss or gradient is not finite at {nimg / 1000:.3f} kimg "
                    f"(step {nimg // self.config.batch}); last good snapshot: {last_good}. Lower the learning rates, "
                    "or use --precision=fp32."
                )

    def state_dict(self) -> dict:
        """Everything stateful, as tensors and plain values that `torch.load(weights_only=True)` reads."""
        state = {name: part.state_dict() for name, part in self._stateful().items()}
        scalers = {name: scaler.state_dict() for name, scaler in self._scalers.items()}
        return {**state, "scalers": scalers, "nimg": self.nimg}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()` of the same networks; learning rates are those of this trainer's settings."""
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        # The optimizers' states bring the rates they were saved with; the settings of this trainer count.
        cfg = self.config
        for group, lr in zip(self.student_optimizer.param_groups, (cfg.score_lr, cfg.ratio_lr)):
            group["lr"] = lr
        self.generator_optimizer.param_groups[0]["lr"] = cfg.lr
        if self.critic is not None:
            self.critic_optimizer.param_groups[0]["lr"] = cfg.lr
        for name, scaler in self._scalers.items():
            if state["scalers"][name]:  # empty where float16 was not used
                scaler.load_state_dict(state["scalers"][name])
        self.nimg = state["nimg"]
        self._reference_stream, self._agreed = None, False
        self._bad.fill_(-1)

    # ------------------------------------------------------------------------------------------------------------------

    def _accumulate(self, draws: _Draws, part: slice, moves: bool) -> dict[str, torch.Tensor]:
        """Add the gradients of a part of the batch; the generator's only if it `moves`."""
        with self._autocast("generator"), torch.set_grad_enabled(moves):
            images = self.generator(draws.z[part], draws.labels[part]).float()
            x0 = self.bridge(images)
        stats, scored = {}, None
        if self.objective.needs_student:
            stats, scored = self._train_score(x0.detach(), draws, part)
        if moves:
            if self.critic is not None:
                stats["critic_loss"] = self._train_critic(images.detach(), draws, part)
            stats |= self._pull_generator(images, x0, draws, part, scored)
        return stats

    def _train_score(self, sample: torch.Tensor, draws: _Draws, part: slice) -> tuple[dict, _Scored]:
        """Denoising score matching on generator samples, and telling them from the teacher's."""
        cfg = self.config
        labels, sigma = draws.labels[part], draws.score_sigma[part]
        s = expand_as(sigma, sample)
        augmented, kwargs = self._augmented(sample, "score", draws, part)
        x_s = augmented + s * draws.normals("score", sample.shape[1:])[part]
        random_state = self._rng_state()
        dp, features = self._student(x_s, sigma, labels, **kwargs)
        weight = expand_as(edm_weight(sigma, cfg.sigma_data), sample)
        squares = weight * (dp - augmented) ** 2
        loss = squares.mean()
        stats = {"score_loss": loss.detach(), "score_loss_by_sigma": (sigma, tools.per_sample(squares))}
        known = None
        if self.ratio is not None:
            logits = self.ratio(features)
            known = self._log_ratio(logits.detach())
            ratio_loss = self._ratio_loss(logits, sample.shape, draws, part)
            stats["ratio_loss"] = ratio_loss.detach()
            loss = loss + cfg.ratio_weight * ratio_loss
        self._backward("student", loss)
        return stats, _Scored(dp.detach(), known, random_state)

    def _ratio_loss(self, logits: torch.Tensor, shape: torch.Size, draws: _Draws, part: slice) -> torch.Tensor:
        """Logistic loss of the generator's logits and of teacher-side samples at the same noise levels."""
        cfg, sigma = self.config, draws.score_sigma[part]
        images, labels = draws.of_reference(part)
        if images.shape[1:] != shape[1:]:
            images = self.bridge(images)
        images, kwargs = self._augmented(images, "reference", draws, part)
        x_s = images + expand_as(sigma, images) * draws.normals("reference", shape[1:])[part]
        x_s = x_s.detach().requires_grad_(cfg.ratio_r1 > 0)
        # The fused attention kernels have no second derivative, which R1 is made of.
        plain = sdpa_kernel(SDPBackend.MATH) if cfg.ratio_r1 > 0 else contextlib.nullcontext()
        with self._autocast("score"), plain:
            features = self.ratio.features(x_s, sigma, labels, **kwargs)
        teacher_logits = self.ratio(features)
        # The head learns the ratio within a class. Where the reference has other class frequencies than the generator,
        # the classifier's logit is that plus the log ratio of the frequencies.
        generator_prior, teacher_prior = (c @ self._log_prior for c in (draws.labels[part], labels))
        loss = ratio.logistic_loss(logits + generator_prior, teacher_logits + teacher_prior).mean()
        if cfg.ratio_r1 > 0:
            (gradient,) = torch.autograd.grad(teacher_logits.sum(), x_s, create_graph=True)
            loss = loss + cfg.ratio_r1 / 2 * gradient.flatten(1).square().sum(dim=1).mean()
        return loss

    def _train_critic(self, fake: torch.Tensor, draws: _Draws, part: slice) -> torch.Tensor:
        real, labels = draws.of_reference(part)
        penalty = self.nimg // self.config.batch % R1_INTERVAL == 0
        loss = self.critic.loss(real, labels, fake, draws.labels[part], penalty)
        self._backward("critic", loss)
        return loss.detach()

    def _pull_generator(
        self, images: torch.Tensor, x0: torch.Tensor, draws: _Draws, part: slice, scored: _Scored | None
    ) -> dict[str, torch.Tensor]:
        """The objective's gradient, and the adversarial one."""
        cfg, objective = self.config, self.objective
        labels, sigma = draws.labels[part], draws.sigma[part]
        # The score's noised samples serve the generator too: its gradient needs the student's output at *some* noised
        # samples, and this output is at hand before the student is updated. That saves a third of the student's passes.
        same_noise = cfg.score_sigma is None and self._augment is None
        noise = expand_as(sigma, x0) * draws.normals("score" if same_noise else "generator", x0.shape[1:])[part]
        x_s = (x0.detach() if objective.detached else x0) + noise
        random_state = scored.random_state if scored is not None and same_noise else self._rng_state()
        found: dict[str, Any] = {}

        def student(x, sigma):
            if same_noise and objective.detached:
                found["dp"], found["log_ratio"] = scored.dp, scored.log_ratio
            else:
                with self._replayed(random_state):
                    found["dp"], features = self._student(x, sigma, labels)
                if self.ratio is not None:
                    found["log_ratio"] = self._log_ratio(self.ratio(features))
            return found["dp"]

        def teacher(x, sigma):
            with self._replayed(random_state), self._autocast("teacher"):
                found["dq"] = self.teacher(x, sigma, labels).float()
            return found["dq"]

        def log_ratio(x, sigma):  # asked for at the same samples as the student, whose features it is made from
            return found["log_ratio"]

        others = [*self._student_params, *self._ratio_params, *self._critic_params]
        with tools.frozen(others):
            loss = objective(x0, x_s, sigma, teacher, student, log_ratio).mean()
            stats = {"generator_loss": loss.detach()}
            if cfg.adversarial_weight > 0:
                if self.critic is not None:
                    adversarial = self.critic.generator_loss(images, labels)
                else:
                    with self._autocast("score"):
                        features = self.ratio.features(x0 + noise, sigma, labels)
                    adversarial = torch.nn.functional.softplus(-self.ratio(features)).mean()
                stats["adversarial_loss"] = adversarial.detach()
                loss = loss + cfg.adversarial_weight * adversarial
            self._backward("generator", loss)
        gap = (found.get("dp", x0).detach() - found["dq"].detach()).abs()
        return {**stats, "score_gap": gap.mean(), "score_gap_by_sigma": (sigma, tools.per_sample(gap))}

    def _student(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor, **kwargs):
        """The student's denoised samples, float32, and the features the ratio is made from (or None)."""
        watching = contextlib.nullcontext([None]) if self.ratio is None else self.ratio.watching()
        with watching as features, self._autocast("score"):
            dp = self.student(x, sigma, labels, **kwargs).float()
        return dp, features[-1]

    def _log_ratio(self, logits: torch.Tensor) -> torch.Tensor:
        """What objectives may take the exponential of."""
        return logits.clamp(-self.config.ratio_clamp, self.config.ratio_clamp)

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

    # ------------------------------------------------------------------------------------------------------------------

    def _draws(self, turn: int) -> _Draws:
        """The random numbers of this step's turn; turn 0 is the one that the generator shares."""
        cfg = self.config
        seed = (cfg.seed, self.nimg) if turn == 0 else (cfg.seed, self.nimg, "score", turn)
        rng = torch.Generator(self.device).manual_seed(misc.derive_seed(*seed))
        z, labels = self.draw(cfg.batch, rng)
        score_sigma = sigma = (cfg.score_sigma or cfg.sigma)(cfg.batch, rng)
        if cfg.score_sigma is not None:
            sigma = cfg.sigma(cfg.batch, rng)
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
        with self._seeded("ratio"), torch.no_grad():
            z, labels = self.draw(1, torch.Generator(self.device).manual_seed(0))
            x = self.bridge(self.ema(z, labels).float())
            return ratio.DensityRatio(self.student, x, labels, layer, spectral_norm=cfg.ratio_spectral_norm)

    def _make_log_prior(self) -> torch.Tensor:
        """log(frequency in the reference / frequency of the generator's labels) `[label_dim]`."""
        frequencies = getattr(self._reference, "class_frequencies", None)
        if frequencies is None or not len(self._class_probs):
            return torch.zeros_like(self._class_probs)
        reference = torch.as_tensor(frequencies, dtype=torch.float32, device=self.device)
        ratio = (reference / reference.sum()) / (self._class_probs / self._class_probs.sum())
        # A class that one side never has teaches nothing about the others, and its infinite logarithm would spoil them.
        return torch.where((reference > 0) & (self._class_probs > 0), ratio, 1).log()

    def _stateful(self) -> dict[str, Any]:
        names = ["generator", "ema", "student", "generator_optimizer", "student_optimizer"]
        parts = {name: getattr(self, name) for name in names}
        if self.ratio is not None:
            parts["ratio"] = self.ratio
        if self.critic is not None:
            parts |= {"critic": self.critic.net, "critic_optimizer": self.critic_optimizer}
        return parts

    @property
    def _fraction(self) -> float:
        """How much of this process's share one pass is."""
        return self.micro_batch / (self.share.stop - self.share.start)

    def _backward(self, network: str, loss: torch.Tensor) -> None:
        self._scalers[network].scale(loss * self._fraction).backward()

    def _update(self, network: str, title: str, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Let a network's optimizer take the gradients that have accumulated; `loss` is watched with their norm."""
        optimizer, scaler = getattr(self, f"{network}_optimizer"), self._scalers[network]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        distributed.average_gradients(params)
        scaler.unscale_(optimizer)
        grads = [p.grad for p in params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).detach()
        stats = {f"{title}_grad_norm": norm}
        if self.config.max_grad_norm is not None:
            excess = norm / self.config.max_grad_norm
            torch._foreach_div_(grads, excess.clamp(min=1))
            stats[f"{title}_clipped"] = (excess > 1).float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        # A scaler meets infinite gradients in search of its scale, and leaves such steps out.
        self._watch(_WATCHED.index(title), loss if scaler.is_enabled() else loss + norm)
        return stats

    @torch.no_grad()
    def _average(self) -> None:
        averages, current = self._ema_pairs
        torch._foreach_lerp_(averages, current, 1 - 0.5 ** (self.config.batch / self.config.ema_nimg))
        for average, value in zip(*self._ema_buffers):
            average.copy_(value)

    def _watch(self, network: int, value: torch.Tensor) -> None:
        now = torch.where(torch.isfinite(value), -1, self.nimg)
        self._bad[network] = torch.where(self._bad[network] >= 0, self._bad[network], now)

    def _autocast(self, network: str):
        precision = self.config.precision_of(network)
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=precision != "fp32")

    @contextlib.contextmanager
    def _seeded(self, *purpose: int | str):
        """Random draws inside the networks (noise inputs, dropout) depend on seed, images seen and purpose alone."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(misc.derive_seed(self.config.seed, self.nimg, "networks", *purpose))
            yield

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
