"""The page `report.html`: what a run, or several, have done, in one file that needs no network.

All text goes through a template that escapes it. The browser runs only the scripts whose hashes the page names, so that
nothing that a run's files hold is ever executed.
"""

import base64
import datetime
import hashlib
import io
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

from di_refine import terminal
from di_refine.errors import InputError
from di_refine.files.pictures import read_png
from di_refine.metrics import compare
from di_refine.report import charts
from di_refine.report.record import TEACHER, Course, Run
from torch_utils import misc

PICTURE_BYTES = 600_000  # of a picture in the page; three of them and plotly have 7.2 MB
PICTURE_WIDTHS = ((1280, 90), (1280, 75), (960, 75), (640, 75))  # and JPEG's quality, where a picture has more
LEAST_WIDTH = 640  # pixels, below which a picture is enlarged
CLASSES = 40  # that the page names
VALUE = 300  # characters of an option's value

SOURCES = {
    "given": "command line",
    "auto": "fitted to the run",
    "registry": "registry, for this network",
    "minutes": "fitted to --minutes",
    "start_from": "the network of --from",
}


def write(path: Path, folders: Sequence[Path]) -> None:
    """Write the page of a run, or one that compares several, atomically.

    Args:
        path: the file; its folder must exist.
        folders: run directories.

    Raises:
        InputError: one of them is none, a file in one is damaged, or they have no metric in common.
    """
    runs = [Run(folder) for folder in folders]
    content = _of_one(runs[0]) if len(runs) == 1 else _of_several(runs)
    content["files"] = [entry for run in runs for entry in _files(run, path.parent, len(runs) > 1)]
    text = _render(content)
    with misc.open_atomic(path, "w") as file:
        file.write(text)


def _render(content: dict[str, Any]) -> str:
    """Fill in the template; charts get their places in the order of their titles."""
    drawn: dict[str, charts.Chart] = {}
    for kind in ("metric_charts", "map_charts", "line_charts"):
        places = [(title, f"{kind}-{number}") for number, title in enumerate(content.get(kind, {}))]
        drawn |= {place: content[kind][title] for title, place in places}
        content[kind] = places
    # A text of a browser's JSON, in which no character begins a tag.
    data = json.dumps(drawn, allow_nan=False).replace("<", "\\u003c")
    scripts = [get_plotlyjs().replace("</script", "<\\/script"), Path(__file__).with_name("page.js").read_text("utf-8")]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html").render(
        **content,
        charts=Markup(data),
        scripts=[Markup(script) for script in scripts],
        hashes=Markup(" ".join(f"'sha256-{value}'" for value in hashes)),
    )


# ----------------------------------------------------------------------------------------------------------------------
# What a page shows


def _of_one(run: Run) -> dict[str, Any]:
    """What the page of one run shows, by the names of the template."""
    summaries = list(run.summaries(run.rows()))
    compare.add_differences(summaries)
    tables = []
    if summaries:
        rows, header, legend = compare.table(summaries)
        tables.append({"title": "", "rows": rows, "header": header, "legend": legend})
    names = run.options.get("class_names")
    names = [str(name) for name in names if name] if isinstance(names, list) else []
    more = f" and {len(names) - CLASSES} more" if len(names) > CLASSES else ""
    return {
        "title": f"{run.name}: {run.command}",
        "verdicts": [_verdict(run)],
        "facts": list(_facts(run)),
        "tables": tables,
        "pictures": list(_pictures(run)),
        "classes": ", ".join(names[:CLASSES]) + more,
        "metric_charts": {
            f"{key}: {_meaning(course)}": charts.metric(key, [run])
            for key, course in run.courses.items()
            if course.snapshots
        },
        "map_charts": charts.heat_maps(run),
        "line_charts": charts.lines(run),
        "options": _options(run),
    }


