"""How every command starts: an interrupt is one line from the first moment on, also while modules are imported.

Only the standard library's smallest modules are imported here; what a command needs comes once the handler is there.
"""

import contextlib
import ctypes
import functools
import importlib
import os
import signal
from types import FrameType

INTERRUPTED = 130  # exit status
SPIN_COUNT = "1000"  # see `set_runtime`; the runtime's own is 300000
KEPT_BYTES = 2**30
LARGEST_KEPT = 2**28
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)


def run(command: str, args: list[str] | None = None, prog_name: str | None = None) -> None:
    """Import a command of `di_refine.commands` and run it; this does not return.

    Args:
        command: its module.
        args: of the command; None takes those of the process.
        prog_name: how it is called in messages; None takes the name of the program.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, _interrupt)
    set_runtime()
    try:
        importlib.import_module(f"di_refine.commands.{command}").main(args=args, prog_name=prog_name)
    except KeyboardInterrupt:
        _end()


def set_runtime() -> None:
    """Set what the libraries under PyTorch read when they load; the user's own environment variables win.

    OpenMP's threads wait for work by spinning. While another process needs their core, the thread that has work waits
    for one that spins: with as many busy processes as cores, training falls to a fifteenth. Threads that soon go to
    sleep cost next to nothing on an idle machine (`benchmarks/threads.py`).

    glibc gives large blocks of memory back to the system at once, and the system clears them page by page when they are
    asked for again. Kept for the next step they save a sixth of an update (`benchmarks/update.py --plain` is without).
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    if not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ):
        with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
            mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


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
