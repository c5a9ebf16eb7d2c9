"""Run directories: their names, locks and logs, and which of them a command continues.

To resume a run is to repeat its command: `open_run` finds the directory, or makes a new one.
"""

import contextlib
import json
import math
import os
import re
import shutil
import weakref
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from di_refine import terminal
from di_refine.errors import InputError, RunError
from di_refine.files import pictures
from di_refine.files.run_files import RunFiles, snapshot_kimg, state_kimg
from di_refine.runs import checkpoint
from di_refine.runs.config import RunConfig
from torch_utils import distributed, misc, safe_files
from torch_utils.settings import declared

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_PLACES = frozenset(item.name for item in declared(RunConfig))
"""Settings that say where a run is, not how it goes."""

EVENT_PIXELS = 1024
"""Larger pictures are made smaller for TensorBoard, whose files keep every one."""


class RunDirectory:
    """A numbered folder of results, `00000-<description>`.

    Of several processes only the first writes; for the others everything here does nothing.

    Attributes:
        files: the names of the files in it.
    """

    def __init__(self, path: str | os.PathLike):
        self.files = RunFiles(path)
        self._writes = distributed.is_first()
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._lock: IO[bytes] | None = None
        self._made: list[Path] = []  # this folder and those above it, as far as they are new

    @property
    def path(self) -> Path:
        """The folder."""
        return self.files.path

    @classmethod
    def create(cls, outdir: str | os.PathLike, description: str, options: dict[str, Any]) -> "RunDirectory":
        """Make the next free number under `outdir`, locked, and write `training_options.json` there."""
        outdir = Path(outdir)
        above = [folder for folder in (outdir, *outdir.parents) if not folder.exists()]
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
        run._made = [path, *above]
        run.lock()
        run.write_options(options)
        return run

    def lock(self) -> None:
        """Make this process the only one that writes here, until `close` or its end, however it ends.

        Raises:
            InputError: another process has the lock, or a log is a link or no regular file.
        """
        if self._lock is not None or not self._writes or fcntl is None:
            return
        for path in (self.files.stats, *self.files.metrics()):  # are refused before anything is written, too
            if os.path.lexists(path):
                with checkpoint.saving(path):
                    safe_files.open_append(path).close()
        # The lock is on a file that is always there, and that is never replaced by another one of its name.
        with checkpoint.saving(self.files.log):
            handle = safe_files.open_append(self.files.log)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise InputError(
                f"{self.path} is in use: another process is writing there; wait for its end, or name another `outdir`"
            ) from None
        except OSError:  # some network file systems have no locks
            pass
        self._lock = handle
        _locks.add(handle)

    def discard(self) -> None:
        """Remove the folder, and those above it that were made for it, if it is new: nothing came of this run."""
        self.close()
        for folder in self._made[:1]:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self._made[1:]:
            with contextlib.suppress(OSError):  # somebody else's run is in there by now
                folder.rmdir()
        self._made = []

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
        """Write one line to stderr and to `log.txt`."""
        if self._writes:
            self._append(self.files.log, terminal.say(text))

    def append_stats(self, record: dict[str, Any]) -> None:
        """Write one JSON object as one line of `stats.jsonl`; what is not finite becomes null."""
        if self._writes:
            self._append(self.files.stats, json.dumps(_finite(record), allow_nan=False))

    def stats(self) -> list[dict[str, Any]]:
        """The lines of `stats.jsonl`; what is damaged is left out."""
        found = []
        with contextlib.suppress(OSError), safe_files.open_regular(self.files.stats) as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    found.append(safe_files.parse_json(line))
        return [record for record in found if isinstance(record, dict)]

    def scalars(self, record: dict[str, Any], nimg: int) -> None:
        """Write numbers for TensorBoard, where that is installed.

        Args:
            record: numbers, and lists of them, which become `name/0`, `name/1`, ...
            nimg: images seen, which is TensorBoard's step.
        """
        with self._events(nimg) as writer:
            if writer is None:
                return
            for key, value in record.items():
                parts = {f"{key}/{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {key: value}
                for name, number in parts.items():
                    writer.add_scalar(name, number, global_step=nimg)

    def picture(self, name: str, path: Path, nimg: int) -> None:
        """Write a picture, a PNG that is there already, for TensorBoard, where that is installed.

        Args:
            name: under which TensorBoard shows it.
            path: the PNG.
            nimg: images seen.

        Raises:
            InputError: it is no readable picture.
        """
        with self._events(nimg) as writer:
            if writer:
                picture = pictures.on_paper(pictures.read_png(path)[1])
                picture.thumbnail((EVENT_PIXELS, EVENT_PIXELS))
                writer.add_image(name, np.asarray(picture), global_step=nimg, dataformats="HWC")

    def text(self, name: str, text: str, nimg: int) -> None:
        """Write a text in Markdown for TensorBoard, where that is installed.

        Args:
            name: under which TensorBoard shows it.
            text: what it says.
            nimg: images seen.
        """
        with self._events(nimg) as writer:
            if writer:
                writer.add_text(name, text, global_step=nimg)

    @contextlib.contextmanager
    def _events(self, nimg: int) -> "Iterator[SummaryWriter | None]":
        """What writes for TensorBoard, None without TensorBoard; a file that is new begins with the run's options."""
        try:
            from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import
        except ImportError:
            yield None
            return
        if not self._writes:
            yield None
            return
        with checkpoint.saving(self.files.events):
            if self._writer is None:
                self._writer = SummaryWriter(str(self.path), purge_step=self._purge_step)
                with contextlib.suppress(InputError):  # somebody has damaged the file meanwhile
                    self._writer.add_text("options", _options_table(_read_options(self.path) or {}), global_step=nimg)
            yield self._writer
            self._writer.flush()

    def write_options(self, options: dict[str, Any]) -> None:
        """Write `training_options.json`."""
        self._write_json(self.files.options, options)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write `result.json`, which says that the run has ended; a run that goes on removes it."""
        self._write_json(self.files.result, terminal.without_secrets(result))

    def rewind(self, nimg: int) -> None:
        """Make the logs end at `nimg` images, -1 for none, and clear away what a killed process left half-written.

        Ticks and measurements after that are dropped, and so is a torn line. Training states after that are renamed to
        `*.old`: they belong to a future that is given up, and would later be taken for the newest.
        """
        if not self._writes:
            return
        with checkpoint.saving(self.files.stats):
            for entry in (*self.files.half_written(), self.files.result):
                entry.unlink(missing_ok=True)
            for state in self.files.states():
                if (state_kimg(state.name) or 0) > nimg // 1000:
                    state.rename(state.with_name(state.name + ".old"))
                    self.log(f"{state.name} is not continued from and is now {state.name}.old")
            _filter_lines(self.files.stats, lambda record: round(record["kimg"] * 1000) <= nimg)
            for path in self.files.metrics():
                _filter_lines(path, lambda record: _measured_at(record) <= nimg)
            log = self.files.log
            if log.exists():
                with safe_files.open_regular(log) as file:
                    torn = file.seek(0, os.SEEK_END) > 0 and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n"
                if torn:
                    self._append(log, "")
        if self.files.event_files():
            self._purge_step = nimg + 1

    def newest_state(self) -> Path | None:
        """Return the training state with the most images, intact or not; None where there is none."""
        return next(iter(self.files.states()), None)

    def _write_json(self, path: Path, content: dict[str, Any]) -> None:
        if self._writes:
            with checkpoint.saving(path), misc.open_atomic(path, "w") as file:
                json.dump(content, file, indent=2)
                file.write("\n")

    def _append(self, path: Path, line: str) -> None:
        with checkpoint.saving(path):
            safe_files.write_line(path, line)


def is_running(path: str | os.PathLike) -> bool:
    """Whether a process writes to a run directory now; False where the file system has no locks."""
    with contextlib.suppress(OSError), safe_files.open_regular(RunFiles(path).log) as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


# ----------------------------------------------------------------------------------------------------------------------
# Which run goes on


def find_run_to_resume(path: str | os.PathLike, warn: Callable[[str], None] | None = None) -> tuple[RunDirectory, Path]:
    """Return a run directory and its newest intact training state.

    Args:
        path: the directory, or a training state in it, which then is the one to continue from.
        warn: called with a sentence for each newer state that is damaged; None prints it.

    Raises:
        InputError: the path is neither, or the run has saved no state yet, or none of its states is intact.
    """
    path = Path(path)
    if path.is_dir():
        state = checkpoint.newest_intact(path, warn or _warn)
        if state is None:
            raise InputError(f"resume={path} has no training state; name a run directory that has one")
        return RunDirectory(path), state
    if path.is_file() and state_kimg(path.name) is not None:
        return RunDirectory(path.parent), path
    instead = "; pretrain.py takes a network to start from as --from" if path.suffix in (".pkl", ".safetensors") else ""
    raise InputError(f"resume={path} is neither a run directory nor a training state in one{instead}")


def open_run(
    outdir: str | os.PathLike,
    resume: str | os.PathLike | None,
    description: str,
    options: dict[str, Any],
    may_change: Collection[str],
) -> tuple[RunDirectory, Path | None]:
    """Return the run directory that a command writes to, locked, and the state that it continues from, if any.

    * `outdir` is a run directory itself: that run goes on, from its beginning where it has saved nothing yet;
    * `resume` is 'auto': the newest run under `outdir` with this description and command goes on, if there is one;
    * `resume` is a run directory or a training state: that one goes on;
    * otherwise there is a new directory under `outdir`.

    Settings that changed since are listed in the log, and the new values recorded. All processes call this; the first
    decides.

    Args:
        outdir: as above.
        resume: as above, or None.
        description: the part after the number in a run directory's name.
        options: what `training_options.json` is to say: settings and facts by name, the command's as 'command'.
        may_change: names of those that may differ from what is recorded, see `torch_utils.settings.may_change`.

    Raises:
        InputError: there is nothing to continue at `resume`, another process is writing there, or something differs
            that may not.
    """
    run, options = None, terminal.without_secrets(options)

    def decide() -> tuple[Path, Path | None]:
        nonlocal run
        warnings: list[str] = []
        path, state, changes = _found(outdir, resume, description, options, may_change, warnings.append)
        if path is None:
            run = RunDirectory.create(outdir, description, options)
            return run.path, None
        recorded = _read_options(path) or {}
        run = RunDirectory(path)
        run.lock()
        for warning in warnings:
            run.log(f"warning: {warning}")
        before, now = changes.pop("sources", ({}, {}))
        listed = {name: new for name, (_, new) in changes.items() if name not in _PLACES}
        for name, new in listed.items():
            run.log(f"{name}: {json.dumps(changes[name][0])} -> {json.dumps(new)}")
        if listed and now:  # what has not changed still comes from where it came from
            kept = {name: source for name, source in before.items() if name not in listed}
            listed["sources"] = {**kept, **{name: now[name] for name in listed if name in now}}
        if listed or not recorded:
            run.write_options({**(recorded or options), **listed})
        return path, state

    path, state = _on_first(decide)
    return run or RunDirectory(path), state


def check_run(
    outdir: str | os.PathLike,
    resume: str | os.PathLike | None,
    description: str,
    options: dict[str, Any],
    may_change: Collection[str],
) -> tuple[RunDirectory, Path] | None:
    """Refuse what `open_run` would, and write nothing.

    Returns:
        The run directory and the state that it would continue from; None where it would begin anew.
    """
    path, state, _ = _found(outdir, resume, description, terminal.without_secrets(options), may_change, _warn)
    if path is None:
        return None
    run = RunDirectory(path)
    if os.path.lexists(run.files.log):
        run.lock()
        run.close()
    return None if state is None else (run, state)


def _found(
    outdir: str | os.PathLike,
    resume: str | os.PathLike | None,
    description: str,
    options: dict[str, Any],
    may_change: Collection[str],
    warn: Callable[[str], None],
) -> tuple[Path | None, Path | None, dict[str, tuple[Any, Any]]]:
    """Return the run directory to go on with and its state, None where there is none, and the settings that differ.

    Raises:
        InputError: as `open_run`.
    """
    path, state = _existing(Path(outdir), resume, description, options, warn)
    changes = {} if path is None else _changes(_read_options(path) or {}, options, may_change, path)
    return path, state, changes


def _on_first(function: Callable[[], Any]) -> Any:
    """Return what a function returns on the first process, on all of them, or raise there what it raises."""
    value, failure = None, None
    if distributed.is_first():
        try:
            value = function()
        except (InputError, RunError, OSError) as error:
            if distributed.world_size() == 1:
                raise
            failure = error
    value, failure = distributed.broadcast_object((value, failure))
    if failure is not None:
        raise failure
    return value


def _existing(
    outdir: Path, resume: str | os.PathLike | None, description: str, options: dict, warn: Callable[[str], None]
) -> tuple[Path | None, Path | None]:
    """Return the run directory to go on with and its state, each None where there is none."""
    if resume and str(resume) != "auto":
        run, state = find_run_to_resume(resume, warn)
        return run.path, state
    path = _that_goes_on(outdir, resume, description, options.get("command"))
    return path, checkpoint.newest_intact(path, warn) if path else None


def recorded_options(
    outdir: str | os.PathLike, resume: str | os.PathLike | None, description: str, command: str
) -> dict[str, Any]:
    """Return what the run that `open_run` would continue has recorded; nothing where it would begin anew.

    Raises:
        InputError: as `find_run_to_resume`.
    """
    if resume and str(resume) != "auto":
        path: Path | None = find_run_to_resume(resume, lambda _: None)[0].path
    else:
        path = _that_goes_on(Path(outdir), resume, description, command)
    return (path and _read_options(path)) or {}


def _that_goes_on(outdir: Path, resume: str | os.PathLike | None, description: str, command: str | None) -> Path | None:
    """Return `outdir` where it is a run directory, else the newest of its runs where `resume` asks for that."""
    path = None
    if RunFiles(outdir).options.is_file():
        path = outdir
    elif resume and outdir.is_dir():
        fitting = [
            entry
            for entry in outdir.iterdir()
            if re.fullmatch(r"\d{5}-" + re.escape(description), entry.name)
            and (recorded := _read_options(entry)) is not None
            and recorded.get("command") == command
        ]
        path = max(fitting, default=None)
    return path


def _read_options(path: Path) -> dict[str, Any] | None:
    file = RunFiles(path).options
    try:
        recorded = safe_files.read_json(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{file} cannot be read ({reason})") from None
    if not isinstance(recorded, dict):
        return None
    for name, kinds in {"sources": (dict,), "minutes": (int, float), "kimg": (int, float)}.items():
        if recorded.get(name) is not None and not isinstance(recorded[name], kinds):
            raise InputError(f"{file} is damaged: its {name} is none; restore it, or name another `outdir`")
    return recorded


def _changes(recorded: dict, options: dict, may_change: Collection[str], path: Path) -> dict[str, tuple[Any, Any]]:
    """Return name -> (value then, value now) of what differs; what only one side knows does not count.

    Raises:
        InputError: something differs that may not.
    """
    now = json.loads(json.dumps(options))
    changes = {
        name: (recorded[name], value) for name, value in now.items() if name in recorded and recorded[name] != value
    }
    if "command" in changes:
        then, command = changes["command"]
        raise InputError(f"{path} is a run of {then!r} and cannot be continued by {command!r}; name another `outdir`")
    for name, (old, new) in changes.items():
        if name not in may_change:
            raise InputError(
                f"{path} was started {_with(name, old)} and cannot be continued {_with(name, new)}; give the old value "
                "to continue that run, or start a new one"
            )
    return changes


def _with(name: str, value: Any) -> str:
    """Return 'with name=value', or how a sentence says that a setting has no value."""
    if value is None:
        return f"without `{name}`"
    return f"with {name}={value if isinstance(value, str) else json.dumps(value)}"


def _warn(text: str) -> None:
    terminal.say(f"warning: {text}")


# ----------------------------------------------------------------------------------------------------------------------
# Locks and lines

_locks: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()
"""The lock files of this process. A forked worker closes its copies, for otherwise it would keep the lock alive."""


def _close_locks() -> None:
    for handle in list(_locks):
        handle.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)


def _options_table(options: dict[str, Any]) -> str:
    """A run's options and where each comes from, as a table in Markdown."""
    sources = options.get("sources", {})
    shown = {name: json.dumps(value) for name, value in options.items() if name != "sources" and value is not None}
    rows = []
    for name, value in shown.items():
        escaped = value.replace("|", "\\|").replace("`", "'")
        rows.append(f"| {name} | `{escaped}` | {sources.get(name, '')} |")
    return "\n".join(["| option | value | from |", "|---|---|---|", *rows])


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _filter_lines(path: Path, keep: Callable[[dict], bool]) -> None:
    """Drop the lines of a JSONL file that are torn or not wanted."""
    if not path.exists():
        return
    with safe_files.open_regular(path) as file:
        lines, kept = file.read().splitlines(keepends=True), []
    for line in lines:
        try:
            if line.endswith(b"\n") and keep(safe_files.parse_json(line)):
                kept.append(line)
        except (ValueError, KeyError, TypeError, OverflowError):
            pass
    if kept != lines:
        with misc.open_atomic(path) as file:
            file.writelines(kept)


def _measured_at(record: dict) -> int:
    """Return the images, rounded down to thousands, of the snapshot that a line of a metric's file is about."""
    return (snapshot_kimg(record["snapshot_pkl"] or "") or 0) * 1000
