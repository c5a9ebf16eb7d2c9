"""Coverage-guided fuzzing of the readers of files that strangers make: `make fuzz`. Not a part of the test suite.

Needs atheris (`pip install atheris`). A finding is an exception other than those that a reader documents, an action
that no reader of data takes (a process, a connection, a file opened for writing, source text compiled), more than 5 s,
or more than a gigabyte; libFuzzer then writes the input to the working folder and stops.

    python tests/fuzz/fuzz.py TARGET CORPUS [-max_total_time=60] [any option of libFuzzer]

The targets are in `targets.py`, each with its seeds, which are written into CORPUS when it is empty.
"""

import resource
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "torch_utils")]

import atheris
import torch

with atheris.instrument_imports(include=["torch_utils", "di_refine"]):
    from targets import TARGETS, Target

_FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect", "compile")
_MEMORY = 1 << 20  # KiB, of the process
_watched: Target | None = None  # whose reader is at work


def watch(event: str, args: tuple) -> None:
    """Audit hook: raise when a reader does something that only code from the file could want."""
    if _watched is None or event in _watched.actions:
        return
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if event in _FORBIDDEN or writes:
        raise SystemError(f"the file made the reader do this: {event} {args[:1]}")


def attempt(target: Target, data: bytes) -> None:
    """Let a target's reader read `data`."""
    global _watched
    given = target.prepare(data)
    _watched = target
    try:
        target.read(given)
    except target.errors as error:
        if isinstance(error.__cause__, SystemError):
            raise error.__cause__ from None
        if target.printable:
            assert str(error).isprintable(), "a message must not carry control characters"
    finally:
        _watched = None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if used > _MEMORY:
        raise MemoryError(f"{used >> 10} MiB")
    target.check()


def main() -> None:
    """Write the seeds if there are none, then run libFuzzer."""
    words = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    if len(words) != 2 or words[0] not in TARGETS:
        raise SystemExit(f"usage: fuzz.py {'|'.join(TARGETS)} CORPUS [-max_total_time=60] [-option=value ...]")
    target, corpus = TARGETS[words[0]](), Path(words[1])
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        for index, data in enumerate(target.seeds()):
            (corpus / f"seed{index:04d}").write_bytes(data)
    torch.set_num_threads(1)
    for seed in sorted(corpus.iterdir())[:20]:  # imports what is needed
        attempt(target, seed.read_bytes())
    sys.addaudithook(watch)
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    settings = ["-timeout=5", "-rss_limit_mb=2048", f"-max_len={target.longest}"]
    atheris.Setup([sys.argv[0], str(corpus), *settings, *options], lambda data: attempt(target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
