"""What every command shares: errors as one sentence, grouped help, devices, and places to write to.

A command is declared with `@command()` instead of `@click.command()`; nothing else is needed for its error handling:

    @cli.command()
    @click.option("--batch", type=cli.POSITIVE_INT, default=64, help="Draw this many images at once.")
    def main(batch):
        ...
        terminal.print_result({"batch": batch})

Exit status: 0 done, 1 failed while running, 2 the user can mend it (options, files), 130 interrupted. Any other
exception is a bug of ours and keeps its traceback.

Below the commands, settings are written as `name=value` or in backquotes, in messages as in help texts. What is shown
here has the spelling of the options: `batch_gpu=3` becomes --batch-gpu=3. PyTorch is imported only inside functions, so
that `--help` is quick.
"""

from __future__ import annotations

import errno
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from di_refine import terminal
from di_refine.commands import aliases
from di_refine.errors import InputError, RunError
from torch_utils.settings import GROUPS, SettingError

if TYPE_CHECKING:
    import torch

CONTEXT = {"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]}

MAX_LIST = 10_000_000  # a mistyped range such as 0-99999999999 must not eat the memory

MAX_SENTENCE = 4000  # characters of a message: names and texts from files may be in it

OPS = ("auto", "cuda", "native")  # of torch_utils.custom_ops.MODES, which imports PyTorch


# ----------------------------------------------------------------------------------------------------------------------
# Commands


class Option(click.Option):
    """An option that `--help` shows under a heading.

    Args:
        group: the heading, one of `torch_utils.settings.GROUPS`.
        arguments: as for `click.Option`.
    """

    def __init__(self, *arguments, group: str = "Options", **settings):
        super().__init__(*arguments, **settings)
        self.group = group


class _OneSentence(click.Command):
    """Mixed into a click command: its failures are one sentence on stderr and an exit status, its help has groups."""

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
            terminal.say(spell(sentence, self))
            sys.exit(status)
        sys.exit(result if isinstance(result, int) else 0)  # click returns the status of `--help` and `ctx.exit()`

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):  # the usage line shows arguments
                groups.setdefault(getattr(param, "group", "Options"), []).append((record[0], spell(record[1], self)))
        for name in sorted(groups, key=lambda group: (*GROUPS, group).index(group)):
            with formatter.section(name):
                formatter.write_dl(groups[name])


class Command(_OneSentence):
    """A command with this project's error handling and help, which takes the spellings in `aliases`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = [param for param in self.params if isinstance(param, click.Option)]
        options = {name for param in own for name in (*param.opts, *param.secondary_opts)} | {"--help"}
        flags = {name for param in own if param.is_flag for name in param.opts}
        return super().parse_args(ctx, aliases.ours(args, options, flags))


class Group(_OneSentence, click.Group):
    """A command of sub-commands, with this project's error handling."""

    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        click.Group.format_options(self, ctx, formatter)


def command(**attributes) -> Callable[[Callable], Command]:
    """`click.command` with this project's error handling and help settings."""
    return click.command(cls=Command, **{"context_settings": CONTEXT, **attributes})


def group(**attributes) -> Callable[[Callable], Group]:
    """`click.group` with the same error handling and help settings; sub-commands are added with `@name.command()`."""
    return click.group(cls=Group, **{"context_settings": CONTEXT, **attributes})


def spell(text: str, of: click.Command) -> str:
    """A text with the settings in it spelled as the options of a command, or of its sub-commands."""
    commands = [of, *(of.commands.values() if isinstance(of, click.Group) else [])]
    flags = {
        param.name: next((name for name in param.opts if name.startswith("--")), param.opts[0])
        for each in commands
        for param in each.params
        if isinstance(param, click.Option)
    }

    def flag(found: re.Match[str]) -> str:
        name, value = found["name"] or found["bare"], found["value"] or found["bare_value"] or ""
        return flags[name] + value if name in flags else found[0].replace("`", "")

    names = r"(?<![\w./-])(?P<bare>[a-z][a-z0-9_]*)(?P<bare_value>=)"
    return re.sub(rf"`(?P<name>[a-z][a-z0-9_]*)(?P<value>=[^`]*)?`|{names}", flag, text)


def describe(error: BaseException) -> tuple[int, str] | None:
    """Exit status and sentence for an exception, or None where it is a bug that should show its traceback."""
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return 130, "interrupted"
    if isinstance(error, click.UsageError):
        return 2, f"error: {_one_line(error.format_message()).rstrip('.')} (--help lists the options)"
    if isinstance(error, click.ClickException):
        return error.exit_code, f"error: {_one_line(error.format_message())}"
    # Whoever raised one of the others has imported its module.
    if isinstance(error, (InputError, SettingError, *_known("persistence.NetworkFormatError"))):
        return 2, f"error: {_one_line(error)}"
    if isinstance(error, _known("distributed.DistributedError")):
        return 2, f"error: {_one_line(error)}"
    if isinstance(error, (RunError, *_known("custom_ops.OpsUnavailable", "training.NotFiniteError"))):
        return 1, f"error: {_one_line(error)}"
    if "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError):
        return 1, "error: out of GPU memory; use a smaller batch per GPU"
    if isinstance(error, OSError):
        return 2 if error.errno == errno.ENAMETOOLONG else 1, f"error: {_one_line(_os_sentence(error))}"
    return None


