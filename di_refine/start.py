"""How every command starts: an interrupt is one line from the first moment on, also while modules are imported.

Only the standard library's smallest modules are imported here; what a command needs comes once the handler is there.
"""

import functools
import importlib
import os
import signal
from types import FrameType

INTERRUPTED = 130  # exit status


def run(command: str, args: list[str] | None = None, prog_name: str | None = None) -> None:
    """Import a command of `di_refine.commands` and run it; this does not return.

    Args:
        command: its module.
        args: of the command; None takes those of the process.
        prog_name: how it is called in messages; None takes the name of the program.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, _interrupt)
    try:
        importlib.import_module(f"di_refine.commands.{command}").main(args=args, prog_name=prog_name)
    except KeyboardInterrupt:
        _end()


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; during an import end the process at once.

    Compiled modules that are being imported turn the exception into others, or print it and go on.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end()
        frame = frame.f_back
    raise KeyboardInterrupt


def _end() -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


# What the installed programs call.
refine = functools.partial(run, "refine")
distill = functools.partial(run, "distill")
pretrain = functools.partial(run, "pretrain")
generate = functools.partial(run, "generate")
dataset_tool = functools.partial(run, "dataset_tool")
calc_metrics = functools.partial(run, "calc_metrics")
