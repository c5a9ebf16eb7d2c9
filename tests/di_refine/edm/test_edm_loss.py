"""Denoising losses against recorded draws, losses and gradients."""

import pytest
import torch
from golden_io import GOLDEN, assert_close, cases, load_npz

from di_refine.edm import loss, networks
from di_refine.edm.augment import AugmentPipe
from torch_utils import persistence

CASES = cases("edm/dsm_loss.npz")[0]["cases"]
DRAW = {"edm": "rnd_normal", "vp": "rnd_uniform", "ve": "rnd_uniform"}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name):
    prefix, case = ("" if name == "edm" else f"{name}_"), CASES[name]
    a = {k: torch.from_numpy(v.copy()) for k, v in load_npz("edm/dsm_loss.npz").items() if k != "meta"}
    net = persistence.load(GOLDEN / case["network"])["ema"].requires_grad_(True)
    fn = getattr(loss, case["loss"])(**case["loss_kwargs"])
    images = a[f"{prefix}images_uint8"] / 127.5 - 1
    draws = {"rnd": a[prefix + DRAW[name]], "noise": a[f"{prefix}noise"]}
    value = fn(net, images, a[f"{prefix}labels"], **draws)
    for ours, theirs in zip(value, a[f"{prefix}loss"]):
        assert_close(ours, theirs, 1e-5, "loss")

    (value.sum() / len(images)).backward()
    parameters = dict(net.named_parameters())
    assert [n for n, p in parameters.items() if p.grad is None] == case["unused_parameters"]
    norms = [
        torch.zeros([]) if parameters[n].grad is None else parameters[n].grad.norm() for n in case["parameter_names"]
    ]
    assert_close(torch.stack(norms), a[f"{prefix}grad_norms"], 1e-5, "gradient norms")
    for key in a:
        if key.startswith(f"{prefix}grad__"):
            assert_close(parameters[key.split("__")[1]].grad, a[key], 2e-5, key)


@pytest.mark.parametrize("fn", [loss.EDMLoss(), loss.VPLoss(), loss.VELoss()])
def test_draw_order(fn):
    """Numbers drawn inside are those of `draw`, then one normal per pixel, so seeds mean the same everywhere."""
    images = torch.rand(3, 1, 4, 4)

    def net(x, sigma, labels):
        return x * 0.9

    torch.manual_seed(0)
    value = fn(net, images)
    torch.manual_seed(0)
    rnd = fn.draw(images)
    assert torch.equal(value, fn(net, images, rnd=rnd, noise=torch.randn_like(images)))
    assert value.shape == images.shape


def test_edm_loss_of_an_untrained_network_is_one():
    """Unit weight at every level is what `edm_weight` is for; the output layer starts at zero."""
    torch.manual_seed(0)
    kwargs = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    net = networks.EDMPrecond(8, 1, **kwargs)
    images = torch.randn(256, 1, 8, 8) * 0.5
    for level in (-2.0, 0.0, 2.0):
        value = loss.EDMLoss()(net, images, rnd=torch.full([256, 1, 1, 1], level))
        assert value.mean().item() == pytest.approx(1, rel=0.05)


def test_augment_labels_reach_the_network():
    seen = {}

    def net(x, sigma, labels, augment_labels):
        seen["labels"] = augment_labels
        return x

    loss.EDMLoss()(net, torch.rand(2, 1, 8, 8), augment_pipe=AugmentPipe.edm(p=1))
    assert seen["labels"].shape == (2, 9)
