"""Starts several processes of a test module, each of which runs one of its functions in a process group.

A module that uses this ends with `if __name__ == "__main__": ranks.main(globals())`.
"""

import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from torch_utils import distributed

ROOT = Path(__file__).parents[1]

# Processes are forked from one that has imported what they need: importing takes seconds, most of these run shorter.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["torch._dynamo", "di_refine.commands.pretrain", "di_refine.trainer", "di_refine.runs.loop"]
)


def start(file, function, size, *arguments):
    """Start processes, without torchrun, that run `function(*arguments)` of the module in `file`, arguments as text."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Forked([str(file), function, *map(str, arguments)], {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]


class Forked:
    """A Python program in a process of its own, with as much of `subprocess.Popen` as tests use.

    Args:
        arguments: the file and its arguments.
        variables: of its environment, besides those of this process.
    """

    def __init__(self, arguments, variables):
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        self._process = _SERVER.Process(target=_program, args=(arguments, environment, *map(str, self._files)))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """Wait for the end; return what was written to standard output and error."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return tuple(path.read_text() for path in self._files)


def _program(arguments, environment, out, err):
    """Become the program `arguments`, which writes to the files `out` and `err`."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, path in ((1, out), (2, err)):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, number)
        os.close(target)
    sys.argv = arguments
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()


def torchrun(file, function, size, *arguments):
    """Start torchrun, which starts and watches processes that run `function(*arguments)`."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    return _process([*launch, str(file), function, *map(str, arguments)], {})


def _process(arguments, variables):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(file, function, size, *arguments):
    """Return standard output of the processes, which must all succeed, in the order of their ranks."""
    processes = start(file, function, size, *arguments)
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, outputs):
        assert process.returncode == 0, errors
    return [out for out, _ in outputs]


def say_pid():
    """Print which process has which rank, for `read_pids`."""
    # torchrun starts Python with -u, by which print() would write the line and its end one after the other.
    os.write(1, f"rank {distributed.rank()} has pid {os.getpid()}\n".encode())


def read_pids(process, size):
    """Return the process ids of the ranks that torchrun started; each calls `say_pid` before it prints."""
    pids = {}
    while len(pids) < size:
        words = process.stdout.readline().split()
        if words[:1] != ["rank"]:
            process.terminate()
            raise AssertionError(f"{' '.join(words)!r} instead of a process id: {process.communicate()[1]}")
        pids[int(words[1])] = int(words[4])
    return [pids[rank] for rank in range(size)]


def are_running(pids):
    """Return those of the process ids that still exist."""
    return [pid for pid in pids if _exists(pid)]


def _exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main(functions, timeout=3600):
    """Run the function that the command line names in a process group."""
    torch.set_num_threads(1)
    with distributed.process_group("cpu", timeout):
        functions[sys.argv[1]](*sys.argv[2:])
