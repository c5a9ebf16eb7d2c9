"""The command `python -m di_refine playground`: it trains a small generator in the plane and measures it exactly."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from di_refine import objectives, terminal
from di_refine.commands import cli
from di_refine.errors import InputError

if TYPE_CHECKING:
    import torch


@cli.command()
@click.option(
    "--objective", type=click.Choice(objectives.NAMES), default="ikl", help="Train the generator with this objective."
)
@click.option(
    "--steps", type=cli.Integer(1), default=1500, help="Update the generator this often, with 512 samples each."
)
@click.option("--seed", type=cli.Integer(0), default=0, help="Draw everything random from this seed.")
@click.option("--picture", default="playground.png", metavar="PATH", help="Draw the densities into this file.")
@click.option("--no-picture", is_flag=True, help="Draw nothing.")
def main(objective, steps, seed, picture, no_picture):
    """Refine a small generator in the plane, and measure it exactly.

    The teacher is a ring of six Gaussians. The divergences of generator and teacher are printed as they were before and
    are afterwards: KL(generator || teacher) and Jensen-Shannon after a little noise was added to both, and what the
    objective itself minimises after more noise.
    """
    from di_refine.commands import plane  # imports PyTorch, which --help must not wait for

    path = None if no_picture else cli.check_outfile(picture, "--picture")
    done, own = plane.play(objective, steps, seed), plane.own_divergence(objective)
    titles = {
        "kl": f"KL, sigma {plane.SIGMA}",
        "js": f"Jensen-Shannon, sigma {plane.SIGMA}",
        "own": f"{own}, sigma {plane.SIGMA_OWN}",
    }
    rows = [[title, done.before[name], done.after[name]] for name, title in titles.items()]
    terminal.table(rows, ["divergence", "before", "after"])
    if path:
        exact = plane.ring().log_prob(plane.plane()[1], plane.SIGMA).exp()
        after = plane.generator_density(done.trainer.ema)
        _draw(path, plane.EXTENT, [("teacher", exact), ("before", done.density_before), ("after", after)])
    result = {"objective": objective, "steps": steps, "own": own}
    for name in titles:
        result |= {f"{name}_before": done.before[name], f"{name}_after": done.after[name]}
    reduction = 1 - done.after["own"] / done.before["own"]
    terminal.print_result({**result, "reduction": reduction, "seconds": round(done.seconds, 1)})


def _draw(path: Path, extent: float, panels: "list[tuple[str, torch.Tensor]]") -> None:
    """Draw densities `[CELLS, CELLS]` side by side, each under its title."""
    from torch_utils import misc

    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--picture needs matplotlib; install it, or use --no-picture") from None
    figure = Figure(figsize=(4 * len(panels), 4.4), layout="constrained")
    top = panels[0][1].max().item()
    for axes, (title, density) in zip(figure.subplots(1, len(panels)), panels):
        axes.imshow(density.T.numpy(), origin="lower", extent=[-extent, extent] * 2, vmin=0, vmax=top, cmap="magma")
        axes.set_title(title)
    with misc.open_atomic(path) as file:
        figure.savefig(file, format="png", dpi=100)


if __name__ == "__main__":
    main()
