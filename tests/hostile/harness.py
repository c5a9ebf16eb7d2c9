"""Runs commands on hostile files, each in a process of its own, and measures what refusing them takes.

The processes are forked from one that has imported everything, so that a hundred of them take a minute, or run a Python
from its start. Making the files is no part of what is measured.
"""

import importlib
import json
import os
import pkgutil
import resource
import runpy
import signal
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KINDS = ("special", "detectors", "networks", "pictures")
#: Cases whose files are unusual, and right.
ACCEPTED = {"pictures-unknown_arrays", "pictures-large_at_once", "networks-much_inspected"}
#: Cases whose files take seconds to make, or to read: `python tests/hostile` runs them, and the test suite does not.
HEAVY = {
    "detectors-inflating",
    "pictures-cifar_of_zeros",
    "pictures-inflating_features",
    "pictures-inflating_labels",
    "pictures-inflating_pixels",
    "pictures-inflating_state",
    "pictures-large_at_once",
    "pictures-larger",
    "pictures-unknown_arrays",
}
WALL_SECONDS = 300  # after which a process that waits for something is ended
ADDRESSES = 1 << 34  # bytes of address space, so that a failure does not take the machine's memory


def prepare():
    """Import everything that a command may import, and set what all commands are run with."""
    global _cache
    _cache = tempfile.TemporaryDirectory()
    os.environ |= {"OMP_NUM_THREADS": "1", "DI_REFINE_OFFLINE": "1", "DI_REFINE_CACHE": _cache.name}
    os.chdir(ROOT)
    sys.path[:0] = [str(HERE), str(ROOT)]
    for package in ("torch_utils", "stylegan2_ada", "di_refine"):
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def cases():
    """Return all cases by name: (function, bound in CPU seconds, bound in MiB)."""
    found = [case for kind in KINDS for case in importlib.import_module(kind).CASES]
    return {name: rest for name, *rest in found}


def run(name, fresh=False):
    """Run a case; return what it took and what is wrong with it.

    Args:
        name: of the case.
        fresh: start a Python, whose imports are measured with the rest, instead of forking this one.

    Returns:
        A dict with `name`, `status` (negative for a signal), `seconds` of CPU time, `mebibytes`, `errors` (what was
        written on stderr), and `problems`, a list of sentences.
    """
    function, seconds, mebibytes = cases()[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "files")
        folder.mkdir()
        made, output, errors = (Path(temporary, file) for file in ("made", "output", "errors"))
        status, _ = _forked(lambda: made.write_text(json.dumps([str(item) for item in function(folder)])))
        if status:
            raise RuntimeError(f"making {name} failed with status {status}")
        arguments = json.loads(made.read_text())
        before = set(folder.rglob("*"))

        def command():
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
            for number, path in ((1, output), (2, errors)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            if fresh:
                os.execv(sys.executable, [sys.executable, *arguments])
            module = arguments[0] == "-m"
            sys.argv = arguments[module:]
            if module:
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")

        status, usage = _forked(command)
        result = {
            "name": name,
            "status": status,
            "seconds": usage.ru_utime + usage.ru_stime,
            "mebibytes": usage.ru_maxrss / 1024,
            "errors": errors.read_text(),
        }
        new = [] if name in ACCEPTED else sorted(map(str, set(folder.rglob("*")) - before))
        return result | {"problems": _problems(result, seconds, mebibytes, new, output.read_text())}


def _forked(function):
    """Call a function in a fork of this process; return its exit status and resource usage."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            signal.alarm(WALL_SECONDS)
            function()
            status = 0
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, code, usage = os.wait4(process, 0)
    return os.waitstatus_to_exitcode(code), usage


def _problems(result, seconds, mebibytes, new, output):
    status, lines = result["status"], result["errors"].splitlines()
    wanted = 0 if result["name"] in ACCEPTED else 2
    sentences = [line for line in lines if line.startswith("error: ")]
    found = {
        f"exit status {status}, not {wanted}": status != wanted,
        "a traceback": "Traceback" in result["errors"],
        f"{len(lines)} lines on stderr, not one sentence": wanted == 2 and (len(lines) != 1 or len(sentences) != 1),
        f"{len(result['errors'])} characters on stderr": len(result["errors"]) > 5000,
        "control characters": not all(line.isprintable() for line in lines),
        "the file's code ran": "this ran" in output,
        f"{result['seconds']:.1f} s of CPU time, more than {seconds}": result["seconds"] > seconds,
        f"{result['mebibytes']:.0f} MiB, more than {mebibytes}": result["mebibytes"] > mebibytes,
        f"it left {', '.join(new)}": bool(new),
    }
    return [sentence for sentence, is_so in found.items() if is_so]
