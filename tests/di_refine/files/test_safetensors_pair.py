"""Pickle to safetensors with JSON and back: nothing is lost, and nothing wrong gets in."""

import hashlib
import json
import math
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from golden_io import GOLDEN

import stylegan2_ada.networks
from di_refine.files import safetensors_pair
from torch_utils import persistence
from torch_utils.persistence import NetworkFormatError, Record

PICKLES = sorted(str(path.relative_to(GOLDEN)) for path in GOLDEN.glob("*/*.pkl"))
PICKLES.remove("edm2/latent.pkl")  # its record of an autoencoder holds arrays, for which pairs have no place


@pytest.mark.parametrize("name", PICKLES)
def test_round_trip_gives_the_same_pickle_bit_for_bit(name, tmp_path):
    networks = persistence.load(GOLDEN / name)
    persistence.save(networks, tmp_path / "a.pkl")
    safetensors_pair.save(networks, tmp_path / "b.safetensors")
    persistence.save(safetensors_pair.load(tmp_path / "b.json"), tmp_path / "c.pkl")
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "c.pkl").read_bytes()


def small_pair(tmp_path, networks=None):
    safetensors_pair.save(networks or persistence.load(GOLDEN / "edm/fp16_cond.pkl"), tmp_path / "net.safetensors")
    return tmp_path / "net.json", tmp_path / "net.safetensors"


def test_names_are_those_of_the_state_dictionary(tmp_path):
    networks = persistence.load(GOLDEN / "stylegan2/sg2ada-resnet16.pkl")
    config_path, tensors_path = small_pair(tmp_path, networks)
    tensors = safetensors.torch.load_file(tensors_path)
    for name, tensor in networks["G_ema"].state_dict().items():
        assert torch.equal(tensors[f"G_ema.{name}"], tensor)
    config = json.loads(config_path.read_text())
    assert config["format"] == "di-refine-networks" and config["version"] == 1
    state = config["content"]["G_ema"]["state"]
    assert state["_init_kwargs"]["z_dim"] == networks["G_ema"].z_dim
    assert list(config["sources"].values()) == ["raise RuntimeError('embedded source must never be executed')"]
    assert config["content"]["G_ema"]["source"] in config["sources"]


def test_every_kind_of_value_comes_back(tmp_path):
    shared = [1, 2]
    content = {
        "settings": {
            "floats": [0.1, math.inf, -math.inf, 1e-300],
            "numbers": (1, -(2**70), True, None),
            "text": "äöü \ud800 $x",
            "ordered": OrderedDict(b=1, a=2),
            "odd names": {"$record": 1, "": 2},
            "numbered": {1: "one"},
            "set": {"a", "b"},
            "bytes": b"\x00\xff",
            "empty": [(), [], {}, set()],
            "twice": [shared, shared, (shared,)],
            "tensor": torch.arange(6).reshape(2, 3).T,
        },
        "loss_fn": Record("Loss", {"x": 1.0}, "source"),
        "nothing": None,
    }
    config_path, _ = small_pair(tmp_path, content)
    again = safetensors_pair.load(config_path)
    expected, found = dict(content["settings"]), again["settings"]
    tensor, other = expected.pop("tensor"), found.pop("tensor")
    assert torch.equal(tensor, other) and tensor.stride() == other.stride()
    assert found == expected and type(found["ordered"]) is OrderedDict and list(found["ordered"]) == ["b", "a"]
    assert found["twice"][0] is found["twice"][1] is found["twice"][2][0]
    assert again["loss_fn"].state == {"x": 1.0} and again["loss_fn"].module_src == "source"
    assert again["nothing"] is None and list(again) == list(content)


def test_permuted_weights_keep_their_strides(tmp_path):
    net = stylegan2_ada.networks.Discriminator(0, 16, 3, channel_base=64, block_kwargs={"fp16_channels_last": True})
    persistence.save({"D": net}, tmp_path / "a.pkl")
    networks = persistence.load(tmp_path / "a.pkl")
    config_path, _ = small_pair(tmp_path, networks)
    persistence.save(safetensors_pair.load(config_path), tmp_path / "b.pkl")
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pkl").read_bytes()


