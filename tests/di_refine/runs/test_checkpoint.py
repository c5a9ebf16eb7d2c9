"""Training states on disk: whole, verified, and the newest intact one found."""

import errno
import hashlib
import os
import resource
import subprocess
import sys
import zipfile

import pytest
import torch

from di_refine.errors import RunError
from di_refine.runs import checkpoint

STATE = {"net": {"w": torch.arange(6.0).reshape(2, 3)}, "nimg": 1234, "names": ["a", None], "rate": 0.5}


def states(folder, *kimgs):
    for kimg in kimgs:
        checkpoint.save(checkpoint.path_of(folder, kimg * 1000), {"kimg": kimg})


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "training-state-000001.pt"
    checkpoint.save(path, STATE)
    for loaded in (checkpoint.load(path), torch.load(path, weights_only=True), torch.load(path, mmap=True)):
        assert torch.equal(loaded["net"]["w"], STATE["net"]["w"])
        assert {k: v for k, v in loaded.items() if k != "net"} == {k: v for k, v in STATE.items() if k != "net"}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_checksum_is_that_of_the_file_torch_wrote(tmp_path):
    path = tmp_path / "training-state-000001.pt"
    checkpoint.save(path, STATE)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        comment = archive.comment
    torch_wrote = path.read_bytes()[: -len(comment) - 2] + b"\0\0"
    assert comment == b"sha256:" + hashlib.sha256(torch_wrote).hexdigest().encode()


def test_every_altered_byte_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "training-state-000001.pt"
    checkpoint.save(path, {"w": torch.arange(4)})
    whole = path.read_bytes()
    checkpoint.check(path)
    for position in range(0, len(whole), 7):
        path.write_bytes(whole)
        flip(path, position)
        with pytest.raises(checkpoint.CheckpointError, match=r"training-state-000001\.pt is damaged"):
            checkpoint.check(path)
    for size in (*range(0, len(whole), 11), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(checkpoint.CheckpointError, match="damaged"):
            checkpoint.load(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.check(path)


def test_a_state_runs_no_code(tmp_path):
    class Code:
        def __reduce__(self):
            return os.system, ("true",)

    path = tmp_path / "training-state-000001.pt"
    checkpoint.save(path, {"x": Code()})
    checkpoint.check(path)
    with pytest.raises(checkpoint.CheckpointError, match="is no training state"):
        checkpoint.load(path)


def test_the_newest_intact_state_is_found(tmp_path):
    assert checkpoint.newest_intact(tmp_path) is None
    states(tmp_path, 8, 9, 10, 1_000_001)
    (tmp_path / "training-state-000011.pt.old").write_bytes(b"")
    said = []
    assert checkpoint.newest_intact(tmp_path, said.append).name == "training-state-1000001.pt" and not said
    (tmp_path / "training-state-1000001.pt").write_bytes(b"")
    flip(tmp_path / "training-state-000010.pt", 300)
    assert checkpoint.newest_intact(tmp_path, said.append).name == "training-state-000009.pt"
    assert len(said) == 2
    assert "training-state-1000001.pt is damaged (no checksum" in said[0]
    assert "training-state-000010.pt is damaged (its checksum differs); going back to training-state-000009" in said[1]
    flip(tmp_path / "training-state-000009.pt", -1)
    flip(tmp_path / "training-state-000008.pt", -1)
    with pytest.raises(checkpoint.CheckpointError, match="no training state in .* can be used"):
        checkpoint.newest_intact(tmp_path)


def test_prune_keeps_the_newest(tmp_path):
    states(tmp_path, 9, 100, 10)
    checkpoint.prune(tmp_path, 2)
    assert [path.name for path in checkpoint.in_folder(tmp_path)] == [
        "training-state-000100.pt",
        "training-state-000010.pt",
    ]


def test_a_failed_write_leaves_the_old_state(tmp_path):
    """A limit on file sizes acts like a full disk: the first bytes are written, the rest is refused."""
    path = tmp_path / "training-state-000001.pt"
    checkpoint.save(path, {"kimg": 1})
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(
            RunError, match=r"000001\.pt could not be written \(File too large\); free some space, then"
        ):
            checkpoint.save(path, {"w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "make .* writable"), (errno.EACCES, "make .* writable")],
)
def test_the_remedy_fits_the_failure(tmp_path, monkeypatch, number, remedy):
    def refuse(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(RunError, match=rf"could not be written \({os.strerror(number)}\); {remedy}"):
        checkpoint.save(tmp_path / "training-state-000001.pt", STATE)


def test_a_kill_in_the_middle_of_writing_leaves_the_old_state(tmp_path):
    path = tmp_path / "training-state-000001.pt"
    checkpoint.save(path, {"kimg": 1})
    script = f"""
import os, signal, torch
from di_refine import checkpoint
write = checkpoint._Hashed.write
def die(self, data):
    if self._file.tell() > 50_000:
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, data)
checkpoint._Hashed.write = die
checkpoint.save({str(path)!r}, {{str(i): torch.zeros(10_000) for i in range(10)}})
"""
    result = subprocess.run([sys.executable, "-c", script], check=False, cwd=os.getcwd())
    assert result.returncode == -9
    assert checkpoint.load(path) == {"kimg": 1}
    (left,) = (entry for entry in tmp_path.iterdir() if entry != path)
    assert left.name.startswith(".training-state-000001.pt.") and left.stat().st_size > 40_000
