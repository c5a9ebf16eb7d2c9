"""Coverage-guided fuzzing of the reader of network pickles: `make fuzz`. Not a part of the test suite.

Needs atheris (`pip install atheris`). A finding is an exception other than NetworkFormatError, an action that no reader
of data takes (a process, a connection, a file opened for writing, source text compiled), more than 5 s, or more than
2 GB; libFuzzer then writes the input to the working folder and stops.

    python tests/fuzz/fuzz_persistence.py CORPUS [-max_total_time=60] [any option of libFuzzer]

The seeds are parts of the golden pickles, small enough to be mutated fast, and the hostile files of the test suite,
written into CORPUS when it is empty.
"""

import io
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "torch_utils")]

import atheris
import torch

with atheris.instrument_imports(include=["torch_utils"]):
    from torch_utils import persistence
    from torch_utils.persistence import reader, writer

import test_persistence_hostile as hostile
from golden_io import GOLDEN

_FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect", "compile")
_MAX_SEED = 30_000  # bytes
watching = False


def watch(event: str, args: tuple) -> None:
    """Audit hook: raise when the reader does something that only code from the file could want."""
    if not watching:
        return
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if event in _FORBIDDEN or writes:
        raise SystemError(f"the file made the reader do this: {event} {args[:1]}")


def test_one_input(data: bytes) -> None:
    """Read `data`, and what was read once more after it was written."""
    global watching
    watching = True
    try:
        persistence.load(data)
    except persistence.NetworkFormatError as error:
        assert str(error).isprintable(), "a message must not carry control characters"
        if isinstance(error.__cause__, SystemError):
            raise error.__cause__ from None
    finally:
        watching = False
    assert hostile.CANARY == []


def seeds() -> dict[str, bytes]:
    """The hostile files, and every record of the golden pickles that is small, on its own."""
    found = {f"hostile-{name}": data for name, (data, _) in hostile.HOSTILE.items()}
    found["good"] = hostile.GOOD
    for path in sorted(GOLDEN.glob("*/*.pkl")):
        if len(path.read_bytes()) > 2_000_000:
            continue
        content = reader.read(path.read_bytes())
        records = content.values() if isinstance(content, dict) else content
        for index, record in enumerate(item for item in records if isinstance(item, reader.Record)):
            for number, part in enumerate(parts(record)):
                try:
                    data = written({"G" if number else "x": part})
                except TypeError:  # TensorFlow-era records are not written
                    continue
                if len(data) <= _MAX_SEED:
                    found[f"{path.stem}-{index}-{part.class_name}"] = data  # one of each class
    return {name: data for name, data in found.items() if len(data) <= _MAX_SEED}


def parts(record):
    """A record and all below it."""
    yield record
    for child in record.state.get("_modules", {}).values():
        if child is not None:
            yield from parts(child)


def written(content) -> bytes:
    buffer = io.BytesIO()
    writer.write(
        {key: writer.plain(value) for key, value in content.items()},
        buffer,
        persistence._reconstruct_persistent_obj,
    )
    return buffer.getvalue()


def main() -> None:
    """Write the seeds if there are none, then run libFuzzer."""
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    if not folders:
        raise SystemExit("usage: fuzz_persistence.py CORPUS [-max_total_time=60] [-option=value ...]")
    corpus = Path(folders[0])
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        for index, data in enumerate(seeds().values()):
            (corpus / f"seed{index:04d}").write_bytes(data)
    torch.set_num_threads(1)
    persistence.load(hostile.GOOD)  # imports what is needed
    sys.addaudithook(watch)
    atheris.Setup([*sys.argv, "-timeout=5", "-rss_limit_mb=2048", f"-max_len={_MAX_SEED}"], test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
