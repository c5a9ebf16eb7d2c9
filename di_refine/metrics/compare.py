"""Several measurements side by side: means over seeds, their spread, and differences from the first source."""

import math
import statistics as stats
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from di_refine.files.run_files import snapshot_kimg
from di_refine.metrics.results import MetricResult

LEVEL = 0.95


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95% confidence interval of the mean of repeated draws (Student's t), or None for a single one."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit  # slow to import

    half = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * stats.stdev(values) / len(values) ** 0.5
    mean = stats.fmean(values)
    return mean - half, mean + half


def summarise(source: str, results: Sequence[MetricResult]) -> dict[str, Any]:
    """Summarise one metric of one source over all seeds, as the JSON result gives it.

    Args:
        source: what people call it.
        results: results of the same metric, one per seed.
    """
    first = results[0]
    series = {key: [result.values[key] for result in results] for key in first.values}
    return {
        "source": source,
        "metric": first.name,
        "results": {key: stats.fmean(values) for key, values in series.items()},
        "sd": {key: stats.stdev(values) for key, values in series.items() if len(values) > 1},
        "min": {key: min(values) for key, values in series.items()},
        "interval": {key: bounds for key, values in series.items() if (bounds := interval(values))},
        "values": series,
        "seeds": [result.seed for result in results],
        "labels": first.labels,
        "num_images": first.num_images,
        "resolution": first.resolution,
        "detector": first.detector.as_dict(),
        "reference": first.reference,
        "seconds": sum(result.seconds for result in results),
    }


def add_differences(summaries: Sequence[dict[str, Any]]) -> None:
    """Add `delta` and `delta_interval`, against the first source of the same metric, to every later summary.

    Where both were measured with two seeds or more the differences are taken seed by seed, over the seeds of both: two
    generators of one family then see the same latents and labels, and what is common to both cancels.
    """
    base: dict[str, dict[str, Any]] = {}
    for summary in summaries:
        first = base.setdefault(summary["metric"], summary)
        if first is summary:
            continue
        summary["delta"] = {key: mean - first["results"][key] for key, mean in summary["results"].items()}
        summary["delta_interval"] = {}
        shared = [seed for seed in summary["seeds"] if seed in first["seeds"]]
        places = [(summary["seeds"].index(seed), first["seeds"].index(seed)) for seed in shared]
        for key, values in summary["values"].items():
            differences = [values[i] - first["values"][key][j] for i, j in places]
            bounds = interval(differences)
            if bounds:
                summary["delta"][key] = stats.fmean(differences)
                summary["delta_interval"][key] = bounds


def differs(summary: dict[str, Any], key: str) -> bool:
    """Whether the interval of the difference from the first source leaves 0 out."""
    bounds = summary.get("delta_interval", {}).get(key)
    return bounds is not None and not bounds[0] <= 0 <= bounds[1]


def number(mean: float, sd: float | None = None) -> str:
    """A mean with its standard deviation, to the second digit of the latter: '9.15 +- 0.32'; alone, to four digits."""
    if sd is None or not math.isfinite(sd):
        return f"{mean:.4g}"
    digits = min(max(1 - math.floor(math.log10(sd)), 0), 6) if sd > 0 else 4
    return f"{mean:.{digits}f} +- {sd:.{digits}f}"


def table(summaries: Sequence[dict[str, Any]]) -> tuple[list[list[str]], list[str], list[str]]:
    """A table for people: a row for each source, a column for each value.

    Args:
        summaries: of `summarise`, with or without differences; `steps`, where it is there, are those of a diffusion
            model.

    Returns:
        Rows, header, and sentences that explain them.
    """
    sources = list(dict.fromkeys(summary["source"] for summary in summaries))
    keys = list(dict.fromkeys(key for summary in summaries for key in summary["results"]))
    cells: dict[tuple[str, str], str] = {}
    for summary in summaries:
        for key, mean in summary["results"].items():
            mark = " *" if differs(summary, key) else ""
            cells[summary["source"], key] = number(mean, summary["sd"].get(key)) + mark
    labels = {summary["source"]: summary["labels"] for summary in summaries}
    legend, several = [], {len(summary["seeds"]) for summary in summaries} - {1}
    if several:
        legend.append(f"+- is the standard deviation over {' or '.join(map(str, sorted(several)))} seeds")
    if any(cell.endswith("*") for cell in cells.values()):
        legend.append("* differs from the first row: 0 is outside of the 95% interval of the difference, seed by seed")
    steps = {summary["source"]: summary.get("steps") or 0 for summary in summaries}
    counted = {source: f", {n} step{'s' if n > 1 else ''}" if n else "" for source, n in steps.items()}
    titles = {source: short + counted[source] for source, short in zip(sources, short_names(sources))}
    rows = [[titles[source], *(cells.get((source, key), "") for key in keys)] for source in sources]
    header = ["network", *keys]
    drawn = {value for value in labels.values() if value is not None}
    if len(drawn) == 1:
        legend.append(f"labels: {drawn.pop()}")
    elif drawn:
        rows, header = [[*row, labels[source] or ""] for source, row in zip(sources, rows)], [*header, "labels"]
    return rows, header, legend


def short_names(names: Sequence[str]) -> list[str]:
    """Names of files as people call them, without folders, where that leaves them apart.

    A snapshot of a run is called by the run: 'runs/00001-mine/network-snapshot-000040.pkl' is '00001-mine at 40 kimg'.
    """
    short = []
    for name in names:
        path = Path(name)
        kimg = snapshot_kimg(path.name)
        short.append(path.name if kimg is None else f"{path.absolute().parent.name} at {kimg} kimg")
    return [one if short.count(one) == 1 else name for one, name in zip(short, names)]
