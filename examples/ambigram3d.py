"""One solid body that reads as a digit from the front and as another from the side, from a 2-D diffusion model alone.

    python examples/ambigram3d.py --front=3 --side=8
    python examples/ambigram3d.py --front=3 --side=8 --objective=sds

The generator is a volume of density and a camera: a label says which side is looked at. No 3-D shape is ever seen, and
no image. `ikl` learns the score of the renderings, as variational score distillation does (Wang et al., arXiv
2305.16213); `sds` is score distillation sampling (Poole et al., arXiv 2209.14988), which does without.
"""

import math
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from di_refine.denoisers import load_denoiser
from di_refine.files import film, pictures
from di_refine.labels import LabelLaw
from di_refine.metrics.detectors import load_detector
from di_refine.trainer import Trainer, TrainerConfig


class Body(nn.Module):
    """A white, glowing and absorbing volume `[32, 32, 32]` (depth, height, width), seen along parallel rays.

    Its density is a sum of grids, coarse to fine, which makes it smooth and lets whole parts move together.
    """

    latent_shape = (1,)  # turns the camera a little
    label_dim, img_channels, img_resolution = 10, 1, 16
    size, jitter = 32, math.radians(6)

    def __init__(self, front: int, side: int):
        super().__init__()
        self.front, self.side = front, side
        self.grids = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, n, n, n)) for n in (4, 8, 16, 32))

    def density(self) -> torch.Tensor:
        """`[1, 1, D, H, W]`, absorption over the side of the volume."""
        size = [self.size] * 3
        total = sum(F.interpolate(grid, size, mode="trilinear", align_corners=False) for grid in self.grids)
        ball = torch.linspace(-1, 1, self.size).square()  # begins as a cloud in the middle
        return 20 * F.softplus(total - 2 - 2 * (ball[:, None, None] + ball[:, None] + ball))

    def turned(self, volume: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """The volume `[1, C, ...]` as `[N, C, D, H, W]` in the frames of cameras at these angles around the upright."""
        cos, sin, zero, one = angles.cos(), angles.sin(), torch.zeros_like(angles), torch.ones_like(angles)
        rows = [
            torch.stack(row, 1) for row in ((cos, zero, sin, zero), (zero, one, zero, zero), (-sin, zero, cos, zero))
        ]
        grid = F.affine_grid(
            torch.stack(rows, 1), [len(angles), volume.shape[1], *[self.size] * 3], align_corners=False
        )
        return F.grid_sample(volume.expand(len(angles), -1, -1, -1, -1), grid, align_corners=False)

    def render(self, angles: torch.Tensor, shaded: bool = False) -> torch.Tensor:
        """Images `[N, 1, 32, 32]` in [0, 1]: emission and absorption, and for the eye a light from the upper left."""
        volume = self.density()
        colour = torch.ones_like(volume)
        if shaded:
            smooth = F.avg_pool3d(F.avg_pool3d(volume, 3, 1, 1), 3, 1, 1)[0, 0]
            slopes = torch.stack(torch.gradient(smooth, dim=(0, 1, 2)))
            colour = -slopes[None] / (slopes.norm(dim=0) + 1e-3)
        optical = self.turned(volume, angles) / self.size
        reached = (-F.pad(optical, [0, 0, 0, 0, 1, 0]).cumsum(dim=2)[:, :, :-1]).exp()  # light from here, to the camera
        colour = self.turned(colour, angles)
        if shaded:
            across = colour[:, :1] * -angles.sin()[:, None, None, None, None]
            across = across + colour[:, 2:] * angles.cos()[:, None, None, None, None]
            colour = 0.35 + 0.65 * (-0.6 * colour[:, 1:2] - 0.6 * across + 0.3).clamp(0, 1)
        return (reached * (1 - (-optical).exp()) * colour).sum(dim=2)

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Latents `[N, 1]` and labels `[N, 10]` -> images `[N, 1, 16, 16]` in [-1, 1]."""
        from_side = labels.argmax(dim=1) == self.side
        angles = from_side * (math.pi / 2) + self.jitter * z[:, 0].clamp(-2, 2) / 2
        return F.avg_pool2d(self.render(angles), 2) * 2 - 1


def make(front: int, side: int, objective: str, kimg: float, teacher: nn.Module, seed: int = 0) -> Body:
    """Teach a body both digits."""
    torch.manual_seed(seed)
    counts = np.bincount([front, side], minlength=10).astype(float)
    config = TrainerConfig(
        objective=objective, batch=16, lr=0.05, score_lr=1e-3, score_warmup=0.1, ema_kimg=0, seed=seed, sigma_mean=0
    )
    trainer = Trainer(Body(front, side), teacher, config, labels=LabelLaw(10, counts))
    while trainer.nimg < kimg * 1000:
        trainer.step()
    return trainer.ema.eval()


def read(body: Body, views: torch.Tensor) -> list[float]:
    """The probabilities that the digits' feature network gives the wanted digits in the two views."""
    probabilities = load_detector("digits")(pictures.to_uint8(views))[1]
    return [float(probabilities[0, body.front]), float(probabilities[1, body.side])]


def save_mesh(body: Body, path: Path) -> None:
    """Write the surface for a viewer or a 3-D printer, as the path's suffix asks (.stl, .ply, .obj)."""
    try:
        import trimesh
        from skimage.measure import marching_cubes
    except ImportError as error:
        raise click.ClickException(f"--mesh needs {error.name}: pip install scikit-image trimesh") from None
    volume = np.pad(body.density()[0, 0].detach().numpy(), 1)
    vertices, faces, _, _ = marching_cubes(volume, level=10)
    trimesh.Trimesh(vertices, faces).export(path)


@click.command()
@click.option("--front", type=click.IntRange(0, 9), default=3, help="Show this digit from the front.")
@click.option("--side", type=click.IntRange(0, 9), default=8, help="Show this one from the side.")
@click.option("--objective", type=click.Choice(["ikl", "sds"]), default="ikl", help="What pulls the body.")
@click.option("--kimg", default=4.8, help="Train on this many thousand renderings.")
@click.option("--seed", default=0, help="Draw random numbers from this seed.")
@click.option("--dest", default="ambigram.gif", type=Path, help="Write the turning body here.")
@click.option("--mesh", type=Path, help="Write its surface here (.stl, .ply or .obj).")
def main(front, side, objective, kimg, seed, dest, mesh):
    """Print how well both views are read, and write a film of the body, a picture of views beside it, and a mesh."""
    if front == side:
        raise click.UsageError("--front and --side are the two digits that the camera tells apart; name different ones")
    start = time.monotonic()
    body = make(front, side, objective, kimg, load_denoiser("edm-digits-16x16-cond.pkl"), seed)
    with torch.no_grad():
        views = body(torch.zeros(2, 1), F.one_hot(torch.tensor([front, side]), 10).float())
        as_front, as_side = read(body, views)
        print(f"{objective}: {front} {as_front:.3f}, {side} {as_side:.3f} ({time.monotonic() - start:.0f} s)")
        turn = body.render(torch.linspace(0, 2 * math.pi, 37)[:-1], shaded=True) * 2 - 1
        between = body.render(torch.linspace(0, math.pi / 2, 7), shaded=True) * 2 - 1
    big = [pictures.to_pillow(pictures.to_uint8(frame)).resize((128, 128), Image.Resampling.BICUBIC) for frame in turn]
    film.save(dest, big, fps=12)
    pictures.save_grid(dest.with_suffix(".png"), between, columns=7, scale=4)
    if mesh:
        save_mesh(body, mesh)


if __name__ == "__main__":
    main()
