"""Resume is the same command: which run directory a command continues, and with which other options it may."""

import json
import os
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from di_refine.errors import InputError, RunError
from di_refine.runs import checkpoint
from di_refine.runs.directory import OPTIONS, RunDirectory
from torch_utils import distributed

MAY_CHANGE = frozenset(
    [
        "kimg",
        "tick",
        "snap",
        "keep",
        "max_minutes",
        "stop_if_worse",
        "metrics",
        "final_metrics",
        "ref",
        "detector",
        "teacher_steps",
        "device",
        "workers",
        "batch_gpu",
        "compile",
        "lr",
        "score_lr",
        "ratio_lr",
        "max_grad_norm",
        "outdir",
        "desc",
        "resume",
        "network_file",
        "teacher_files",
        "data_file",
        "sources",
        "torch",
        "gpus",
    ]
)
"""Options that a run may be continued with other values of. A change of the others would make it another run."""

_UNLISTED = {"outdir", "desc", "resume"}  # they say where a run is, not how it goes


def find_run_to_resume(path: str | os.PathLike, warn: Callable[[str], None] | None = None) -> tuple[RunDirectory, Path]:
    """The run directory and its newest intact training state, from a run directory or a state file.

    Args:
        path: either.
        warn: called with a sentence for each newer state that is damaged; None prints it.

    Raises:
        InputError: neither, or a run that has saved nothing yet, or nothing that is intact.
    """
    path = Path(path)
    if path.is_dir():
        state = checkpoint.newest_intact(path, warn or _warn)
        if state is None:
            raise InputError(f"--resume={path}: no training-state-*.pt there; name a run directory that has one")
        return RunDirectory(path), state
    if path.is_file() and checkpoint.PATTERN.fullmatch(path.name):
        return RunDirectory(path.parent), path
    raise InputError(f"--resume={path}: not a run directory and not a training-state-*.pt file")


def open_run(
    outdir: str | os.PathLike,
    resume: str | os.PathLike | None,
    description: str,
    options: dict[str, Any],
    may_change: Collection[str] = MAY_CHANGE,
) -> tuple[RunDirectory, Path | None]:
    """The run directory that a command writes to, locked, and the state that it continues from.

    * `outdir` is a run directory itself: that run goes on, from its beginning where it has saved nothing yet;
    * `resume` is 'auto': the newest run under `outdir` with this description and command goes on, if there is one;
    * `resume` is a run directory or a training state: that one goes on;
    * otherwise there is a new directory under `outdir`.

    Options that changed since are listed, and the new ones recorded. Call this on all processes; one decides.

    Args:
        outdir: as above.
        resume: as above, or None.
        description: the part after the number in a run directory's name.
        options: what `training_options.json` is to say, with the command's name as 'command'.
        may_change: names of options that may differ from those recorded.

    Raises:
        InputError: there is nothing to continue at `resume`, another process is writing there, or an option differs
            that may not.
    """
    run = None

    def decide() -> tuple[Path, Path | None]:
        nonlocal run
        warnings: list[str] = []
        path, state = _existing(Path(outdir), resume, description, options, warnings.append)
        if path is None:
            run = RunDirectory.create(outdir, description, options)
            return run.path, None
        recorded = _read_options(path) or {}
        changes = _changes(recorded, options, may_change, path)
        run = RunDirectory(path)
        run.lock()
        for warning in warnings:
            run.log(f"warning: {warning}")
        for name, (old, new) in changes.items():
            if name not in _UNLISTED:
                run.log(f"{name}: {json.dumps(old)} -> {json.dumps(new)}")
        listed = {name: new for name, (_, new) in changes.items() if name not in _UNLISTED}
        if listed or not recorded:
            run.write_options({**(recorded or options), **listed})
        return path, state

    path, state = on_first(decide)
    return run or RunDirectory(path), state


def on_first(function: Callable[[], Any]) -> Any:
    """What a function returns, or the error it raises, on the first process, for all of them."""
    outcome = None
    if distributed.is_first():
        try:
            outcome = (function(), None)
        except (InputError, RunError, OSError) as error:
            if distributed.world_size() == 1:
                raise
            outcome = (None, error)
    value, error = distributed.broadcast_object(outcome)
    if error is not None:
        raise error
    return value


def _existing(
    outdir: Path, resume: str | os.PathLike | None, description: str, options: dict, warn: Callable[[str], None]
) -> tuple[Path | None, Path | None]:
    """The run directory to go on with and its state, either of them None where there is none."""
    if resume and str(resume) != "auto":
        run, state = find_run_to_resume(resume, warn)
        return run.path, state
    path = None
    if (outdir / OPTIONS).is_file():
        path = outdir
    elif resume and outdir.is_dir():
        fitting = [
            entry
            for entry in outdir.iterdir()
            if re.fullmatch(r"\d{5}-" + re.escape(description), entry.name)
            and (recorded := _read_options(entry)) is not None
            and recorded.get("command") == options.get("command")
        ]
        path = max(fitting, default=None)
    return path, checkpoint.newest_intact(path, warn) if path else None


def _read_options(path: Path) -> dict[str, Any] | None:
    try:
        recorded = json.loads((path / OPTIONS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path / OPTIONS} cannot be read ({error})") from None
    return recorded if isinstance(recorded, dict) else None


def _changes(recorded: dict, options: dict, may_change: Collection[str], path: Path) -> dict[str, tuple[Any, Any]]:
    """Name -> (value then, value now) of the options that differ; those that only one side knows do not count.

    Raises:
        InputError: one that may not.
    """
    now = json.loads(json.dumps(options))
    changes = {
        name: (recorded[name], value) for name, value in now.items() if name in recorded and recorded[name] != value
    }
    if "command" in changes:
        then, command = changes["command"]
        raise InputError(f"{path} is a run of {then!r} and cannot be continued by {command!r}; name another --outdir")
    for name, (old, new) in changes.items():
        if name not in may_change:
            option = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{option} was {json.dumps(old)} when {path} was started and is {json.dumps(new)} now; give the old "
                "value to continue that run, or start a new one"
            )
    return changes


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
