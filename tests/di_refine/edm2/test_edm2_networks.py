"""EDM2's network against the outputs, gradients, names and shapes of the public implementation."""

import copy
import math
from functools import cache

import pytest
import torch
from golden_io import GOLDEN, assert_close, cases, load_npz, relative_error

from di_refine import denoisers
from di_refine.edm2 import networks
from di_refine.errors import InputError
from di_refine.files import networks as network_files
from torch_utils import persistence

NAMES = ["cond", "uncond", "latent"]
TOLERANCE = 2e-5
BLOCKS = cases("edm2/blocks.npz")[0]["cases"]


@cache
def load(name):
    return persistence.load(GOLDEN / f"edm2/{name}.pkl")["ema"]


def network(name):
    """Made by the constructor, so that no attribute comes from the file."""
    net = networks.Precond(**cases(f"edm2/{name}.npz")[0]["init_kwargs"])
    net.load_state_dict(load(name).state_dict())
    return net.eval().requires_grad_(True)


def arrays(name):
    return {k: torch.from_numpy(v.copy()) for k, v in load_npz(f"edm2/{name}.npz").items() if k != "meta"}


def inputs(a):
    return a["x"], a["sigma"], a.get("labels")


@pytest.mark.parametrize("name", NAMES)
def test_outputs(name):
    net, a = network(name), arrays(name)
    seen = {}
    net.unet.register_forward_hook(lambda module, args, output: seen.update(F=output, c_noise=args[1]))
    denoised, logvar = net(*inputs(a), return_logvar=True)
    assert_close(denoised, a["D_float32_weights"], TOLERANCE, "D")
    assert_close(logvar, a["logvar_float32_weights"], TOLERANCE, "logvar")
    assert_close(seen["c_noise"], a["c_noise"], TOLERANCE, "c_noise")
    # These come from gains that were rounded to half precision once more.
    assert_close(denoised, a["D"], 1e-3, "D")
    assert_close(seen["F"], a["F"], 1e-3, "F")
    if "D_nolabel" in a:
        assert_close(net(a["x"], a["sigma"]), a["D_nolabel"], 1e-3, "D without labels")


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    net, a = network(name), arrays(name)
    names = cases(f"edm2/{name}.npz")[0]["parameter_names"]
    assert [key for key, _ in net.named_parameters()] == names
    x = a["x"].clone().requires_grad_(True)
    (net(x, *inputs(a)[1:]) * a["dy"]).sum().backward()
    assert_close(x.grad, a["gx"], TOLERANCE, "gx")
    parameters = dict(net.named_parameters())
    norms = [0.0 if parameters[key].grad is None else parameters[key].grad.norm().item() for key in names]
    assert_close(torch.tensor(norms), a["gparam_norm"], TOLERANCE, "norms")
    for key in (key for key in a if key.startswith("grad/")):
        assert_close(parameters[key[5:]].grad, a[key], TOLERANCE, key)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_in_place(name):
    net, a, means = network(name), arrays(name), []
    layers = dict(net.unet.named_modules())
    for key in cases(f"edm2/{name}.npz")[0]["block_order"]:
        layers[key].register_forward_hook(lambda module, args, y: means.append((y.mean(), y.abs().mean())))
    net(*inputs(a))
    mean, meanabs = (torch.stack(column) for column in zip(*means))
    assert_close(mean, a["block_mean"], TOLERANCE, "mean")
    assert_close(meanabs, a["block_meanabs"], TOLERANCE, "meanabs")


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_with_its_log_variance(name):
    net, a, meta = network(name), arrays(name), cases(f"edm2/{name}.npz")[0]["loss"]
    y, deviation = a["loss_images"], meta["sigma_data"]
    sigma = (a["loss_rnd_normal"] * meta["P_std"] + meta["P_mean"]).exp().reshape(-1, 1, 1, 1)
    weight = (sigma**2 + deviation**2) / (sigma * deviation) ** 2
    denoised, u = net(y + sigma * a["loss_noise"], sigma, a.get("labels"), return_logvar=True)
    loss = weight / u.exp() * (denoised - y) ** 2 + u
    assert_close(loss, a["loss"], TOLERANCE, "loss")
    (loss.sum() / len(y)).backward()
    norms = torch.stack([p.grad.norm() for p in net.parameters()])
    assert_close(norms, a["loss_grad_norm"], TOLERANCE, "norms")
    assert_close(net.logvar_linear.weight.grad, a["loss_grad/logvar_linear.weight"], TOLERANCE, "logvar")


def test_operations():
    a = arrays("blocks")
    x, tiny = a["normalize/x"], a["normalize/tiny_x"]
    for key, value in (("", x), ("tiny_", tiny)):
        assert_close(networks.normalize(value), a[f"normalize/{key}all"], 1e-6, key)
        assert_close(networks.normalize(value, dim=[1]), a[f"normalize/{key}dim1"], 1e-6, key)
    assert_close(networks.mp_silu(x), a["mp_silu/y"], 1e-6)
    for t in (0.5, 0.3, 0.8):
        assert_close(networks.mp_sum(x, a["mp/b"], t), a[f"mp_sum/t{t}"], 1e-6)
    for t in (0.5, 0.3):
        assert_close(networks.mp_cat(x, a["mp_cat/c"], t), a[f"mp_cat/t{t}"], 1e-6)
    for taps in ([1, 1], [1, 3, 3, 1], [1, 2]):
        for mode in ("down", "up"):
            expected = a[f"resample/{mode}_{'_'.join(map(str, taps))}"]
            assert_close(networks.resample(a["resample/x"], taps, mode), expected, 1e-6, f"{mode} by {taps}")
    layer = networks.MPFourier(12)
    layer.load_state_dict({"freqs": a["mpfourier/freqs"], "phases": a["mpfourier/phases"]})
    assert_close(layer(a["mpfourier/t"]), a["mpfourier/y"], 1e-5)


