"""What every command shares: errors as one sentence, option types, devices, progress on stderr, results on stdout.

A command is declared with `@command()` instead of `@click.command()`; nothing else is needed for its error handling:

    @cli.command()
    @click.option("--batch", type=cli.Integer(1), default=64, help="Images per step.")
    def main(batch):
        ...
        terminal.print_result({"batch": batch})

Exit status: 0 done, 1 failed while running, 2 the user can mend it (options, files), 130 interrupted. Any other
exception is a bug of ours and keeps its traceback.
"""

import errno
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from di_refine.errors import InputError, RunError
from torch_utils import custom_ops, distributed

CONTEXT = {"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]}

MAX_LIST = 10_000_000  # a mistyped range such as 0-99999999999 must not eat the memory


# ----------------------------------------------------------------------------------------------------------------------
# Errors


class _OneSentence:
    """Mixed into a click command: its failures are one sentence on stderr and an exit status."""

    def main(self, args=None, prog_name=None, complete_var=None, standalone_mode=True, **extra):
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except (Exception, KeyboardInterrupt) as error:
            failure = describe(error)
            if failure is None:
                raise
            status, sentence = failure
            click.echo(sentence, err=True)
            sys.exit(status)
        sys.exit(result if isinstance(result, int) else 0)  # click returns the status of `--help` and `ctx.exit()`


class Command(_OneSentence, click.Command):
    """A command with this project's error handling."""


class Group(_OneSentence, click.Group):
    """A command of sub-commands, with this project's error handling."""


def command(**attributes) -> Callable[[Callable], Command]:
    """`click.command` with this project's error handling and help settings."""
    return click.command(cls=Command, **{"context_settings": CONTEXT, **attributes})


def group(**attributes) -> Callable[[Callable], Group]:
    """`click.group` with the same error handling and help settings; sub-commands are added with `@name.command()`."""
    return click.group(cls=Group, **{"context_settings": CONTEXT, **attributes})


def describe(error: BaseException) -> tuple[int, str] | None:
    """Exit status and sentence for an exception, or None where it is a bug that should show its traceback."""
    persistence = sys.modules.get("torch_utils.persistence")  # whoever raised its error has imported it
    format_error = getattr(persistence, "NetworkFormatError", InputError)
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return 130, "interrupted"
    if isinstance(error, click.UsageError):
        return 2, f"error: {_one_line(error.format_message()).rstrip('.')} (--help lists the options)"
    if isinstance(error, click.ClickException):
        return error.exit_code, f"error: {_one_line(error.format_message())}"
    if isinstance(error, (InputError, format_error, distributed.DistributedError)):
        return 2, f"error: {_one_line(error)}"
    if isinstance(error, (RunError, custom_ops.OpsUnavailable)):
        return 1, f"error: {_one_line(error)}"
    if isinstance(error, torch.OutOfMemoryError):
        return 1, "error: out of GPU memory; use a smaller batch per GPU"
    if isinstance(error, OSError):
        return 1, f"error: {_one_line(_os_sentence(error))}"
    return None


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _os_sentence(error: OSError) -> str:
    if error.strerror is None:
        return str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    advice = "; free some space or choose another folder" if error.errno == errno.ENOSPC else ""
    return f"{where}{error.strerror}{advice}"


# ----------------------------------------------------------------------------------------------------------------------
# Option types


def option_name(param: click.Parameter | None) -> str:
    """The spelling a user knows, '--batch-gpu', for messages."""
    if param is None:
        return "the value"
    return param.opts[0] if param.opts and param.opts[0].startswith("-") else (param.name or "the value")


class _Typed(click.ParamType):
    """Converts text, and says `--option must be ..., not 'text'` where it cannot."""

    wanted = ""

    def parse(self, text: str) -> Any:
        raise NotImplementedError

    def convert(self, value, param, ctx):
        try:
            return self.parse(str(value)) if isinstance(value, (str, int, float)) else value
        except ValueError:
            raise click.UsageError(f"{option_name(param)} must be {self.wanted}, not {str(value)!r}", ctx) from None


class Integer(_Typed):
    """A whole number, `minimum` to `maximum` inclusive."""

    name = "integer"

    def __init__(self, minimum: int | None = None, maximum: int | None = None):
        self.minimum, self.maximum = minimum, maximum
        self.wanted = "a whole number" + _bounds(minimum, maximum)

    def parse(self, text: str) -> int:
        return _in_bounds(int(text), self.minimum, self.maximum)


class Number(_Typed):
    """A finite number, `minimum` to `maximum` inclusive, or strictly greater than `above`."""

    name = "number"

    def __init__(self, minimum: float | None = None, maximum: float | None = None, above: float | None = None):
        self.minimum, self.maximum, self.above = minimum, maximum, above
        self.wanted = "a number" + _bounds(minimum, maximum, above)

    def parse(self, text: str) -> float:
        number = float(text)
        if not math.isfinite(number) or (self.above is not None and number <= self.above):
            raise ValueError
        return _in_bounds(number, self.minimum, self.maximum)


class IntegerList(_Typed):
    """Non-negative integers and ranges: '0-63', '1,5,8-10'."""

    name = "list"
    wanted = "a list of numbers and ascending ranges such as 0-63 or 1,5,8-10"

    def parse(self, text: str) -> list[int]:
        return parse_list(text)


def parse_list(text: str) -> list[int]:
    """'1,5,8-10' -> [1, 5, 8, 9, 10], in the order given.

    Raises:
        ValueError: for anything else, a descending range, or more than ten million numbers.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise ValueError(text)
        start, stop = int(first), int(last or first) + 1
        if stop <= start or stop - start + len(numbers) > MAX_LIST:
            raise ValueError(text)
        numbers += range(start, stop)
    return numbers


def _bounds(minimum, maximum, above=None) -> str:
    words = [f"greater than {above:g}"] if above is not None else []
    words += [f"at least {minimum:g}"] if minimum is not None else []
    words += [f"at most {maximum:g}"] if maximum is not None else []
    return f" ({' and '.join(words)})" if words else ""


def _in_bounds(number, minimum, maximum):
    if (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
        raise ValueError
    return number


POSITIVE_INT = Integer(minimum=1)
NON_NEGATIVE_INT = Integer(minimum=0)
POSITIVE_NUMBER = Number(above=0)
NON_NEGATIVE_NUMBER = Number(minimum=0)
INT_LIST = IntegerList()


# ----------------------------------------------------------------------------------------------------------------------
# Devices and places to write

device_option = click.option(
    "--device",
    default="auto",
    metavar="auto|cpu|mps|cuda[:N]",
    help="Where to compute; auto is cuda, else mps, else cpu.",
)


def _set_ops(_context, _param, value: str) -> None:
    custom_ops.set_mode(value)


ops_option = click.option(
    "--ops",
    type=click.Choice(custom_ops.MODES),
    default="auto",
    envvar="DI_REFINE_OPS",
    show_envvar=True,
    expose_value=False,
    callback=_set_ops,
    help="Form of upfirdn2d and bias_act: compiled where possible, compiled on CUDA or fail, PyTorch's own.",
)


def pick_device(name: str | None = "auto") -> torch.device:
    """The device a user asked for; under torchrun, 'auto' and 'cuda' are the GPU of this process.

    Raises:
        InputError: naming --device, when it is not known or not there.
    """
    name = name or "auto"
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device must be auto, cpu, mps, cuda or cuda:N, not {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device={name}: this PyTorch ({torch.__version__}) sees no CUDA GPU; use --device=cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device={device}: this machine has {torch.cuda.device_count()} GPU(s), counted from 0")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device=mps: this machine has no Metal GPU; use --device=cpu")
    elif device.type not in ("cpu", "mps"):
        raise InputError(f"--device must be auto, cpu, mps, cuda or cuda:N, not {name!r}")
    return device


def check_outdir(path: str | os.PathLike, option: str = "--outdir") -> Path:
    """Check, leaving nothing behind, that a folder can be written to or created.

    Raises:
        InputError: naming the option, when the path is a file or writing there is refused.
    """
    path = Path(path)
    existing = path
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"{option}={path}: {existing} is not a folder; choose another place")
    try:
        with tempfile.TemporaryFile(dir=existing):  # os.access is wrong for root and for network file systems
            pass
    except OSError as error:
        raise InputError(
            f"{option}={path}: cannot write to {existing} ({error.strerror}); choose another place"
        ) from None
    return path


def check_outfile(path: str | os.PathLike, option: str, overwrite: bool = True) -> Path:
    """Check that a file can be written (its folder may have to be created), before any work is spent on its content.

    Raises:
        InputError: naming the option, when the path is a folder, its folder cannot be written to, or the file exists
            and `overwrite` is off.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{option}={path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise InputError(f"{option}={path} exists already; choose another name or give --overwrite")
    check_outdir(path.parent, option)
    return path
