"""Network pickles: all golden ones load exactly, and what is written reads back exactly, here and in official tools."""

import collections
import copy
import io
import pickle
import pickletools
import sys
import types
from functools import cache

import numpy as np
import pytest
import torch
from golden_io import GOLDEN, cases

import di_refine.edm.networks
import stylegan2_ada.networks
from torch_utils import persistence
from torch_utils.persistence import NetworkFormatError, Record

# EDM2's are in half precision, which is widened when they are read; tests/di_refine/edm2 has them.
PICKLES = sorted(str(p.relative_to(GOLDEN)) for p in GOLDEN.glob("*/*.pkl") if p.parent.name != "edm2")
TENSORFLOW = "stylegan2/sg2tf-legacy.pkl"
RECORDS = [name for name in PICKLES if name != TENSORFLOW]
PLACEHOLDER = "raise RuntimeError('embedded source must never be executed')"
GLOBALS = {
    "torch_utils.persistence _reconstruct_persistent_obj",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch.storage _load_from_bytes",
    "torch.nn.modules.container ModuleDict",
    "collections OrderedDict",
}


@cache
def meta_of(name):
    return cases(name.replace("-era", "").replace(".pkl", ".npz"))[0]


def state_of(network):
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def networks_of(content):
    return {key: value for key, value in content.items() if isinstance(value, torch.nn.Module)}


# A second reader, with Python's own unpickler and torch.load.


