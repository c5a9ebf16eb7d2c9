"""Arrays of others are read where they are wanted, and where they are not far larger than their file."""

import zipfile

import numpy as np
import pytest

from di_refine.files import arrays


def test_only_what_is_wanted_is_read(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(3), b=np.array([object()]))
    found, others = arrays.read(tmp_path / "a.npz", ["a", "c"])
    assert found["a"].tolist() == [0, 1, 2] and others == ["b"] and list(found) == ["a"]
    with pytest.raises(ValueError, match="allow_pickle"):
        arrays.read(tmp_path / "a.npz", ["b"])


def test_what_unpacks_to_much_more_than_the_file_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(1 << 17))
    assert arrays.read(tmp_path / "a.npz", ["a"])[0]["a"].size == 1 << 17
    monkeypatch.setattr(arrays, "ROOM", 0)
    with pytest.raises(ValueError, match="unpack to 1048704 bytes, more than the"):
        arrays.read(tmp_path / "a.npz", ["a"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(arrays.ERRORS):
        arrays.read(tmp_path / "a.npz", ["a"])


@pytest.mark.parametrize("header", [b"{'descr': (((((", b"(" * 5000, b"{'descr': 3}"])
def test_headers_of_arrays_that_are_none_are_refused(tmp_path, header):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(arrays.ERRORS):
        arrays.read(tmp_path / "a.npz", ["a"])
