"""Stage 7: the files for `pretrained/`, and what the registry and its README say of them.

Weights are stored in float16; `torch_utils.persistence.load` makes float32 of them again. Discriminators, raw networks
and single features stay behind. Files are taken in order until --limit-mib is reached, and what does not fit is named.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import click
from stages import NAME, ROOT, Stage, stage

from di_refine.files.run_files import RunFiles

# File, the stage's name, kind in the registry, what it is. The first matter most.
FILES = [
    (f"features-{NAME}.safetensors", "features", "features", "image classifier whose features the metrics use"),
    (f"stats-{NAME}-features.npz", "features", "statistics", "its mean and covariance of the training images"),
    ("edm-cifar10-small.pkl", "teacher", "edm", "class-conditional EDM diffusion model: the teacher"),
    ("stylegan2-cifar10-small.pkl", "gan", "stylegan2", "class-conditional StyleGAN2-ADA"),
    ("stylegan2-cifar10-small-refined.pkl", "refined", "stylegan2", "the same, refined with the teacher"),
    ("onestep-cifar10-small.pkl", "one-step", "edm", "the teacher, distilled to one step"),
]
KEPT = {"edm": ("ema", "dataset_kwargs", "distilled_sigmas"), "stylegan2": ("G_ema", "training_set_kwargs")}
REFINE_OPTIONS = ["kimg", "batch", "lr", "score_lr", "score_warmup", "ema_kimg", "tick", "snap", "precision"]


@stage(minutes=1, extra=False)
@click.option(
    "--dest", metavar="DIR", help="Where to write.  [default: pretrained/, in --smoke a folder of the workdir]"
)
@click.option("--limit-mib", type=float, default=32, help="All files together.")
def main(stage: Stage, dest: str | None, limit_mib: float):
    """Write the networks in float16, registry entries, and lines for the README."""
    folder = Path(dest) if dest else (stage.workdir / "pretrained" if stage.smoke else ROOT / "pretrained")
    folder.mkdir(parents=True, exist_ok=True)
    resolution, left_out, total = None, [], 0
    entries, lines = {}, []
    for file, name, kind, what in FILES:
        result = stage.result(name)
        if result is None:
            left_out.append(f"{file} (not made)")
            continue
        path = folder / file
        part = path.with_name(f".part-{file}")
        if kind in KEPT:
            resolution = _write_network(stage.network(name, "the other stages"), part, kind)
        elif kind == "features":
            shutil.copyfile(stage.features, part)
        else:
            _write_statistics(stage.statistics, part)
        size = part.stat().st_size
        if total + size > limit_mib * 2**20:
            part.unlink()
            left_out.append(f"{file} ({size / 2**20:.1f} MiB)")
            continue
        part.replace(path)
        total += size
        entries[file] = _entry(stage, file, name, kind, what)
        seconds = stage.trained_seconds(name) if "run_dir" in result else None
        lines.append(_line(file, what, size, seconds, result, kind))
    for entry in entries.values():
        entry["resolution"] = resolution or 32
        for role in ("teacher", "detector", "statistics"):
            if entry.get(role) not in entries:
                entry.pop(role, None)
    _merge(folder / "registry.json", entries)
    head = "| file | what | size | minutes | command |\n|---|---|---|---|---|\n"
    (folder / "cifar10.md").write_text(head + "".join(lines), "utf-8")
    for text in left_out:
        click.echo(f"left out: {text}", err=True)
    click.echo(json.dumps({"dest": str(folder), "files": list(entries), "mib": total / 2**20, "left_out": left_out}))


def _write_network(source: Path, path: Path, kind: str) -> int:
    """Write what a generator needs, in half precision, and return its resolution."""
    from di_refine import labels
    from di_refine.files import networks as files
    from torch_utils import persistence

    networks = {key: value for key, value in files.load(source).networks.items() if key in (*KEPT[kind], labels.KEY)}
    persistence.save(networks, path, half=True)
    return networks[KEPT[kind][0]].img_resolution


def _write_statistics(source: Path, path: Path) -> None:
    """Without single features: they are most of the file, and only kernel distances want them."""
    from di_refine.metrics.statistics import FeatureStatistics

    replace(FeatureStatistics.load(source), features=None).save(path)


def _entry(stage: Stage, file: str, name: str, kind: str, what: str) -> dict:
    entry = {"file": file, "kind": kind, "resolution": None, "channels": 3, "classes": 10}
    if kind == "stylegan2":
        entry["teacher"] = "edm-cifar10-small.pkl"
    if kind != "features":
        entry["detector"] = f"features-{NAME}.safetensors"
    if kind != "statistics":
        entry["statistics"] = f"stats-{NAME}-features.npz"
    entry["licence"] = "Apache-2.0"
    entry["note"] = f"{what}; CIFAR-10 (Krizhevsky 2009), made with scripts/cifar10"
    if kind in KEPT:
        entry["metrics"] = [f"fd5k_full@{NAME}", f"acc5k@{NAME}"]
    trained = {"gan": ("refine", "refined"), "teacher": ("distill", "one-step")}.get(name)
    result = trained and stage.result(trained[1])
    if result:
        options = json.loads(RunFiles(result["run_dir"]).options.read_text("utf-8"))
        wanted = [*REFINE_OPTIONS, *(["init_sigma"] if trained[0] == "distill" else [])]
        entry[trained[0]] = {**{key: options[key] for key in wanted}, "kimg": round(result["kimg"], 3)}
    return entry


def _line(file: str, what: str, size: int, seconds: float | None, result: dict, kind: str) -> str:
    minutes = "" if seconds is None else f"{seconds / 60:.1f}"
    command = "" if kind == "statistics" else f"`{' '.join(result['command'])}`"
    return f"| `{file}` | {what} | {size / 1e6:.1f} MB | {minutes} | {command} |\n"


def _merge(path: Path, entries: dict[str, dict]) -> None:
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps({**known, **entries}, indent=2, ensure_ascii=False) + "\n", "utf-8")
    part.replace(path)


if __name__ == "__main__":
    main()
