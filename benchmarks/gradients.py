"""Every objective's gradient against the exact one, by quadrature: the tables and the figure of docs/objectives.md.

    python benchmarks/gradients.py --figure=docs/objectives.png

What is integrated, and how, is in `tests/quadrature.py`; the test suite checks the same numbers against 1e-6.
"""

import sys
from pathlib import Path

import click
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from quadrature import (
    GENERATORS,
    SETTINGS,
    F,
    dirac_gradients,
    estimate,
    exact,
    expansion,
    gap,
    minimised,
    unit,
)

from di_refine import objectives, terminal
from di_refine.commands import cli
from di_refine.errors import InputError
from torch_utils import misc

TITLES = {
    "rkl": "reverse KL",
    "fkl": "forward KL",
    "jeffreys": "Jeffreys",
    "js": "Jensen-Shannon",
    "hellinger": "squared Hellinger",
    "chi2": "Pearson $\\chi^2$",
    "neyman": "Neyman $\\chi^2$",
}
SETTING = ("two", "wavy", 0.8)  # of the figure: teacher, generator, noise level
PARAMETER, SCALES = 1, torch.linspace(0.6, 1.0, 25, dtype=torch.float64)  # x0 = a + b z + c sin(2 z): b
BLUE, RED, INK = "#0072B2", "#D55E00", "#333333"  # distinct for colour-blind readers, and in grey


def differences() -> dict[str, list[float]]:
    """For every objective: the relative difference of its gradient from the exact one, in every setting."""
    table = {}
    for name in objectives.NAMES:
        if name == "sds":
            pairs = [dirac_gradients(name, teacher, s, 0.7) for teacher, _, s in SETTINGS]
        else:
            pairs = [(estimate(unit(name), *setting), exact(minimised(name), *setting)) for setting in SETTINGS]
        table[name] = [gap(*pair) for pair in pairs]
    return table


def detached() -> dict[str, list[tuple[float, float]]]:
    """By divergence, with the Gaussian and the wavy generator: exact and detached-ratio gradient of the scale."""
    table = {}
    for name in F:
        if not unit(f"uni-{name}").needs_ratio:
            continue
        table[name] = []
        for setting in SETTINGS[:2]:
            kept, cut = (estimate(unit(f"uni-{name}", detach_ratio=flag), *setting) for flag in (False, True))
            table[name].append((kept[PARAMETER].item(), cut[PARAMETER].item()))
    return table


def curves(name: str) -> dict[str, list[float]]:
    """The gradient with respect to the generator's scale, along the scale."""
    theta = GENERATORS[SETTING[1]].theta
    kinds = {
        "f exact": lambda at: exact(minimised(f"f-{name}"), *SETTING, at),
        "f": lambda at: estimate(unit(f"f-{name}"), *SETTING, at),
        "uni exact": lambda at: exact(minimised(f"uni-{name}"), *SETTING, at),
        "uni": lambda at: estimate(unit(f"uni-{name}"), *SETTING, at),
    }
    if unit(f"uni-{name}").needs_ratio:
        kinds["detached"] = lambda at: estimate(unit(f"uni-{name}", detach_ratio=True), *SETTING, at)
    found = {kind: [] for kind in kinds}
    for scale in SCALES:
        at = theta.clone()
        at[PARAMETER] = scale
        for kind, gradient in kinds.items():
            found[kind].append(gradient(at)[PARAMETER].item())
    return found


def draw(path: Path, table: dict[str, list[float]]) -> None:
    """One panel per divergence, and one with all differences."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--figure needs matplotlib; install it, or leave --figure away") from None
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    panels = list(figure.subplots(2, 4).flat)
    x, dots = SCALES.numpy(), slice(None, None, 3)
    for axes, name in zip(panels, F):
        y = curves(name)
        axes.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
        for kind, colour, label in (("f", BLUE, "$D_f(q\\,\\|\\,p)$"), ("uni", RED, "$E_p[h(r)\\,|u|^2]$")):
            axes.plot(x, y[f"{kind} exact"], color=colour, linewidth=1.4, label=f"{label}: exact")
            axes.plot(x[dots], y[kind][dots], "o", color=colour, markersize=4.2, label=f"{label}: estimator")
        if "detached" in y:
            axes.plot(x, y["detached"], "--", color=INK, linewidth=1.4, label="ratio detached: biased")
        axes.set_title(TITLES[name], fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    last = panels[-1]
    for row, (name, values) in enumerate(table.items()):
        colour = BLUE if objectives.get(name).detached else RED
        last.plot(values, [row] * len(values), "o", color=colour, markersize=2.6, alpha=0.8)
    last.axvline(1e-6, color=INK, linewidth=1, linestyle=":")
    last.text(3e-6, len(table) / 2, "allowed in the tests", rotation=90, va="center", fontsize=8.5, color=INK)
    last.set(xscale="log", xlim=(1e-16, 1e-4), xticks=[1e-16, 1e-12, 1e-8, 1e-4], yticks=[])
    last.set_ylabel(f"{len(table)} objectives x {len(SETTINGS)} settings")
    last.set_title("relative differences", fontsize=11)
    figure.supxlabel("scale b of the generator $x_0 = a + b z + c\\,\\sin 2z$", fontsize=10.5)
    figure.supylabel("gradient with respect to b", fontsize=10.5)
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize=9.5, columnspacing=1.2)
    with misc.open_atomic(path) as file:
        figure.savefig(file, format="png", dpi=160)


@cli.command()
@click.option("--figure", metavar="FILE.png", help="Also draw the figure there.")
def main(figure):
    """Print the relative differences of all objectives, the expansion identity, and the bias of detached ratios."""
    torch.set_num_threads(1)
    path = figure and cli.check_outfile(figure, "--figure")

    table = differences()
    header = [f"{teacher}/{generator} s={s}" for teacher, generator, s in SETTINGS]
    terminal.table([[name, *(f"{value:.0e}" for value in row)] for name, row in table.items()], ["objective", *header])

    click.echo("")
    sums = {name: expansion(name) for name in F}
    rows = [[f"uni-{name}", *pair, f"{abs(pair[1] / pair[0] - 1):.0e}"] for name, pair in sums.items()]
    terminal.table(rows, ["objective", "D_f(q0 || p0)", "integral of s E_p[h |u|^2] ds", "difference"])

    click.echo("")
    biased = detached()
    rows = [
        [f"uni-{name}", *(cell for kept, cut in pairs for cell in (kept, cut, f"{cut / kept - 1:+.0%}"))]
        for name, pairs in biased.items()
    ]
    terminal.table(rows, ["d/db of", *("exact, Gaussian", "detached", "bias", "exact, wavy", "detached", "bias")])

    if path:
        draw(Path(path), table)
    terminal.print_result(
        {
            "max_difference": max(map(max, table.values())),
            "differences": table,
            "expansion": sums,
            "detached": biased,
            "figure": figure,
        }
    )


if __name__ == "__main__":
    main()
