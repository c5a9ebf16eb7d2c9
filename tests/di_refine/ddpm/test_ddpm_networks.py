"""Diffusion models of other code bases as denoisers, against golden numbers that the public code made.

The numbers are in the steps' own form (`x_t`, and what the network returns) and in the variance-exploding one.
"""

import json

import numpy as np
import pytest
import torch
from golden_io import GOLDEN

from di_refine.ddpm.networks import ADMUNet
from di_refine.denoisers import Ensemble, encoder_layer, has_dropout, load_denoiser, loss_weight, recompute_blocks
from di_refine.edm.loss import edm_weight
from di_refine.files import adm_checkpoint
from torch_utils import persistence

ADM, DIFFUSERS = GOLDEN / "guided", GOLDEN / "diffusers"
ADM_FILES = sorted(path.stem for path in ADM.glob("*.pt"))
STEPPED = ["ddim-v-scaled-class", "ddpm-eps-linear", "ddpm-eps-oldbin", "ddpm-learned-range", "ddpm-sample-cosine"]
LIMIT = 5e-5  # per sample, relative to its largest value; float32 alone makes 2e-6 to 6e-6


def golden(path):
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays.pop("meta").reshape(-1)[0]))
    return meta, {name: torch.from_numpy(array) for name, array in arrays.items()}


def assert_near(actual, expected, limit=LIMIT):
    expected = expected.float()
    error = (actual - expected).abs().flatten(1).amax(dim=1) / expected.abs().flatten(1).amax(dim=1)
    assert error.max() <= limit, f"{error.max():.1e}"


def adm_flags(meta, **changes):
    family = {"training_mode": "edm"} if meta["family"] == "consistency" else {}
    return {**meta["flags"], **family, **changes}


def adm_cases():
    for name in ADM_FILES:
        meta, _ = golden(ADM / f"{name}.npz")
        yield name, ""
        yield from ((name, prefix) for prefix in meta["alternatives"])


@pytest.mark.parametrize("name, prefix", list(adm_cases()))
@torch.no_grad()
def test_adm(name, prefix):
    """One file under several flags gives several networks; the flags are not in the file."""
    meta, arrays = golden(ADM / f"{name}.npz")
    flags = adm_flags(meta, **meta["alternatives"].get(prefix, {}))
    net = load_denoiser(ADM / f"{name}.pt", flags)
    labels = torch.eye(10)[arrays["labels"]] if "labels" in arrays else None
    assert net.label_dim == (10 if labels is not None else 0)

    def array(key):
        return arrays.get(prefix + key, arrays.get(key))

    if meta["family"] == "consistency":
        x, sigma = arrays["x"], arrays["sigma"]
        assert (net.sigma_min, net.sigma_max) == (0.002, 80)
    else:
        x, sigma = array("ve_x"), array("ve_sigma_f64").float()
        step = flags["diffusion_steps"] / 2 + 0.3
        out = net.unet(array("x_t")[:1], net.time_scale * torch.tensor([step]), None if labels is None else labels[:1])
        assert_near(out, array("frac_t_out"))
        torch.testing.assert_close(net.step(sigma), array("timesteps").float(), rtol=0, atol=0)
        alphas = array("alphas_cumprod_probe_f64")[[0, -1]]
        ends = torch.tensor([net.sigma_min, net.sigma_max], dtype=torch.float64)
        torch.testing.assert_close(ends, ((1 - alphas) / alphas).sqrt(), rtol=1e-6, atol=0)
    time = net._coefficients(sigma.reshape(-1, 1, 1, 1))[3].flatten()
    torch.testing.assert_close(time, array("model_t"), rtol=1e-5, atol=1e-4)
    assert_near(net(x, sigma, labels), array("denoised"))


