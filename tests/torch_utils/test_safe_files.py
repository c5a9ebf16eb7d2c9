"""Files that somebody else may have put there are opened as what they should be, or not at all."""

import os

import pytest

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
