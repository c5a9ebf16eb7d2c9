"""The convert command, and ONNX models against our own networks in ONNX Runtime."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden_io import GOLDEN

import di_refine
from di_refine.commands import convert
from di_refine.files import onnx_export
from torch_utils import persistence


def run(*args, status=0):
    result = CliRunner().invoke(convert.main, list(map(str, args)), prog_name="convert")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout.splitlines()[-1]) if status == 0 else result.stderr


def test_pickle_to_safetensors_and_back(tmp_path):
    source = GOLDEN / "stylegan2/sg2ada-resnet16.pkl"
    found = run(f"--source={source}", f"--dest={tmp_path}/new/net.safetensors")
    assert found["dest"] == [f"{tmp_path}/new/net.safetensors", f"{tmp_path}/new/net.json"]
    assert found["networks"] == ["G", "D", "G_ema"]
    run(f"--source={tmp_path}/new/net.json", f"--dest={tmp_path}/again.pkl")
    run(f"--source={source}", f"--dest={tmp_path}/direct.pkl")
    assert (tmp_path / "again.pkl").read_bytes() == (tmp_path / "direct.pkl").read_bytes()


@pytest.mark.parametrize("name", ["stylegan2/sg2ada-resnet16.pkl", "edm/adm_cond.pkl"])
@pytest.mark.parametrize("suffix", ["pkl", "safetensors"])
def test_refreshed_source_leaves_the_rest_alone(name, suffix, tmp_path):
    dest = tmp_path / f"net.{suffix}"
    run(f"--source={GOLDEN / name}", f"--dest={dest}", "--refresh-source")
    if suffix == "safetensors":
        run(f"--source={dest}", f"--dest={tmp_path}/net.pkl")
    before, after = persistence.load(GOLDEN / name), persistence.load(tmp_path / "net.pkl")
    assert list(before) == list(after)
    records = persistence.load_records(tmp_path / "net.pkl")
    for key, value in before.items():
        if not isinstance(value, torch.nn.Module):
            assert value == after[key] or isinstance(value, persistence.Record)
            continue
        text = Path(sys.modules[type(value).__module__].__file__).read_text()
        assert records[key].module_src == text
        assert (value.init_args, value.init_kwargs) == (after[key].init_args, after[key].init_kwargs)
        states = value.state_dict(), after[key].state_dict()
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(*map(dict.values, states)))


def test_objects_that_no_class_fits_keep_their_source(tmp_path):
    loss = persistence.Record("Loss", {"_init_args": (), "_init_kwargs": {}}, "text of the loss", 6)
    persistence.save({**persistence.load(GOLDEN / "edm/adm_cond.pkl"), "loss_fn": loss}, tmp_path / "a.pkl")
    command = [f"--source={tmp_path}/a.pkl", f"--dest={tmp_path}/b.pkl", "--refresh-source"]
    result = CliRunner().invoke(convert.main, command)
    assert "note: 'loss_fn' (Loss) keeps its source text" in result.stderr
    assert persistence.load_records(tmp_path / "b.pkl")["loss_fn"].module_src == "text of the loss"


def test_tensorflow_pickle_becomes_an_official_one(tmp_path):
    run(f"--source={GOLDEN}/stylegan2/sg2tf-legacy.pkl", f"--dest={tmp_path}/net.pkl")
    networks = persistence.load(tmp_path / "net.pkl")
    assert list(networks) == ["G", "D", "G_ema"]


@pytest.mark.parametrize(
    "args, reason",
    [
        (["--dest=x.zip"], "--dest=x.zip must end in .pkl, .safetensors, .onnx or .pt"),
        (["--dest=x.onnx", "--refresh-source"], "--refresh-source is for pickles and safetensors"),
        (["--dest=x.pkl", "--noise-mode=none"], "--noise-mode is for --dest=...onnx"),
        (["--dest=x.pkl", "--init-sigma=1"], "--init-sigma is for --dest=...onnx"),
        (["--dest=x.onnx", "--init-sigma=1"], "--init-sigma is for one-step EDM generators"),
        (["--dest=x.onnx", "--key=D"], "--key=D is a Discriminator, not a generator"),
        (["--dest=x.onnx", "--key=H"], "--key=H: .* holds G, D, G_ema"),
        (["--dest=there.pkl"], "--dest=there.pkl exists already; choose another name or give --overwrite"),
        (["--dest=there.safetensors"], "there.json exists already"),
    ],
)
def test_contradictions(args, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.pkl").write_bytes(b"precious")
    (tmp_path / "there.json").write_bytes(b"precious")
    message = run(f"--source={GOLDEN}/stylegan2/sg2ada-orig16.pkl", *args, status=2)
    assert message.startswith("error: ") and message.count("\n") == 1
    assert re.search(reason, message), message
    assert (tmp_path / "there.pkl").read_bytes() == b"precious"


def test_edm_needs_a_noise_level(tmp_path):
    message = run(f"--source={GOLDEN}/edm/vp.pkl", f"--dest={tmp_path}/x.onnx", status=2)
    assert "--init-sigma is needed" in message


def test_bad_source(tmp_path):
    (tmp_path / "bad.pkl").write_bytes(b"hello")
    assert "does not begin like a pickle" in run(f"--source={tmp_path}/bad.pkl", f"--dest={tmp_path}/x.pkl", status=2)


def test_without_the_optional_packages_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    message = run(f"--source={GOLDEN}/stylegan2/sg2ada-orig16.pkl", f"--dest={tmp_path}/x.onnx", status=2)
    assert "ONNX needs the package onnx; pip install 'di-refine[onnx]'" in message


def test_onnx_needs_a_newer_pytorch(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="needs the optional package onnxscript")
    monkeypatch.setattr(onnx_export, "OLDEST_TORCH", "99.1")
    message = run(f"--source={GOLDEN}/stylegan2/sg2ada-orig16.pkl", f"--dest={tmp_path}/x.onnx", status=2)
    assert "cannot trace these networks; use PyTorch 99.1 or newer" in message and not list(tmp_path.iterdir())


def test_as_a_module():
    command = [sys.executable, "-m", "di_refine", "convert", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(di_refine.__file__).parent.parent)
    assert done.returncode == 0 and done.stdout.startswith("Usage: python -m di_refine convert")


# ONNX.

CASES = [
    ("stylegan2/sg2ada-cifar-cond.pkl", "G_ema", ["--noise-mode=none", "--truncation=0.7"], 3e-5),
    ("stylegan2/sg2ada-resnet16.pkl", "G_ema", [], 3e-5),
    ("stylegan2/sg2ada-orig16.pkl", "G", ["--key=G"], 3e-5),
    ("distill/teacher.pkl", "ema", ["--init-sigma=2.5"], 1e-5),
    ("edm/adm_cond.pkl", "ema", ["--init-sigma=1"], 1e-5),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, key, options, tolerance", CASES)
def test_onnx_runtime_agrees(name, key, options, tolerance, tmp_path):
    """The allowed 1e-4 is absolute; images here reach 12, so the limit is relative to them and smaller."""
    if torch.__version__ < onnx_export.OLDEST_TORCH:
        pytest.skip("the exporter of this PyTorch cannot trace these networks")
    onnx = pytest.importorskip("onnx", reason="needs the optional package onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the optional package onnxruntime")
    pytest.importorskip("onnxscript", reason="needs the optional package onnxscript")
    path = tmp_path / "net.onnx"
    found = run(f"--source={GOLDEN / name}", f"--dest={path}", *options)
    assert found["networks"] == [key] and found["opset"] == onnx_export.OPSET

    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    assert [(item.domain, item.version) for item in proto.opset_import] == [("", onnx_export.OPSET)]
    assert str(Path(di_refine.__file__).parent).encode() not in path.read_bytes(), "no paths of this machine"
    properties = {item.key: item.value for item in proto.metadata_props}
    assert properties["key"] == key and properties["opset"] == str(onnx_export.OPSET)

    net = persistence.load(GOLDEN / name)[key]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        inputs = {
            item.name: torch.randn(batch, *item.shape[1:], generator=torch.Generator().manual_seed(batch))
            for item in session.get_inputs()
        }
        if "c" in inputs:
            inputs["c"] = torch.eye(inputs["c"].shape[1])[:batch]
        assert json.loads(properties["inputs"]) == {key: list(value.shape[1:]) for key, value in inputs.items()}
        (images,) = session.run(["images"], {key: value.numpy() for key, value in inputs.items()})
        expected = ours(net, inputs, options)
        error = np.abs(images - expected.numpy()).max()
        assert images.shape == tuple(expected.shape) and images.dtype == np.float32
        assert error <= min(1e-4, tolerance * max(expected.abs().max().item(), 1)), error


def ours(net, inputs, options):
    """What this project computes without ONNX."""
    option = dict(text.removeprefix("--").split("=") for text in options)
    with torch.no_grad():
        if hasattr(net, "round_sigma"):
            sigma = float(option["init-sigma"])
            return net(inputs["z"] * sigma, torch.tensor(sigma), inputs.get("c"))
        psi, mode = float(option.get("truncation", 1)), option.get("noise-mode", "const")
        return net(inputs["z"], inputs.get("c"), truncation_psi=psi, noise_mode=mode)


def test_the_tolerance_would_notice_a_wrong_noise_mode():
    net = persistence.load(GOLDEN / "stylegan2/sg2ada-resnet16.pkl")["G_ema"]
    z, c = torch.randn(1, net.z_dim), torch.eye(net.c_dim)[:1]
    with torch.no_grad():
        difference = net(z, c, noise_mode="const") - net(z, c, noise_mode="none")
    assert difference.abs().max() > 1e-2 and math.isfinite(difference.abs().max())
