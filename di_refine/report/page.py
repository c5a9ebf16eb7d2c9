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
from di_refine.runs.config import TOLD_ANEW
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
    content = _of_one(runs[0], path.parent) if len(runs) == 1 else _of_several(runs, path.parent)
    text = _render(content)
    with misc.open_atomic(path) as file:
        file.write(text.encode(errors="replace"))  # JSON can hold what UTF-8 cannot


def _render(content: dict[str, Any]) -> str:
    """Fill in the template; charts get their places in the order of their titles."""
    drawn: dict[str, charts.Chart] = {}
    for kind in ("metric_charts", "map_charts", "line_charts"):
        places = [(title, f"{kind}-{number}") for number, title in enumerate(content[kind])]
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


def _of_one(run: Run, folder: Path) -> dict[str, Any]:
    """What a page of one run in a folder shows, by the names of the template."""
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
        "files": [(title, links) for title, paths in _files(run).items() if (links := _links(paths, folder))],
    }


def _of_several(runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    """What a page in a folder shows that compares runs.

    Raises:
        InputError: they have no metric in common.
    """
    common = [key for key in runs[0].courses if all(key in run.courses and run.courses[key].snapshots for run in runs)]
    if not common:
        raise InputError(
            f"{runs[0].path} and {', '.join(str(run.path) for run in runs[1:])} have no metric in common; measure them "
            "alike, with calc_metrics.py, or report on each alone"
        )
    labels = _labels(runs)
    settings = {name: [_value(run.options.get(name)) for run in runs] for name in _settings(runs[0])}
    return {
        "title": f"{len(runs)} runs compared",
        "verdicts": [{**_verdict(run), "name": label} for run, label in zip(runs, labels)],
        "facts": [],
        "tables": [_differences(key, runs, labels) for key in common],
        "pictures": [
            {"id": f"run{number}", "caption": label, "before": image, "after": None}
            for number, (run, label) in enumerate(zip(runs, labels), 1)
            if (image := _best_picture(run)) is not None
        ],
        "classes": "",
        "metric_charts": {
            f"{key}: {_meaning(runs[0].courses[key])}": charts.metric(key, runs, labels) for key in common
        },
        "map_charts": {},
        "line_charts": {},
        "options": {
            "header": ["option", *labels],
            "changed": [[name, *values] for name, values in settings.items() if len(set(values)) > 1],
            "rest": [[name, *values] for name, values in settings.items() if len(set(values)) == 1],
            "rest_is": "in which the runs agree",
            "facts": [],
        },
        "files": [
            (label, _links([run.files.report, *_files(run)["Networks"], *_files(run)["Records"]], folder))
            for run, label in zip(runs, labels)
        ],
    }


def _labels(runs: Sequence[Run]) -> list[str]:
    """The names of the runs' folders, with as many of the folders above as tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(folder[-count:]) for folder in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({number})" for number, label in enumerate(labels, 1)]  # the same run twice


def _differences(key: str, runs: Sequence[Run], labels: Sequence[str]) -> dict[str, Any]:
    """The table of one metric: each run at the start and at its best, and how the best differs from the first run's.

    Differences are taken where the same feature network compares with the same reference.
    """
    best: list[dict[str, Any]] = []
    cells: list[list[str]] = []
    for run, label in zip(runs, labels):
        rows: list[tuple[str, float | None]] = [("start", 0.0), (TEACHER, None)]
        rows += [] if run.best is None else [("best", run.best)]
        found = {summary["source"]: summary for summary in run.summaries(rows) if key in summary["results"]}
        texts = {row: compare.number(each["results"][key], each["sd"].get(key)) for row, each in found.items()}
        kimg = f"{run.best:g}" if "best" in texts else ""
        cells.append([label, texts.get("start", ""), texts.get("best", ""), kimg, texts.get(TEACHER, "")])
        best.append(found.get("best", {}))
    first = best[0]
    for row, summary in zip(cells, best):
        if not summary or not first or summary is first:
            row.append("")
        elif any(summary[name] != first[name] for name in ("detector", "reference", "labels")):
            row.append("measured against something else")
        else:
            compare.add_differences([first, summary])
            bounds = summary["delta_interval"].get(key)
            within = f" ({bounds[0]:+.3g} to {bounds[1]:+.3g})" if bounds else ""
            row.append(f"{summary['delta'][key]:+.3g}{within}{' *' if compare.differs(summary, key) else ''}")
    legend = [
        "+- is the standard deviation over seeds; in brackets: 95% interval of the difference, seed by seed over the "
        "seeds of both runs; * leaves 0 out"
    ]
    header = ["run", "start", "best", "at kimg", "teacher", "difference from the first run's best"]
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
    speeds = [value for kimg, value in run.series("images_per_sec") if kimg > 0]
    if speeds:
        yield "speed (median)", f"{statistics.median(speeds):.4g} images/s"
    for name, key in (("memory", "cpu_memory_gb"), ("memory of the GPU", "gpu_memory_gb")):
        if values := [value for _, value in run.series(key)]:
            yield name, f"{max(values):.3g} GiB at most"
    times = [value for _, value in run.series("timestamp") if 0 < value < 1e11]
    if times:
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
    rows = []
    for name in settings:
        value, source = run.options[name], str(sources.get(name, ""))
        if not source and name in TOLD_ANEW and value != TOLD_ANEW[name]:
            source = "given"
        rows.append([name, _value(value), origin.get(source, source) or default])
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
        before = _picture(path, _title(run, kimg, path))
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
    best = of_best and run.courses  # of what was not measured the newest counts as the best
    return _picture(path, f"best, {kimg} kimg" if best else _title(run, kimg, path))


def _title(run: Run, kimg: int, path: Path) -> str:
    if path == run.files.samples(0):
        return run.start_name
    return f"at {kimg} kimg" if kimg else "soon after the start"


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


def _files(run: Run) -> dict[str, list[Path]]:
    """The files that a run may have, by what they are."""
    files = run.files
    return {
        "Networks": files.snapshots(),
        "Training states": files.states(),
        "Pictures": [files.before_after, files.reals, *(path for _, path in run.pictures)],
        "Records": [files.options, files.log, files.stats, *files.metrics(), files.result],
        "For TensorBoard": files.event_files(),
    }


def _links(paths: Iterable[Path], folder: Path) -> list[tuple[str, str]]:
    """The names of those files that there are, and links to them from a folder."""
    return [(path.name, quote(Path(os.path.relpath(path, folder)).as_posix())) for path in paths if path.is_file()]
