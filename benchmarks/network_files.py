"""What reading and writing network files costs and gives: the tables of docs/formats.md.

python benchmarks/network_files.py [golden] [hostile] [roundtrip] [large]
"""

import hashlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "torch_utils")]

import test_persistence_limits as limits
from golden_io import GOLDEN, load_npz, relative_error

from di_refine import terminal
from di_refine.edm.networks import EDMPrecond
from di_refine.files import safetensors_pair
from torch_utils import persistence

PICKLES = sorted(str(path.relative_to(GOLDEN)) for path in GOLDEN.glob("*/*.pkl"))


@torch.no_grad()
def golden() -> None:
    """Every golden pickle: load it, compute, and compare with the reference's outputs."""
    rows = []
    for name in PICKLES:
        start = time.perf_counter()
        content = persistence.load(GOLDEN / name)
        seconds = time.perf_counter() - start
        errors = {"stylegan2": stylegan2_errors, "edm": edm_errors, "distill": distill_errors}[name.split("/")[0]]
        error, count = 0.0, 0
        for found, expected in errors(name, content):
            error, count = max(error, relative_error(found, torch.from_numpy(expected))), count + 1
        rows.append([name, round((GOLDEN / name).stat().st_size / 1e6, 2), round(seconds, 3), count, f"{error:.1e}"])
    terminal.table(rows, ["pickle", "MB", "load s", "arrays", "max relative error"])


def tensors(data: dict, *names: str) -> list[torch.Tensor]:
    return [torch.from_numpy(data[name]) for name in names]


def stylegan2_errors(name, content):
    data = load_npz(name.replace("-era", "").replace(".pkl", ".npz"))
    z, c, ws, images = tensors(data, "z", "c", "ws", "D_img")
    net, fp32 = content["G_ema"], {"force_fp32": True}
    yield net.mapping(z, c), data["ws"]
    for mode in ("const", "none"):
        expected = data[f"img_{mode}"]
        yield net.synthesis(ws[: len(expected)], noise_mode=mode, **fp32), expected
    yield content["D"](images, c[: len(images)], **fp32), data["logits"]


def edm_errors(name, content):
    data = {
        key: torch.from_numpy(array) for key, array in load_npz(name.replace(".pkl", ".npz")).items() if key != "meta"
    }
    net, x, sigma, labels = content["ema"], data["x"], data["sigma"], data.get("labels")
    yield net(x, sigma, labels), data["D"].numpy()
    if "D_aug" in data:
        yield net(x, sigma, labels, augment_labels=data["augment_labels"]), data["D_aug"].numpy()
    if "D_nolabel" in data:
        yield net(x, sigma), data["D_nolabel"].numpy()


def distill_errors(name, content):
    data = load_npz("distill/diff_instruct.npz")
    x0, noise, sigma, labels = tensors(data, "x0", "noise", "sigma", "labels")
    sigma = sigma.reshape(-1, 1, 1, 1)
    expected = data["D_teacher" if "teacher" in name else "D_fake"]
    yield content["ema"](x0 + sigma * noise, sigma, labels), expected


def hostile() -> None:
    """Every hostile file of the test suite: outcome, processor time, and how much memory was used at most."""
    rows = []
    for name, (text, seconds, memory) in limits.run(limits.HOSTILE)["outcome"].items():
        outcome = text.removeprefix("network pickle: ")
        rows.append([name, round(seconds, 3), round(memory / 1e6, 1), outcome[:90]])
    terminal.table(rows, ["file", "cpu s", "MB", "refused, because"])
    print(f"{len(rows)} files, at most {max(row[1] for row in rows)} s and {max(row[2] for row in rows)} MB")


def roundtrip() -> None:
    """Every golden pickle: written, converted to safetensors and JSON, and back."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        a, b, c = (Path(folder) / name for name in ("a.pkl", "b.safetensors", "c.pkl"))
        for name in PICKLES:
            networks = persistence.load(GOLDEN / name)
            persistence.save(networks, a)
            safetensors_pair.save(networks, b)
            persistence.save(safetensors_pair.load(b), c)
            hashes = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in (a, c)]
            rows.append([name, *hashes, "equal" if a.read_bytes() == c.read_bytes() else "DIFFERENT"])
    terminal.table(rows, ["pickle", "written", "via safetensors", "bytes"])


def large() -> None:
    """A synthetic EDM network of more than 100 MB."""
    net = EDMPrecond(32, 3, model_type="SongUNet", model_channels=96, channel_mult=[2, 2, 2], attn_resolutions=[])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.pkl"
        start = time.perf_counter()
        persistence.save({"ema": net}, path)
        seconds = time.perf_counter() - start
        size = path.stat().st_size
        results = [limits.run(limits.LARGE, size=size, path=str(path)) for _ in range(3)]
    memory = [result["memory"] / size for result in results]
    print(f"{size / 1e6:.0f} MB, written in {seconds:.2f} s (with fsync)")
    print(f"loaded in {np.median([result['seconds'] for result in results]):.2f} s of processor time")
    print(f"peak memory {np.median(memory):.2f} times the file")


def main() -> None:
    """Print the tables asked for, or all."""
    torch.set_num_threads(1)
    for table in sys.argv[1:] or ("golden", "hostile", "roundtrip", "large"):
        {"golden": golden, "hostile": hostile, "roundtrip": roundtrip, "large": large}[table]()
        print()


if __name__ == "__main__":
    main()