def test_one_network_under_two_names_stays_one(tmp_path):
    net = persistence.load(GOLDEN / "stylegan2/sg2ada-orig16.pkl")["G_ema"]
    config_path, tensors_path = small_pair(tmp_path, {"G": net, "G_ema": net})
    again = safetensors_pair.load(config_path)
    assert again["G"] is again["G_ema"]
    assert len(safetensors.torch.load_file(tensors_path)) == len(net.state_dict())


def refused(path, reason):
    with pytest.raises(NetworkFormatError, match=reason) as caught:
        safetensors_pair.load(path)
    assert str(path.with_suffix("")) in str(caught.value) and str(caught.value).isprintable()


def edit(config_path, change):
    config = json.loads(config_path.read_text())
    change(config)
    config_path.write_text(json.dumps(config))


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda c: c.update(format="other"), "its format is not"),
        (lambda c: c.update(version=2), "version 2; only 1 is known"),
        (lambda c: c.pop("content"), "'content' is missing or malformed"),
        (lambda c: c["tensors"].update(sha256="0"), "net.safetensors is not the file it was written with"),
        (lambda c: c["content"]["ema"].update(source="00"), "the source 00 is missing"),
        (lambda c: c["content"]["ema"].update(version=7), "a record of version 7"),
        (lambda c: c["content"]["ema"].update({"$record": "Nonsense"}), "the class is not known"),
        (lambda c: c["content"]["ema"].update({"$record": 5}), "malformed record"),
        (lambda c: c["content"]["ema"]["state"]["_init_kwargs"].update(img_resolution=32), "attribute|do not fit"),
        (lambda c: c["content"].update(x={"$tensor": "nothing"}), "tensor 'nothing' is missing"),
        (lambda c: c["content"].update(x={"$code": "os.system"}), "'\\$code' is not known"),
        (lambda c: c["content"].update(x={"a": 1, "$tensor": "x"}), "marked and other keys"),
        (lambda c: c["content"].update(x={"$shared": 5}), "reference to nothing"),
        (lambda c: (c["shared"].append({"$shared": 0}), c["content"].update(x={"$shared": 0})), "circular"),
        (lambda c: c["content"].update(x={"$bytes": "!!"}), "malformed bytes"),
        (lambda c: c["content"].update(x={"$set": [1]}), "malformed set"),
        (lambda c: c["content"].update(x={"$float": "os"}), "damaged"),
        (lambda c: c["content"].update(x={"$dict": [[[1], 2]]}), "neither text nor a whole number"),
        (lambda c: c["content"].update(x=nested(900)), "RecursionError"),
        (lambda c: c["content"].pop("ema"), "nothing refers to the tensor"),
        (lambda c: c["content"].update(G_ema=5), "'G_ema' is a int, not a network"),
    ],
)
def test_wrong_configurations(tmp_path, change, reason):
    config_path, _ = small_pair(tmp_path)
    edit(config_path, change)
    refused(config_path, reason)


def test_wrong_strides(tmp_path):
    config_path, _ = small_pair(tmp_path, {"x": torch.arange(6).reshape(2, 3).T})
    for stride in ([1, 1], [3, 1], [1], [0, 3], [1, 6], [-1, 3]):
        edit(config_path, lambda config, stride=stride: config["content"]["x"].update(stride=stride))
        refused(config_path, "strides of 'x' leave gaps or overlap")


def test_wrong_files(tmp_path):
    config_path, tensors_path = small_pair(tmp_path)
    text = config_path.read_text()
    for wrong, reason in [
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"format": NaN}', "NaN is no JSON"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[]", "format"),
    ]:
        config_path.write_text(wrong)
        refused(config_path, reason)
    config_path.write_bytes(b"\xff\xfe")
    refused(config_path, "no JSON")
    config_path.unlink()
    refused(tensors_path, "net.json: No such file")
    config_path.write_text(text)
    tensors_path.write_bytes(b"\xff" * 100)
    edit(config_path, lambda c: c["tensors"].update(sha256=hashlib.sha256(b"\xff" * 100).hexdigest()))
    refused(config_path, "[Hh]eader")
    tensors_path.unlink()
    tensors_path.mkdir()
    refused(config_path, "net.safetensors: a folder")


def test_what_has_no_place_is_not_written(tmp_path):
    for value, reason in [({"x": print}, "'?builtin_function_or_method"), ({"G": torch.nn.Linear(1, 1)}, "Linear")]:
        with pytest.raises(NetworkFormatError, match=reason):
            safetensors_pair.save(value, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []
