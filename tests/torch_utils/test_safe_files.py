"""Files that somebody else may have put there are opened as what they should be, or not at all."""

import io
import os
import pickle
import struct
import zipfile

import pytest
import torch

from torch_utils import safe_files

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders here")


@pytest.fixture(params=["pipe", "device", "folder"])
def special(request, tmp_path):
    path = tmp_path / "x"
    {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": os.mkdir}[request.param](path)
    return path


def test_only_regular_files_are_read(special):
    for opened in (safe_files.open_regular, safe_files.check_safetensors, safe_files.read_json):
        with pytest.raises(OSError, match="not a regular file|a folder"):
            opened(special)


def test_only_regular_files_are_added_to(special):
    with pytest.raises(OSError, match=r"not a regular file|a symbolic link|Is a directory"):
        safe_files.open_append(special)


def test_a_link_is_read_through_and_not_written_through(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert safe_files.read_json(tmp_path / "b") == 1
    with pytest.raises(OSError, match="a symbolic link, which is not followed"):
        safe_files.write_line(tmp_path / "b", "x")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_lines_are_added(tmp_path):
    safe_files.write_line(tmp_path / "a", "one")
    safe_files.write_line(tmp_path / "a", "zwei €")
    assert (tmp_path / "a").read_text("utf-8") == "one\nzwei €\n"


def test_a_file_that_is_too_large_is_not_opened(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        file.truncate(1 << 40)  # holes, which take no room
    with pytest.raises(OSError, match="1099511627776 bytes, more than the 16777216 there may be"):
        safe_files.read_json(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "it nests too deeply"),
        (b"[" + b"{}," * 600_000 + b"1]", "600001 lists and objects, more than the 500000 there may be"),
        (b"\xff", "utf-8"),
        (b"{", "Expecting"),
    ],
)
def test_json_has_bounds(text, reason):
    with pytest.raises(ValueError, match=reason):
        safe_files.parse_json(text)


def _saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _check(data):
    return safe_files.check_saved(io.BytesIO(data), len(data))


def test_what_torch_saves_is_accepted():
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool]
    content = {"tensors": [torch.zeros(3, dtype=kind) for kind in kinds], "p": torch.nn.Parameter(torch.zeros(2))}
    content |= {"layers": torch.nn.Linear(2, 2).state_dict(), "plain": (1, -1.5, "x", None, True, 1 << 70)}
    assert len(_check(_saved(content))) > len(kinds)
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    assert _check(file.getvalue()) == []


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_call_something_is_refused(zipped):
    file = io.BytesIO()
    torch.save({"x": bytearray(3)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError, match=r"asks for \w+ bytearray"):
        _check(file.getvalue())


def test_an_archive_that_python_and_pytorch_would_read_differently_is_refused():
    """Two archives in one file: PyTorch finds the first, which is packed, and Python the second."""

    def archive(compression, pickled):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as written:
            written.writestr("x/data.pkl", pickled)
            written.writestr("x/version", "3")
        data = file.getvalue()
        size, start = struct.unpack("<II", data[-10:-2])
        return data[:start], data[start : start + size], data[-22:]

    packed, stored = archive(zipfile.ZIP_DEFLATED, bytes(1 << 20)), archive(zipfile.ZIP_STORED, b"\x80\x02}.")
    entry = bytearray(stored[1])
    shift = len(packed[0]) - len(stored[0])  # Python adds what lies before the directory
    for start in (0, 46 + len("x/data.pkl")):
        (offset,) = struct.unpack_from("<I", entry, start + 42)
        struct.pack_into("<I", entry, start + 42, offset + shift)
    both = packed[0] + packed[1] + stored[0] + entry + packed[2]
    with zipfile.ZipFile(io.BytesIO(both)) as seen:
        assert seen.read("x/data.pkl") == b"\x80\x02}."
    assert torch._C.PyTorchFileReader(io.BytesIO(both)).get_record("data.pkl") == bytes(1 << 20)
    with pytest.raises(zipfile.BadZipFile, match="its directory is not where it says"):
        _check(both)


def test_two_pickles_in_an_archive_are_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/DATA.PKL", b"\x80\x02].")
    with pytest.raises(zipfile.BadZipFile, match="2 entries named data.pkl"):
        _check(file.getvalue())