def _of_several(runs: Sequence[Run]) -> dict[str, Any]:
    """What a page that compares runs shows.

    Raises:
        InputError: they have no metric in common.
    """
    common = [
        key for key in runs[0].courses if all(run.courses[key].snapshots for run in runs[1:] if key in run.courses)
    ]
    common = [key for key in common if all(key in run.courses for run in runs)]
    if not common:
        raise InputError(
            f"{runs[0].path} and {', '.join(str(run.path) for run in runs[1:])} have no metric in common; measure them "
            "alike, with calc_metrics.py, or report on each alone"
        )
    labels = compare.short_names([str(run.path.absolute()) for run in runs])
    settings = {name: [_value(run.options.get(name)) for run in runs] for name in _settings(runs[0])}
    return {
        "title": " and ".join(labels) if len(runs) == 2 else f"{len(runs)} runs compared",
        "verdicts": [_verdict(run) for run in runs],
        "facts": [],
        "tables": [_differences(key, runs, labels) for key in common],
        "pictures": [
            {"id": f"run{number}", "caption": label, "before": image, "after": None}
            for number, (run, label) in enumerate(zip(runs, labels), 1)
            if (image := _best_picture(run)) is not None
        ],
        "classes": "",
        "metric_charts": {f"{key}: {_meaning(runs[0].courses[key])}": charts.metric(key, runs) for key in common},
        "map_charts": {},
        "line_charts": {},
        "options": {
            "header": ["option", *labels],
            "changed": [[name, *values] for name, values in settings.items() if len(set(values)) > 1],
            "rest": [[name, *values] for name, values in settings.items() if len(set(values)) == 1],
            "rest_is": "in which the runs agree",
            "facts": [],
        },
    }


def _differences(key: str, runs: Sequence[Run], labels: Sequence[str]) -> dict[str, Any]:
    """The table of one metric: each run at the start and at its best, and how the best differs from the first run's.

    Differences are taken where the same feature network compares with the same reference.
    """
    best: list[dict[str, Any]] = []
    cells: list[list[str]] = []
    for run, label in zip(runs, labels):
        found = {}
        for summary in run.summaries([("start", 0.0), (label, run.best), (TEACHER, None)]):
            if key in summary["results"]:
                found[summary["source"]] = summary
        texts = [
            compare.number(found[row]["results"][key], found[row]["sd"].get(key)) if row in found else ""
            for row in ("start", label, TEACHER)
        ]
        at = "" if run.best is None else f" at {run.best:g} kimg"
        cells.append([label, texts[0], texts[1] + (at if texts[1] else ""), texts[2]])
        best.append(found.get(label, {}))
    first, legend = best[0], ["+- is the standard deviation over seeds"]
    for row, summary in zip(cells, best):
        same = first and summary and all(summary[name] == first[name] for name in ("detector", "reference", "labels"))
        if summary is first or not same:
            row.append("" if summary is first or not summary or not first else "measured against something else")
            continue
        pair = [first, summary]
        compare.add_differences(pair)
        bounds = summary["delta_interval"].get(key)
        within = f" ({bounds[0]:+.3g} to {bounds[1]:+.3g})" if bounds else ""
        row.append(f"{summary['delta'][key]:+.3g}{within}{' *' if compare.differs(summary, key) else ''}")
    if any(row[-1].endswith(")") or row[-1].endswith("*") for row in cells):
        legend.append(
            "in brackets: 95% interval of the difference, seed by seed over the seeds of both; * leaves 0 out"
        )
    header = ["run", "start", "best", "teacher", f"difference from {labels[0]}"]
    title = f"{key}: {_meaning(runs[0].courses[key])}"
    return {"title": title, "rows": cells, "header": header, "legend": legend}


def _meaning(course: Course) -> str:
    better = "higher" if course.spec.higher_is_better else "lower"
    return f"{course.spec.kind.what}; {better} is better"


def _verdict(run: Run) -> dict[str, Any]:
    sentences = run.verdict()
    kind = sentences[0].partition(":")[0]
    return {"name": run.name, "sentences": sentences, "kind": kind if kind in ("better", "worse") else ""}


def _facts(run: Run) -> Iterable[tuple[str, str]]:
    """The first things to know of a run, as (name, value)."""
    options = run.options
    for name, key in (("network", "network_file"), ("data", "data"), ("objective", "objective"), ("device", "device")):
        if options.get(key):
            yield name, Path(str(options[key])).name if key == "network_file" else str(options[key])
    files = options.get("teacher_files")
    if isinstance(files, list) and files:
        yield TEACHER, ", ".join(Path(str(file)).name for file in files)
    yield "images seen", f"{run.kimg:g} kimg"
    speeds = [value for kimg, value in zip(*run.series("images_per_sec")) if kimg > 0]
    if speeds:
        yield "speed", f"{statistics.median(speeds):.4g} images/s, median of the ticks"
    for name, key in (("memory", "cpu_memory_gb"), ("memory of the GPU", "gpu_memory_gb")):
        if values := run.series(key)[1]:
            yield name, f"{max(values):.3g} GiB at most"
    if times := run.series("timestamp")[1]:
        moment = datetime.datetime.fromtimestamp(times[-1], datetime.timezone.utc)
        yield "last tick", f"{moment:%Y-%m-%d %H:%M} UTC"


