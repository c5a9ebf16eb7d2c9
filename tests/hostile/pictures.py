"""Pictures, data sets and arrays that are programs for others, or that unpack to far more than their files."""

import gzip
import io
import json
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from special import GENERATOR, MEBIBYTES, SECONDS


def _convert(source):
    return ["dataset_tool.py", f"--source={source}", f"--dest={source.parent / 'out.zip'}", "--resolution=16"]


def _measure(images):
    return ["calc_metrics.py", f"--images={images}", "--metrics=is1k@digits"]


def _against(reference):
    return ["calc_metrics.py", GENERATOR, f"--data={reference}", "--no-cache", "--metrics=fd1k_full@digits"]


def _png(side):
    """A black greyscale picture of few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _zip(folder, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(folder / "x.zip", "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return folder / "x.zip"


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(x) (w) file closefile\nshowpage\n"


def postscript(folder):
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(POSTSCRIPT)
    return _convert(folder / "images")


def postscript_in_a_zip(folder):
    return _measure(_zip(folder, {"a.png": POSTSCRIPT, "b.jpg": POSTSCRIPT}))


def evil_names(folder):
    return _measure(_zip(folder, {"a\x1b[2J\x1b]0;owned\x07\u202egnp.png": b"no image"}))


def large_at_once(folder):
    """Six pictures of 169 megapixels, in 164 KB each."""
    png = _png(13_000)
    return [*_convert(_zip(folder, {f"{index}.png": png for index in range(6)})), "--rgb", "--transform=none"]


def larger(folder):
    """A picture of 900 megapixels in 1 MB."""
    return _convert(_zip(folder, {"a.png": _png(30_000)}))


def large_reference(folder):
    """A data set of 32 pictures of 169 megapixels, which a feature network for 16x16 would see."""
    png = _png(13_000)
    return _against(_zip(folder, {f"{index}.png": png for index in range(32)}))


def inflating_labels(folder):
    """A dataset.json of 1 GB, packed a thousandfold."""
    return _measure(_zip(folder, {"a.png": _png(16), "dataset.json": b" " * (1 << 30)}))


def many_lists(folder):
    return _measure(_zip(folder, {"a.png": _png(16), "dataset.json": b"[" + b"[]," * 1_300_000 + b"0]"}))


def deep_labels(folder):
    return _measure(_zip(folder, {"a.png": _png(16), "dataset.json": '{"labels": ' + "[" * 9999}))


def _npz(folder, arrays, unread=()):
    with zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(f"{name}.npy", file.getvalue())
        for name, size in unread:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (size,)})
                for _ in range(size >> 17):
                    member.write(bytes(1 << 20))
    return folder / "x.npz"


MOMENTS = {"mu": np.zeros(64), "sigma": np.eye(64)}


def unknown_arrays(folder):
    """Statistics beside arrays of no use, of 3 GB, packed a thousandfold."""
    reference = _npz(folder, MOMENTS | {"count": np.array(2)}, [(f"x{index}", 1 << 27) for index in range(3)])
    return ["calc_metrics.py", GENERATOR, f"--ref={reference}", "--metrics=fd1k_full@digits"]


def inflating_features(folder):
    reference = _npz(folder, MOMENTS, [("features", 3 << 27)])
    return ["calc_metrics.py", GENERATOR, f"--ref={reference}", "--metrics=fd1k_full@digits"]


def inflating_pixels(folder):
    return _measure(_npz(folder, {}, [("arr_0", 3 << 27)]))


def false_shape(folder):
    """An array that says it has 8 TB, and has nothing."""
    with zipfile.ZipFile(folder / "x.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    return _measure(folder / "x.npz")


def _cifar(folder, content):
    """An archive whose first member has this content."""
    with gzip.open(folder / "x.tar.gz", "wb") as packed:
        head = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        head.size = sum(map(len, content))
        packed.write(head.tobuf())
        for block in content:
            packed.write(block)
    return ["dataset_tool.py", f"--source={folder / 'x.tar.gz'}", f"--dest={folder / 'out.zip'}"]


def cifar_of_zeros(folder):
    """An archive of 2 GB, packed a thousandfold."""
    return _cifar(folder, [bytes(1 << 20)] * (1 << 11))


def cifar_with_a_far_memo(folder):
    """A pickle with an entry in its memo of number 2^31, for which the C unpickler would clear 32 GB."""
    return _cifar(folder, [b"\x80\x02Nr\xff\xff\xff\x7f.".ljust(512, b"\0")])


def inflating_state(folder):
    """A training state of 1 GB, packed a thousandfold."""
    (folder / "training_options.json").write_text(json.dumps({"command": "refine"}))
    path = _zip(folder, {"x/data.pkl": b"\x80\x02}q\x00.", "x/data/0": bytes(1 << 30), "x/version": b"3\n"})
    path.rename(folder / "training-state-000001.pt")
    return ["refine.py", GENERATOR, f"--outdir={folder}", f"--resume={folder}", "--metrics=none"]


def expanded_state(folder):
    """A training state with tensors of 4 TB, of which four bytes are stored."""
    import torch

    (folder / "training_options.json").write_text(json.dumps({"command": "refine"}))
    large = torch.zeros(1).expand(1_000_000, 1_000_000)
    torch.save({"trainer": {"generator": large}, "loop": {"nimg": large}}, folder / "training-state-000001.pt")
    return ["refine.py", GENERATOR, f"--outdir={folder}", f"--resume={folder}", "--metrics=none"]


def calling_state(folder):
    """A training state of 300 bytes that asks for a bytearray of 2 GB, and makes it in the only way PyTorch allows."""
    (folder / "training_options.json").write_text(json.dumps({"command": "refine"}))
    call = b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R"
    path = _zip(folder, {"x/data.pkl": b"\x80\x02" + call + b".", "x/version": b"3\n"}, zipfile.ZIP_STORED)
    path.rename(folder / "training-state-000001.pt")
    return ["refine.py", GENERATOR, f"--outdir={folder}", f"--resume={folder}", "--metrics=none"]


CASES = [
    (f"pictures-{case.__name__}", case, SECONDS, MEBIBYTES)
    for case in (
        postscript,
        postscript_in_a_zip,
        evil_names,
        larger,
        inflating_labels,
        many_lists,
        deep_labels,
        unknown_arrays,
        inflating_features,
        inflating_pixels,
        false_shape,
        cifar_of_zeros,
        cifar_with_a_far_memo,
        inflating_state,
        expanded_state,
        calling_state,
    )
] + [("pictures-large_at_once", large_at_once, 60, 2000), ("pictures-large_reference", large_reference, 60, 2000)]
