"""The inspect command says what is in a file, builds nothing, and remembers embedded source texts."""

import hashlib
import json

import pytest
import torch
from click.testing import CliRunner
from golden_io import GOLDEN, cases

import stylegan2_ada.networks
from di_refine.commands import inspect
from di_refine.files import safetensors_pair
from torch_utils import persistence

PICKLES = sorted(str(path.relative_to(GOLDEN)) for path in GOLDEN.glob("*/*.pkl"))
PLACEHOLDER = hashlib.sha256(b"raise RuntimeError('embedded source must never be executed')").hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DI_REFINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*args, status=0):
    result = CliRunner().invoke(inspect.main, list(map(str, args)), prog_name="inspect")
    assert result.exit_code == status, result.output
    return result, (json.loads(result.stdout.splitlines()[-1]) if status == 0 else None)


@pytest.mark.parametrize("name", PICKLES)
def test_counts_agree_with_the_networks(name, monkeypatch):
    content = persistence.load(GOLDEN / name)
    monkeypatch.setattr(persistence.builder, "assemble", None)  # nothing is built
    monkeypatch.setattr(persistence.builder, "build_empty", None)
    _, report = run(GOLDEN / name)
    networks = {key: value for key, value in content.items() if isinstance(value, torch.nn.Module)}
    assert set(report["networks"]) == {key for key, net in networks.items() if list(net.parameters())}
    for key, entry in report["networks"].items():
        network = networks[key]
        if "legacy" not in name:
            assert entry["parameters"] == sum(parameter.numel() for parameter in network.parameters())
            assert entry["tensors"] == len(list(network.parameters())) + len(list(network.buffers()))
            assert entry["class"] == type(network).__name__
            assert entry["init_kwargs"] == network.init_kwargs or "sg3repo" in name  # other names for the same
            assert entry["source"] == PLACEHOLDER
        assert entry["kind"].startswith("stylegan2" if name.startswith("stylegan2") else "edm")
    assert report["sha256"] == hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest()


def test_training_options_and_other_objects():
    result, report = run(GOLDEN / "stylegan2/sg2ada-cifar-cond.pkl")
    meta = cases("stylegan2/sg2ada-cifar-cond.npz")[0]
    assert report["settings"]["training_set_kwargs"] == meta["training_set_kwargs"]
    assert report["objects"]["augment_pipe"]["init_kwargs"] == meta["augment_init_kwargs"]
    assert "G_ema: Generator(z_dim=64, w_dim=64" in result.stdout
    assert "tensor_list" not in report["networks"]["G"]
    result, report = run(GOLDEN / "stylegan2/sg2ada-cifar-cond.pkl", "--layers")
    assert report["networks"]["G"]["tensor_list"]["synthesis.b4.const"] == [64, 4, 4]
    assert "G.synthesis.b4.const" in result.stdout


def test_new_source_texts_are_warned_of_once(cache, tmp_path):
    result, report = run(GOLDEN / "edm/vp.pkl")
    assert f"warning: vp.pkl embeds source text that was not seen before ({PLACEHOLDER[:16]})" in result.stderr
    assert report["sources"][PLACEHOLDER]["new"] is True
    result, report = run(GOLDEN / "edm/ve.pkl")
    assert "warning" not in result.stderr
    assert report["sources"][PLACEHOLDER]["seen"].startswith("first seen in vp.pkl on 20")
    (cache / "sources.json").write_text("damaged")
    assert "warning" in run(GOLDEN / "edm/ve.pkl")[0].stderr
    run(GOLDEN / "edm/ve.pkl", f"--dump-source={tmp_path}/texts")
    (text,) = (tmp_path / "texts").iterdir()
    assert text.name == f"{PLACEHOLDER[:16]}.txt" and hashlib.sha256(text.read_bytes()).hexdigest() == PLACEHOLDER


def test_our_own_source_is_known(tmp_path):
    net = stylegan2_ada.networks.Generator(8, 0, 8, 8, 3, {"num_layers": 1}, {"channel_base": 64})
    persistence.save({"G_ema": net}, tmp_path / "net.pkl")
    result, report = run(tmp_path / "net.pkl")
    assert "warning" not in result.stderr
    (verdict,) = report["sources"].values()
    assert verdict == {"new": False, "seen": "this project's own stylegan2_ada/networks.py"}


def test_safetensors(tmp_path):
    safetensors_pair.save(persistence.load(GOLDEN / "edm/vp.pkl"), tmp_path / "net.safetensors")
    _, pickle_report = run(GOLDEN / "edm/vp.pkl")
    for name in ("net.json", "net.safetensors"):
        _, report = run(tmp_path / name)
        assert report["networks"] == pickle_report["networks"] and report["settings"] == pickle_report["settings"]


def test_what_is_no_network_file(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"hello")
    result, _ = run(tmp_path / "x.pkl", status=2)
    assert result.stderr.startswith("error: ") and "does not begin like a pickle" in result.stderr
    result, _ = run("nonsense", status=2)
    assert "network=nonsense is neither a file nor a name" in result.stderr