class Stub:
    """Stands for any object in a pickle: it holds what was called, with what, and the state that was set."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class MiniReader(pickle.Unpickler):
    def find_class(self, module, name):
        plain = {"EasyDict": dict, "OrderedDict": collections.OrderedDict, "set": set}
        numpy = {"scalar": lambda dtype, data: float(np.frombuffer(data, "<f8")[0]), "dtype": Stub}
        tensors = {
            "_rebuild_parameter": lambda tensor, *rest: torch.nn.Parameter(tensor, False),
            "_rebuild_tensor_v2": lambda storage, offset, size, stride, *rest: torch.empty(0, dtype=storage.dtype).set_(
                storage._untyped_storage, offset, size, stride
            ),
            "_load_from_bytes": lambda data: torch.load(io.BytesIO(data), weights_only=True),
        }
        record = {"_reconstruct_persistent_obj": lambda meta: meta, "ModuleDict": Stub}
        return {**plain, **numpy, **tensors, **record}[name]


def mini_read(path):
    with open(path, "rb") as file:
        return MiniReader(file).load()


def flat_state(meta, prefix=""):
    """Return the tensors of a record as the second reader sees it, by full name."""
    state = meta["state"] if isinstance(meta, dict) else meta.state
    tensors = {
        prefix + name: tensor
        for table in ("_parameters", "_buffers")
        for name, tensor in state[table].items()
        if tensor is not None
    }
    for name, child in state["_modules"].items():
        if child is not None:
            tensors |= flat_state(child, f"{prefix}{name}.")
    return tensors


def comparable(value):
    """Return a record without tensors, in a form that can be compared."""
    if isinstance(value, torch.Tensor):
        return type(value).__name__, value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, Stub):
        return "ModuleDict", comparable(value.state)
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(comparable(item) for item in value)
    return value


@pytest.mark.parametrize("name", PICKLES)
def test_golden_pickle_loads(name):
    content = persistence.load(GOLDEN / name)
    networks = networks_of(content)
    expected = {"distill": {"ema"}, "edm": {"ema"}, "stylegan2": {"G", "D", "G_ema"}}[name.split("/")[0]]
    assert expected <= set(networks)
    for network in networks.values():
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert all(tensor.device.type == "cpu" for tensor in state_of(network).values())


@pytest.mark.parametrize("name", RECORDS)
def test_weights_are_those_a_second_reader_finds(name):
    content, raw = persistence.load(GOLDEN / name), mini_read(GOLDEN / name)
    assert list(content) == list(raw)
    for key, network in networks_of(content).items():
        expected, state = flat_state(raw[key]), state_of(network)
        assert set(state) == set(expected)
        for tensor_name, tensor in state.items():
            assert tensor.dtype == expected[tensor_name].dtype
            assert torch.equal(tensor, expected[tensor_name]), (key, tensor_name)


@pytest.mark.parametrize("name", [name for name in PICKLES if name.startswith("stylegan2")])
def test_weights_match_the_stored_sums(name):
    content = persistence.load(GOLDEN / name)
    for key, sums in meta_of(name)["state_sums"].items():
        state = state_of(content[key])
        assert set(state) == set(sums)
        for tensor_name, (total, total_abs) in sums.items():
            tensor = state[tensor_name].double()
            assert abs(tensor.sum().item() - total) <= 1e-12 * total_abs, (key, tensor_name)
            assert abs(tensor.abs().sum().item() - total_abs) <= 1e-12 * total_abs, (key, tensor_name)


@pytest.mark.parametrize("name", [name for name in RECORDS if name.startswith("stylegan2/sg2ada")])
def test_stylegan2_arguments(name):
    content, meta = persistence.load(GOLDEN / name), meta_of(name)
    assert content["G"].init_kwargs == content["G_ema"].init_kwargs == meta["G_init_kwargs"]
    assert content["D"].init_kwargs == meta["D_init_kwargs"]
    assert content["training_set_kwargs"] == meta["training_set_kwargs"]
    assert type(content["training_set_kwargs"]) is dict
    if meta["augment_init_kwargs"] is None:
        assert content["augment_pipe"] is None
    else:
        assert content["augment_pipe"].init_kwargs == meta["augment_init_kwargs"]
        assert content["augment_pipe"].p.item() == np.float32(meta["augment_p"])


@pytest.mark.parametrize("name", [name for name in RECORDS if name.startswith("edm")])
def test_edm_arguments_and_attributes(name):
    network, meta = persistence.load(GOLDEN / name)["ema"], meta_of(name)
    assert type(network).__name__ == meta["precond"]
    assert network.init_kwargs == meta["init_kwargs"]
    for attribute, value in meta["attributes"].items():
        assert getattr(network, attribute) == value, attribute
    assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == meta["state_dict"]


def test_losses_and_foreign_augmentation_stay_records():
    content = persistence.load(GOLDEN / "edm/ddpmpp_cond.pkl")
    assert isinstance(content["loss_fn"], Record) and content["loss_fn"].class_name == "EDMLoss"
    assert content["loss_fn"].module_src == PLACEHOLDER
    pipe = content["augment_pipe"]
    assert pipe.class_name == "AugmentPipe" and pipe.init_kwargs["p"] == 0.12 and pipe.state["scale_std"] == 0.2
    assert content["dataset_kwargs"]["resolution"] == 32


@pytest.mark.parametrize("name", RECORDS)
def test_saving_an_official_pickle_keeps_everything_but_the_tensors(name, tmp_path):
    """Source text byte for byte, attributes, hook tables, constructor arguments, strides; for changed weights too."""
    content = persistence.load(GOLDEN / name)
    for network in networks_of(content).values():
        for parameter in network.parameters():
            parameter.data.mul_(2)
    persistence.save(content, tmp_path / "a.pkl")
    before, after = mini_read(GOLDEN / name), mini_read(tmp_path / "a.pkl")
    assert comparable(before) == comparable(after)
    for key, network in networks_of(content).items():
        old, new = flat_state(before[key]), flat_state(after[key])
        for tensor_name in old:
            factor = 2 if tensor_name in dict(network.named_parameters()) else 1
            assert torch.equal(new[tensor_name], old[tensor_name] * factor), (key, tensor_name)


@pytest.mark.parametrize("name", PICKLES)
def test_round_trip_is_exact(name, tmp_path):
    content = persistence.load(GOLDEN / name)
    persistence.save(content, tmp_path / "a.pkl")
    again = persistence.load(tmp_path / "a.pkl")
    persistence.save(again, tmp_path / "b.pkl")
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pkl").read_bytes()
    assert list(content) == list(again)
    for key, network in networks_of(content).items():
        other = state_of(again[key])
        assert all(torch.equal(tensor, other[tensor_name]) for tensor_name, tensor in state_of(network).items())
        assert again[key].init_kwargs == network.init_kwargs
    found = {str(arg) for op, arg, _ in pickletools.genops((tmp_path / "a.pkl").read_bytes()) if op.name == "GLOBAL"}
    assert not found  # protocol 4 has them on the stack
    assert globals_of(tmp_path / "a.pkl") <= GLOBALS


def globals_of(path):
    """Return what every STACK_GLOBAL of a pickle refers to; its strings are followed through the memo."""
    found, strings, memo = set(), [], []
    for op, arg, _ in pickletools.genops(path.read_bytes()):
        if op.name == "MEMOIZE":
            memo.append(strings[-1] if strings else None)
        elif op.name in ("BINGET", "LONG_BINGET"):
            strings.append(memo[arg])
        elif op.name == "STACK_GLOBAL":
            found.add(f"{strings[-2]} {strings[-1]}")
            strings.append(None)
        elif op.name not in ("FRAME", "PROTO"):
            strings.append(arg if isinstance(arg, str) else None)
    return found


def test_outputs_after_a_round_trip_are_bit_identical(tmp_path):
    content = persistence.load(GOLDEN / "stylegan2/sg2ada-resnet16.pkl")
    persistence.save(content, tmp_path / "g.pkl")
    G, again = content["G_ema"], persistence.load(tmp_path / "g.pkl")["G_ema"]
    z, c = torch.randn(2, G.z_dim), torch.eye(G.c_dim)[:2]
    assert torch.equal(G(z, c, noise_mode="const"), again(z, c, noise_mode="const"))

    content = persistence.load(GOLDEN / "edm/fp16_cond.pkl")
    persistence.save(content, tmp_path / "e.pkl")
    x = torch.randn(2, 3, 16, 16)
    nets = content["ema"], persistence.load(tmp_path / "e.pkl")["ema"]
    first, second = (net(x, torch.ones(2), torch.eye(10)[:2]) for net in nets)
    assert torch.equal(first, second)


def test_source_can_be_path_bytes_or_file(tmp_path):
    path = GOLDEN / "edm/fp16_cond.pkl"
    file = io.BytesIO(b"skip" + path.read_bytes())
    file.seek(4)
    states = [persistence.load(source)["ema"].state_dict() for source in (str(path), path.read_bytes(), file)]
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in states[0])


def test_load_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    persistence.load(GOLDEN / "stylegan2/sg2ada-orig16.pkl")
    persistence.load(GOLDEN / "edm/ve.pkl")
    assert torch.equal(torch.rand(4), expected)


def test_source_record_survives_copies(tmp_path):
    G = persistence.load(GOLDEN / "stylegan2/sg2ada-resnet16.pkl")["G_ema"]
    average = copy.deepcopy(G)
    for parameter in average.parameters():
        parameter.data.add_(1)
    persistence.save({"G_ema": average}, tmp_path / "a.pkl")
    raw = mini_read(tmp_path / "a.pkl")["G_ema"]
    assert raw["module_src"] == PLACEHOLDER
    assert torch.equal(flat_state(raw)["synthesis.b4.const"], G.synthesis.b4.const + 1)


@pytest.mark.parametrize("change", ["half", "channels_last", "train"])
def test_saving_does_not_depend_on_how_the_network_is_held(change, tmp_path):
    content = persistence.load(GOLDEN / "stylegan2/sg2ada-resnet16.pkl")
    for network in networks_of(content).values():
        for parameter in network.parameters():
            parameter.data.copy_(parameter.half().float())
    persistence.save(content, tmp_path / "a.pkl")
    D = content["D"]
    if change == "half":
        D.half()
    elif change == "channels_last":
        D.to(memory_format=torch.channels_last)
    else:
        D.train().requires_grad_(True)
    buffers = {name: buffer.clone() for name, buffer in D.named_buffers()}
    persistence.save(content, tmp_path / "b.pkl")
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pkl").read_bytes()
    assert all(p.dtype == (torch.float16 if change == "half" else torch.float32) for p in D.parameters())
    assert all(p.requires_grad == D.training == (change == "train") for p in D.parameters())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in D.named_buffers())


def test_saving_gives_no_pickler_a_method_of_its_own(tmp_path, monkeypatch):
    """From Python 3.13 on a pickler takes none, so this test does there what it imitates elsewhere."""

    class Strict(pickle.Pickler):
        def __setattr__(self, name, value):
            raise AttributeError(f"'_pickle.Pickler' object attribute '{name}' is read-only")

    monkeypatch.setattr(pickle, "Pickler", Strict)
    persistence.save({"G": stylegan2_ada.networks.Generator(4, 0, 4, 4, 1)}, tmp_path / "a.pkl")
    monkeypatch.undo()
    assert list(persistence.load(tmp_path / "a.pkl")) == ["G"]


def test_half_precision_is_for_the_file_alone(tmp_path):
    content = persistence.load(GOLDEN / "stylegan2/sg2ada-resnet16.pkl")
    persistence.save(content, tmp_path / "full.pkl")
    persistence.save(content, tmp_path / "half.pkl", half=True)
    sizes = [(tmp_path / name).stat().st_size for name in ("full.pkl", "half.pkl")]
    weights = sum(t.numel() for network in networks_of(content).values() for t in network.state_dict().values())
    assert sizes[0] - sizes[1] > 1.9 * weights
    read = persistence.load(tmp_path / "half.pkl")
    for name, network in networks_of(content).items():
        for key, value in network.state_dict().items():
            found = read[name].state_dict()[key]
            assert found.dtype == value.dtype and torch.equal(found, value.half().to(value.dtype)), f"{name}.{key}"
    persistence.save(read, tmp_path / "again.pkl")  # whoever goes on with the network gets all digits
    assert abs((tmp_path / "again.pkl").stat().st_size - sizes[0]) < 1000
    next(iter(networks_of(content).values())).synthesis.b4.conv1.weight.data.fill_(1e6)
    with pytest.raises(NetworkFormatError, match="non-finite"):
        persistence.save(content, tmp_path / "half.pkl", half=True)


@pytest.mark.gpu
def test_saving_from_the_gpu(tmp_path):
    content = persistence.load(GOLDEN / "stylegan2/sg2ada-resnet16.pkl")
    persistence.save(content, tmp_path / "a.pkl")
    for network in networks_of(content).values():
        network.cuda()
    persistence.save(content, tmp_path / "b.pkl")
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pkl").read_bytes()
    assert all(parameter.is_cuda for parameter in content["G"].parameters())


def test_one_network_under_two_names_stays_one(tmp_path):
    G = persistence.load(GOLDEN / "stylegan2/sg2ada-orig16.pkl")["G"]
    persistence.save({"G": G, "G_ema": G, "D": None}, tmp_path / "a.pkl")
    content = persistence.load(tmp_path / "a.pkl")
    assert content["G"] is content["G_ema"] and content["D"] is None


def test_permuted_weights_keep_their_strides(tmp_path):
    """Official networks built for channels-last float16 store such weights."""
    D = stylegan2_ada.networks.Discriminator(0, 16, 3, channel_base=64, block_kwargs={"fp16_channels_last": True})
    D.b16.conv0.weight.data = D.b16.conv0.weight.data.contiguous(memory_format=torch.channels_last)
    persistence.save({"D": D}, tmp_path / "a.pkl")
    loaded = persistence.load(tmp_path / "a.pkl")["D"]
    assert torch.equal(loaded.b16.conv0.weight, D.b16.conv0.weight)
    loaded.b16.conv0.weight.data = D.b16.conv0.weight.data  # now permuted
    persistence.save({"D": loaded}, tmp_path / "b.pkl")
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pkl").read_bytes()


# Networks made here, opened by something that does what the official loader does.


class OfficialLike(pickle.Unpickler):
    """Runs the embedded source text as a new module and fills an instance of its class with the stored state."""

    modules = {}

    def find_class(self, module, name):
        if name == "_reconstruct_persistent_obj":
            return self.rebuild
        return super().find_class(module, name)

    def rebuild(self, meta):
        text = meta["module_src"]
        if text not in self.modules:
            module = self.modules[text] = types.ModuleType(f"_fresh_{len(self.modules)}")
            sys.modules[module.__name__] = module
            exec(text, module.__dict__)
        cls = getattr(self.modules[text], meta["class_name"])
        instance = cls.__new__(cls)
        instance.__dict__.update(meta["state"])
        return instance


def fresh_networks():
    generator = stylegan2_ada.networks.Generator(
        16, 2, 16, 16, 3, mapping_kwargs={"num_layers": 2}, synthesis_kwargs={"channel_base": 128, "channel_max": 16}
    )
    discriminator = stylegan2_ada.networks.Discriminator(
        c_dim=2, img_resolution=16, img_channels=3, channel_base=128, channel_max=16, block_kwargs={"freeze_layers": 2}
    )
    teacher = di_refine.edm.networks.EDMPrecond(
        16, 3, label_dim=2, model_type="SongUNet", model_channels=8, channel_mult=[1, 2], num_blocks=1
    )
    for parameter in teacher.parameters():
        parameter.data.normal_()
    return {"G": generator, "D": discriminator, "ema": teacher}


def outputs(networks):
    z, c, x = torch.ones(4, 16), torch.eye(2)[[0, 1, 0, 1]], torch.linspace(-1, 1, 4 * 3 * 256).reshape(4, 3, 16, 16)
    return (
        networks["G"].eval()(z, c, noise_mode="const"),
        networks["D"].eval()(x, c),
        networks["ema"].eval()(x, torch.ones(4), c),
    )


def test_fresh_networks_round_trip_and_open_like_official_ones(tmp_path):
    networks = fresh_networks()
    persistence.save(networks, tmp_path / "a.pkl")
    expected = outputs(networks)
    loaded = persistence.load(tmp_path / "a.pkl")
    assert type(loaded["G"]) is stylegan2_ada.networks.Generator
    for key in networks:
        assert loaded[key].init_args == networks[key].init_args
        assert loaded[key].init_kwargs == networks[key].init_kwargs
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(loaded)))

    with open(tmp_path / "a.pkl", "rb") as file:
        official = OfficialLike(file).load()
    assert type(official["G"]) is not stylegan2_ada.networks.Generator
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(official)))
    # The text has registered its classes a second time: the first ones still count.
    assert type(persistence.load(tmp_path / "a.pkl")["G"]) is stylegan2_ada.networks.Generator

    raw = mini_read(tmp_path / "a.pkl")
    with open(stylegan2_ada.networks.__file__, encoding="utf-8") as file:
        assert raw["G"]["module_src"] == raw["D"]["module_src"] == file.read()
    assert raw["G"]["state"]["training"] is False and not raw["G"]["state"]["_parameters"]


def test_plain_unpickling_says_what_to_do(tmp_path):
    persistence.save({"G": fresh_networks()["G"]}, tmp_path / "a.pkl")
    with open(tmp_path / "a.pkl", "rb") as file, pytest.raises(NetworkFormatError, match="persistence.load"):
        pickle.load(file)


# The decorator.


@persistence.persistent_class
class Base(torch.nn.Module):
    def __init__(self, width, depth=1, *, options=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, depth))
        self.register_buffer("count", torch.zeros([], dtype=torch.int64), persistent=False)
        self.options = options or {}


@persistence.persistent_class
class Derived(Base):
    def __init__(self, width):
        super().__init__(width, depth=2)


@persistence.persistent_class
class Settings:
    """Not a network."""

    def __init__(self, gain=1.0):
        self.gain = gain


def test_decorator_records_the_outermost_call():
    derived = Derived(3)
    assert derived.init_args == (3,) and derived.init_kwargs == {}
    options = {"taps": [1, 2]}
    base = Base(2, options=options)
    options["taps"].append(3)
    assert base.init_kwargs == {"options": {"taps": [1, 2]}}
    base.init_kwargs["options"]["taps"].append(4)
    assert base.init_kwargs == {"options": {"taps": [1, 2]}}
    assert persistence.persistent_class(Base) is Base and Base.__name__ == "Base"


def test_user_classes_round_trip(tmp_path):
    content = {"net": Derived(3), "settings": Settings(gain=2.5), "nothing": None, "numbers": [1, 2.5, (True, "x")]}
    content["net"].count += 7
    persistence.save({**content, "scalar": np.float64(0.5), "tensor": torch.arange(3)}, tmp_path / "a.pkl")
    loaded = persistence.load(tmp_path / "a.pkl")
    assert type(loaded["net"]) is Derived and loaded["net"].count == 7
    assert torch.equal(loaded["net"].weight, content["net"].weight)
    assert type(loaded["settings"]) is Settings and loaded["settings"].gain == 2.5
    assert loaded["numbers"] == content["numbers"] and loaded["scalar"] == 0.5
    assert torch.equal(loaded["tensor"], torch.arange(3))


def test_first_class_that_fits_is_taken(tmp_path):
    first = {}
    for width in (2, 3):

        def __init__(self, width=width):
            torch.nn.Module.__init__(self)
            self.weight = torch.nn.Parameter(torch.randn(width))

        cls = type("SameName", (torch.nn.Module,), {"__init__": __init__})
        first[width] = persistence.persistent_class(cls)
    for cls in first.values():
        persistence.save({"net": cls()}, tmp_path / "a.pkl")
        assert type(persistence.load(tmp_path / "a.pkl")["net"]) is cls


# What cannot be written.


def nan_network():
    network = Base(2)
    network.weight.data[0] = float("nan")
    return network


def altered_network():
    network = Base(2)
    network.extra = torch.nn.Parameter(torch.zeros(1))
    return network


def altered_official_network():
    network = persistence.load(GOLDEN / "edm/fp16_cond.pkl")["ema"]
    network.extra = torch.nn.Parameter(torch.zeros(1))
    return network


def odd_attribute():
    network = Base(2)
    network.callback = print
    return network


@pytest.mark.parametrize(
    "make, reason",
    [
        (nan_network, "'weight' contains non-finite values"),
        (altered_network, "unexpected: extra"),
        (altered_official_network, "missing: extra|extra"),
        (odd_attribute, "builtin_function_or_method cannot be written"),
        (lambda: torch.nn.Linear(2, 2), "Linear is not a persistent class"),
        (lambda: print, "cannot be written"),
        (lambda: Base(2, options={"x": float("nan")}), "out of range"),
    ],
)
def test_save_refuses_what_could_not_be_loaded(make, reason, tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(b"precious")
    with pytest.raises(NetworkFormatError, match=reason) as caught:
        persistence.save({"net": make()}, path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [path]


# Files of other times and projects.


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("name", ["edm/vp.pkl", "stylegan2/sg2ada-orig16.pkl"])
def test_protocols(name, protocol, tmp_path, monkeypatch):
    """What other versions of Python write by default; the golden files have 3 and 4."""
    content = persistence.load(GOLDEN / name)
    monkeypatch.setattr(persistence.writer, "PROTOCOL", protocol)
    persistence.save(content, tmp_path / "a.pkl")
    assert (tmp_path / "a.pkl").read_bytes()[:2] == bytes([0x80, protocol])
    for key, network in networks_of(content).items():
        found = state_of(persistence.load(tmp_path / "a.pkl")[key])
        assert all(torch.equal(found[tensor_name], tensor) for tensor_name, tensor in state_of(network).items())


@pytest.mark.parametrize("numpy_name", ["numpy.core", "numpy._core"])
def test_numpy_arrays_of_all_protocols(numpy_name):
    """TensorFlow-era networks hold arrays; protocol 5 has them in another form."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    for protocol in (2, 3, 4, 5):
        for value in (array, np.asfortranarray(array), np.float32(2.5)):
            data = pickle.dumps({"x": value}, protocol)
            for spelling in ("numpy._core", "numpy.core"):
                data = data.replace(f"c{spelling}.".encode(), f"c{numpy_name}.".encode())
            if protocol == 2 and b"_codecs" in data:
                continue  # bytes as Latin-1 text: nothing that holds networks was ever written so
            content = persistence.load_records(data)["x"]
            found = content if isinstance(content, float) else content.value
            assert np.array_equal(found, value) and getattr(found, "dtype", np.float32) == np.float32


