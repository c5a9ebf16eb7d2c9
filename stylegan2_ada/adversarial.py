"""Adversarial training of a StyleGAN2 generator with adaptive discriminator augmentation (ADA).

Losses, the controller of the augmentation strength, and one trainer that sequences them:

* non-saturating loss: Goodfellow et al. 2014, arXiv 1406.2661, section 3;
* R1 penalty: Mescheder et al. 2018, arXiv 1801.04406, equation 9;
* path-length and lazy regularisation: Karras et al. 2020, arXiv 1912.04958, sections 3.1, 3.2 and appendix B;
* adaptive augmentation: Karras et al. 2020, arXiv 2006.06676, section 3.

Shapes: images [N, C, H, W] in -1..1; labels [N, c_dim] one-hot, of width 0 without labels; latents z [N, z_dim]; logits
[N, 1], positive for real.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from torch_utils import distributed


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Non-saturating loss `-log sigmoid(D(G(z)))` per sample (arXiv 1406.2661, section 3)."""
    return F.softplus(-fake_logits)


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Logistic loss `-log sigmoid(D(x)) - log(1 - sigmoid(D(G(z))))` per pair (arXiv 1406.2661, equation 1)."""
    return F.softplus(fake_logits) + F.softplus(-real_logits)


def r1_penalty(real_logits: torch.Tensor, real_images: torch.Tensor) -> torch.Tensor:
    """Squared gradient norm of the discriminator at real images (arXiv 1801.04406, equation 9, without gamma / 2).

    Args:
        real_logits: computed from `real_images`. Their sum is differentiated: where a logit depends on other images as
            well, as with minibatch standard deviation, that dependence is part of the penalty.
        real_images: [N, C, H, W], requires grad.

    Returns:
        [N], differentiable with respect to what the logits depend on.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), real_images, create_graph=True)
    return gradient.square().sum(dim=[1, 2, 3])


def path_lengths(images: torch.Tensor, ws: torch.Tensor) -> torch.Tensor:
    """How far an image moves per unit step in w: the norm of J^T y for one random y (arXiv 1912.04958, equation 4).

    Args:
        images: [N, C, H, W], computed from `ws`.
        ws: [N, num_ws, w_dim], requires grad. The squared norm is averaged over the num_ws layers.

    Returns:
        [N], differentiable with respect to what the images depend on.
    """
    direction = torch.randn_like(images) / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * direction).sum(), ws, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()