@pytest.mark.parametrize("name", STEPPED)
@torch.no_grad()
def test_diffusers_steps(name):
    pytest.importorskip("diffusers", reason="needs the optional package diffusers")
    net = load_denoiser(DIFFUSERS / name)
    _, arrays = golden(DIFFUSERS / f"{name}.npz")
    labels = torch.eye(10)[arrays["class_labels"]] if "class_labels" in arrays else None
    torch.testing.assert_close(net.log_sigmas.double().exp(), arrays["sigmas_f64"], rtol=1e-6, atol=0)
    assert_near(net(arrays["ve_x"], arrays["ve_sigma_f64"].float(), labels), arrays["denoised"])
    sigma = arrays["frac_sigma_f64"].float()
    torch.testing.assert_close(net.step(sigma), arrays["frac_t_f64"].float(), rtol=1e-6, atol=1e-3)
    assert_near(net(arrays["frac_ve_x"], sigma, labels), arrays["frac_denoised"])
    net.whole_steps = True
    assert torch.equal(net.step(sigma), arrays["frac_t_nearest"].float())
    net.unet.register_forward_pre_hook(lambda module, args: (args[0], args[1].float(), *args[2:]))
    assert_near(net(arrays["frac_ve_x"], sigma, labels), arrays["near_denoised"])
    known = net.round_sigma(sigma.double())
    assert known.dtype == torch.float64
    torch.testing.assert_close(known, arrays["sigmas_f64"][arrays["frac_t_nearest"]], rtol=1e-5, atol=0)


@torch.no_grad()
def test_diffusers_edm():
    pytest.importorskip("diffusers", reason="needs the optional package diffusers")
    _, arrays = golden(DIFFUSERS / "edm-epsilon.npz")
    net = load_denoiser(DIFFUSERS / "edm-epsilon")
    assert_near(net(arrays["x"], arrays["sigma"]), arrays["denoised"])
    scheduler = json.loads((DIFFUSERS / "edm-epsilon/scheduler/scheduler_config.json").read_text())
    net = load_denoiser(DIFFUSERS / "edm-epsilon", {**scheduler, "prediction_type": "v_prediction"})
    assert_near(net(arrays["x"], arrays["sigma"]), arrays["denoised_as_v_prediction"])


@torch.no_grad()
def test_diffusers_score_of_images_between_0_and_1():
    pytest.importorskip("diffusers", reason="needs the optional package diffusers")
    _, arrays = golden(DIFFUSERS / "score-sde-ve.npz")
    net = load_denoiser(DIFFUSERS / "score-sde-ve")
    assert (net.sigma_min, net.sigma_max) == (0.02, 100)
    assert_near((net(2 * arrays["x"] - 1, 2 * arrays["sigma"]) + 1) / 2, arrays["denoised"])
    assert not [name for name, _ in net.named_parameters() if "time_proj" in name], "frequencies are no weights"


@pytest.mark.parametrize("name", sorted(json.loads(str(np.load(ADM / "full_size_shapes.npz")["meta"][0]))["models"]))
def test_published_architectures_follow_from_the_shapes(name):
    meta, _ = golden(ADM / "full_size_shapes.npz")
    model = meta["models"][name]
    flags = model["flags"]
    tensors = {key: torch.empty(shape, device="meta") for key, shape in model["state_dict"].items()}
    found = adm_checkpoint.architecture(tensors)
    assert found["classes"] == (flags["num_classes"] or 0)
    assert [width / found["model_channels"] for width in found["widths"]] == flags["channel_mult"]
    resolutions = [flags["image_size"] >> level for level, attends in enumerate(found["attention"]) if attends]
    assert resolutions == [size for size in flags["attention_resolutions"] if size <= flags["image_size"]]
    with torch.device("meta"):
        unet = ADMUNet(
            found["in_channels"],
            found["out_channels"],
            found["classes"],
            found["model_channels"],
            found["widths"],
            found["num_blocks"],
            found["attention"],
            kernel_dims=found["kernel_dims"],
            scale_shift=found["scale_shift"],
            resample_blocks=found["resample_blocks"],
        )
    assert {key: list(value.shape) for key, value in unet.state_dict().items()} == model["state_dict"]
    assert sum(p.numel() for p in unet.parameters()) == model["parameters"]


def adm(name="gd64-cond", **changes):
    return load_denoiser(ADM / f"{name}.pt", adm_flags(golden(ADM / f"{name}.npz")[0], **changes))


def teachers():
    yield pytest.param(adm, id="adm")
    yield pytest.param(lambda: load_denoiser(DIFFUSERS / "ddim-v-scaled-class"), id="diffusers")


