"""The FID Inception network against golden outputs for weights made by a recipe."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from di_refine.errors import InputError
from di_refine.metrics.inception import InceptionV3, resize_tf1

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics" / "inception.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as archive:
        arrays = {key: archive[key] for key in archive.files if key != "meta"}
        return arrays, json.loads(str(archive["meta"][0]))


@pytest.fixture(scope="module")
def weights(golden):
    """The recipe: every tensor from its own generator, seeded by the name's checksum."""
    arrays, meta = golden
    state = {}
    for key, shape in meta["state_dict"].items():
        if key.endswith("num_batches_tracked"):
            continue
        rng = np.random.default_rng([zlib.crc32(key.encode()), meta["weight_seed"]])
        if len(shape) >= 2:
            value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif key.endswith((".bn.weight", ".running_var")):
            value = 0.5 + rng.random(shape)
        elif key == "fc.bias":
            value = rng.standard_normal(shape)
        else:
            value = 0.2 * rng.standard_normal(shape)
        state[key] = torch.from_numpy(value.astype(np.float32))
    for i, key in enumerate(meta["probe_keys"]):
        np.testing.assert_array_equal(state[key].flatten()[:6], arrays["probe_values"][i])
    return state


@pytest.fixture(scope="module")
def net(weights):
    net = InceptionV3()
    net.load_state_dict(weights)
    return net


@pytest.fixture(scope="module")
def run(golden, net):
    """Pooled outputs of the four golden images at the recorded places."""
    arrays, _ = golden
    places = {"pool1_64": net.maxpool1, "pool2_192": net.maxpool2, "mixed6e_768": net.Mixed_6e}
    collected = {name: [] for name in places}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: collected[name].append(out.mean(dim=(2, 3))))
        for name, module in places.items()
    ]
    features = [net(torch.from_numpy(arrays[name])) for name in ("images_32x32", "images_64x48")]
    for hook in hooks:
        hook.remove()
    outputs = {name: torch.cat(values) for name, values in collected.items()}
    outputs["pool3_2048"] = torch.cat(features)
    outputs["logits_nobias"] = net.logits(outputs["pool3_2048"])
    outputs["logits_bias"] = net.logits(outputs["pool3_2048"], bias=True)
    return outputs


@pytest.mark.parametrize(
    "place", ["pool1_64", "pool2_192", "mixed6e_768", "pool3_2048", "logits_nobias", "logits_bias"]
)
def test_outputs(golden, run, place):
    want = golden[0][place]
    assert run[place].shape == want.shape and run[place].dtype == torch.float32
    assert np.abs(run[place].numpy() - want).max() / np.abs(want).max() < 1e-5


def test_resize(golden):
    arrays, _ = golden
    resized = resize_tf1(torch.from_numpy(arrays["images_64x48"][:1]).float(), 299)[0].numpy()
    np.testing.assert_allclose(resized[:, :64, :64], arrays["resized_crop_topleft"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(resized[:, -64:, -64:], arrays["resized_crop_bottomright"], rtol=0, atol=1e-3)


def test_resize_by_hand():
    # Doubling without a half-pixel shift: old samples stay, midpoints in between, the edge is repeated.
    row = torch.tensor([0.0, 10.0, 30.0]).expand(1, 1, 3, 3)
    assert resize_tf1(row, 6)[0, 0, 4].tolist() == [0, 5, 10, 20, 30, 30]
    assert resize_tf1(row.mT, 6)[0, 0, :, 1].tolist() == [0, 5, 10, 20, 30, 30]
    same = torch.rand(1, 3, 299, 299)
    assert resize_tf1(same, 299) is same


def test_inputs(golden, net, run):
    image = torch.from_numpy(golden[0]["images_32x32"][:1])
    assert torch.equal(net(image.float()), net(image))
    gray = image[:, :1]
    torch.testing.assert_close(net(gray), net(gray.repeat(1, 3, 1, 1)))
    for shape in ([1, 2, 32, 32], [3, 32, 32]):
        with pytest.raises(InputError, match="expected images"):
            net(torch.zeros(shape))


def test_state_dict(golden, weights):
    meta = golden[1]
    net = InceptionV3()
    names = {key: list(value.shape) for key, value in net.state_dict().items()}
    assert names == {key: shape for key, shape in meta["state_dict"].items() if "num_batches" not in key}
    assert len(names) == meta["key_count_without_counters"] == 472
    counters = {key.replace("running_var", "num_batches_tracked"): torch.tensor(0) for key in weights if "_var" in key}
    assert len(counters) == meta["extra_counter_keys"]
    net.load_state_dict({**weights, **counters})
    assert torch.equal(net.fc.bias, weights["fc.bias"])
    with pytest.raises(RuntimeError, match="Missing key.*fc.bias"):
        net.load_state_dict({key: value for key, value in weights.items() if key != "fc.bias"})
    with pytest.raises(RuntimeError, match="Unexpected key.*AuxLogits"):
        net.load_state_dict({**weights, "AuxLogits.fc.bias": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        net.load_state_dict({**weights, "fc.bias": torch.zeros(1000)})
    assert not any(parameter.requires_grad for parameter in net.parameters()) and not net.training
