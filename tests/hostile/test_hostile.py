"""Commands refuse hostile files by one sentence and exit status 2, in little time and memory."""

import json
import subprocess
import sys
from pathlib import Path

import harness
import pytest

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, and Linux' measure of memory")


@pytest.fixture(scope="module")
def server():
    """A process that has imported everything, and runs the cases whose names it reads."""
    arguments = [sys.executable, str(HERE), "--serve"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("name", [name for name in harness.cases() if name not in harness.HEAVY])
def test_hostile_files_are_refused(server, name):
    print(name, file=server.stdin, flush=True)
    result = json.loads(server.stdout.readline())
    assert not result["problems"], result


def test_lists_of_cases_name_cases():
    assert harness.cases().keys() >= harness.HEAVY | harness.ACCEPTED
