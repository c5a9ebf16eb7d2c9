"""The training loop in the plane, where everything it minimises can be computed: `python -m di_refine.playground`.

The teacher is a Gaussian mixture with its exact denoiser, the generator and the student score are small networks, and
the loop is the real `Trainer`. How far the generator is from the teacher is integrated over the plane after a little
noise (`SIGMA`) is added to both, because then both densities are smooth and known: the teacher's in closed form, the
generator's as an integral over its two-dimensional latent.
"""

import math
import time
from pathlib import Path

import click
import torch

from di_refine import cli, objectives
from di_refine.errors import InputError
from di_refine.noise import LogNormal, expand_as
from di_refine.trainer import Trainer, TrainerConfig
from torch_utils import misc

SIGMA = 0.2  # the noise level at which densities are compared
EXTENT = 5.0  # the plane ends here, in both directions
CELLS = 100  # per axis


class MixtureDenoiser(torch.nn.Module):
    """The exact denoiser of a mixture of `N(means[k], std^2 I)` with equal weights; no parameters.

    Args:
        means: `[K, 2]`.
        std: standard deviation of every component.
    """

    def __init__(self, means: torch.Tensor, std: float):
        super().__init__()
        self.register_buffer("means", means)
        self.std = std

    def _logits(self, x: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return -((x[..., None, :] - self.means) ** 2).sum(-1) / (2 * var)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """`E[x0 | x]` for `x` `[N, 2]` at noise levels `sigma` `[N]`."""
        var = self.std**2 + expand_as(sigma, x) ** 2
        centre = self._logits(x, var).softmax(-1) @ self.means
        return centre + self.std**2 / var * (x - centre)

    def log_prob(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """Log density `[...]` at points `[..., 2]`, after noise of level `sigma`."""
        var = torch.tensor(self.std**2 + sigma**2, dtype=x.dtype)
        return self._logits(x, var).logsumexp(-1) - math.log(len(self.means)) - (2 * math.pi * var).log()


def ring(num: int = 6, radius: float = 2.0, std: float = 0.3) -> MixtureDenoiser:
    """A teacher of `num` bumps on a circle."""
    angles = 2 * math.pi * torch.arange(num) / num
    return MixtureDenoiser(radius * torch.stack([angles.cos(), angles.sin()], 1), std)


def _mlp(inputs: int, width: int) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for size in (inputs, width, width):
        layers += [torch.nn.Linear(size, width), torch.nn.SiLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))


class PlaneGenerator(torch.nn.Module):
    """A small network from two normals to the plane; it begins as a blob away from the middle."""

    latent_shape = (2,)
    label_dim = 0

    def __init__(self, width: int = 128):
        super().__init__()
        self.net = _mlp(2, width)
        self.start = torch.nn.Parameter(torch.tensor([1.0, 0.5]))

    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """`[N, 2]` latents -> `[N, 2]` points."""
        return self.net(z) + 0.5 * z + self.start


class PlaneDenoiser(torch.nn.Module):
    """A small network with EDM's preconditioning (arXiv 2206.00364, table 1): the student score."""

    def __init__(self, width: int = 128, sigma_data: float = 1.0):
        super().__init__()
        self.net = _mlp(3, width)
        self.sigma_data = sigma_data

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """`[N, 2]` points, `[N]` noise levels -> `[N, 2]` denoised points."""
        s, d = expand_as(sigma, x), self.sigma_data
        size = (s**2 + d**2).sqrt()
        out = self.net(torch.cat([x / size, s.log().expand(len(x), 1) / 4], dim=1))
        return d**2 / size**2 * x + s * d / size * out


def plane() -> tuple[torch.Tensor, torch.Tensor]:
    """One axis `[CELLS]` of cell centres, and all cell centres `[CELLS, CELLS, 2]`, first index first coordinate."""
    step = 2 * EXTENT / CELLS
    axis = -EXTENT + step * (torch.arange(CELLS) + 0.5)
    return axis, torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)


