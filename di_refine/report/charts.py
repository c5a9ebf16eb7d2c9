"""Charts of runs, as plotly's JSON: dictionaries of `data` and `layout`. Drawing them is the browser's work."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import escape

from di_refine import terminal
from di_refine.metrics import compare
from di_refine.noise import SIGMA_EDGES
from di_refine.report.record import BySeed, Run

Chart = dict[str, Any]

COLORS = ("#1f5fa8", "#c2571a", "#2f7d4f", "#8a3ea8", "#a8263b", "#6b6b00")
FAINT, BEST = "#777777", "#c2571a"
POINTS = 1000  # of a line; of more ticks, every n-th is drawn

KIMG = "thousand images (kimg)"

LINES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "Denoising loss": ("weighted squared error per pixel", {"loss", "score_loss", "score_margin"}.__contains__),
    "Score gap": ("mean |Dp - Dq| (pixels in -1..1)", {"score_gap"}.__contains__),
    "Objective of the generator": ("mean over images (no unit)", {"generator_loss"}.__contains__),
    "Losses of classifiers": (
        "cross entropy (nats)",
        {"ratio_loss", "critic_loss", "adversarial_loss", "loss_G", "loss_D"}.__contains__,
    ),
    "Regularization": ("part of the loss (nats)", {"loss_r1", "loss_pl"}.__contains__),
    "Logits of the discriminator": ("logarithm of odds (nats)", lambda name: name.endswith("_logits")),
    "Augmentation": ("probability", {"augment_p"}.__contains__),
    "Gradients": ("norm (loss per unit of weight)", lambda name: "grad_norm" in name),
    "Speed": ("images per second", {"images_per_sec"}.__contains__),
    "Memory": ("peak (GiB)", {"cpu_memory_gb", "gpu_memory_gb"}.__contains__),
}
"""Title of a chart -> unit of its values, and which statistics it shows."""

MAPS = {
    "score_gap_by_sigma": ("Score gap by noise level", "mean |Dp - Dq|<br>(pixels in -1..1)"),
    "score_loss_by_sigma": ("Loss of the student score by noise level", "weighted squared error<br>(per pixel)"),
    "loss_by_sigma": ("Loss by noise level", "weighted squared error<br>(per pixel)"),
}
"""Statistic by noise level -> title of its heat map, and unit of its values."""


def metric(key: str, runs: Sequence[Run], labels: Sequence[str] = ()) -> Chart:
    """A metric over the course of runs, with intervals where there are several seeds.

    Of a single run the values of the start and of the teacher are lines.

    Args:
        key: of the metric files.
        runs: that have it.
        labels: what several runs are called.
    """
    data: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        course, color = run.courses[key], COLORS[number % len(COLORS)]
        name = str(escape(labels[number])) if len(runs) > 1 else f"every snapshot, seed {run.seed}"
        line = {kimg: seeds[run.seed].values[key] for kimg, seeds in course.snapshots.items() if run.seed in seeds}
        shared = {"legendgroup": name, "showlegend": False}
        if line:
            data.append(_line(name, list(line), list(line.values()), color, mode="lines+markers"))
        others = {
            kimg: {seed: result for seed, result in seeds.items() if seed != run.seed}
            for kimg, seeds in course.snapshots.items()
        }
        # The seed by which the best was chosen flatters it.
        spread = {kimg: values for kimg, seeds in others.items() if len(values := _values(seeds, key)) > 1}
        if spread:
            bounds = [compare.interval(values) or (math.nan, math.nan) for values in spread.values()]
            means = [(low + high) / 2 for low, high in bounds]
            bars = {"type": "data", "array": [high - mean for (_, high), mean in zip(bounds, means)], "width": 5}
            count = "/".join(map(str, sorted({len(values) for values in spread.values()})))
            data.append(
                {
                    **_line(f"mean of {count} seeds, 95% interval", list(spread), means, color, mode="markers"),
                    "marker": {"symbol": "square-open", "size": 9},
                    "error_y": {**bars, "color": color, "thickness": 1.5},
                    **({} if len(runs) == 1 else shared),
                }
            )
        best = run.best
        if best is not None and best in line:
            star = {"symbol": "star", "size": 15, "color": BEST if len(runs) == 1 else color}
            mark = {**_line(f"best, {best:g} kimg", [best], [line[best]], color, mode="markers"), "marker": star}
            data.append({**mark, **({} if len(runs) == 1 else shared)})
        if len(runs) == 1:
            end = [0, max(course.snapshots, default=0) or run.kimg]
            for title, seeds, dash in (
                (run.start_name, others.get(0.0) or course.snapshots.get(0.0, {}), "dash"),
                ("teacher", course.teacher, "dot"),
            ):
                values = _values(seeds, key)
                if values:
                    mean = sum(values) / len(values)
                    shown = f"{title} {compare.number(mean)}"
                    data.append({**_line(shown, end, [mean, mean], FAINT), "line": {"color": FAINT, "dash": dash}})
    return _chart(data, f"{escape(key)}<br>({runs[0].courses[key].spec.kind.unit})")


def lines(run: Run) -> dict[str, Chart]:
    """The statistics of a run's ticks that have a chart, by its title."""
    names = list(dict.fromkeys(name for tick in run.ticks for name in tick))
    found = {}
    for title, (unit, belongs) in LINES.items():
        data: list[dict[str, Any]] = []
        for name in filter(belongs, names):
            drawn = [(kimg, value) for kimg, value in run.series(name) if kimg > 0]  # at 0 there were no steps
            if drawn:
                x, y = zip(*_thinned(drawn))
                data.append(_line(str(escape(name)), x, y, COLORS[len(data) % len(COLORS)]))
        if data:
            chart = _chart(data, unit)
            if title in ("Speed", "Memory"):
                chart["layout"]["yaxis"]["rangemode"] = "tozero"
            found[title] = chart
    return found


