"""Several measurements side by side: means over seeds, their spread, and differences from the first source."""

import statistics as stats
from collections.abc import Sequence
from typing import Any

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

    Where both were measured with the same seeds the differences are taken seed by seed: two generators of one family
    then see the same latents and labels, and what is common to both cancels.
    """
    base: dict[str, dict[str, Any]] = {}
    for summary in summaries:
        first = base.setdefault(summary["metric"], summary)
        if first is summary:
            continue
        summary["delta"] = {key: mean - first["results"][key] for key, mean in summary["results"].items()}
        summary["delta_interval"] = {}
        if summary["seeds"] == first["seeds"]:
            for key, values in summary["values"].items():
                bounds = interval([a - b for a, b in zip(values, first["values"][key])])
                if bounds:
                    summary["delta_interval"][key] = bounds


def rows(summaries: Sequence[dict[str, Any]]) -> tuple[list[list], list[str]]:
    """Return table rows and header: metric by metric, the sources in the order given, without empty columns."""
    columns = ["source", "metric", "labels", "value", "sd", "min", "95% interval", "delta", "95% of delta"]
    table = []
    for metric in dict.fromkeys(summary["metric"] for summary in summaries):
        for summary in (summary for summary in summaries if summary["metric"] == metric):
            for key, mean in summary["results"].items():
                several = len(summary["seeds"]) > 1
                table.append(
                    [
                        summary["source"],
                        key,
                        summary["labels"],
                        mean,
                        summary["sd"].get(key),
                        summary["min"][key] if several else None,
                        _bounds(summary["interval"].get(key)),
                        summary.get("delta", {}).get(key),
                        _bounds(summary.get("delta_interval", {}).get(key)),
                    ]
                )
    used = [i for i in range(len(columns)) if any(row[i] is not None for row in table)]
    return [[row[i] for i in used] for row in table], [columns[i] for i in used]


def _bounds(bounds: tuple[float, float] | None) -> str | None:
    return None if bounds is None else f"{bounds[0]:.5g} .. {bounds[1]:.5g}"
