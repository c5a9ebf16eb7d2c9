"""The two tables of the report, as Markdown, from what the workdir holds."""

import statistics
from typing import Any

from stages import NAME, Stage, ticks

COLUMNS = {  # column -> the metrics that may stand in it, and how they are written
    "Frechet distance, 10k": (("fd10k_full", "fd5k_full", "fd1k_full"), "{:.3f}"),
    "Frechet distance, 50k": (("fd50k_full",), "{:.3f}"),
    "class accuracy": (("acc10k", "acc5k", "acc1k"), "{:.4f}"),
    "KID x 1000": (("kd10k_full", "kd5k_full", "kd1k_full"), "{:.3f}"),
    "FID, 10k": (("fid10k_full",), "{:.2f}"),
}


def quality_table(stage: Stage, rows: dict[str, str], images_per_sec: dict[str, float]) -> str:
    """A line for each network: parameters, metrics as mean and standard deviation over the seeds, speed."""
    found = {name: _values(stage, name) for name in rows}
    columns = [
        column
        for column, (metrics, _) in COLUMNS.items()
        if "FID" not in column or any(metric in values for values in found.values() for metric in metrics)
    ]
    lines = []
    for name, title in rows.items():
        parameters = (stage.read_json("measured/parameters.json") or {}).get(name)
        cells = [title, f"{parameters / 1e6:.2f} M" if parameters else ""]
        for column in columns:
            metrics, form = COLUMNS[column]
            known = next((metric for metric in metrics if metric in found[name]), None)
            cells.append("" if known is None else _cell(found[name][known], form, column, known))
        speed = images_per_sec.get(name)
        lines.append([*cells, "" if speed is None else f"{speed:,.0f}"])
    return markdown(["network", "parameters", *columns, "images/s"], lines)


def speed_table(stage: Stage, names: list[str], device: dict[str, Any], operations: dict[str, float]) -> str:
    """A line for each training: minutes, images, images/s, share of the device's bf16 rate, memory."""
    lines = []
    for name in names:
        result = stage.result(name)
        if not result or "run_dir" not in result:
            continue
        log = [tick for tick in ticks(result["run_dir"]) if tick["kimg"] <= result["kimg"]]
        begin = (stage.result("gan") or {}).get("kimg", 0) if name == "gan-longer" else 0
        seconds = stage.trained_seconds(name)
        speeds = sorted(tick["images_per_sec"] for tick in log if tick["images_per_sec"] and tick["kimg"] > begin)
        if not speeds:
            continue
        # The median tick: compiling, the warm-up and whatever else runs are in the first and the odd ones.
        speed, flop = statistics.median(speeds), operations.get(name)
        rate = device["bf16_tflops"]
        share = f"{100 * speed * flop / 1e12 / rate:.1f}%" if flop and rate else ""
        memory = max((tick.get("gpu_memory_gb") or 0) for tick in log)
        cells = [name, f"{seconds / 60:.1f}", f"{result['kimg'] - begin:,.0f}", f"{speed:,.0f}"]
        cells += [f"{flop / 1e9:.1f}" if flop else "", share, f"{memory:.1f}" if memory else ""]
        lines.append(cells)
    header = ["training", "minutes", "kimg", "images/s", "GFLOP/image", "share of bf16 rate", "GPU memory, GiB"]
    return markdown(header, lines)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _values(stage: Stage, name: str) -> dict[str, list[float]]:
    """Metric without its network's name -> a value for each seed; of two measurements the one with more seeds."""
    found: dict[str, list[float]] = {}
    for path in sorted((stage.workdir / "measured").glob(f"{name}-*.json")):
        record = stage.read_json(f"measured/{path.name}")
        for summary in record["results"] if record["name"] == name else ():
            for key, values in summary["values"].items():
                key = key.removesuffix(f"@{NAME}")
                found[key] = max(found.get(key, []), values, key=len)
    return found


def _cell(values: list[float], form: str, column: str, metric: str) -> str:
    if column.startswith("KID"):
        values = [1000 * value for value in values]
    text = form.format(statistics.fmean(values))
    if len(values) > 1:
        text += " ± " + form.format(statistics.stdev(values))
    size = next(count for count in ("10k", "50k", "5k", "1k") if count in metric)
    return text if size in ("10k", "50k") else f"{text} ({size})"
