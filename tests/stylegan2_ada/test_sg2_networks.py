"""StyleGAN2 networks against the golden latents, images, logits and gradients of the public implementation."""

from functools import cache

import pytest
import torch
from golden_io import GOLDEN, assert_close, cases, load_npz

from stylegan2_ada.networks import Discriminator, Generator, MinibatchStdLayer
from torch_utils import persistence

NAMES = [
    "sg2ada-cifar-cond",
    "sg2ada-uncond64",
    "sg2ada-resnet16",
    "sg2ada-orig16",
    "sg3repo-stylegan2",
    "sg2tf-legacy",
]
FORWARD, GRADIENT = 3e-5, 1e-4


@cache
def networks(name):
    return persistence.load(GOLDEN / "stylegan2" / f"{name}.pkl")


def arrays(name):
    return {k: torch.from_numpy(v.copy()) for k, v in load_npz(f"stylegan2/{name}.npz").items() if k != "meta"}


def check_gradients(network, prefix, loss, x, expected_dx, a, meta):
    names = [n for n, p in network.named_parameters()]
    parameters = [p for _, p in network.named_parameters()]
    for p in parameters:
        p.requires_grad_()
    grads = torch.autograd.grad(loss(), [x, *parameters])
    assert_close(grads[0], expected_dx, GRADIENT, "input gradient")
    by_name = dict(zip(names, grads[1:]))
    for n in meta[f"{prefix}_grad_names"]:
        assert_close(by_name[n], a[f"{prefix}_grad/{n}"], GRADIENT, n)
    assert sorted(by_name) == sorted(meta[f"{prefix}_grad_norm_names"])
    norms = torch.stack([by_name[n].norm() for n in meta[f"{prefix}_grad_norm_names"]])
    assert_close(norms, a[f"{prefix}_grad_norms"], GRADIENT, "gradient norms")


@pytest.mark.parametrize("name", NAMES)
def test_generator(name):
    a, G = arrays(name), networks(name)["G_ema"]
    z, c = a["z"], a["c"]
    assert_close(G.mapping(z, c), a["ws"], FORWARD, "ws")
    assert_close(G.mapping(z, c, truncation_psi=0.7), a["ws_psi07"], FORWARD, "psi")
    cut = G.mapping(z, c, truncation_psi=0.7, truncation_cutoff=2)
    assert_close(cut, a["ws_psi07_cut2"], FORWARD, "cutoff")
    for key, ws, mode in [
        ("img_const", a["ws"], "const"),
        ("img_none", a["ws"], "none"),
        ("img_psi07_cut2_const", a["ws_psi07_cut2"], "const"),
        ("img_ws_rand", a["ws_rand"], "const"),
    ]:
        for fused in (False, True):
            img = G.synthesis(ws[: len(a[key])], noise_mode=mode, force_fp32=True, fused_modconv=fused)
            assert img.dtype == torch.float32
            assert_close(img, a[key], FORWARD, f"{key}, fused {fused}")
    first = len(a["G_img_const"])
    img = networks(name)["G"](z[:first], c[:first], noise_mode="const", force_fp32=True)
    assert_close(img, a["G_img_const"], FORWARD, "G")


@pytest.mark.parametrize("name", NAMES)
def test_generator_gradients(name):
    a, meta, G = arrays(name), cases(f"stylegan2/{name}.npz")[0], networks(name)["G_ema"]
    z = a["z"].requires_grad_()

    def loss():
        return (G(z, a["c"], noise_mode="const", force_fp32=True) * a["dimg"]).sum()

    check_gradients(G, "G", loss, z, a["dz"], a, meta)


@pytest.mark.parametrize("name", NAMES)
def test_discriminator(name):
    a, meta, D = arrays(name), cases(f"stylegan2/{name}.npz")[0], networks(name)["D"]
    img = a["D_img"].requires_grad_()
    assert_close(D(img[:2], a["c"][:2], force_fp32=True), a["logits_first2"], FORWARD, "first two")
    assert_close(D(img, a["c"], force_fp32=True), a["logits"], FORWARD, "logits")

    def loss():
        return (D(img, a["c"], force_fp32=True) * a["dlogits"]).sum()

    check_gradients(D, "D", loss, img, a["dD_img"], a, meta)


@pytest.mark.parametrize("name", ["sg2ada-resnet16", "sg2ada-orig16"])
def test_state_names_shapes_and_kinds(name):
    """Built from constructor arguments alone, every parameter and buffer is where the public code has it."""
    meta, a = cases(f"stylegan2/{name}.npz")[0], arrays(name)
    for key, cls, prefix in [("G", Generator, "G_ema"), ("D", Discriminator, "D")]:
        with torch.device("meta"):
            network = cls(**meta[f"{key}_init_kwargs"])
        state = {n: list(t.shape) for n, t in network.state_dict().items()}
        assert state == {k[len(prefix) + 1 :]: list(v.shape) for k, v in a.items() if k.startswith(f"{prefix}/")}
        assert sorted(n for n, _ in network.named_buffers()) == sorted(meta["buffer_names"][prefix])


def test_random_noise_differs_per_sample_and_training_moves_w_avg():
    torch.manual_seed(0)
    G = Generator(
        8, 0, 8, 8, 3, mapping_kwargs={"num_layers": 2}, synthesis_kwargs={"channel_base": 64, "channel_max": 8}
    )
    with torch.no_grad():
        for block in (G.synthesis.b4, G.synthesis.b8):
            block.conv1.noise_strength.fill_(1)
    z, c = torch.randn(1, 8).expand(2, -1), torch.zeros(2, 0)
    a, b = G(z, c, noise_mode="random")
    assert not torch.equal(a, b)
    a, b = G(z, c, noise_mode="const")
    assert torch.allclose(a, b, atol=1e-6)
    with pytest.raises(ValueError, match="noise_mode"):
        G(z, c, noise_mode="loud")

    before = G.mapping.w_avg.clone()
    G.eval()(z, c)
    assert torch.equal(G.mapping.w_avg, before)
    w = G.train().mapping(z, c)[:, 0]
    expected = 0.995 * before + 0.005 * w.mean(0)
    assert torch.allclose(G.mapping.w_avg, expected, atol=1e-6)


def test_bad_configurations_are_named():
    with pytest.raises(ValueError, match="power of two"):
        Generator(8, 0, 8, 12, 3)
    with pytest.raises(ValueError, match="architecture"):
        Discriminator(0, 8, 3, architecture="unet")
    with pytest.raises(ValueError, match="not a multiple of the group size 4"):
        MinibatchStdLayer(4)(torch.zeros(6, 2, 4, 4))
    G = Generator(8, 0, 8, 8, 3, synthesis_kwargs={"channel_base": 64, "channel_max": 8})
    with pytest.raises(AssertionError, match=r"\[None, 8\]"):
        G(torch.zeros(2, 7), torch.zeros(2, 0))
