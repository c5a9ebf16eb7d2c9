"""A command of this repository with something done to it: `python tests/soak/child.py FAULTS COMMAND.py [option ...]`.

FAULTS is a JSON object; all of its members may be left out:

    progress    file that always holds the images seen, as 8 bytes, also after a kill
    kill_at     images after which the process kills itself (SIGKILL)
    file_limit  bytes that a file can have from `limit_at` images on; acts like a full disk
    limit_at    images, 0 by default
    clock       [images, seconds]: the system's clock jumps then
    missing     names of modules that cannot be imported
    mortal      true: even if run by root, the rights of files and folders count
"""

import ctypes
import json
import mmap
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def give_up_roots_rights() -> None:
    """Drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root ignores the rights of files (capset(2), Linux)."""
    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    data[0] &= ~0b110
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


class Faults:
    """Wraps the trainer's step of every loop."""

    def __init__(self, faults: dict):
        self.faults = faults
        self.memory = None
        if "progress" in faults:
            Path(faults["progress"]).write_bytes(bytes(8))
            with open(faults["progress"], "r+b") as file:
                self.memory = mmap.mmap(file.fileno(), 8)

    def install(self) -> None:
        from di_refine.runs.loop import Loop

        call = Loop.__call__

        def wrapped(loop):
            step = loop.trainer.step

            def with_faults():
                report = step()
                self.after_step(loop.trainer.nimg)
                return report

            loop.trainer.step = with_faults
            call(loop)

        Loop.__call__ = wrapped

    def after_step(self, nimg: int) -> None:
        faults = self.faults
        if self.memory is not None:
            self.memory[:] = nimg.to_bytes(8, "little")
        if nimg >= faults.get("kill_at", nimg + 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if "file_limit" in faults and nimg >= faults.get("limit_at", 0):
            resource.setrlimit(resource.RLIMIT_FSIZE, (faults["file_limit"], resource.RLIM_INFINITY))
        if "clock" in faults and nimg >= faults["clock"][0]:
            jump, real = faults.pop("clock")[1], time.time
            time.time = lambda: real() + jump


def main() -> None:
    faults = json.loads(sys.argv[1])
    sys.path.insert(0, str(ROOT))
    for name in faults.get("missing", ()):
        sys.modules[name] = None
    if faults.get("mortal"):
        give_up_roots_rights()
    import torch

    torch.set_num_threads(1)
    Faults(faults).install()
    sys.argv = sys.argv[2:]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    main()
