"""Pipes, devices and links in the places of files: refused at once, and never written through.

`CASES` has (name, function, bound in CPU seconds, bound in MiB). The function writes hostile files into an empty folder
and returns the arguments of the Python that meets them, which must end within the bounds: with exit status 2 and one
sentence, or where the files are merely unusual, with 0.
"""

import json
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "pretrained"
GENERATOR = f"--network={SHIPPED / 'stylegan2-digits.pkl'}"
RUN = [
    "refine.py",
    GENERATOR,
    "--kimg=0.008",
    "--score-warmup=0",
    "--batch=8",
    "--metrics=none",
    "--tick=0.0004",
    "--ema-kimg=0.0008",
]


def _pipe(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


def _run_directory(folder: Path) -> Path:
    (folder / "training_options.json").write_text(json.dumps({"command": "refine"}))
    return folder


def network(folder):
    return ["generate.py", f"--network={_pipe(folder / 'x.pkl')}", "--seeds=0", f"--outdir={folder / 'out'}"]


def inspected(folder):
    return ["-m", "di_refine", "inspect", str(_pipe(folder / "x.pkl"))]


def network_device(folder):
    return ["generate.py", "--network=/dev/zero", "--seeds=0", f"--outdir={folder / 'out'}"]


def pair(folder):
    (folder / "x.safetensors").write_bytes(b"")
    _pipe(folder / "x.json")
    return ["-m", "di_refine", "inspect", str(folder / "x.safetensors")]


def image(folder):
    _pipe(folder / "images" / "a.png")
    return ["dataset_tool.py", f"--source={folder / 'images'}", f"--dest={folder / 'a.zip'}"]


def image_device(folder):
    (folder / "images").mkdir()
    (folder / "images" / "a.png").symlink_to("/dev/zero")
    return ["calc_metrics.py", f"--images={folder / 'images'}", "--metrics=is1k@digits"]


def labels(folder):
    shutil.unpack_archive(SHIPPED / "digits-16x16.zip", folder / "images")
    (folder / "images" / "dataset.json").unlink()
    _pipe(folder / "images" / "dataset.json")
    return ["calc_metrics.py", f"--images={folder / 'images'}", "--metrics=is1k@digits"]


def images(folder):
    return ["calc_metrics.py", f"--images={_pipe(folder / 'x.zip')}", "--metrics=is1k@digits"]


def reference(folder):
    return ["calc_metrics.py", GENERATOR, f"--ref={_pipe(folder / 'x.npz')}", "--metrics=fd1k_full@digits"]


def reference_device(folder):
    return ["calc_metrics.py", GENERATOR, "--ref=/dev/zero", "--metrics=fd1k_full@digits"]


def detector(folder):
    return ["calc_metrics.py", GENERATOR, f"--detector={_pipe(folder / 'x.safetensors')}", "--metrics=is1k@x"]


def detector_device(folder):
    return ["calc_metrics.py", GENERATOR, "--detector=/dev/zero", "--metrics=is1k@zero"]


def log(folder):
    _pipe(_run_directory(folder) / "log.txt")
    return [*RUN, f"--outdir={folder}"]


def log_link(folder):
    (_run_directory(folder) / "log.txt").symlink_to(folder / "victim.txt")
    return [*RUN, f"--outdir={folder}"]


def stats(folder):
    _pipe(_run_directory(folder) / "stats.jsonl")
    return [*RUN, f"--outdir={folder}"]


def stats_link(folder):
    (_run_directory(folder) / "stats.jsonl").symlink_to(folder / "victim.txt")
    return [*RUN, f"--outdir={folder}"]


def state(folder):
    _pipe(_run_directory(folder) / "training-state-000001.pt")
    return [*RUN, f"--outdir={folder}", f"--resume={folder}"]


SECONDS, MEBIBYTES = 30, 1500  # most of both is the import of PyTorch
CASES = [
    (f"special-{case.__name__}", case, SECONDS, MEBIBYTES)
    for case in (
        network,
        inspected,
        network_device,
        pair,
        image,
        image_device,
        labels,
        images,
        reference,
        reference_device,
        detector,
        detector_device,
        log,
        log_link,
        stats,
        stats_link,
        state,
    )
]