@torch.no_grad()
def generator_density(generator: torch.nn.Module, sigma: float = SIGMA, nodes: int = 320) -> torch.Tensor:
    """Density `[CELLS, CELLS]` of the generator's samples after noise of level `sigma`, by quadrature over the latent.

    `p(x) = integral of N(z; 0, I) N(x; G(z), sigma^2 I) dz`, with `nodes` latents per axis. It is accurate where
    neighbouring latents land closer together than `sigma`.
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


def distances(generator: torch.nn.Module, teacher: MixtureDenoiser, sigma: float = SIGMA) -> dict[str, float]:
    """KL(generator || teacher) and the Jensen-Shannon divergence, in nats, both after noise of level `sigma`.

    Raises:
        ValueError: the generator has left the part of the plane that is integrated over.
    """
    axis, points = plane()
    area = float(axis[1] - axis[0]) ** 2
    p = generator_density(generator, sigma).double()
    log_q = teacher.log_prob(points.double(), sigma)
    mass = p.sum().item() * area
    if not abs(mass - 1) < 0.02:
        raise ValueError(f"only {mass:.3f} of the generator's samples are within {EXTENT:g} of the middle")
    q, log_p = log_q.exp(), p.clamp_min(1e-300).log()
    log_mean = ((p + q) / 2).clamp_min(1e-300).log()
    kl = (p * (log_p - log_q)).sum() * area
    js = ((p * (log_p - log_mean)).sum() + (q * (log_q - log_mean)).sum()) / 2 * area
    return {"kl": kl.item(), "js": js.item()}


def make_trainer(teacher: MixtureDenoiser, objective: str = "ikl", seed: int = 0, **settings) -> Trainer:
    """The real trainer on plane-sized networks; `settings` override those of `TrainerConfig`."""
    config = {
        "objective": objective,
        "lr": 1e-3,
        "score_lr": 2e-3,
        "batch": 512,
        "sigma": LogNormal(-0.5, 1.0, 0.05, 10.0),
        "score_warmup": 512 * 200,
        "ema_nimg": 512 * 50,
        "sigma_data": 1.0,
        "seed": seed,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(misc.derive_seed(seed, "playground"))
        generator, student = PlaneGenerator(), PlaneDenoiser()
    return Trainer(generator, teacher, TrainerConfig(**{**config, **settings}), student)


def _picture(path: Path, panels: list[tuple[str, torch.Tensor]]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--picture needs matplotlib; install it, or use --no-picture") from None
    figure = Figure(figsize=(4 * len(panels), 4.4), layout="constrained")
    top = panels[0][1].max().item()
    for axes, (title, density) in zip(figure.subplots(1, len(panels)), panels):
        axes.imshow(density.T.numpy(), origin="lower", extent=[-EXTENT, EXTENT] * 2, vmin=0, vmax=top, cmap="magma")
        axes.set_title(title)
    with misc.open_atomic(path) as file:
        figure.savefig(file, format="png", dpi=100)


@cli.command()
@click.option("--objective", default="ikl", metavar="NAME", help="An objective that needs no density ratio.")
@click.option("--steps", type=cli.Integer(1), default=1500, help="Generator updates, of 512 samples each.")
@click.option("--seed", type=cli.Integer(0), default=0, help="Seed of everything.")
@click.option("--picture", default="playground.png", metavar="PATH", help="Where to draw the densities.")
@click.option("--no-picture", is_flag=True, help="Draw nothing.")
def main(objective, steps, seed, picture, no_picture):
    """Refine a small generator in the plane, and measure it exactly.

    The teacher is a ring of six Gaussians. Prints the divergences of generator and teacher before and after.
    """
    try:
        known = objectives.get(objective)
    except ValueError as error:
        raise InputError(f"--objective: {error}") from None
    if known.needs_ratio or not known.needs_student:
        why = "a density ratio" if known.needs_ratio else "a generator without randomness"
        raise InputError(f"--objective={objective} needs {why}, which the playground does not have")
    path = None if no_picture else cli.check_outfile(picture, "--picture")
    teacher = ring()
    trainer = make_trainer(teacher, objective, seed)
    before, density_before = distances(trainer.ema, teacher), generator_density(trainer.ema)

    start, warmup = time.perf_counter(), trainer.config.score_warmup // trainer.config.batch
    with cli.progress(warmup + steps, desc=objective) as bar:
        for _ in range(warmup + steps):
            trainer.step()
            bar.update(1)
    trainer.check_finite()
    seconds = time.perf_counter() - start

    after = distances(trainer.ema, teacher)
    cli.table([[name, before[name], after[name]] for name in before], ["nats", "before", "after"])
    if path:
        exact = teacher.log_prob(plane()[1], SIGMA).exp()
        _picture(path, [("teacher", exact), ("before", density_before), ("after", generator_density(trainer.ema))])
    result = {
        f"{name}_{when}": value for when, d in (("before", before), ("after", after)) for name, value in d.items()
    }
    cli.print_result({"objective": objective, "steps": steps, **result, "sigma": SIGMA, "seconds": round(seconds, 1)})


if __name__ == "__main__":
    main()
