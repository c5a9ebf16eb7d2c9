"""Adversarial training of a StyleGAN2 generator with adaptive discriminator augmentation (ADA).

Losses, the controller of the augmentation strength, and one trainer that sequences them:

* non-saturating loss: Goodfellow et al. 2014, arXiv 1406.2661, section 3;
* R1 penalty: Mescheder et al. 2018, arXiv 1801.04406, equation 9;
* path-length and lazy regularisation: Karras et al. 2020, arXiv 1912.04958, sections 3.1, 3.2 and appendix B;
* adaptive augmentation: Karras et al. 2020, arXiv 2006.06676, section 3.

Shapes: images [N, C, H, W] in -1..1; labels [N, c_dim] one-hot, of width 0 without labels; latents z [N, z_dim]; logits
[N, 1], positive for real.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F

from stylegan2_ada.augment import AugmentPipe
from stylegan2_ada.config import AdversarialConfig
from stylegan2_ada.networks import Discriminator, Generator
from torch_utils import distributed, misc
from torch_utils.training import Average, FiniteWatch, load_adam, seeded


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
        """Continue from a `state_dict`.

        Raises:
            ValueError: it is none.
        """
        own = self.state_dict()
        if any(torch.is_tensor(value) and value.shape != state[name].shape for name, value in own.items()):
            raise ValueError("the state of the adaptive augmentation holds other numbers")
        self.p, self.r_t, self._signs = state["p"].clone(), state["r_t"].clone(), state["signs"].clone()
        self._images, self._batches = state["images"], state["batches"]


class Data(Protocol):
    """A stream of real images, whose order is a function of the images seen.

    Called as `data(start_nimg)`, it returns an iterator of this process's share of each step's images, uint8
    `[share, C, H, W]`, and labels `[share, c_dim]`. `data.draw_labels(n, rng)` returns labels `[n, c_dim]` for
    generated images, as often as the data have them, on the device of `rng`.
    """

    def draw_labels(self, n: int, rng: torch.Generator) -> torch.Tensor: ...

    def __call__(self, start_nimg: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]: ...


@dataclass(frozen=True)
class Phase:
    """One optimizer update: `name`, its network 'G' or 'D', which terms it has, and every how many steps it comes."""

    name: str
    net: str
    main: bool
    reg: bool
    interval: int = 1


def _title(phase: Phase) -> str:
    """A phase in messages."""
    return f"{'generator' if phase.net == 'G' else 'discriminator'} in phase {phase.name}"


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

    Nothing in `step` waits for the device. Randomness inside the networks (noise, augmentation, style mixing, path
    directions) comes from PyTorch's global generators, which `step` seeds, and who calls `update` instead seeds alone.

    With several processes (`torch_utils.distributed`), each makes one trainer of the same networks and settings and
    gives it its share of every batch. Gradients, losses, the heuristic of the augmentation and the running means are
    those of the whole batch, so that all processes keep the same state, and a run may go on with another number of
    them. A seed for `update` should depend on the rank, or all shares get the same noise.

    Args:
        G: `G.mapping(z, c, skip_w_avg_update=...) -> ws`, `G.synthesis(ws, noise_mode=...) -> images`, such as
            `stylegan2_ada.networks.Generator`. Trained in place, in train mode.
        D: `D(images, c) -> logits`, such as `stylegan2_ada.networks.Discriminator`. Trained likewise.
        augment_pipe: `stylegan2_ada.augment.AugmentPipe` on the same device; acts on all that D sees. None: off.
        ada: moves `augment_pipe.p`. None leaves it as it is.
        config: options.
        G_ema: averaged generator to go on with; a copy of G if None.
        data: real images, which `step` takes; None leaves them to the caller of `update`.

    Attributes:
        G_ema: averaged generator, in eval mode.
        phases: the optimizer updates in their order.
        nimg: real images seen, by all processes together.
        num_steps: steps taken.
        pl_mean: running mean of the path lengths.
    """

    def __init__(
        self,
        G: Generator,
        D: Discriminator,
        augment_pipe: AugmentPipe | None = None,
        ada: AdaController | None = None,
        config: AdversarialConfig | None = None,
        G_ema: torch.nn.Module | None = None,
        data: Data | None = None,
    ):
        if ada is not None and augment_pipe is None:
            raise ValueError("adaptive augmentation needs an augment_pipe whose strength it can move")
        self.config = config = config or AdversarialConfig()
        self.G, self.D = G.train().requires_grad_(False), D.train().requires_grad_(False)
        self._average = Average(G, G_ema)
        self.G_ema = self._average.module
        self.augment_pipe, self.ada = augment_pipe, ada
        g_phases = _phases("G", config.pl_weight > 0, config.g_reg_interval)
        d_phases = _phases("D", config.gamma > 0, config.d_reg_interval)
        self.phases = g_phases + d_phases
        self.optimizers = {
            "G": _adam(G, config.lr, config, g_phases),
            "D": _adam(D, config.d_lr or config.lr, config, d_phases),
        }
        self.device = next(D.parameters()).device
        self._data = data
        self._batches: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.num_steps = self.nimg = 0
        self.by_sigma: dict[str, torch.Tensor] = {}
        self._agreed = False
        self.pl_mean = torch.zeros([], device=self.device)
        self._finite = FiniteWatch([_title(phase) for phase in self.phases], self.device)
        if ada is not None and augment_pipe is not None:
            augment_pipe.p.copy_(ada.p)

    def step(self) -> dict[str, torch.Tensor]:
        """Take the next real images, draw latents and labels, and `update`.

        Latents and labels are drawn for the whole batch, for both networks, and then cut: they are the same for any
        number of processes. Labels are as frequent as in the data.

        Raises:
            ValueError: the trainer was made without data.
        """
        if self._data is None:
            raise ValueError("the trainer was made without data; call update() with images")
        if self._batches is None:
            self._batches = self._data(self.nimg)
        real, labels = next(self._batches)
        rng = torch.Generator(self.device).manual_seed(misc.derive_seed(self.config.seed, self.nimg, "latents"))
        z = torch.randn([2 * self.config.batch, self.G.z_dim], generator=rng, device=self.device)
        fake_labels = self._data.draw_labels(len(z), rng)
        share = distributed.share(self.config.batch)
        z, fake_labels = (torch.cat([half[share] for half in x.chunk(2)]) for x in (z, fake_labels))
        rank = [distributed.rank()] if distributed.rank() else []
        with seeded(self.device, self.config.seed, self.nimg, "networks", *rank):
            return self.update(real.to(torch.float32) / 127.5 - 1, labels, z, fake_labels)

    def update(
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
        for phase in self.phases:
            if self.num_steps % phase.interval:
                continue
            mine = half[phase.net]
            terms = self.accumulate_gradients(phase, real_images, real_labels, z[mine], gen_labels[mine])
            grads = [p.grad for p in getattr(self, phase.net).parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            losses = [value.sum() for name, value in terms.items() if name.startswith("loss_")]
            self._finite.note(_title(phase), norm + sum(losses), self.nimg)
            self.optimizers[phase.net].step()
            self.optimizers[phase.net].zero_grad(set_to_none=True)
            stats.update({name: value.mean() for name, value in terms.items()})
            stats[f"grad_norm/{phase.name}"] = norm
            if self.ada is not None and self.augment_pipe is not None and phase.net == "D" and phase.main:
                self.augment_pipe.p.copy_(self.ada.update(terms["real_logits"]))
        total = num * distributed.world_size()
        distributed.average_buffers(self.G)  # the mean w has seen only this share
        half_life = self.config.ema_kimg * 1000
        if self.config.ema_rampup is not None:
            half_life = min(half_life, self.nimg * self.config.ema_rampup)
        self._average.update(total, half_life)
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
        size = min(self.config.batch_gpu or num, num)
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
            loss = cast(torch.Tensor, sum(v.mean() for name, v in terms.items() if name.startswith("loss_")))
            (loss * (phase.interval * size / num)).backward()
            rounds.append({name: value.detach() for name, value in terms.items()})
        net.requires_grad_(False)
        distributed.average_gradients(net.parameters())
        terms = distributed.gather_batch({name: torch.cat([terms[name] for terms in rounds]) for name in rounds[0]})
        if "path_lengths" in terms:
            self.pl_mean.lerp_(terms["path_lengths"].mean(), self.config.pl_decay)
        return terms

    def _generator_terms(self, phase: Phase, z: torch.Tensor, c: torch.Tensor) -> dict[str, torch.Tensor]:
        terms: dict[str, torch.Tensor] = {}
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
        terms: dict[str, torch.Tensor] = {}
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
            terms["loss_r1"] = terms["r1_penalty"] * (self.config.gamma / 2)
        return terms

    def _map(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """ws, in which some samples take the layers from a random one on from another latent."""
        ws = self.G.mapping(z, c)
        if self.config.style_mixing > 0:
            num, layers = ws.shape[:2]
            first = torch.randint(1, layers, [num, 1], device=ws.device)
            mixed = torch.rand([num, 1], device=ws.device) < self.config.style_mixing
            other = mixed & (torch.arange(layers, device=ws.device) >= first)
            ws = torch.where(other[:, :, None], self.G.mapping(torch.randn_like(z), c, skip_w_avg_update=True), ws)
        return ws

    def _synthesize(self, ws: torch.Tensor) -> torch.Tensor:
        return self.G.synthesis(ws, noise_mode=self.config.noise_mode)

    def _discriminate(self, images: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.D(images if self.augment_pipe is None else self.augment_pipe(images), c)

    def check_finite(self, last_good: str = "none yet") -> None:
        """Raise if any loss or gradient since the start was not finite. Waits for the device: call it once a tick.

        Raises:
            NotFiniteError: naming the network, the phase, the images seen, and `last_good`, the snapshot to go back to.
        """
        batch = self.nimg // max(self.num_steps, 1)
        self._finite.check(max(batch, 1), last_good, "Lower `lr`, or raise `gamma`.")

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
        for name, part in modules.items():
            if isinstance(part, torch.optim.Adam):
                load_adam(part, state[name])
            else:
                part.load_state_dict(state[name])
        self.pl_mean.copy_(state["pl_mean"])
        self.num_steps, self.nimg = state["num_steps"], state["nimg"]
        self._finite.reset()
        self._agreed, self._batches = False, None

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
