"""Stage 6: what came out: measurements, the table, pictures, speeds.

Measures what is in the workdir and has not been measured yet, in a few calls of calc_metrics.py, so that what is cut
off loses one of them. With --smoke, or --dest, nothing outside of the workdir or of that folder is written.
"""

import hashlib
import json
import time
import zipfile
from pathlib import Path

import click
from stages import ROOT, Stage, stage, ticks
from tables import quality_table, speed_table

ROWS = {
    "data": "data (held-out tenth)",
    "teacher": "teacher, 18 steps",
    "gan": "GAN",
    "gan-longer": "GAN, trained as much longer",
    "refined": "refined GAN",
    "one-step": "one step, distilled",
}
SEEDS = 3


@stage(minutes=8, extra=False)
@click.option(
    "--dest", metavar="DIR", help="Where results.md and results/ go.  [default: docs/, in --smoke the workdir]"
)
@click.option("--teacher-50k", is_flag=True, help="Also draw 50,000 images of the teacher, once: it takes minutes.")
@click.option("--inception", metavar="FILE", help="The 2015 Inception network, to give FID as well.")
def main(stage: Stage, dest: str | None, teacher_50k: bool, inception: str | None):
    """Measure, and write results.md with the pictures and logs beside it."""
    dest = Path(dest) if dest else (stage.workdir if stage.smoke else ROOT / "docs")
    start = time.monotonic()
    names = [name for name in ROWS if name == "data" or stage.result(name)]
    variants = [path.stem for path in sorted((stage.workdir / "results").glob("*.json"))]
    names += [name for name in variants if name not in ROWS and (stage.result(name) or {}).get("stage")]
    pending = []
    for measurement, group in todo(stage, names, teacher_50k, inception):
        if time.monotonic() - start > 60 * stage.minutes:
            pending.append(f"{measurement['metrics']} of {', '.join(group)}")
        else:
            measure(stage, group, measurement)
    if pending:
        click.echo("the time is up; call again for what is pending", err=True)
        click.echo(json.dumps({"results": None, "rows": names, "pending": pending}))
        return

    import figures  # slow to import, and the measurements do not need it

    (dest / "results").mkdir(parents=True, exist_ok=True)
    generated = figures.generation_speeds(stage, names)
    figures.side_by_side(stage, {name: ROWS.get(name, name) for name in names}, dest / "results" / "cifar10.png")
    device = figures.device_facts(stage.device, stage.smoke)
    table = quality_table(stage, {name: ROWS.get(name, name) for name in names}, generated)
    speeds = speed_table(stage, names, device, figures.operations(stage))
    text = (Path(__file__).parent / "results.md.in").read_text("utf-8")
    text = text.format(quality=table, speed=speeds, seeds=SEEDS, **device, **facts(stage))
    (dest / "results.md").write_text(text, "utf-8")
    for name in names:
        copy_log(stage, name, dest / "results")
    click.echo(json.dumps({"results": str(dest / "results.md"), "rows": names, "pending": pending}))


def measurements(name: str, smoke: bool, teacher_50k: bool, inception: str | None) -> list[dict]:
    """What is measured of a row: names of metrics without the network's, and with how many seeds."""
    if name == "data":
        return [] if smoke else [{"metrics": "fd5k_full,acc5k,kd5k_full", "seeds": 1}]
    if smoke:
        return [{"metrics": "fd1k_full,acc1k,kd1k_full", "seeds": SEEDS}]
    # Eighteen steps are 35 passes an image: of the teacher, 10,000 images a seed have to do.
    many = name != "teacher"
    found = [{"metrics": f"fd10k_full,{'fd50k_full,' if many else ''}acc10k,kd10k_full", "seeds": SEEDS}]
    if teacher_50k and not many:
        found.append({"metrics": "fd50k_full", "seeds": 1})
    if inception:
        found.append({"metrics": "fid10k_full", "seeds": 1, "detector": inception})
    return found


def todo(stage: Stage, names: list[str], teacher_50k: bool, inception: str | None) -> list[tuple[dict, list[str]]]:
    """Measurements that are missing, each with the rows that share it: one call makes them, which starts but once."""
    groups: dict[str, tuple[dict, list[str]]] = {}
    for name in names:
        for measurement in measurements(name, stage.smoke, teacher_50k, inception):
            known = stage.read_json(f"measured/{_file_name(name, measurement)}")
            if known is None or known["sha256"] != _sha256(_source(stage, name)):
                groups.setdefault(json.dumps(measurement), (measurement, []))[1].append(name)
    return list(groups.values())


def measure(stage: Stage, names: list[str], measurement: dict) -> None:
    """Measure rows and leave the results in measured/."""
    sources = {name: _source(stage, name) for name in names}
    options = [f"--{'images' if name == 'data' else 'network'}={source}" for name, source in sources.items()]
    if "detector" in measurement:
        options += [f"--metrics={measurement['metrics']}", f"--detector={measurement['detector']}"]
        options += [f"--data={stage.train_images}"]
    else:
        options += stage.metric_options(measurement["metrics"])
    options += [f"--seeds={measurement['seeds']}", "--steps=2" if stage.smoke else "--steps=18", "--no-jsonl"]
    result = stage.run("calc_metrics.py", *options, extra=False)
    for name, source in sources.items():
        found = [summary for summary in result["results"] if summary["source"] == str(source)]
        record = {"name": name, "sha256": _sha256(source), "warnings": result["warnings"], "results": found}
        stage.write_json(f"measured/{_file_name(name, measurement)}", record)


def _source(stage: Stage, name: str) -> Path:
    return stage.held_out_images if name == "data" else stage.network(name, "the other stages")


def _file_name(name: str, measurement: dict) -> str:
    return f"{name}-{measurement['metrics'].replace(',', '-')}.json"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def facts(stage: Stage) -> dict[str, str]:
    """What the text around the table says."""
    features = stage.result("features") or {}
    accuracy = features.get("held_out_accuracy")
    with zipfile.ZipFile(stage.train_images) as archive:
        lossy = any(name.lower().endswith((".jpg", ".jpeg")) for name in archive.namelist())
    jpeg = "; they come from a copy that was saved as JPEG, so figures differ from those on the lossless originals"
    return {
        "jpeg": jpeg if lossy else "",
        "accuracy": "?" if accuracy is None else f"{100 * accuracy:.1f}%",
        "training_images": f"{features.get('training_images', 0):,}",
        "held_out_images": f"{features.get('held_out_images', 0):,}",
    }


def copy_log(stage: Stage, name: str, folder: Path) -> None:
    """At most 200 lines of a run's log: enough for its curves."""
    result = stage.result(name)
    if name == "data" or not result or "run_dir" not in result or not Path(result["run_dir"]).is_dir():
        return
    lines = ticks(result["run_dir"])
    lines = [line for line in lines if line["kimg"] <= result["kimg"]][:: max(len(lines) // 200, 1)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"cifar10-{name}.jsonl").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