def _options(run: Run) -> dict[str, Any]:
    """The options with where each comes from: those that are no defaults, the others, and facts."""
    sources = run.options.get("sources")
    sources = sources if isinstance(sources, dict) else {}
    # Runs that do not record what was given cannot tell it from defaults.
    default = "default" if "given" in sources.values() else "default, or command line"
    origin = {**SOURCES, "preset": f"preset {run.options.get('preset')}"}
    settings = _settings(run)
    rows = [
        [name, _value(run.options[name]), origin.get(sources[name], str(sources[name])) if name in sources else default]
        for name in settings
    ]
    facts = [
        [name, _value(value)] for name, value in run.options.items() if name not in (*settings, "sources", "command")
    ]
    return {
        "header": ["option", "value", "from"],
        "changed": [row for row in rows if row[2] != default],
        "rest": [row for row in rows if row[2] == default],
        "rest_is": f"with the value of the {default}",
        "facts": facts,
    }


def _settings(run: Run) -> list[str]:
    """The names in `training_options.json` that are settings: those before `sources`."""
    names = [name for name in run.options if name != "command"]
    return names[: names.index("sources")] if "sources" in names else names


def _value(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    text = terminal.clean(text)
    return text if len(text) <= VALUE else f"{text[:VALUE]}..."


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and files


def _pictures(run: Run) -> Iterable[dict[str, Any]]:
    """The samples at the start and at the best, which a slider joins, and the real images."""
    best = _best_picture(run)
    if best is not None:
        kimg, path = run.pictures[0]
        before = _picture(path, run.start_name if path == run.files.samples(0) else f"at {kimg} kimg")
        if len(run.pictures) > 1:
            caption = "The same latents in both; move the slider across the picture."
            yield {"id": "", "caption": caption, "before": before, "after": best}
        else:
            yield {"id": "", "caption": before["title"], "before": before, "after": None}
    if run.files.reals.is_file():
        title = "Real images"
        yield {"id": "", "caption": title, "before": _picture(run.files.reals, title), "after": None}


def _best_picture(run: Run) -> dict[str, Any] | None:
    """The samples of the best snapshot, of the newest where those are not there; None where there are none at all."""
    if not run.pictures:
        return None
    of_best = [item for item in run.pictures[1:] if run.best is not None and item[0] == int(run.best)]
    kimg, path = of_best[0] if of_best else run.pictures[-1]
    if path == run.files.samples(0):
        return _picture(path, run.start_name)
    return _picture(path, f"best, {kimg} kimg" if of_best else f"at {kimg} kimg")


def _picture(path: Path, title: str) -> dict[str, Any]:
    """A picture as the page holds it; a large one is made smaller, a tiny one larger.

    Raises:
        InputError: the file is damaged.
    """
    content, image = read_png(path)
    kind = "png"
    if image.width < LEAST_WIDTH and len(content) < PICTURE_BYTES // 4:
        scale = -(-LEAST_WIDTH // image.width)
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        content = _encoded(image, "PNG")
    for width, quality in PICTURE_WIDTHS:
        if len(content) <= PICTURE_BYTES:
            break
        kind, small = "jpeg", image.convert("RGB")
        small.thumbnail((width, image.height))
        content = _encoded(small, "JPEG", quality=quality)
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"uri": uri, "width": image.width, "height": image.height, "title": title}


def _encoded(image: Image.Image, kind: str, **details: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **details)
    return file.getvalue()


def _files(run: Run, folder: Path, named: bool) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    """Links to a run's files, relative to a folder, as (title, [(name, link)])."""
    files = run.files
    pictures = [path for _, path in run.pictures]
    records = [files.options, files.log, files.stats, *files.metrics(), files.result]
    groups = {
        "Networks": files.snapshots(),
        "Training states": files.states(),
        "Pictures": [files.before_after, files.reals, *pictures],
        "Records": records,
        "For TensorBoard": files.event_files(),
    }
    for title, paths in groups.items():
        links = [(path.name, quote(Path(os.path.relpath(path, folder)).as_posix())) for path in paths if path.is_file()]
        if links:
            yield f"{run.name}, {title.lower()}" if named else title, links