@pytest.mark.parametrize("make", list(teachers()))
def test_a_network_pickle_keeps_them(make, tmp_path, request):
    if "diffusers" in request.node.name:
        pytest.importorskip("diffusers", reason="needs the optional package diffusers")
    net = make()
    x, labels = torch.randn(3, 3, 8, 8), torch.eye(10)[:3]
    with torch.no_grad():
        before = net(x, torch.tensor([0.1, 1.0, 5.0]), labels)
        for p in net.parameters():  # as training does
            p.mul_(1.01)
        changed = net(x, torch.tensor([0.1, 1.0, 5.0]), labels)
        persistence.save({"ema": net}, tmp_path / "a.pkl")
        again = persistence.load(tmp_path / "a.pkl")["ema"]
        assert type(again) is type(net) and not again.training
        assert torch.equal(again(x, torch.tensor([0.1, 1.0, 5.0]), labels), changed)
    assert not torch.allclose(before, changed)
    persistence.save({"ema": again}, tmp_path / "b.pkl")
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pkl").read_bytes()


@pytest.mark.parametrize("make", list(teachers()))
def test_what_training_asks_of_a_network(make, request):
    """Gradients to the input and to itself, in bfloat16 as well, an encoder, blocks that are computed again."""
    if "diffusers" in request.node.name:
        pytest.importorskip("diffusers", reason="needs the optional package diffusers")
    net = make().train().requires_grad_(True)
    x, sigma, labels = torch.randn(2, 3, 8, 8, requires_grad=True), torch.tensor([0.3, 2.0]), torch.eye(10)[:2]

    def gradients():
        output = net(x, sigma, labels)
        return output, torch.autograd.grad(output.square().sum(), [x, *net.parameters()])

    output, expected = gradients()
    assert all(gradient.abs().max() > 0 for gradient in expected[:1])
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, sigma, labels)
        assert torch.equal(net(x, sigma, labels, force_fp32=True), output)
    assert half.dtype == torch.float32
    assert 1e-5 < (half - output).abs().max() / output.abs().max() < 0.05
    features = []
    handle = encoder_layer(net).register_forward_hook(lambda module, args, result: features.append(result))
    recompute_blocks(net)
    again, gradients_again = gradients()
    handle.remove()
    assert features[0].ndim == 4 and len(features[0]) == 2
    torch.testing.assert_close(again, output)
    torch.testing.assert_close(gradients_again, expected)
    assert not has_dropout(net)
    with pytest.raises(ValueError, match="needs class_labels"):
        net(x, sigma)


def test_dropout_is_seen():
    assert has_dropout(adm(dropout=0.1))


def test_beyond_the_steps_the_input_keeps_its_scale():
    net = adm("gd256-uncond")
    sigma = torch.tensor([1e-4, 1e4]).reshape(-1, 1, 1, 1)
    _, _, c_in, time = net._coefficients(sigma)
    assert time.flatten().tolist() == [0, 999]
    torch.testing.assert_close(c_in, 1 / (1 + sigma**2).sqrt())


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, lambda s: 1 / s**2),  # of noise
        ({"predict_xstart": True}, lambda s: torch.ones_like(s)),
    ],
)
def test_the_loss_weighs_what_the_network_puts_out(flags, expected):
    """Else the rare high levels, at which an error in the noise is one of sigma times it in the image, would rule."""
    net, sigma = adm("gd256-uncond", **flags), torch.tensor([0.1, 1.0, 30.0])
    torch.testing.assert_close(loss_weight(net, sigma), expected(sigma))
    torch.testing.assert_close(loss_weight(Ensemble([net, net]), sigma), expected(sigma))


def test_the_loss_of_other_parameterisations():
    sigma = torch.tensor([0.1, 1.0, 30.0])
    torch.testing.assert_close(loss_weight(adm("cm-imagenet64"), sigma), edm_weight(sigma, 0.5))
    pytest.importorskip("diffusers", reason="needs the optional package diffusers")
    v = load_denoiser(DIFFUSERS / "ddim-v-scaled-class")
    torch.testing.assert_close(loss_weight(v, sigma), 1 + 1 / sigma**2)
    torch.testing.assert_close(loss_weight(load_denoiser(DIFFUSERS / "score-sde-ve"), sigma), 1 / sigma**2)


@pytest.mark.parametrize("name", ["vp", "ve", "iddpm", "ddpmpp_cond"])
def test_the_loss_of_networks_of_edm(name):
    net, sigma = load_denoiser(GOLDEN / f"edm/{name}.pkl"), torch.tensor([0.1, 1.0, 30.0])
    c_out = net._coefficients(sigma.reshape(-1, 1, 1, 1))[1].flatten()
    torch.testing.assert_close(loss_weight(net, sigma), 1 / c_out**2)