def test_sets_under_their_python_2_name():
    data = b"\x80\x02}X\x01\x00\x00\x00xc__builtin__\nset\n](X\x01\x00\x00\x00aX\x01\x00\x00\x00be\x85Rs."
    assert persistence.load(data) == {"x": {"a", "b"}}


@pytest.mark.parametrize("key", ["ema", "G_ema", "net"])
def test_one_step_generators_of_distillation_projects(key, tmp_path):
    """EDM networks alone, as `ema`, or under a generator's name; sometimes beside the score network `Sg`."""
    network = persistence.load(GOLDEN / "distill/teacher.pkl")["ema"]
    score = persistence.load(GOLDEN / "distill/fake_score.pkl")["ema"]
    persistence.save({key: network, "Sg": score}, tmp_path / "a.pkl")
    content = persistence.load(tmp_path / "a.pkl")
    assert list(content) == [key, "Sg"] and type(content[key]).__name__ == "EDMPrecond"
    assert torch.equal(content[key](torch.ones(1, 3, 16, 16), 2.5), network(torch.ones(1, 3, 16, 16), 2.5))


@pytest.mark.parametrize("keep", [["G_ema"], ["G_ema", "training_set_kwargs"], ["augment_pipe", "D"], []])
def test_optional_keys_may_be_missing(keep, tmp_path):
    content = persistence.load(GOLDEN / "stylegan2/sg2ada-cifar-cond.pkl")
    persistence.save({key: content[key] for key in keep}, tmp_path / "a.pkl")
    assert list(persistence.load(tmp_path / "a.pkl")) == keep


def test_records_are_read_without_building(monkeypatch):
    monkeypatch.setattr(persistence.builder, "assemble", None)
    content = persistence.load_records(GOLDEN / "stylegan2/sg2tf-legacy.pkl")
    assert list(content) == ["G", "D", "G_ema"] and content["G"].class_name == persistence.TENSORFLOW_NETWORK
    content = persistence.load_records(GOLDEN / "edm/vp.pkl")
    assert content["ema"].class_name == "VPPrecond" and content["ema"].init_kwargs["img_resolution"] == 16


def test_a_pickle_does_not_depend_on_which_strings_are_one_object(tmp_path):
    for name, texts in (("a.pkl", ["ab" * 9] * 2), ("b.pkl", ["".join(["ab"] * 9) for _ in range(2)])):
        persistence.save({"x": texts}, tmp_path / name)
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pkl").read_bytes()