class AdaController:
    """Chooses the augmentation probability p by how far the discriminator overfits (arXiv 2006.06676, section 3.1).

    The heuristic is `r_t = E[sign(D(real))]` (equation 1): 0 for a discriminator that cannot tell, 1 for one that knows
    every training image. Every `interval` batches p moves up if r_t is above `target` and down if below, by the number
    of images seen since the last move divided by `kimg` thousand. Nothing here waits for the device.

    Args:
        target: wanted r_t.
        kimg: thousands of images in which p can move from 0 to 1.
        interval: batches between two moves.
        p: initial probability.

    Attributes:
        p: current probability, a tensor without axes; never negative.
        r_t: heuristic at the last move, likewise.
    """

    def __init__(self, target: float = 0.6, kimg: float = 500, interval: int = 4, p: float = 0):
        if kimg <= 0 or interval < 1 or p < 0:
            raise ValueError(f"ADA needs kimg > 0, interval >= 1 and p >= 0, not {kimg}, {interval} and {p}")
        self.target, self.kimg, self.interval = target, kimg, interval
        self.p = torch.tensor(float(p))
        self.r_t = torch.zeros([])
        self._signs = torch.zeros([])
        self._images = self._batches = 0

    def update(self, real_logits: torch.Tensor) -> torch.Tensor:
        """Account for one batch of logits of real images, one per image, and return p."""
        for name in ("p", "r_t", "_signs"):
            setattr(self, name, getattr(self, name).to(real_logits.device))
        self._signs = self._signs + real_logits.detach().sign().sum()
        self._images += real_logits.numel()
        self._batches += 1
        if self._batches == self.interval:
            self.r_t = self._signs / self._images
            move = (self.r_t - self.target).sign() * (self._images / (self.kimg * 1000))
            self.p = (self.p + move).clamp(min=0)
            self._signs = torch.zeros_like(self._signs)
            self._images = self._batches = 0
        return self.p

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, including a started interval."""
        return {"p": self.p, "r_t": self.r_t, "signs": self._signs, "images": self._images, "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.p, self.r_t, self._signs = state["p"].clone(), state["r_t"].clone(), state["signs"].clone()
        self._images, self._batches = state["images"], state["batches"]


@dataclass(frozen=True)
class AdversarialConfig:
    """Options of `AdversarialTrainer`; the defaults are those of ADA's configuration for CIFAR-10."""

    batch_gpu: int | None = None
    """Images that go through a network at once; gradients accumulate over the batch. None: the whole batch."""
    g_lr: float = 0.0025
    """Learning rate of the generator."""
    d_lr: float = 0.0025
    """Learning rate of the discriminator."""
    betas: tuple[float, float] = (0.0, 0.99)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    r1_gamma: float = 0.01
    """Weight of the R1 penalty, halved as in the paper; 0 switches it off."""
    d_reg_interval: int | None = 16
    """Steps between two R1 penalties. None: in every step, in one backward pass with the loss."""
    pl_weight: float = 0.0
    """Weight of the path-length penalty (StyleGAN2 uses 2); 0 switches it off."""
    g_reg_interval: int | None = 4
    """Steps between two path-length penalties. None: in every step, in one backward pass with the loss."""
    pl_decay: float = 0.01
    """Share of the newest path lengths in their running mean."""
    pl_batch_shrink: int = 2
    """The path-length penalty uses one in so many images of the batch."""
    style_mixing_prob: float = 0.0
    """Probability that an image takes its later layers' w from another latent (arXiv 1812.04948, section 3.1)."""
    noise_mode: str = "random"
    """Noise of the synthesis network while training: 'random', 'const' or 'none'."""
    ema_kimg: float = 500.0
    """Half-life of the averaged generator in thousands of images; 0 makes it a copy."""
    ema_rampup: float | None = 0.05
    """Limit of the half-life relative to the images seen so far, so that the start is forgotten. None: no limit."""

    def __post_init__(self):
        for name in ("g_lr", "d_lr", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("r1_gamma", "pl_weight", "ema_kimg"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("style_mixing_prob", "pl_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        for name in ("batch_gpu", "d_reg_interval", "g_reg_interval", "pl_batch_shrink"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Phase:
    """One optimizer update: `name`, its network 'G' or 'D', which terms it has, and every how many steps it comes."""

    name: str
    net: str
    main: bool
    reg: bool
    interval: int = 1


def _phases(net: str, regularised: bool, interval: int | None) -> list[Phase]:
    if not regularised:
        return [Phase(f"{net}main", net, main=True, reg=False)]
    if interval is None:
        return [Phase(f"{net}both", net, main=True, reg=True)]
    return [
        Phase(f"{net}main", net, main=True, reg=False),
        Phase(f"{net}reg", net, main=False, reg=True, interval=interval),
    ]


def _adam(net: torch.nn.Module, lr: float, config: AdversarialConfig, phases: list[Phase]) -> torch.optim.Adam:
    """Adam, slowed down for the additional updates of lazy regularisation (arXiv 1912.04958, appendix B)."""
    interval = phases[-1].interval
    ratio = interval / (interval + 1) if len(phases) > 1 else 1.0
    betas = tuple(beta**ratio for beta in config.betas)
    return torch.optim.Adam(net.parameters(), lr=lr * ratio, betas=betas, eps=config.eps)


class AdversarialTrainer:
    """Trains a generator and a discriminator against each other, and averages the generator.

    Nothing in `step` waits for the device. Randomness (noise, augmentation, style mixing, path directions) comes from
    PyTorch's global generators, which the caller seeds.

    With several processes (`torch_utils.distributed`), each makes one trainer of the same networks and settings and
    gives it its share of every batch. Gradients, losses, the heuristic of the augmentation and the running means are
    those of the whole batch, so that all processes keep the same state, and a run may go on with another number of
    them. The caller's seed should depend on the rank, lest all shares get the same noise.

    Args:
        G: `G.mapping(z, c, skip_w_avg_update=...) -> ws`, `G.synthesis(ws, noise_mode=...) -> images`, such as
            `stylegan2_ada.networks.Generator`. Trained in place, in train mode.
        D: `D(images, c) -> logits`, such as `stylegan2_ada.networks.Discriminator`. Trained likewise.
        augment_pipe: `stylegan2_ada.augment.AugmentPipe` on the same device; acts on all that D sees. None: off.
        ada: moves `augment_pipe.p`. None leaves it as it is.
        config: options.
        G_ema: averaged generator to go on with; a copy of G if None.

    Attributes:
        G_ema: averaged generator, in eval mode.
        phases: the optimizer updates in their order.
        nimg: real images seen, by all processes together.
        num_steps: steps taken.
        pl_mean: running mean of the path lengths.
    """

    def __init__(
        self,
        G: torch.nn.Module,
        D: torch.nn.Module,
        augment_pipe: torch.nn.Module | None = None,
        ada: AdaController | None = None,
        config: AdversarialConfig | None = None,
        G_ema: torch.nn.Module | None = None,
    ):
        if ada is not None and augment_pipe is None:
            raise ValueError("adaptive augmentation needs an augment_pipe whose strength it can move")
        self.config = config = config or AdversarialConfig()
        self.G, self.D = G.train().requires_grad_(False), D.train().requires_grad_(False)
        self.G_ema = (copy.deepcopy(G) if G_ema is None else G_ema).eval().requires_grad_(False)
        self.augment_pipe, self.ada = augment_pipe, ada
        g_phases = _phases("G", config.pl_weight > 0, config.g_reg_interval)
        d_phases = _phases("D", config.r1_gamma > 0, config.d_reg_interval)
        self.phases = g_phases + d_phases
        self.optimizers = {
            "G": _adam(G, config.g_lr, config, g_phases),
            "D": _adam(D, config.d_lr, config, d_phases),
        }
        device = next(D.parameters()).device
        self.num_steps = self.nimg = 0
        self._agreed = False
        self.pl_mean = torch.zeros([], device=device)
        # First step in which each phase was not finite; stays on the device until `check_finite` asks.
        self._first_bad_step = torch.full([len(self.phases)], -1, device=device)
        if ada is not None:
            augment_pipe.p.copy_(ada.p)

    def step(
        self,
        real_images: torch.Tensor,
        real_labels: torch.Tensor | None,
        z: torch.Tensor,
        gen_labels: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """One training step: all phases that are due, the averaged generator, the augmentation strength.

        With several processes N is the size of a share, the same for all.

        Args:
            real_images: [N, C, H, W].
            real_labels: [N, c_dim], or None without labels.
            z: [N, z_dim], for the updates of both networks, or [2N, z_dim]: the first half for the generator's, the
                second half for the discriminator's.
            gen_labels: [N, c_dim] or [2N, c_dim], to go with `z`; None without labels.

        Returns:
            Tensors without axes, on the device: batch means of 'gen_logits', 'real_logits', 'loss_G', 'loss_D', and in
            the steps that have them 'r1_penalty', 'loss_r1', 'path_lengths', 'loss_pl'; norms 'grad_norm/<phase>' of
            the gradients that the optimizer gets; with augmentation 'augment_p'.

        Raises:
            ValueError: batch sizes that do not fit each other.
            DistributedError: in the first step, if the processes have different states, settings or shares.
        """
        num = len(real_images)
        if len(z) not in (num, 2 * num) or (gen_labels is not None and len(gen_labels) != len(z)):
            raise ValueError(f"{num} real images need {num} or {2 * num} latents and as many labels, not {len(z)}")
        real_labels = real_images.new_zeros([num, 0]) if real_labels is None else real_labels
        gen_labels = z.new_zeros([len(z), 0]) if gen_labels is None else gen_labels
        half = {"G": slice(None, num), "D": slice(len(z) - num, None)}
        if not self._agreed:
            distributed.check_equal("GAN's settings", {"share": num, **asdict(self.config)})
            distributed.check_equal("GAN's training state", self.state_dict())
            self._agreed = True

        stats = {}
        for index, phase in enumerate(self.phases):
            if self.num_steps % phase.interval:
                continue
            mine = half[phase.net]
            terms = self.accumulate_gradients(phase, real_images, real_labels, z[mine], gen_labels[mine])
            grads = [p.grad for p in getattr(self, phase.net).parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            self._watch(index, norm, terms)
            self.optimizers[phase.net].step()
            self.optimizers[phase.net].zero_grad(set_to_none=True)
            stats.update({name: value.mean() for name, value in terms.items()})
            stats[f"grad_norm/{phase.name}"] = norm
            if self.ada is not None and phase.net == "D" and phase.main:
                self.augment_pipe.p.copy_(self.ada.update(terms["real_logits"]))
        total = num * distributed.world_size()
        distributed.average_buffers(self.G)  # the mean w has seen only this share
        self._average(total)
        self.num_steps += 1
        self.nimg += total
        if self.augment_pipe is not None:
            stats["augment_p"] = self.augment_pipe.p.clone()
        return stats

    def accumulate_gradients(
        self,
        phase: Phase,
        real_images: torch.Tensor,
        real_labels: torch.Tensor,
        z: torch.Tensor,
        gen_labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Leave a phase's gradients in `.grad` of its network: of the mean over the batch, times `phase.interval`.

        The arguments are this process's share of the batch; all processes get the same gradients and terms.

        Returns:
            Per-sample terms of the whole batch, detached; the losses, called 'loss_...', are without that factor.
        """
        num = len(real_images)
        size = self.config.batch_gpu or num
        if num % size:
            raise ValueError(f"a batch of {num} images does not divide into micro-batches of {size}: change batch_gpu")
        net = getattr(self, phase.net)
        self.optimizers[phase.net].zero_grad(set_to_none=True)
        net.requires_grad_(True)
        rounds = []
        for real, real_c, latents, c in zip(*(x.split(size) for x in (real_images, real_labels, z, gen_labels))):
            if phase.net == "G":
                terms = self._generator_terms(phase, latents, c)
            else:
                terms = self._discriminator_terms(phase, real, real_c, latents, c)
            loss = sum(value.mean() for name, value in terms.items() if name.startswith("loss_"))
            (loss * (phase.interval * size / num)).backward()
            rounds.append({name: value.detach() for name, value in terms.items()})
        net.requires_grad_(False)
        distributed.average_gradients(net.parameters())
        terms = distributed.gather_batch({name: torch.cat([terms[name] for terms in rounds]) for name in rounds[0]})
        if "path_lengths" in terms:
            self.pl_mean.lerp_(terms["path_lengths"].mean(), self.config.pl_decay)
        return terms

    def _generator_terms(self, phase: Phase, z: torch.Tensor, c: torch.Tensor) -> dict[str, torch.Tensor]:
        terms = {}
        if phase.main:
            logits = self._discriminate(self._synthesize(self._map(z, c)), c)
            terms.update(gen_logits=logits, loss_G=generator_loss(logits))
        if phase.reg:
            # Every so many of the images, not the first so many: the same ones however the batch is divided.
            shrink = self.config.pl_batch_shrink
            some = slice(0, max(len(z) // shrink, 1) * shrink, shrink)
            ws = self._map(z[some], c[some])
            lengths = path_lengths(self._synthesize(ws), ws)
            mean = lengths.detach().mean()
            distributed.average([mean])
            target = self.pl_mean.lerp(mean, self.config.pl_decay)
            terms.update(path_lengths=lengths, loss_pl=(lengths - target).square() * self.config.pl_weight)
        return terms

    def _discriminator_terms(self, phase, real, real_c, z, c) -> dict[str, torch.Tensor]:
        terms = {}
        real = real.detach().requires_grad_(phase.reg)
        if phase.main:
            with torch.no_grad():
                fake = self._synthesize(self._map(z, c))
            terms["gen_logits"] = self._discriminate(fake, c)
        terms["real_logits"] = self._discriminate(real, real_c)
        if phase.main:
            terms["loss_D"] = discriminator_loss(terms["real_logits"], terms["gen_logits"])
        if phase.reg:
            terms["r1_penalty"] = r1_penalty(terms["real_logits"], real)
            terms["loss_r1"] = terms["r1_penalty"] * (self.config.r1_gamma / 2)
        return terms

    def _map(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """ws, in which some samples take the layers from a random one on from another latent."""
        ws = self.G.mapping(z, c)
        if self.config.style_mixing_prob > 0:
            num, layers = ws.shape[:2]
            first = torch.randint(1, layers, [num, 1], device=ws.device)
            mixed = torch.rand([num, 1], device=ws.device) < self.config.style_mixing_prob
            other = mixed & (torch.arange(layers, device=ws.device) >= first)
            ws = torch.where(other[:, :, None], self.G.mapping(torch.randn_like(z), c, skip_w_avg_update=True), ws)
        return ws

    def _synthesize(self, ws: torch.Tensor) -> torch.Tensor:
        return self.G.synthesis(ws, noise_mode=self.config.noise_mode)

    def _discriminate(self, images: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.D(images if self.augment_pipe is None else self.augment_pipe(images), c)

    def _watch(self, index: int, norm: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        total = norm + sum(value.sum() for name, value in terms.items() if name.startswith("loss_"))
        new = ~total.isfinite() & (self._first_bad_step[index] < 0)
        self._first_bad_step[index] = torch.where(new, self.num_steps, self._first_bad_step[index])

    def check_finite(self) -> None:
        """Raise if any loss or gradient since the start was not finite. Waits for the device: call it once a tick.

        No gradient is ever altered, so that after a failure the weights are spoilt; call this before saving anything.

        Raises:
            FloatingPointError: names the network, the phase and the first step, counted from 0.
        """
        bad = [(step, index) for index, step in enumerate(self._first_bad_step.tolist()) if step >= 0]
        if bad:
            step, index = min(bad)
            phase = self.phases[index]
            network = {"G": "generator", "D": "discriminator"}[phase.net]
            raise FloatingPointError(f"non-finite loss or gradient of the {network} in step {step}, phase {phase.name}")

    @torch.no_grad()
    def _average(self, num: int) -> None:
        """Move G_ema towards G: parameters with the configured half-life, buffers are copied."""
        half_life = self.config.ema_kimg * 1000
        if self.config.ema_rampup is not None:
            half_life = min(half_life, self.nimg * self.config.ema_rampup)
        keep = 0.5 ** (num / half_life) if half_life > 0 else 0.0
        torch._foreach_lerp_(list(self.G_ema.parameters()), list(self.G.parameters()), 1 - keep)
        for average, newest in zip(self.G_ema.buffers(), self.G.buffers()):
            average.copy_(newest)

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizers, augmentation, running means, counters: all that changes. Tensors are not copied."""
        state = {name: module.state_dict() for name, module in self._stateful().items()}
        return {**state, "pl_mean": self.pl_mean, "num_steps": self.num_steps, "nimg": self.nimg}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of a trainer with the same networks and configuration.

        Raises:
            ValueError: the state has other parts than this trainer, such as no augmentation.
        """
        modules = self._stateful()
        wanted, found = {*modules, "pl_mean", "num_steps", "nimg"}, set(state)
        if wanted != found:
            raise ValueError(
                f"the training state lacks {sorted(wanted - found)} and has unknown parts {sorted(found - wanted)}; "
                "continue with the options it was written with"
            )
        rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}
        for name, module in modules.items():
            module.load_state_dict(state[name])
        for name, rate in rates.items():  # the state brings its own; those of this trainer's configuration count
            self.optimizers[name].param_groups[0]["lr"] = rate
        self.pl_mean.copy_(state["pl_mean"])
        self.num_steps, self.nimg = state["num_steps"], state["nimg"]
        self._first_bad_step.fill_(-1)
        self._agreed = False

    def _stateful(self) -> dict[str, Any]:
        parts = {
            "G": self.G,
            "D": self.D,
            "G_ema": self.G_ema,
            "G_optimizer": self.optimizers["G"],
            "D_optimizer": self.optimizers["D"],
            "augment_pipe": self.augment_pipe,
            "ada": self.ada,
        }
        return {name: part for name, part in parts.items() if part is not None}
