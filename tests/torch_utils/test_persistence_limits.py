"""Hostile files within fixed memory and processor time, and what a large network costs."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from di_refine.edm.networks import EDMPrecond
from torch_utils import persistence

TESTS = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits and /proc")

SCRIPT = """
import json, resource, signal, sys, time
sys.path[:0] = [{repository!r}, {tests!r}, {tests!r} + "/torch_utils"]
import torch
torch.set_num_threads(1)
import test_persistence_hostile as hostile
from torch_utils import persistence

persistence.load(hostile.GOOD)  # imports what is needed

def value(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

def limit(nbytes):
    resource.setrlimit(resource.RLIMIT_AS, (value("VmSize") + nbytes,) * 2)

def measured(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak
    before, start = value("VmRSS"), time.process_time()
    result = call()
    return result, time.process_time() - start, value("VmHWM") - before
"""


def run(body, **values):
    script = SCRIPT.format(repository=str(TESTS.parent), tests=str(TESTS)) + body.format(**values)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


HOSTILE = """
bad = []
def watch(event, args):
    if event in ("os.system", "subprocess.Popen", "socket.connect", "os.exec", "os.posix_spawn", "os.fork"):
        bad.append(event)
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes and args[0] != "/proc/self/clear_refs":
        bad.append(f"open {{args[0]}}")
sys.addaudithook(watch)

def attempt(data):
    try:
        persistence.load(data)
    except persistence.NetworkFormatError as error:
        return str(error)
    return "loads"

limit(2**30)
outcome = {{}}
for name, (data, _) in hostile.HOSTILE.items():
    signal.setitimer(signal.ITIMER_PROF, 10)  # kills this process
    text, seconds, memory = measured(lambda: attempt(data))
    outcome[name] = [text, seconds, memory]
signal.setitimer(signal.ITIMER_PROF, 0)
print(json.dumps({{"outcome": outcome, "bad": bad + hostile.CANARY}}))
"""


def test_hostile_files_within_a_gigabyte_and_ten_seconds():
    """Each of them in one process that may use 1 GB more than at its start, and dies after 10 s of processor time."""
    result = run(HOSTILE)
    assert result["bad"] == []
    assert len(result["outcome"]) > 100
    for name, (text, _, _) in result["outcome"].items():
        assert text != "loads" and "MemoryError" not in text, name


LARGE = """
limit(int(2.5 * {size}))
networks, seconds, memory = measured(lambda: persistence.load({path!r}))
parameters = sum(parameter.numel() for parameter in networks["ema"].parameters())
print(json.dumps({{"seconds": seconds, "memory": memory, "parameters": parameters}}))
"""


def test_a_large_network_takes_little_more_memory_than_its_tensors(tmp_path):
    network = EDMPrecond(32, 3, model_type="SongUNet", model_channels=96, channel_mult=[2, 2, 2], attn_resolutions=[])
    path = tmp_path / "large.pkl"
    persistence.save({"ema": network}, path)
    size = path.stat().st_size
    assert size > 100e6
    result = run(LARGE, size=size, path=str(path))
    assert result["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert result["memory"] < 2.5 * size


def test_the_limit_is_felt():
    """The process above cannot have more memory than it is said to have, to a few MiB that it may give back first."""
    with pytest.raises(AssertionError, match="MemoryError|Cannot allocate|not enough memory"):
        run("limit(2**30)\nx = bytearray(2**30 + 2**24)\nprint(1)")
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
