"""The training loop in the plane, where everything that it minimises can be computed.

The teacher is a Gaussian mixture with its exact denoiser, the generator and the student score are small networks, and
the loop is the real `Trainer`. How far the generator is from the teacher is integrated over the plane after a little
noise (`SIGMA`) is added to both, because then both densities are smooth and known: the teacher's in closed form, the
generator's as an integral over its two-dimensional latent.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from di_refine import objectives, terminal
from di_refine.noise import LogNormal, expand_as
from di_refine.trainer import Trainer, TrainerConfig
from torch_utils import misc

SIGMA = 0.2  # the noise level at which densities are compared
SIGMA_OWN = 0.6  # that for an objective's own divergence: in the middle of the levels it is trained at
EXTENT = 5.0  # the plane ends here, in both directions
CELLS = 100  # per axis


class MixtureDenoiser(torch.nn.Module):
    """The exact denoiser of a mixture of `N(means[k], std^2 I)` with equal weights; it has no parameters.

    Args:
        means: `[K, 2]`.
        std: standard deviation of every component.
    """

    sigma_min = 0.0
    sigma_data = 1.0
    sigma_max = math.inf
    means: torch.Tensor

    def __init__(self, means: torch.Tensor, std: float):
        super().__init__()
        self.register_buffer("means", means)
        self.std = std

    def _logits(self, x: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return -((x[..., None, :] - self.means) ** 2).sum(-1) / (2 * var)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return `E[x0 | x]`, `[N, 2]`, for points `x` `[N, 2]` at noise levels `sigma` `[N]`."""
        var = self.std**2 + expand_as(sigma, x) ** 2
        centre = self._logits(x, var).softmax(-1) @ self.means
        return centre + self.std**2 / var * (x - centre)

    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draw points `[n, 2]` without noise."""
        which = torch.randint(len(self.means), [n], generator=rng)
        return self.means[which] + self.std * torch.randn(n, 2, generator=rng)

    def log_prob(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """Return the log density `[...]` at points `[..., 2]`, after noise of level `sigma`."""
        var = torch.tensor(self.std**2 + sigma**2, dtype=x.dtype)
        return self._logits(x, var).logsumexp(-1) - math.log(len(self.means)) - (2 * math.pi * var).log()


def ring(num: int = 6, radius: float = 2.0, std: float = 0.3) -> MixtureDenoiser:
    """Return a teacher of `num` Gaussians on a circle."""
    angles = 2 * math.pi * torch.arange(num) / num
    return MixtureDenoiser(radius * torch.stack([angles.cos(), angles.sin()], 1), std)


def _mlp(inputs: int, width: int) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for size in (inputs, width, width):
        layers += [torch.nn.Linear(size, width), torch.nn.SiLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))


class PlaneGenerator(torch.nn.Module):
    """A small network from two normals to the plane; untrained, its points lie around (1, 0.5)."""

    latent_shape = (2,)
    label_dim = 0

    def __init__(self, width: int = 128):
        super().__init__()
        self.net = _mlp(2, width)
        self.start = torch.nn.Parameter(torch.tensor([1.0, 0.5]))

    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return points `[N, 2]` for latents `[N, 2]`."""
        return self.net(z) + 0.5 * z + self.start


class PointGenerator(torch.nn.Module):
    """A single point that ignores its latent: a generator without randomness, for score distillation sampling."""

    latent_shape = (2,)
    label_dim = 0

    def __init__(self):
        super().__init__()
        self.point = torch.nn.Parameter(torch.tensor([-3.5, 3.0]))

    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the point for each of the latents `[N, 2]`: `[N, 2]`."""
        return self.point.expand(len(z), 2)


class PlaneDenoiser(torch.nn.Module):
    """A small network with EDM's preconditioning (arXiv 2206.00364, table 1): the student score."""

    sigma_min = 0.0
    sigma_max = math.inf

    def __init__(self, width: int = 128, sigma_data: float = 1.0):
        super().__init__()
        self.net = _mlp(3, width)
        self.sigma_data = sigma_data

    @property
    def last_hidden(self) -> torch.nn.Module:
        """The layer in front of the output, whose features the density ratio is made from."""
        return self.net[-2]

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return denoised points `[N, 2]` for points `[N, 2]` at noise levels `[N]`."""
        s, d = expand_as(sigma, x), self.sigma_data
        size = (s**2 + d**2).sqrt()
        out = self.net(torch.cat([x / size, s.log().expand(len(x), 1) / 4], dim=1))
        return d**2 / size**2 * x + s * d / size * out


def plane() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cell centres of one axis, `[CELLS]`, and all of them, `[CELLS, CELLS, 2]`, first coordinate first."""
    step = 2 * EXTENT / CELLS
    axis = -EXTENT + step * (torch.arange(CELLS) + 0.5)
    return axis, torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)


