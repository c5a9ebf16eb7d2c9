"""Run directories: their names, lock and logs."""

import contextlib
import errno
import json
import math
import os
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from di_refine.errors import InputError
from di_refine.runs import checkpoint
from torch_utils import distributed, misc

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None

OPTIONS = "training_options.json"


class RunDirectory:
    """A numbered folder of results, `00000-<description>`, with the file names of the StyleGAN family.

    Of several processes only the first writes; for the others everything here does nothing.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._writes = distributed.is_first()
        self._writer = None
        self._purge_step: int | None = None
        self._lock = None

    @classmethod
    def create(cls, outdir: str | os.PathLike, description: str, options: dict[str, Any]) -> "RunDirectory":
        """Make the next free number under `outdir`, locked, and write `training_options.json` there."""
        outdir = Path(outdir)
        outdir.mkdir(parents=True, exist_ok=True)
        numbers = [int(m[1]) for entry in outdir.iterdir() if (m := re.match(r"(\d{5})(-|$)", entry.name))]
        number = max(numbers, default=-1) + 1
        while True:  # two runs may start at the same moment: whoever makes the folder has the number
            path = outdir / f"{number:05d}-{description}"
            taken = any(entry.name.startswith(f"{number:05d}") for entry in outdir.iterdir())
            with contextlib.suppress(FileExistsError):
                if not taken:
                    path.mkdir()
                    break
            number += 1
        run = cls(path)
        run.lock()
        run.write_options(options)
        return run

    def lock(self) -> None:
        """Make this process the only one that writes here, until `close` or its end, however it ends.

        Raises:
            InputError: another process has the lock.
        """
        if self._lock is not None or not self._writes or fcntl is None:
            return
        # The lock is on a file that is always there, and that is never replaced by another one of its name.
        handle = open(self.path / "log.txt", "ab")  # noqa: SIM115
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise InputError(
                f"{self.path} is in use: another process is writing there; wait for its end, or name another --outdir"
            ) from None
        except OSError:  # some network file systems have no locks
            pass
        self._lock = handle
        _locks.add(handle)

    def close(self) -> None:
        """Close the event file, if there is one, and give the lock back."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ------------------------------------------------------------------------------------------------------------------

    def log(self, text: str) -> None:
        """One line on stderr and in `log.txt`."""
        if self._writes:
            print(text, file=sys.stderr, flush=True)
            self._append("log.txt", text)

    def append(self, name: str, record: dict[str, Any]) -> None:
        """One JSON object as one line of `name`; what is not finite becomes null."""
        if self._writes:
            self._append(name, json.dumps(_finite(record), allow_nan=False))

    def scalars(self, record: dict[str, Any], nimg: int) -> None:
        """The same numbers as TensorBoard events at step `nimg`, lists as `name/0`, `name/1`, ..., where tensorboard is
        installed.
        """
        if not self._writes:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        with checkpoint.saving(self.path / "events.out.tfevents"):
            if self._writer is None:
                self._writer = SummaryWriter(str(self.path), purge_step=self._purge_step)
            for key, value in record.items():
                parts = {f"{key}/{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {key: value}
                for name, number in parts.items():
                    self._writer.add_scalar(name, number, global_step=nimg)
            self._writer.flush()

    def write_options(self, options: dict[str, Any]) -> None:
        """Write `training_options.json`."""
        if self._writes:
            with checkpoint.saving(self.path / OPTIONS), misc.open_atomic(self.path / OPTIONS, "w") as file:
                json.dump(options, file, indent=2)
                file.write("\n")

    def rewind(self, nimg: int) -> None:
        """Make the logs end at `nimg` images, -1 for none, and clear away what a killed process left half-written.

        Ticks and measurements after that are dropped, and so is a torn line; training states after that are renamed to
        `*.old`, since a state that is continued past would later be taken for the newest.
        """
        if not self._writes:
            return
        with checkpoint.saving(self.path / "stats.jsonl"):
            for entry in self.path.glob(".*.tmp"):
                entry.unlink(missing_ok=True)
            for state in checkpoint.in_folder(self.path):
                if checkpoint.kimg_of(state) > nimg // 1000:
                    state.rename(state.with_name(state.name + ".old"))
                    self.log(f"{state.name} is not continued from and is now {state.name}.old")
            _filter_lines(self.path / "stats.jsonl", lambda record: round(record["kimg"] * 1000) <= nimg)
            for path in self.path.glob("metric-*.jsonl"):
                _filter_lines(path, lambda record: _measured_at(record) <= nimg)
            log = self.path / "log.txt"
            if log.is_file() and not log.read_bytes().endswith(b"\n"):
                self._append("log.txt", "")
        if any(self.path.glob("events.out.tfevents.*")):
            self._purge_step = nimg + 1

    def newest_state(self) -> Path | None:
        """The training state with the most images, intact or not, or None."""
        return next(iter(checkpoint.in_folder(self.path)), None)

    def _append(self, name: str, line: str) -> None:
        """Add a line by a single write, so that a kill cannot tear it; where the disk is full, add nothing."""
        data = line.encode() + b"\n"
        with checkpoint.saving(self.path / name):
            handle = os.open(self.path / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                size = os.fstat(handle).st_size
                written = os.write(handle, data)
                if written < len(data):
                    os.ftruncate(handle, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(handle)


_locks: weakref.WeakSet = weakref.WeakSet()
"""Lock files of this process: a forked worker closes its copies, for otherwise it would keep the lock alive."""


def _close_locks() -> None:
    for handle in list(_locks):
        handle.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _filter_lines(path: Path, keep: Callable[[dict], bool]) -> None:
    """Drop the lines of a JSONL file that are torn or not wanted."""
    if not path.is_file():
        return
    lines, kept = path.read_bytes().splitlines(keepends=True), []
    for line in lines:
        try:
            if line.endswith(b"\n") and keep(json.loads(line)):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            pass
    if kept != lines:
        with misc.open_atomic(path) as file:
            file.writelines(kept)


def _measured_at(record: dict) -> int:
    """Images (rounded down to thousands) of the snapshot that a line of `metric-*.jsonl` is about."""
    found = re.fullmatch(r"network-snapshot-(\d+)\.pkl", record["snapshot_pkl"] or "")
    return int(found[1]) * 1000 if found else 0
