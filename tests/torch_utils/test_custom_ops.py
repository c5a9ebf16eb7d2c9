"""Choosing, building and locking: what happens on the way to a compiled operator, above all when it goes wrong."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from torch_utils import custom_ops
from torch_utils.ops import bias_act, building

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Start with no library loaded or built; the value is the cache folder."""
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path))
    monkeypatch.setattr(custom_ops, "_libraries", {})
    with custom_ops.use("auto"):
        yield tmp_path / "ops"


@pytest.fixture
def fake_build(monkeypatch):
    """Count builds instead of compiling."""
    builds = []

    def build(device_type, target):
        builds.append(threading.get_ident())
        time.sleep(0.3)
        target.mkdir()
        (target / f"{building.NAME}.so").touch()

    monkeypatch.setattr(building, "_build", build)
    monkeypatch.setattr(building, "missing_tool", lambda device_type: None)
    return builds


def reference(*args):
    return "reference"


# ----------------------------------------------------------------------------------------------------------------------
# Choosing


def test_auto_without_cuda_build_says_one_line_and_uses_pytorch(fresh, capsys, monkeypatch):
    monkeypatch.setattr(building, "missing_tool", lambda device_type: "no nvcc; install it")
    for _ in range(3):
        assert custom_ops.pick("upfirdn2d", reference, "auto", CUDA) is reference
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["the CUDA operators cannot be compiled: no nvcc; install it; using PyTorch's own operators"]


def test_auto_speaks_for_the_first_process_only(fresh, capsys, monkeypatch):
    monkeypatch.setattr(building, "missing_tool", lambda device_type: "no nvcc; install it")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert custom_ops.pick("upfirdn2d", reference, "auto", CUDA) is reference
    assert capsys.readouterr().err == ""


def test_auto_on_a_cpu_never_builds_and_never_speaks(fresh, fake_build, capsys):
    assert bias_act.bias_act(torch.zeros(1, 2), act="lrelu").shape == (1, 2)
    assert custom_ops.pick("bias_act", reference, "auto", torch.device("cpu"), faster_on_cpu=True) is reference
    assert fake_build == [] and not fresh.exists() and capsys.readouterr() == ("", "")


def test_auto_on_a_cpu_takes_what_is_built_where_it_is_faster(compiled, monkeypatch):
    with custom_ops.use("auto"):
        picked = custom_ops.pick("bias_act", reference, "auto", torch.device("cpu"), faster_on_cpu=True)
        assert picked is not reference
        assert custom_ops.pick("bias_act", reference, "auto", torch.device("cpu")) is reference
        assert custom_ops.pick("bias_act", reference, "auto", torch.device("cpu"), "x", True) is reference
        assert custom_ops.pick("bias_act", reference, "ref", torch.device("cpu"), faster_on_cpu=True) is reference


def test_mode_cuda_makes_any_failure_an_error(fresh, monkeypatch):
    monkeypatch.setattr(building, "missing_tool", lambda device_type: "no nvcc; install it")
    with custom_ops.use("cuda"):
        with pytest.raises(custom_ops.OpsUnavailable, match="^the CUDA operators cannot be compiled: no nvcc"):
            custom_ops.pick("upfirdn2d", reference, "auto", CUDA)
        with pytest.raises(custom_ops.OpsUnavailable, match="ops=cuda needs tensors on a CUDA device.* on cpu; use"):
            bias_act.bias_act(torch.zeros(1, 2))
    with pytest.raises(custom_ops.OpsUnavailable, match="no nvcc"):
        custom_ops.pick("upfirdn2d", reference, "cuda", CUDA)


def test_mode_native_loads_nothing(fresh, fake_build):
    with custom_ops.use("native"):
        assert custom_ops.pick("upfirdn2d", reference, "auto", CUDA, faster_on_cpu=True) is reference
    assert custom_ops._libraries == {} and fake_build == []


