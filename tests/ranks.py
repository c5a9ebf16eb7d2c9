"""Starting several processes of a test module without torchrun: each runs one of its functions in a process group.

A module that uses `start` ends with `if __name__ == "__main__": ranks.main(globals())`.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from torch_utils import distributed

ROOT = Path(__file__).parents[1]


def start(file, function, size, *arguments):
    """Processes that run `function(*arguments)` of the module in `file`, the arguments as text."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    return [
        subprocess.Popen(
            [sys.executable, str(file), function, *map(str, arguments)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def run(file, function, size, *arguments):
    """Standard output of the processes, which must all succeed, in the order of their ranks."""
    processes = start(file, function, size, *arguments)
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, outputs):
        assert process.returncode == 0, errors
    return [out for out, _ in outputs]


def main(functions):
    """What each process does."""
    torch.set_num_threads(1)
    with distributed.process_group("cpu"):
        functions[sys.argv[1]](*sys.argv[2:])
