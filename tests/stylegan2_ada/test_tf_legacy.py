"""TensorFlow-era pickles and the StyleGAN3 repository's StyleGAN2: names, settings, weights, images, and refusals."""

import numpy as np
import pytest
import torch
from golden_io import GOLDEN, assert_close, cases, load_npz

from stylegan2_ada import flavours, networks, tf_legacy
from torch_utils import persistence
from torch_utils.persistence import TENSORFLOW_NETWORK, NetworkFormatError, Record
from torch_utils.persistence.reader import Array

TF, SG3 = "sg2tf-legacy", "sg3repo-stylegan2"
FORWARD = 3e-5


def load(name):
    return persistence.load(GOLDEN / "stylegan2" / f"{name}.pkl")


def arrays(name):
    return {k: torch.from_numpy(v.copy()) for k, v in load_npz(f"stylegan2/{name}.npz").items() if k != "meta"}


def state_of(network):
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


@pytest.mark.parametrize("name", [TF, SG3])
def test_golden_outputs(name):
    content, a = load(name), arrays(name)
    G, D = content["G_ema"], content["D"]
    assert_close(G.mapping(a["z"], a["c"]), a["ws"], FORWARD, "ws")
    assert_close(G.synthesis(a["ws"], noise_mode="const", force_fp32=True), a["img_const"], FORWARD, "img")
    first = len(a["G_img_const"])
    img = content["G"](a["z"][:first], a["c"][:first], noise_mode="const", force_fp32=True)
    assert_close(img, a["G_img_const"], FORWARD, "G")
    assert_close(D(a["D_img"], a["c"], force_fp32=True), a["logits"], FORWARD, "logits")


def test_tensorflow_arguments_and_round_trip(tmp_path):
    content, meta = load(TF), cases(f"stylegan2/{TF}.npz")[0]
    assert list(content) == ["G", "D", "G_ema"]
    assert content["G"].init_kwargs == content["G_ema"].init_kwargs == meta["converted_G_init_kwargs"]
    assert content["D"].init_kwargs == meta["converted_D_init_kwargs"]
    persistence.save(content, tmp_path / "converted.pkl")
    again = persistence.load(tmp_path / "converted.pkl")
    for key, network in content.items():
        other = state_of(again[key])
        assert again[key].init_kwargs == network.init_kwargs
        assert all(torch.equal(tensor, other[name]) for name, tensor in state_of(network).items())


# TensorFlow files made here, by going from a network of this package back to TensorFlow's names.


def to_tensorflow(network, static, version=5):
    """Return a TensorFlow record of a generator or discriminator: the table of names is read from right to left."""
    is_generator = isinstance(network, networks.Generator)
    variables = {"lod": 0.0}
    for name, tensor in state_of(network).items():
        value = tensor.detach().numpy()
        if name.endswith("resample_filter"):
            continue
        module, *path, leaf = name.split(".")
        path = path if is_generator else [module, *path]
        if name == "mapping.w_avg":
            variables["dlatent_avg"] = value
        elif "mapping" in name:
            layer = path[-1]
            number = layer.removeprefix("fc")
            title = "LabelEmbed" if layer == "embed" else ("Dense" if is_generator else "Mapping") + number
            variables[("mapping/" if is_generator else "") + f"{title}/{leaf}"] = value.T
        elif name == "synthesis.b4.const":
            variables["synthesis/4x4/Const/const"] = value[None]
        elif leaf == "noise_const":
            index = 2 * int(np.log2(len(value))) - (4 if path[1] == "conv1" else 5)
            variables[f"synthesis/noise{index}"] = value[None, None]
        else:
            size = int(path[0][1:])
            layer, affine = path[1], "affine" in path
            titles = {"torgb": "ToRGB", "fromrgb": "FromRGB", "skip": "Skip", "conv": "Conv", "fc": "Dense0"}
            if is_generator:
                titles |= {"conv1": "Conv" if size == 4 else "Conv1", "conv0": "Conv0_up"}
            else:
                titles |= {"conv0": "Conv0", "conv1": "Conv1_down"}
            if affine:
                leaf, value = "mod_" + leaf, value.T if leaf == "weight" else value - 1
            elif leaf == "weight" and value.ndim == 4:
                value = value.transpose(2, 3, 1, 0)
                if is_generator and layer in ("conv0", "skip"):
                    value = value[::-1, ::-1]
            elif leaf == "weight":
                value = value.T
            full = f"{size}x{size}/{titles.get(layer)}/{leaf}" if layer != "out" else f"Output/{leaf}"
            variables[("synthesis/" if is_generator else "") + full] = value
    values = {name: value if isinstance(value, float) else Array(value) for name, value in variables.items()}

    def record(prefix, others=()):
        own = [
            (name.removeprefix(prefix), value)
            for name, value in values.items()
            if name.startswith(prefix) and not name.startswith(tuple(others))
        ]
        return {"version": version, "static_kwargs": static, "variables": own, "components": {}}

    if not is_generator:
        return Record(TENSORFLOW_NETWORK, record(""))
    state = record("", ["synthesis/", "mapping/"])
    for part in ("synthesis", "mapping"):
        state["components"][part] = Record(TENSORFLOW_NETWORK, record(f"{part}/"))
    return Record(TENSORFLOW_NETWORK, state)