def test_unknown_modes_are_named(monkeypatch):
    with pytest.raises(ValueError, match="must be auto, cuda or native, not 'fast'"):
        custom_ops.set_mode("fast")
    monkeypatch.setattr(custom_ops, "_mode", "fast")  # as the environment variable would have set it
    with pytest.raises(ValueError, match="DI_REFINE_OPS must be auto, cuda or native, not 'fast'"):
        bias_act.bias_act(torch.zeros(1))


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "text"),
    [
        ([], {}, 0, "auto"),
        (["--ops=native"], {}, 0, "native"),
        ([], {"DI_REFINE_OPS": "native"}, 0, "native"),
        (["--ops=fast"], {}, 2, "'fast' is not one of 'auto', 'cuda', 'native'"),
        ([], {"DI_REFINE_OPS": "fast"}, 2, "'fast' is not one of"),
        (["--ops=cuda"], {}, 1, "error: the CUDA operators cannot be compiled"),
    ],
)
def test_option(fresh, monkeypatch, arguments, environment, status, text):
    monkeypatch.setattr(building, "missing_tool", lambda device_type: "no nvcc; install it")
    cli = pytest.importorskip("di_refine.commands.cli")  # has dependencies that a machine lent for its GPU may lack

    @cli.command()
    @cli.ops_option
    def main():
        if custom_ops.mode() == "cuda":
            custom_ops.insist("cuda")
        print(custom_ops.mode())

    result = CliRunner().invoke(main, arguments, env=environment)
    assert (result.exit_code, text in result.output) == (status, True), result.output


# ----------------------------------------------------------------------------------------------------------------------
# Building


