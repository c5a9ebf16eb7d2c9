"""Training states on disk: whole, verified, and the newest intact one found."""

import errno
import os
import re
import resource
import subprocess
import sys
import zipfile

import pytest
import torch

from di_refine.errors import RunError
from di_refine.files.run_files import RunFiles
from di_refine.runs import checkpoint

STATE = {"net": {"w": torch.arange(6.0).reshape(2, 3)}, "nimg": 1234, "names": ["a", None], "rate": 0.5}


def states(folder, *kimgs):
    for kimg in kimgs:
        checkpoint.save(RunFiles(folder).state(kimg * 1000), {"kimg": kimg})


def flip(path, position, bits=1):
    content = bytearray(path.read_bytes())
    content[position] ^= bits
    path.write_bytes(content)


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "training-state-000001.pt"
    checkpoint.save(path, STATE)
    for loaded in (checkpoint.load(path), torch.load(path, weights_only=True), torch.load(path, mmap=True)):
        assert torch.equal(loaded["net"]["w"], STATE["net"]["w"])
        assert {k: v for k, v in loaded.items() if k != "net"} == {k: v for k, v in STATE.items() if k != "net"}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_state_is_the_archive_that_torch_writes(tmp_path):
    path = tmp_path / "training-state-000001.pt"
    checkpoint.save(path, STATE)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert all(entry.external_attr == 0 for entry in archive.infolist())


def same(state, wanted):
    """Whether two states of one tensor are equal."""
    return (
        state.keys() == wanted.keys() and state["w"].dtype == wanted["w"].dtype and torch.equal(state["w"], wanted["w"])
    )


def test_no_altered_bit_changes_what_is_loaded(tmp_path):
    """The checksums cover what the entries hold. In the rest, torch.load refuses the file or reads the right values."""
    path, wanted = tmp_path / "training-state-000001.pt", {"w": torch.arange(4)}
    checkpoint.save(path, wanted)
    whole = path.read_bytes()
    refused = 0
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        try:
            assert same(checkpoint.load(path), wanted), position
        except checkpoint.CheckpointError as error:
            refused += 1
            assert str(error).startswith(f"{path} is ")
    assert refused > len(whole) / 3


def test_every_altered_bit_of_a_tensor_is_noticed(tmp_path):
    path, values = tmp_path / "training-state-000001.pt", torch.arange(100, 104)
    checkpoint.save(path, {"w": values})
    whole = path.read_bytes()
    start = whole.index(values.numpy().tobytes())
    for bit in range(values.nbytes * 8):
        path.write_bytes(whole)
        flip(path, start + bit // 8, 1 << bit % 8)
        with pytest.raises(checkpoint.CheckpointError, match=r"training-state-000001\.pt is damaged \(its checksum"):
            checkpoint.load(path)


def test_an_entry_that_is_marked_as_a_folder_is_noticed(tmp_path):
    """The archive's directory has no checksum, and torch.load reads nothing of a folder."""
    path = tmp_path / "training-state-000001.pt"
    checkpoint.save(path, {"w": torch.arange(4)})
    whole = path.read_bytes()
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", whole)]
    assert len(entries) > 3
    for entry in entries:
        path.write_bytes(whole)
        flip(path, entry + 38, 0x10)  # the external attributes
        with pytest.raises(checkpoint.CheckpointError, match="damaged"):
            checkpoint.load(path)


def test_every_cut_is_noticed(tmp_path):
    path, wanted = tmp_path / "training-state-000001.pt", {"w": torch.arange(4)}
    checkpoint.save(path, wanted)
    whole = path.read_bytes()
    for size in (*range(0, len(whole), 11), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(checkpoint.CheckpointError, match="damaged"):
            checkpoint.load(path)
    path.write_bytes(whole)
    assert same(checkpoint.load(path), wanted)
    for longer in (whole + b"x", b"x" + whole):
        path.write_bytes(longer)
        with pytest.raises(checkpoint.CheckpointError, match="damaged"):
            checkpoint.load(path)


def test_a_state_runs_no_code(tmp_path):
    class Code:
        def __reduce__(self):
            return os.system, ("true",)

    path = tmp_path / "training-state-000001.pt"
    checkpoint.save(path, {"x": Code()})
    with pytest.raises(checkpoint.CheckpointError, match=r"is no training state \(it holds more than tensors"):
        checkpoint.load(path)


def test_the_newest_intact_state_is_found(tmp_path):
    assert checkpoint.newest_intact(tmp_path) is None
    states(tmp_path, 8, 9, 10, 1_000_001)
    (tmp_path / "training-state-000011.pt.old").write_bytes(b"")
    said = []
    assert checkpoint.newest_intact(tmp_path, said.append).name == "training-state-1000001.pt" and not said
    (tmp_path / "training-state-1000001.pt").write_bytes(b"")
    flip(tmp_path / "training-state-000010.pt", 65)
    assert checkpoint.newest_intact(tmp_path, said.append).name == "training-state-000009.pt"
    assert len(said) == 2
    assert "training-state-1000001.pt is damaged (it is no archive" in said[0]
    assert "training-state-000010.pt is damaged" in said[1] and "; going back to training-state-000009" in said[1]
    flip(tmp_path / "training-state-000009.pt", -22)  # of the mark by which the archive's directory is found
    flip(tmp_path / "training-state-000008.pt", 0)
    with pytest.raises(checkpoint.CheckpointError, match="no training state in .* can be used"):
        checkpoint.newest_intact(tmp_path)


def test_prune_keeps_the_newest(tmp_path):
    states(tmp_path, 9, 100, 10)
    checkpoint.prune(tmp_path, 2)
    assert [path.name for path in RunFiles(tmp_path).states()] == [
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
from di_refine.runs import checkpoint
save = torch.save
class Dying:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        if self.file.tell() > 50_000:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.file.write(data)
    def flush(self):
        self.file.flush()
torch.save = lambda state, file: save(state, Dying(file))
checkpoint.save({str(path)!r}, {{str(i): torch.zeros(10_000) for i in range(10)}})
"""
    result = subprocess.run([sys.executable, "-c", script], check=False, cwd=os.getcwd())
    assert result.returncode == -9
    assert checkpoint.load(path) == {"kimg": 1}
    (left,) = (entry for entry in tmp_path.iterdir() if entry != path)
    assert left.name.startswith(".training-state-000001.pt.") and left.stat().st_size > 40_000


@pytest.mark.parametrize("tensor", [torch.zeros(1).expand(9, 9), torch.zeros(3, 3).to_sparse()])
def test_tensors_of_which_less_is_stored_are_refused(tmp_path, tensor):
    checkpoint.save(tmp_path / "a.pt", {"a": [{"b": tensor}]})
    with pytest.raises(
        checkpoint.CheckpointError, match="a tensor of shape .* of which less is stored|no training state"
    ):
        checkpoint.load(tmp_path / "a.pt")


def test_packed_entries_are_refused(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"a": torch.zeros(1 << 16)})
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as plain,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as b,
    ):
        for name in plain.namelist():
            b.writestr(name, plain.read(name))
    with pytest.raises(checkpoint.CheckpointError, match="is damaged"):
        checkpoint.load(tmp_path / "b.pt")
