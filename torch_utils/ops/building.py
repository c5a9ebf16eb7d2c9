"""Builds the compiled operators once per machine, PyTorch and GPU architecture, into the user's cache folder.

A library's folder is named after a digest of everything that it depends on, so that no library is ever out of date and
different versions of the sources do not share one. Another process builds it in a private folder and tries it out
there; then it is moved into place in one step. Of processes that start together, one builds and the others wait.
"""

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

CSRC = Path(__file__).parent / "csrc"
SOURCES = {
    "cpu": ("binding.cpp", "bias_act_cpu.cpp", "upfirdn2d_cpu.cpp"),
    "cuda": ("binding.cpp", "bias_act.cu", "upfirdn2d.cu"),
}
CXX_FLAGS = {
    "cpu": ("-O3", "-march=native", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"),
    "cuda": ("-O2", "-fvisibility=hidden", "-DDI_REFINE_CUDA"),
}
NVCC_FLAGS = ("-O3", "-Xcompiler", "-fvisibility=hidden")
NAME = "di_refine_ops"

NOT_BUILT = "the compiled operators have not been built"
TIMEOUT = 900  # seconds after which a build is taken to hang
TOUCH_SECONDS = 5  # a process that builds touches its lock file this often
STALE = 60  # seconds after which a lock file that nobody has touched no longer counts


class BuildError(RuntimeError):
    """The operators cannot be built; the message says in one line why, and what to do."""


def existing(device_type: str) -> Path:
    """Return the path of the library of a device type.

    Raises:
        BuildError: it has not been built.
    """
    path = folder(device_type) / f"{NAME}.so"
    if not path.exists():
        raise BuildError(NOT_BUILT)
    return path


def ensure(device_type: str) -> Path:
    """Return the path of the library of a device type, which is built first where it is not there.

    Raises:
        BuildError: it cannot be built; the message has the reason and the remedy.
    """
    target = folder(device_type)
    if not (target / f"{NAME}.so").exists():
        reason = missing_tool(device_type)
        if reason:
            raise BuildError(f"the {device_type.upper()} operators cannot be compiled: {reason}")
        started = time.time()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with turn(target.with_suffix(".lock"), target.exists) as ours:
                failed_log = failure_log(target)
                if ours and failed_log.exists() and failed_log.stat().st_mtime > started:  # while we waited
                    raise BuildError(_failure(device_type, failed_log))
                if ours and not target.exists():
                    _build(device_type, target)
        except OSError as error:
            raise BuildError(
                f"the {device_type.upper()} operators cannot be compiled: {error.filename or target.parent}: "
                f"{error.strerror or error}; name a writable folder in DI_REFINE_CACHE"
            ) from None
    return existing(device_type)


def cache_folder() -> Path:
    """Return the folder of all libraries: ops/ in $DI_REFINE_CACHE, else in ~/.cache/di-refine."""
    return Path(os.environ.get("DI_REFINE_CACHE") or Path.home() / ".cache" / "di-refine").expanduser() / "ops"


def folder(device_type: str) -> Path:
    """Return the folder of a device type's library; its name changes with everything the library depends on."""
    digest = hashlib.sha256()
    for path in sorted(CSRC.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    facts = (SOURCES, CXX_FLAGS, NVCC_FLAGS, torch.__version__, torch.version.cuda, platform.system())
    digest.update(repr((*facts, platform.machine(), architectures(device_type))).encode())
    return cache_folder() / f"{device_type}-{digest.hexdigest()[:16]}"


@functools.cache
def architectures(device_type: str) -> tuple[str, ...]:
    """Return what a library is built for: compute capabilities such as '9.0', or the CPU's instruction set."""
    if device_type == "cuda":
        if not torch.cuda.is_available():
            return ()
        seen = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
        return tuple(f"{major}.{minor}" for major, minor in sorted(seen))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return (platform.processor(),)
    return tuple(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def compiler() -> str | None:
    """Return the path of the C++ compiler that PyTorch's build helper takes, or None."""
    return shutil.which(os.environ.get("CXX") or "c++")


def cuda_home() -> Path | None:
    """Return the folder of a CUDA toolkit with compiler and headers, or None.

    It is looked for in $CUDA_HOME, in $CUDA_PATH, around the nvcc on the PATH, and in /usr/local/cuda.
    """
    nvcc = shutil.which("nvcc")
    around_nvcc = str(Path(nvcc).resolve().parent.parent) if nvcc else None
    for name in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), around_nvcc, "/usr/local/cuda"):
        place = Path(name) if name else None
        if place and (place / "bin" / "nvcc").exists() and (place / "include" / "cuda_runtime.h").exists():
            return place
    return None


def missing_tool(device_type: str) -> str | None:
    """Return what is missing for a build, with the remedy, or None."""
    if device_type == "cuda":
        if torch.version.cuda is None:
            return f"this PyTorch ({torch.__version__}) has no CUDA; install a CUDA build of it"
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA GPU; check nvidia-smi"
        if cuda_home() is None:
            return f"no CUDA toolkit (nvcc and headers) found; install CUDA {torch.version.cuda} or set CUDA_HOME to it"
        theirs = nvcc_version()
        if theirs.split(".")[0] != torch.version.cuda.split(".")[0]:
            return (
                f"nvcc in {cuda_home()} is of CUDA {theirs}, PyTorch of {torch.version.cuda}; "
                f"set CUDA_HOME to a {torch.version.cuda} toolkit"
            )
    if compiler() is None:
        return f"no C++ compiler ({os.environ.get('CXX') or 'c++'}) found; install g++ or set CXX"
    if ninja_folder() is None:
        return "ninja not found; pip install ninja"
    return None


def nvcc_version() -> str:
    """Return the version of nvcc as '13.0', or its output where there is no version in it."""
    home = cuda_home()
    if home is None:
        return "no CUDA toolkit"
    try:
        text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        return str(error)
    return text.partition("release ")[2].partition(",")[0] or text.strip()


def ninja_folder() -> str | None:
    """Return the folder of ninja, which a virtual environment that is not activated has beside its Python, or None."""
    beside_python = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    found = shutil.which("ninja", path=beside_python)
    return found and os.path.dirname(found)


@contextlib.contextmanager
def turn(lock: Path, done: Callable[[], bool]) -> Iterator[bool]:
    """Hold a lock file, or wait until its holder is done or dead.

    The lock only saves work: two holders would each build in a folder of their own.

    Args:
        lock: path of the file, which is made and removed here.
        done: returns whether the work is done, by whomever.

    Yields:
        Whether the lock is held; False where the work is done already.
    """
    while True:
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            break
        except FileExistsError:
            if done():
                yield False
                return
            if is_stale(lock):
                lock.unlink(missing_ok=True)
            else:
                time.sleep(0.2)
    with os.fdopen(handle, "w") as file:
        file.write(f"{os.getpid()} {socket.gethostname()}")
    over = threading.Event()

    def keep_touching():
        while not over.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(lock)

    threading.Thread(target=keep_touching, daemon=True).start()
    try:
        yield True
    finally:
        over.set()
        lock.unlink(missing_ok=True)


def is_stale(lock: Path) -> bool:
    """Return whether the holder of a lock file is dead, or, on another host, has not touched it for too long."""
    try:
        age = time.time() - lock.stat().st_mtime
        pid, _, host = lock.read_text().partition(" ")
    except OSError:  # it has just gone
        return False
    if age > STALE:
        return True
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def failure_log(target: Path) -> Path:
    """Return the path for the log of a build that failed."""
    return target.with_name(f"{target.name}.failed.log")


def _build(device_type: str, target: Path) -> None:
    """Build and test the library in a private folder, then move that folder to `target`."""
    for old in target.parent.glob(".build-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 2 * TIMEOUT:
                shutil.rmtree(old, ignore_errors=True)
    print(
        f"compiling the {device_type.upper()} operators into {target}, once, about a minute",
        file=sys.stderr,
        flush=True,
    )
    private = Path(tempfile.mkdtemp(prefix=".build-", dir=target.parent))
    log = private / "build.log"
    root = str(Path(__file__).parents[2])
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
    environment["PATH"] = os.pathsep.join(filter(None, [ninja_folder(), os.environ.get("PATH")]))
    environment["DI_REFINE_OPS"] = "auto"
    # ninja would take the job server of a make that is not its parent, and stop on its closed pipes.
    environment.pop("MAKEFLAGS", None)
    if device_type == "cuda":
        environment |= {"CUDA_HOME": str(cuda_home()), "TORCH_CUDA_ARCH_LIST": ";".join(architectures("cuda"))}
    command = [sys.executable, "-m", "torch_utils.ops.building", device_type, str(private)]
    try:
        with open(log, "w") as file:
            try:
                status = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=TIMEOUT
                ).returncode
            except subprocess.TimeoutExpired:
                status = 1
                file.write(f"\nerror: not done after {TIMEOUT} seconds\n")
        if status == 0:
            with contextlib.suppress(OSError):  # another process may have put its own there
                os.rename(private, target)
            failure_log(target).unlink(missing_ok=True)
        else:
            os.replace(log, failure_log(target))
            raise BuildError(_failure(device_type, failure_log(target)))
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _failure(device_type: str, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror: |Error: ", line)] or lines[-1:] or ["it printed nothing"]
    return f"the {device_type.upper()} operators do not build: {errors[0][:200]}; all of its output is in {log}"


def _compile(device_type: str, directory: str) -> None:
    """Compile, link, load, and compare with the PyTorch form; this runs in the process that builds."""
    from torch.utils import cpp_extension

    from torch_utils import custom_ops
    from torch_utils.ops import compiled, selftest  # noqa: F401  declares what the library implements

    cpp_extension.load(
        NAME,
        [str(CSRC / name) for name in SOURCES[device_type]],
        extra_cflags=list(CXX_FLAGS[device_type]),
        extra_cuda_cflags=list(NVCC_FLAGS),
        build_directory=directory,
        verbose=True,
        with_cuda=device_type == "cuda",
        is_python_module=False,
    )
    torch.set_num_threads(1)  # small tensors, and the other cores may be busy training
    custom_ops.mark_loaded(device_type)
    print(f"self-test: {len(selftest.run(device_type))} comparisons passed", flush=True)


if __name__ == "__main__":
    _compile(*sys.argv[1:])