def test_processes_that_start_together_build_once(fresh, fake_build):
    threads = [threading.Thread(target=building.ensure, args=["cpu"]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(fake_build) == 1
    assert building.existing("cpu").exists() and not list(fresh.glob("*.lock"))


def test_those_who_waited_for_a_build_that_failed_do_not_try_again(fresh, monkeypatch):
    attempts = []

    def build(device_type, target):
        attempts.append(1)
        time.sleep(0.5)
        building.failure_log(target).write_text("error: no such thing\n")
        raise building.BuildError(building._failure(device_type, building.failure_log(target)))

    monkeypatch.setattr(building, "_build", build)
    errors = []

    def ensure():
        try:
            building.ensure("cpu")
        except building.BuildError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ensure) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(attempts) == 1 and len(errors) == 3 and all("error: no such thing" in error for error in errors)


@pytest.mark.parametrize("holder", ["dead", "silent", "elsewhere and silent"])
def test_stale_locks_are_removed(fresh, fake_build, holder):
    target = building.folder("cpu")
    lock = target.with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    pid = finished.pid if holder == "dead" else os.getpid()
    host = "another-host" if "elsewhere" in holder else building.socket.gethostname()
    lock.write_text(f"{pid} {host}")
    if "silent" in holder:
        os.utime(lock, (0, time.time() - 2 * building.STALE))
    start = time.monotonic()
    building.ensure("cpu")
    assert len(fake_build) == 1 and time.monotonic() - start < 5 and not lock.exists()


def test_a_living_holder_is_waited_for(fresh, fake_build):
    lock = building.folder("cpu").with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    lock.write_text(f"{os.getpid()} {building.socket.gethostname()}")
    assert not building.is_stale(lock)
    threading.Timer(0.6, lock.unlink).start()
    start = time.monotonic()
    building.ensure("cpu")
    assert time.monotonic() - start > 0.5


def test_the_folder_depends_on_sources_flags_pytorch_and_architecture(fresh, tmp_path, monkeypatch):
    names = [building.folder("cpu"), building.folder("cuda")]
    sources = tmp_path / "csrc"
    shutil.copytree(building.CSRC, sources)
    monkeypatch.setattr(building, "CSRC", sources)
    assert building.folder("cpu") == names[0]  # and not on where they lie
    (sources / "api.h").write_text((sources / "api.h").read_text() + "\n")
    names.append(building.folder("cpu"))
    for target, attribute, value in [
        (building, "NVCC_FLAGS", ("-O1",)),
        (torch, "__version__", "99.0"),
        (torch.version, "cuda", "99.0"),
        (building, "architectures", lambda device_type: ("9.9",)),
    ]:
        monkeypatch.setattr(target, attribute, value)
        names.append(building.folder("cpu"))
    assert len(set(names)) == len(names)
    assert all(name.parent == fresh for name in names)


def test_a_compile_error_is_one_line_with_the_log(fresh, tmp_path, monkeypatch, capfd):
    if building.missing_tool("cpu"):
        pytest.skip(building.missing_tool("cpu"))
    source = tmp_path / "broken.cpp"
    source.write_text("int broken( {\n")
    monkeypatch.setitem(building.SOURCES, "cpu", [str(source)])  # seen by this process, for the digest
    monkeypatch.setenv("MAKEFLAGS", "-j2 --jobserver-auth=98,99")  # as under make --jobs, whose pipes are closed here
    original = subprocess.run

    def run(command, **options):
        code = (
            "import sys; from torch_utils.ops import building; "
            f"building.SOURCES['cpu'] = [{str(source)!r}]; building._compile(*sys.argv[1:])"
        )
        return original([sys.executable, "-c", code, *command[3:]], **options)

    monkeypatch.setattr(building.subprocess, "run", run)
    with pytest.raises(custom_ops.OpsUnavailable) as error:
        custom_ops.insist("cpu")
    message = str(error.value)
    assert message.startswith("the CPU operators do not build: ") and "broken.cpp:1:" in message
    assert "\n" not in message
    log = Path(message.rpartition(" is in ")[2])
    assert "broken.cpp" in log.read_text()
    assert capfd.readouterr().err.count("compiling the CPU operators") == 1
    assert not list(fresh.glob(".build-*")) and not list(fresh.glob("*.lock"))


@pytest.mark.parametrize(
    ("tool", "message"),
    [("ninja_folder", "ninja not found; pip install ninja"), ("compiler", "install g\\+\\+ or set CXX")],
)
def test_missing_tools_are_named(fresh, monkeypatch, tool, message):
    monkeypatch.setattr(building, tool, lambda: None)
    with pytest.raises(custom_ops.OpsUnavailable, match=message):
        custom_ops.insist("cpu")


def test_missing_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA; install a CUDA build of it" in building.missing_tool("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA GPU" in building.missing_tool("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(building, "cuda_home", lambda: None)
    assert "install CUDA 12.4 or set CUDA_HOME" in building.missing_tool("cuda")
    monkeypatch.setattr(building, "cuda_home", lambda: Path("/usr/local/cuda-old"))
    monkeypatch.setattr(building, "nvcc_version", lambda: "11.8")
    assert "nvcc in /usr/local/cuda-old is of CUDA 11.8, PyTorch of 12.4" in building.missing_tool("cuda")


def test_an_unwritable_cache_is_named(fresh, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(building, "missing_tool", lambda device_type: None)
    with pytest.raises(custom_ops.OpsUnavailable, match="name a writable folder in DI_REFINE_CACHE"):
        custom_ops.insist("cpu")


def test_a_broken_library_is_an_error_not_a_crash(fresh, fake_build):
    with pytest.raises(custom_ops.OpsUnavailable, match="the compiled operators cannot be loaded"):
        custom_ops.insist("cpu")  # what fake_build leaves is an empty file


def test_doctor(compiled_library):
    environment = {**os.environ, "DI_REFINE_CACHE": str(compiled_library.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch_utils.custom_ops", "--no-build"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for text in ("C++ compiler: ", "loaded in ", "comparisons passed", "bias_act lrelu ", "upfirdn2d down 2 "):
        assert text in result.stdout
    environment["DI_REFINE_CACHE"] = "/nonexistent"
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "not built" in result.stdout


def test_compilers_take_what_is_available_for_a_constant():
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(custom_ops._available) == vars(custom_ops._loaded) == vars(marked) != {}


def test_networks_come_without_the_compiler():
    """Importing it takes as long as all of PyTorch, and no command but a training needs it."""
    code = "import sys, torch; before = 'torch._dynamo' in sys.modules\n"
    code += "import stylegan2_ada.networks; sys.exit('torch._dynamo' in sys.modules and not before)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ----------------------------------------------------------------------------------------------------------------------
# nvcc and the GPU machine


@pytest.mark.parametrize("source", ["bias_act.cu", "upfirdn2d.cu"])
def test_cuda_sources_compile_without_warnings(source):
    home = building.cuda_home()
    if home is None:
        pytest.skip("nvcc is not on this machine, so the CUDA sources were not compiled")
    # Kept between runs: nvcc takes a while, and the result depends on nothing but the sources and itself.
    digest = building.hashlib.sha256(building.nvcc_version().encode())
    for path in sorted([*building.CSRC.glob("*.h"), *building.CSRC.glob("*.cuh"), building.CSRC / source]):
        digest.update(path.read_bytes())
    target = ROOT / "build" / "nvcc" / f"{source}-{digest.hexdigest()[:16]}.o"
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    source_file = building.CSRC / source
    command = [home / "bin" / "nvcc", "-std=c++17", "-O3", "-c", source_file, "-o", target.with_suffix(".tmp")]
    command += [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)]
    command += ["--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr[-4000:]
    target.with_suffix(".tmp").rename(target)


def test_gpu_check_needs_few_packages():
    """The tests of `make gpu-check` are collected where only PyTorch, numpy, scipy, click, pytest, pillow... exist."""
    (command,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if "-m gpu" in line)
    paths = [word for word in command.split() if word.startswith("tests/")]
    assert paths
    absent = ("tqdm", "requests", "pooch", "safetensors", "sklearn", "matplotlib", "tensorboard")
    code = f"""
import sys
for name in {absent}:
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["--collect-only", "-qq", "-m", "gpu", "-p", "no:cacheprovider", *{paths}]))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
