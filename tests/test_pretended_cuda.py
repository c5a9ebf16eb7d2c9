"""Every command on a pretended GPU: no operator mixes devices, and no update makes the host wait for the device."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "pretended_cuda"
DATA = "--data=digits-16x16.zip"
TRAIN = ["--kimg=0.048", "--batch=8", "--metrics=none", "--snap=1", "--tick=0.048", "--outdir=run"]
REFINE = ["refine", "--network=stylegan2-digits.pkl", *TRAIN, "--score-warmup=0.016"]
DISTILL = ["distill", "--teacher=edm-digits-16x16-cond.pkl", *TRAIN, "--score-warmup=0.016"]
OF_RATIO = ["--objective=f-js", DATA, "--precision=fp16", "--student-steps=2"]
SMALL = ["--width=16", "--channel-mult=1,2", "--num-blocks=1", "--attn-resolutions=8"]
FILES = ["--dest=features-f.safetensors", "--stats=f.npz"]
CALLS = {
    "refine": REFINE,
    "refine with a discriminator": [*REFINE, "--adversarial-weight=0.1", DATA],
    "refine in parts of a batch, bf16": [*REFINE, "--objective=sid", "--precision=bf16", "--batch-gpu=4"],
    "distill with a ratio, fp16": [*DISTILL, *OF_RATIO],
    "pretrain teacher": ["pretrain", "teacher", DATA, *TRAIN, "--augment=0.2", *SMALL],
    "pretrain gan": ["pretrain", "gan", DATA, *TRAIN, "--channel-base=256", "--channel-max=16", "--z-dim=16"],
    "pretrain features": [
        "pretrain",
        "features",
        DATA,
        "--width=16",
        "--epochs=1",
        "--dest=features-f.safetensors",
        "--stats=f.npz",
    ],
    "calc_metrics": ["calc_metrics", "--network=stylegan2-digits.pkl", "--metrics=fd1k_full@digits"],
    "generate": ["generate", "--network=stylegan2-digits.pkl", "--seeds=0-7", "--outdir=out"],
    "sample_teacher": ["sample_teacher", "--teacher=edm-digits-16x16-cond.pkl", "--num=4", "--batch=4", "--dest=s.zip"],
}
PINNED = re.search(r"^torch==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)[1]
UPDATE = re.compile(r"(trainer|adversarial|teacher)\.py:\d+ step\b")


@pytest.fixture(scope="session")
def guard(tmp_path_factory):
    """The library that makes PyTorch believe in the device."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None or torch.version.cuda is not None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler and a build of PyTorch for CPUs")
    package = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    libraries = [f"-L{package}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{package}/lib"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    includes = [
        f"-I{package}/include",
        f"-I{package}/include/torch/csrc/api/include",
        f"-I{sysconfig.get_path('include')}",
    ]
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-std=c++20",
        abi,
        *includes,
        "-o",
        library,
        HERE / "guard.cpp",
        *libraries,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not torch.__version__.startswith(PINNED):  # elsewhere the interfaces may differ
        pytest.skip(f"the guard does not build against PyTorch {torch.__version__}: {done.stderr[:200]}")
    assert done.returncode == 0, done.stderr
    return library


@pytest.mark.parametrize("call", CALLS)
def test_a_command_runs_on_it(call, guard, tmp_path):
    command, *args = CALLS[call]
    done = subprocess.run(
        [sys.executable, HERE / "run.py", guard, command, *args, "--device=cuda"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DI_REFINE_OPS": "native"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    waits = json.loads(done.stdout.splitlines()[-1])
    # There are six updates. What is copied once for all of them does not count.
    assert [line for line, count in waits.items() if count > 3 and UPDATE.search(line)] == []