def heat_maps(run: Run) -> dict[str, Chart]:
    """The statistics of a run's ticks by noise level, by the title of their chart."""
    edges = [f"{edge:g}" for edge in SIGMA_EDGES]
    levels = [f"< {edges[0]}", *(f"{low} to {high}" for low, high in zip(edges, edges[1:])), f"> {edges[-1]}"]
    found = {}
    for name, (title, unit) in MAPS.items():
        columns = [(kimg, values) for kimg, values in run.vectors(name) if len(values) == len(levels)]
        if not columns:
            continue
        kimg, values = zip(*_thinned(columns))
        data = {
            "type": "heatmap",
            "x": kimg,
            "y": levels,
            "z": list(zip(*values)),
            "colorscale": "Viridis",
            "colorbar": {"title": {"text": unit, "side": "right"}, "thickness": 14, "outlinewidth": 0},
            "hovertemplate": "%{x} kimg, noise %{y}: %{z:.4g}<extra></extra>",
        }
        chart = _chart([data], "noise level sigma<br>(pixels in -1..1)")
        chart["layout"]["yaxis"]["type"] = "category"
        found[title] = chart
    return found


def _values(seeds: BySeed, key: str) -> list[float]:
    return [result.values[key] for result in seeds.values() if key in result.values]


def _line(name: str, x: Sequence[float], y: Sequence[Any], color: str, mode: str = "lines") -> dict[str, Any]:
    shown = {"type": "scatter", "mode": mode, "name": name, "x": x, "y": y}
    return {**shown, "line": {"color": color, "width": 2}, "marker": {"color": color, "size": 6}}


def _thinned(points: list[Any]) -> list[Any]:
    """Every n-th of many points, and the last."""
    step = math.ceil(len(points) / POINTS)
    return points if step < 2 else [*points[:-1:step], points[-1]]


def _chart(data: list[dict[str, Any]], unit: str) -> Chart:
    axis = {
        "gridcolor": "#e4e4e4",
        "zeroline": False,
        "automargin": True,
        "linecolor": "#999999",
        "ticks": "outside",
        "exponentformat": "power",
    }
    layout = {
        "xaxis": {**axis, "title": {"text": KIMG}},
        "yaxis": {**axis, "title": {"text": unit}},
        "margin": {"l": 20, "r": 10, "t": 10, "b": 20},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "showlegend": len(data) > 1,
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222222"},
        "hovermode": "closest",
        "plot_bgcolor": "white",
        "paper_bgcolor": "white",
    }
    return terminal.plain({"data": data, "layout": layout})
