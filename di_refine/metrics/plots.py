"""Metrics over the course of a run, from what its directory records. Drawing needs matplotlib, in the extra `plots`."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from di_refine.errors import InputError
from di_refine.files.run_files import RunFiles, snapshot_kimg
from di_refine.metrics.results import read_jsonl
from torch_utils.misc import open_atomic

Points = dict[float, list[float]]  # kimg -> values, several where a snapshot was measured with several seeds


def check_matplotlib() -> None:
    """Raise InputError, before any work, when there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("`plot` needs matplotlib; install it, or the extra di-refine[plots]") from None


def curves(run_dir: Path, metrics: Iterable[str] = ()) -> dict[str, Points]:
    """Return what was measured in a run, by key of the metric files (`fid5k_full`, `pr5k3_full_precision`).

    Training writes its measurements into the statistics of its ticks. The metric files add what was measured on
    snapshots afterwards; the number of images is in a snapshot's name.

    Args:
        run_dir: the run directory.
        metrics: names to keep; without any, all are kept.

    Raises:
        InputError: the folder records no measurement of these, or a line in it cannot be read.
    """
    found: dict[str, Points] = {}
    files, named = RunFiles(run_dir), set(metrics)
    for path in files.metrics():
        for record in read_jsonl(path):
            if named and record.get("metric") not in named:
                continue
            kimg = snapshot_kimg(Path(record.get("snapshot_pkl") or "").name)
            for key, value in record["results"].items():
                points = found.setdefault(key, {})
                if kimg is not None:
                    points.setdefault(float(kimg), []).append(value)
    for record in read_jsonl(files.stats):
        for key in found.keys() & record.keys():
            # The same measurement may stand in both files, there under a rounded number.
            if float(int(record["kimg"])) not in found[key]:
                found[key][record["kimg"]] = [record[key]]
    found = {key: dict(sorted(points.items())) for key, points in found.items() if points}
    if not found:
        wanted = f" of {', '.join(sorted(named))}" if named else ""
        raise InputError(f"`plot`: {run_dir} records no measurements{wanted} in its metric files")
    return found


def plot_runs(path: str | os.PathLike, runs: Sequence[Path], metrics: Iterable[str] = ()) -> dict[str, dict]:
    """Draw every metric of the runs against kimg, a panel each, and write the picture atomically.

    Args:
        path: the file; its extension says the format (.png, .pdf, .svg).
        runs: run directories; each becomes a line. Bars span the smallest to the largest value of several seeds.
        metrics: names to keep; without any, all are kept.

    Returns:
        What was drawn: {run: {key: [[kimg, mean], ...]}}.

    Raises:
        InputError: as `curves`, or an unknown extension.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = list(metrics)
    kind = Path(path).suffix.lstrip(".").lower() or "png"
    if kind not in FigureCanvasAgg.get_supported_filetypes():
        raise InputError(f"plot={path}: unknown picture format .{kind}; use .png, .pdf or .svg")
    measured = {str(run): curves(run, metrics) for run in runs}
    keys = list(dict.fromkeys(key for found in measured.values() for key in found))
    figure = Figure(figsize=(6, 3.2 * len(keys)), layout="constrained")
    drawn: dict[str, dict] = {run: {} for run in measured}
    for panel, key in zip(figure.subplots(len(keys), 1, squeeze=False)[:, 0], keys):
        for run, found in measured.items():
            if key not in found:
                continue
            kimg, values = list(found[key]), list(found[key].values())
            means = [sum(group) / len(group) for group in values]
            spread = [
                [mean - min(group) for mean, group in zip(means, values)],
                [max(group) - mean for mean, group in zip(means, values)],
            ]
            panel.errorbar(kimg, means, yerr=spread, marker=".", capsize=2, label=Path(run).name)
            drawn[run][key] = [[x, y] for x, y in zip(kimg, means)]
        panel.set_xlabel("kimg")
        panel.set_ylabel(key)
        panel.grid(alpha=0.3)
        panel.legend()
    with open_atomic(path) as file:
        figure.savefig(file, format=kind, dpi=150)
    return drawn