@pytest.mark.parametrize("case", [name for name in BLOCKS if name.startswith("mpconv")])
def test_weights_keep_their_norm_in_training(case):
    a = {key.partition("/")[2]: value for key, value in arrays("blocks").items() if key.startswith(case)}
    gain, kernel = BLOCKS[case]["gain"], list(a["weight"].shape[2:])
    layer = networks.MPConv(6, 9, kernel)
    for mode, steps in (("eval", 1), ("train", 2)):
        with torch.no_grad():
            layer.weight.copy_(a["weight"])
        layer.train(mode == "train")
        layer.weight.grad = None
        y = layer(a["x"], gain)
        (y * a["dy"]).sum().backward()
        assert_close(y, a[f"y_{mode}"], TOLERANCE)
        assert_close(layer.weight.grad, a[f"dw_{mode}"], TOLERANCE)
        assert_close(layer.weight, a["weight_after_train"] if mode == "train" else a["weight"], TOLERANCE)
        if steps == 2:
            with torch.no_grad():
                layer.weight += -0.05 * a["dw_train"]
            assert_close(layer(a["x"], gain), a["y_train_step2"], TOLERANCE)
            assert_close(layer.weight, a["weight_after_step2"], TOLERANCE)


@pytest.mark.parametrize("case", [name for name in BLOCKS if name.startswith("block")])
def test_blocks(case):
    a = {key.partition("/")[2]: value for key, value in arrays("blocks").items() if key.partition("/")[0] == case}
    kwargs = {key: value for key, value in BLOCKS[case].items() if key != "num_heads"}
    block = networks.Block(**kwargs).eval()
    assert block.num_heads == BLOCKS[case]["num_heads"]
    block.load_state_dict({key[2:]: value for key, value in a.items() if key.startswith("p/")})
    x, emb = (a[key].clone().requires_grad_(True) for key in ("x", "emb"))
    y = block(x, emb)
    (y * a["dy"]).sum().backward()
    for found, key in ((y, "y"), (x.grad, "dx"), (emb.grad, "demb")):
        assert_close(found, a[key], TOLERANCE, key)
    parameters = dict(block.named_parameters())
    for key in (key for key in a if key.startswith("g/")):
        assert_close(parameters[key[2:]].grad, a[key], TOLERANCE, key)


def test_files_round_trip(tmp_path):
    content = persistence.load(GOLDEN / "edm2/cond.pkl")
    persistence.save(content, tmp_path / "a.pkl")
    again = network_files.load(tmp_path / "a.pkl")
    assert list(again.networks) == list(content) and again.kind == network_files.EDM
    assert all(
        torch.equal(a, b) for a, b in zip(again.average.state_dict().values(), load("cond").state_dict().values())
    )


def test_latents_are_refused():
    with pytest.raises(InputError, match="latent.pkl is a latent-space model"):
        network_files.load(GOLDEN / "edm2/latent.pkl", "teacher")


def test_it_is_a_denoiser():
    net, a = network("cond"), arrays("cond")
    x, sigma, labels = inputs(a)
    assert denoisers.has_encoder(net) and not denoisers.has_dropout(net) and denoisers.has_dropout(network("uncond"))
    features = denoisers.encode(net, denoisers.encoder_layer(net), x, sigma, labels)
    assert features.shape == (6, 16, 4, 4)
    weight = denoisers.loss_weight(net, sigma)
    assert torch.allclose(weight, (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
    again = copy.deepcopy(net)
    denoisers.recompute_blocks(again)
    for each in (net, again):
        each(x, sigma, labels).sum().backward()
    pairs = zip(net.parameters(), again.parameters())
    assert all(p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-6) for p, q in pairs)
    assert net.round_sigma(3.0) == 3 and (net.sigma_min, net.sigma_max) == (0, math.inf)


def test_norms_are_kept_by_an_optimizer():
    """As in training mode, where each pass stores the weights normalised."""
    a = arrays("cond")
    nets = {mode: network("cond").train(mode == "train") for mode in ("train", "eval")}
    outputs = {}
    for mode, net in nets.items():
        before = net(*inputs(a)).detach()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        if mode == "eval":
            denoisers.keep_norms(net, optimizer)
            assert relative_error(net(*inputs(a)), before) < 1e-3, "the same function"
        for _ in range(3):
            optimizer.zero_grad()
            ((net(*inputs(a)) - a["dy"]) ** 2).mean().backward()
            optimizer.step()
        outputs[mode] = net.eval()(*inputs(a))
    assert relative_error(outputs["eval"], outputs["train"]) < 1e-3
    weight = nets["eval"].unet.enc["8x8_conv"].weight
    assert weight.square().mean(dim=[1, 2, 3]).sqrt().sub(1).abs().max() < 2e-4
    other = torch.nn.Linear(2, 2)
    denoisers.keep_norms(other, torch.optim.Adam(other.parameters()))  # has none of these layers
