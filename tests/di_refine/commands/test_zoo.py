"""The zoo command lists, fetches and verifies what the registry names."""

import hashlib
import json
import os

from click.testing import CliRunner
from di_refine_http import CONTENT

from di_refine.commands.zoo import main
from di_refine.files import registry


def run(*args, status=0):
    result = CliRunner().invoke(main, args, prog_name="zoo")
    assert result.exit_code == status, result.output
    lines = result.stdout.splitlines()
    return result, (json.loads(lines[-1]) if lines else None)


def test_list(small_registry, server, cache):
    _, found = run("list")
    states = {name: record["state"] for name, record in found["entries"].items()}
    assert states == {"gan.pkl": "shipped", "lost.pkl": "missing", "teacher.pkl": "missing", "wrong.pkl": "missing"}
    registry.resolve("teacher")
    _, found = run("list", "--kind=edm")
    assert found["cache"] == str(cache) and "gan.pkl" not in found["entries"]
    assert found["entries"]["teacher.pkl"]["state"] == "cached"


def test_fetch(small_registry, server, cache):
    result, found = run("fetch", "gan", "--companions")
    assert sorted(found["files"]) == ["gan", "teacher.pkl"]
    assert found["sha256"]["teacher.pkl"] == hashlib.sha256(CONTENT).hexdigest()
    count = len(server.requests)
    run("fetch", "teacher", "--offline")
    assert len(server.requests) == count


def test_fetch_offline_never_connects(small_registry, server, cache):
    result, _ = run("fetch", "teacher", "--offline", status=2)
    assert "downloading is off" in result.stderr and not server.requests
    result, _ = run("fetch", "nonsense", status=2)
    assert "known names are" in result.stderr or "nearest names are" in result.stderr


def test_verify(small_registry, server, cache):
    _, found = run("verify")
    assert found["verdicts"] == {"gan.pkl": "ok"}
    run("fetch", "teacher")
    path = cache / "teacher.pkl"
    stat = path.stat()
    _, found = run("verify")
    assert found["verdicts"] == {"gan.pkl": "ok", "teacher.pkl": "ok"}
    path.write_bytes(bytes([CONTENT[0] ^ 1]) + CONTENT[1:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a failing disk would do it
    result, found = run("verify", status=1)
    assert (
        "its SHA-256 is" in found["verdicts"]["teacher.pkl"] and "not as they should be: teacher.pkl" in result.stderr
    )
    result, found = run("verify", "lost", status=1)
    assert found["verdicts"] == {"lost.pkl": "missing"}
