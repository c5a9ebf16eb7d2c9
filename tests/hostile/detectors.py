"""Feature networks that are programs, or that say they are much larger than their files."""

import json
import pickle
import struct
import zipfile

from special import GENERATOR, MEBIBYTES, SECONDS


def _measure(path, name="x"):
    return ["calc_metrics.py", GENERATOR, f"--detector={path}", f"--metrics=is1k@{name}"]


def _torchscript(path):
    """Write a program that would write a file when it is called."""
    import torch

    class Net(torch.nn.Module):
        def forward(self, images):
            torch.from_file(TARGET, shared=True, size=3, dtype=torch.uint8).fill_(65)
            return images.float().mean(dim=[2, 3])

    global TARGET
    TARGET = str(path.parent / "victim")
    torch.jit.trace(Net(), torch.zeros([1, 3, 8, 8]), check_trace=False).save(str(path))
    return path


def torchscript(folder):
    return _measure(_torchscript(folder / "x.pt"))


def torchscript_as_weights(folder):
    return _measure(_torchscript(folder / "x.pth"))


def torchscript_as_safetensors(folder):
    return _measure(_torchscript(folder / "x.pt").rename(folder / "x.safetensors"))


def torchscript_for_paths(folder):
    return ["calc_metrics.py", GENERATOR, f"--perceptual={_torchscript(folder / 'x.pt')}", "--metrics=ppl1k_wend"]


def torchscript_in_training(folder):
    network = _torchscript(folder / "x.pt")
    return ["refine.py", GENERATOR, "--dry-run", f"--outdir={folder}", f"--detector={network}", "--metrics=is1k@x"]


def plugin(folder):
    (folder / "x.py").write_text(f"open({str(folder / 'victim')!r}, 'w')\n")
    return _measure(folder / "x.py")


class _Call:
    def __reduce__(self):
        return print, ("this ran",)


def pickled_call(folder):
    (folder / "x.pth").write_bytes(pickle.dumps(_Call(), protocol=2))
    return _measure(folder / "x.pth")


def inflating(folder):
    """A checkpoint whose tensor is a gigabyte of zeros, packed a thousandfold."""
    with zipfile.ZipFile(folder / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, protocol=2))
        with archive.open("x/data/0", "w") as file:
            for _ in range(1 << 10):
                file.write(bytes(1 << 20))
    return _measure(folder / "x.pth")


def _small(path, header, **config):
    """Write a file of `pretrain.py features` with no tensors but one."""
    config = {"resolution": 8, "channels": 1, "classes": 2, "width": 1, "feature_dim": 1} | config
    metadata = {"format": "di-refine features 1", "name": "x", "config": json.dumps(config), "report": "{}"}
    entries = {"__metadata__": metadata, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, **header}
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    return _measure(path)


def giant(folder):
    """Settings that ask for 70 GB of weights."""
    return _small(folder / "x.safetensors", {}, width=1 << 16, feature_dim=1 << 16)


def giant_pictures(folder):
    return _small(folder / "x.safetensors", {}, resolution=1 << 30)


def many_tensors(folder):
    """A header with as many tensors of no size as it may have."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}
    return _small(folder / "x.safetensors", {f"t{index}": empty for index in range(60_000)})


CASES = [
    (f"detectors-{case.__name__}", case, SECONDS, MEBIBYTES)
    for case in (
        torchscript,
        torchscript_as_weights,
        torchscript_as_safetensors,
        torchscript_for_paths,
        torchscript_in_training,
        plugin,
        pickled_call,
        inflating,
        giant,
        giant_pictures,
        many_tensors,
    )
]