SMALL = {"resolution": 16, "fmap_base": 32, "fmap_max": 8, "label_size": 3}
GENERATOR = {**SMALL, "latent_size": 8, "dlatent_size": 8, "mapping_layers": 2}


def generator(**changes):
    kwargs = {"channel_base": 64, "channel_max": 8, **changes}
    network = networks.Generator(8, 3, 8, 16, 3, {"num_layers": 2}, kwargs)
    randomise(network)
    return network


def discriminator(**changes):
    kwargs = {"channel_base": 64, "channel_max": 8, "mapping_kwargs": {"num_layers": 0}, **changes}
    network = networks.Discriminator(3, 16, 3, epilogue_kwargs={"mbstd_group_size": None}, **kwargs)
    randomise(network)
    return network


def randomise(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_()


def assert_converted(record, network):
    plan = tf_legacy.translate(record)
    expected = state_of(network)
    assert set(plan.tensors) == set(expected)
    for name, tensor in plan.tensors.items():
        tolerance = 1e-6 if "affine.bias" in name else 0
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=0, atol=tolerance, msg=name)
    return plan


@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
@pytest.mark.parametrize("taps", [[1, 3, 3, 1], [1, 2, 1]])
def test_generator_architectures(architecture, taps):
    network = generator(architecture=architecture, resample_filter=taps)
    static = {**GENERATOR, "architecture": architecture, "resample_kernel": taps, "truncation_psi": 0.5}
    plan = assert_converted(to_tensorflow(network, static), network)
    assert plan.class_name == "Generator" and plan.kwargs["synthesis_kwargs"]["architecture"] == architecture


@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
@pytest.mark.parametrize("taps", [[1, 3, 3, 1], [1, 2, 1]])
def test_discriminator_architectures(architecture, taps):
    network = discriminator(architecture=architecture, block_kwargs={"resample_filter": taps})
    static = {**SMALL, "architecture": architecture, "resample_kernel": taps}
    plan = assert_converted(to_tensorflow(network, static), network)
    assert plan.class_name == "Discriminator" and plan.kwargs["architecture"] == architecture


def test_discriminator_with_mapping_layers():
    network = discriminator(mapping_kwargs={"num_layers": 2})
    assert_converted(to_tensorflow(network, {**SMALL, "mapping_layers": 2, "architecture": "resnet"}), network)


def test_without_noise():
    network = generator(use_noise=False)
    assert_converted(to_tensorflow(network, {**GENERATOR, "use_noise": False}), network)


def rename(record, part, old, new):
    state = record.state["components"][part].state if part else record.state
    renamed = [(name.replace(old, new), value) for name, value in state["variables"]]
    assert renamed != state["variables"]
    state["variables"] = renamed
    return record


def test_names_from_progressive_growing_mean_architecture_orig():
    network = generator(architecture="orig")
    record = rename(to_tensorflow(network, GENERATOR), "synthesis", "16x16/ToRGB/", "ToRGB_lod0/")
    assert assert_converted(record, network).kwargs["synthesis_kwargs"]["architecture"] == "orig"
    network = discriminator(architecture="orig")
    record = rename(to_tensorflow(network, SMALL), "", "16x16/FromRGB/", "FromRGB_lod0/")
    assert assert_converted(record, network).kwargs["architecture"] == "orig"