@torch.no_grad()
def generator_density(generator: torch.nn.Module, sigma: float = SIGMA, nodes: int = 320) -> torch.Tensor:
    """Return the density `[CELLS, CELLS]` of the generator's samples after noise of level `sigma`, by quadrature.

    It is `p(x) = integral of N(z; 0, I) N(x; G(z), sigma^2 I) dz`, with `nodes` latents per axis. It is accurate where
    neighbouring latents become points that are closer together than `sigma`.
    """
    axis, _ = plane()
    line = torch.linspace(-4.5, 4.5, nodes)
    z = torch.cartesian_prod(line, line)
    weights = (-(z**2).sum(1) / 2).softmax(0)
    density = torch.zeros(CELLS, CELLS)
    for part, w in zip(z.split(16384), weights.split(16384)):
        x = generator(part, torch.zeros(len(part), 0)).float()
        first, second = ((-((axis - x[:, i, None]) ** 2) / (2 * sigma**2)).exp() for i in (0, 1))
        density += (first * w[:, None]).T @ second
    return density / (2 * math.pi * sigma**2)


def distances(
    generator: torch.nn.Module, teacher: MixtureDenoiser, names: tuple[str, ...] = ("rkl", "js"), sigma: float = SIGMA
) -> dict[str, float]:
    """Return divergences of generator and teacher, both after noise of level `sigma`, by quadrature over the plane.

    Args:
        generator: the generator, whose density is p.
        teacher: the teacher, whose density is q.
        names: keys of `objectives.DIVERGENCES`, for `D_f(q || p)` in nats ('rkl' is KL(p || q)), or 'fisher' for
            `E_p |grad log p - grad log q|^2`.
        sigma: noise level.

    Raises:
        ValueError: the generator has left the part of the plane that is integrated over.
    """
    axis, points = plane()
    step = float(axis[1] - axis[0])
    p = generator_density(generator, sigma).double()
    mass = p.sum().item() * step**2
    if not abs(mass - 1) < 0.02:
        raise ValueError(f"only {mass:.3f} of the generator's samples are within {EXTENT:g} of the middle")
    log_r = teacher.log_prob(points.double(), sigma) - p.clamp_min(1e-30).log()
    found = {}
    for name in names:
        if name == "fisher":
            integrand = sum(slope**2 for slope in torch.gradient(log_r, spacing=step))
        else:
            integrand = objectives.DIVERGENCES[name].f(log_r.exp())
        found[name] = (p.clamp_min(1e-30) * integrand).sum().item() * step**2
    return found


def own_divergence(objective: str) -> str:
    """Return the name, as in `distances`, of what an objective minimises."""
    if objective in ("sim", "sid"):
        return "fisher"
    return objective.split("-")[1] if "-" in objective else "rkl"


def reference(teacher: MixtureDenoiser, batch: int, seed: int) -> Callable[[int], Iterator]:
    """Return the teacher's samples as a trainer wants them: a function of the number of images seen, given the seed."""

    def stream(start_nimg: int):
        for nimg in itertools.count(start_nimg, batch):
            rng = torch.Generator().manual_seed(misc.derive_seed(seed, nimg, "playground"))
            yield teacher.sample(batch, rng), torch.zeros(batch, 0)

    return stream


def make_trainer(teacher: MixtureDenoiser, objective: str = "ikl", seed: int = 0, **settings: Any) -> Trainer:
    """Return the real trainer with the networks of the plane; `settings` go before those chosen here."""
    known = objectives.get(objective)
    config: dict[str, Any] = {
        "objective": objective,
        "lr": 1e-3 if known.needs_student else 1e-2,
        "score_lr": 2e-3,
        "batch": 512,
        "score_warmup": 0.512 * 200 if known.needs_student else 0,
        "ratio_weight": 0.1,
        # The chi-squared weight grows with the ratio's square; from a start this bad, rare samples would outweigh all.
        "ratio_clamp": 4.0 if objective.endswith("chi2") else 10.0,
        "ema_kimg": 0.512 * 50,
        "seed": seed,
    }
    config |= settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(misc.derive_seed(seed, "playground"))
        generator, student = PlaneGenerator() if known.needs_student else PointGenerator(), PlaneDenoiser()
    samples = reference(teacher, config["batch"], seed) if known.needs_ratio else None
    return Trainer(
        generator,
        teacher,
        TrainerConfig(**config),
        student if known.needs_student else None,
        reference=samples,
        ratio_layer=student.last_hidden,
        sigma=LogNormal(-0.5, 1.0, 0.05, 10.0),
    )


@dataclass
class Outcome:
    """What training with an objective did to a generator, measured exactly.

    Attributes:
        trainer: as it ended.
        before, after: 'kl' and 'js' at noise level `SIGMA`, 'own' at `SIGMA_OWN`.
        density_before: of the generator, `[CELLS, CELLS]`.
        seconds: of training.
    """

    trainer: Trainer
    before: dict[str, float]
    after: dict[str, float]
    density_before: torch.Tensor
    seconds: float


def play(objective: str, steps: int = 1500, seed: int = 0) -> Outcome:
    """Train the generator of the plane on an objective, and measure it before and after."""
    teacher, own = ring(), own_divergence(objective)
    trainer = make_trainer(teacher, objective, seed)

    def measure() -> dict[str, float]:
        near = distances(trainer.ema, teacher)
        return {"kl": near["rkl"], "js": near["js"], "own": distances(trainer.ema, teacher, (own,), SIGMA_OWN)[own]}

    before, density = measure(), generator_density(trainer.ema)
    start, steps = time.perf_counter(), steps + trainer.config.warmup_nimg // trainer.config.batch
    with terminal.progress(steps, desc=objective) as bar:
        for _ in range(steps):
            trainer.step()
            bar.update(1)
    trainer.check_finite()
    return Outcome(trainer, before, measure(), density, time.perf_counter() - start)