def _known(*names: str) -> tuple[type[BaseException], ...]:
    """The exceptions of `torch_utils` by name, as far as their modules are imported."""
    found = []
    for name in names:
        module, _, attribute = name.partition(".")
        if f"torch_utils.{module}" in sys.modules:
            found.append(getattr(sys.modules[f"torch_utils.{module}"], attribute))
    return tuple(found)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:MAX_SENTENCE]


def _os_sentence(error: OSError) -> str:
    if error.strerror is None:
        return str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    advice = "; free some space or choose another folder" if error.errno == errno.ENOSPC else ""
    return f"{where}{error.strerror}{advice}"


# ----------------------------------------------------------------------------------------------------------------------
# Types of options


class _Finite(click.ParamType):
    """Mixed into a click type of floating-point numbers: NaN and infinity are refused."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class _FiniteNumber(_Finite, click.types.FloatParamType):
    pass


class _FiniteRange(_Finite, click.FloatRange):
    pass


def Number(minimum: float | None = None, maximum: float | None = None, above: float | None = None) -> click.ParamType:
    """The type of a finite number.

    Args:
        minimum, maximum: the number lies between them, ends included.
        above: the number is larger than this.
    """
    if minimum is maximum is above is None:
        return _FiniteNumber()
    return _FiniteRange(minimum if above is None else above, maximum, min_open=above is not None)


class Integer(click.IntRange):
    """A whole number, `minimum` to `maximum` inclusive."""

    name = "integer"

    def __init__(self, minimum: int | None = None, maximum: int | None = None):
        super().__init__(minimum, maximum)


class WordOr(click.ParamType):
    """One of some words, or what another type takes.

    Args:
        words: such as 'auto'.
        other: the type of everything else.
    """

    def __init__(self, words: tuple[str, ...], other: click.ParamType):
        self.words, self.other = words, other
        self.name = "|".join([*words, other.name])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.words:
            return value
        try:
            return self.other.convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(f"{error.message.rstrip('.')}, nor is it {' or '.join(self.words)}.", param, ctx)


class IntegerList(click.ParamType):
    """Non-negative integers and ascending ranges: '0-63', '1,5,8-10'."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            return parse_list(value) if isinstance(value, str) else value
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers and ascending ranges such as 0-63 or 1,5,8-10.", param, ctx)


class NumberList(click.ParamType):
    """Finite numbers: '0,0.5,-1'."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        return [Number().convert(part, param, ctx) for part in value.split(",")] if isinstance(value, str) else value


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


POSITIVE_INT = Integer(minimum=1)
NON_NEGATIVE_INT = Integer(minimum=0)
POSITIVE_NUMBER = Number(above=0)
NON_NEGATIVE_NUMBER = Number(minimum=0)
INT_LIST = IntegerList()
NUMBER_LIST = NumberList()


# ----------------------------------------------------------------------------------------------------------------------
# Devices and places to write

class_option = click.option(
    "--class",
    "label",
    cls=Option,
    group="What",
    metavar="NUMBER|NAME",
    help="Draw images of this class alone, by number or name.",
)

dry_run_option = click.option(
    "--dry-run", is_flag=True, cls=Option, group="What", help="Check everything, print the options, stop."
)

device_option = click.option(
    "--device",
    cls=Option,
    group="Machine",
    default="auto",
    metavar="auto|cpu|mps|cuda[:N]",
    help="Compute here; auto takes cuda, else mps, else the CPU.",
)


def _set_ops(_context, _param, value: str) -> None:
    if value != "auto":
        from torch_utils import custom_ops

        custom_ops.set_mode(value)


ops_option = click.option(
    "--ops",
    cls=Option,
    group="Machine",
    type=click.Choice(OPS),
    default="auto",
    envvar="DI_REFINE_OPS",
    show_envvar=True,
    expose_value=False,
    callback=_set_ops,
    help="Compile upfirdn2d and bias_act where that is possible (auto), insist on it (cuda), or use PyTorch's own "
    "operators (native).",
)


def pick_device(name: str | None = "auto") -> torch.device:
    """The device a user asked for; under torchrun, 'auto' and 'cuda' are the GPU of this process.

    Raises:
        InputError: naming --device, when it is not known or not there.
    """
    import torch

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
        InputError: naming the option, when the path is a file, its name is not UTF-8, or writing there is refused.
    """
    path = Path(path)
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # TensorBoard, safetensors and readers of our JSON take no other names
        raise InputError(f"{option}={path}: its name is not UTF-8; choose another place") from None
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