def test_defaults_of_tensorflow():
    bare = {"version": 4, "static_kwargs": {}, "variables": [], "components": {}}
    D = tf_legacy.translate(Record(TENSORFLOW_NETWORK, bare)).kwargs
    assert D["mapping_kwargs"]["num_layers"] == 0 and D["mapping_kwargs"]["lr_multiplier"] == 0.1
    assert D["channel_base"] == 32768 and D["img_resolution"] == 1024
    assert D["epilogue_kwargs"]["mbstd_group_size"] is None
    parts = {"synthesis": Record(TENSORFLOW_NETWORK, bare)}
    state = {**bare, "components": parts, "static_kwargs": {"w_avg_beta": None}}
    G = tf_legacy.translate(Record(TENSORFLOW_NETWORK, state)).kwargs
    assert G["mapping_kwargs"]["w_avg_beta"] == 1 and G["mapping_kwargs"]["num_layers"] == 8
    assert G["z_dim"] == G["w_dim"] == 512 and G["synthesis_kwargs"]["architecture"] == "skip"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"version": 3}, "version 3"),
        ({"version": None}, "version None"),
        ({"static_kwargs": None}, "without settings"),
        ({"static_kwargs": {"sorcery": 1}}, "unknown TensorFlow settings: sorcery"),
        ({"static_kwargs": {"resolution": "big"}}, "resolution is big"),
        ({"static_kwargs": {"resolution": 2**40}}, "resolution is 1099511627776"),
        ({"static_kwargs": {"label_size": -1}}, "label_size is -1"),
        ({"variables": None}, "malformed TensorFlow network"),
        ({"variables": [1]}, "malformed TensorFlow variable"),
        ({"variables": [("Output/weight", "x")]}, "'Output/weight' is not a float32 array"),
        ({"variables": [("Output/weight", Array())]}, "'Output/weight' is not a float32 array"),
        ({"variables": [("Output/weight", Array(np.zeros((2, 2))))]}, "'Output/weight' is not a float32 array"),
        ({"variables": [("Output/weight", Array(np.zeros(2, np.float32)))]}, r"'Output/weight' has the shape \[2\]"),
        ({"components": {"x": 5}}, "component 'x' is no network"),
    ],
)
def test_malformed_tensorflow_networks(change, reason):
    state = {"version": 5, "static_kwargs": {}, "variables": [], "components": {}, **change}
    with pytest.raises(NetworkFormatError, match=reason):
        tf_legacy.translate(Record(TENSORFLOW_NETWORK, state))


def test_a_network_within_itself():
    state = {"version": 5, "static_kwargs": {}, "variables": [], "components": {}}
    record = Record(TENSORFLOW_NETWORK, state)
    state["components"]["synthesis"] = record
    with pytest.raises(NetworkFormatError, match="malformed"):
        tf_legacy.translate(record)


def test_two_variables_for_one_place():
    record = to_tensorflow(generator(), GENERATOR)
    record.state["variables"].append(("synthesis/ToRGB_lod0/bias", Array(np.zeros(3, np.float32))))
    with pytest.raises(NetworkFormatError, match="two TensorFlow variables hold 'synthesis.b16.torgb.bias'"):
        tf_legacy.translate(record)


# The StyleGAN3 repository's StyleGAN2.


def test_flat_arguments_become_nested():
    content, meta = load(SG3), cases(f"stylegan2/{SG3}.npz")[0]
    G, D = content["G_ema"], content["D"]
    stored = meta["G_init_kwargs"]
    synthesis = {"channel_base": stored["channel_base"], "channel_max": stored["channel_max"]}
    assert G.init_kwargs["synthesis_kwargs"] == {**synthesis, "num_fp16_res": 4, "conv_clamp": 256}
    assert G.init_kwargs["mapping_kwargs"] == {"num_layers": 8, "w_avg_beta": 0.998}
    assert G.synthesis.b32.conv0.conv_clamp == D.b32.conv0.conv_clamp == D.b4.conv.conv_clamp == 256
    assert G.synthesis.b8.use_fp16 and D.b8.use_fp16 and not G.synthesis.b4.use_fp16
    assert D.init_kwargs["conv_clamp"] == 256
    assert meta["training_set_kwargs"] == content["training_set_kwargs"]


def test_flat_arguments_are_written_back(tmp_path):
    content = load(SG3)
    persistence.save(content, tmp_path / "a.pkl")
    again = persistence.load(tmp_path / "a.pkl")
    assert again["G"].init_kwargs == content["G"].init_kwargs
    source = again["G"]._source_record
    assert source.init_kwargs == cases(f"stylegan2/{SG3}.npz")[0]["G_init_kwargs"]


def test_nested_arguments_stay_as_they_are():
    for name in ("sg2ada-cifar-cond", "sg2ada-orig16"):
        source = load(name)["G"]._source_record
        assert flavours.translate_generator(Record("Generator", {"_init_kwargs": source.init_kwargs})).kwargs == (
            source.init_kwargs
        )


@pytest.mark.parametrize("child", ["input", "L0_36_512", "L13_256_128"])
def test_stylegan3_is_refused(child):
    part = Record("SynthesisLayer", {})
    synthesis = Record("SynthesisNetwork", {"_modules": {child: part}})
    with pytest.raises(NetworkFormatError, match="StyleGAN3"):
        flavours.translate_generator(Record("Generator", {"_modules": {"synthesis": synthesis}}))


def test_filters_have_bounds():
    record = to_tensorflow(generator(), {**GENERATOR, "resample_kernel": [1] * 65})
    with pytest.raises(NetworkFormatError, match="resample_kernel is a list"):
        tf_legacy.translate(record)
