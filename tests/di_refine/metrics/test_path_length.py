"""Perceptual path length: the formula by hand, and the metric on a generator."""

import warnings

import numpy as np
import pytest
import torch

from di_refine.errors import InputError
from di_refine.generators import GeneratorSampler, StyleGAN2Generator
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.path_length import Perceptual, path_lengths, perceptual_path_length
from di_refine.metrics.small import SmallConvNet, save_small
from stylegan2_ada.networks import Generator


class Lpips(torch.nn.Module):
    """The calling convention of the StyleGAN family's perceptual network; here the pixels themselves."""

    def forward(self, img: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        return img.flatten(1).float() / 127.5 if return_lpips else img.float().mean(dim=[2, 3])


class Linear(torch.nn.Module):
    """A generator whose path lengths are known: W is Z, and every pixel is the sum of w."""

    z_dim, c_dim, img_resolution, img_channels = 4, 0, 8, 1

    def mapping(self, z, c, truncation_psi=1):
        return z.unsqueeze(1) * truncation_psi

    def synthesis(self, ws, noise_mode="random", force_fp32=False):
        noise = torch.randn([len(ws), 1, 8, 8])
        return (noise + ws.sum(dim=[1, 2])[:, None, None, None]).double()


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "vgg16.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but it is what the published file is in
        torch.jit.script(Lpips()).save(path)
    return path


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Generator(
        z_dim=8,
        c_dim=4,
        w_dim=8,
        img_resolution=16,
        img_channels=1,
        mapping_kwargs={"num_layers": 1},
        synthesis_kwargs={"channel_base": 64, "channel_max": 8},
    ).requires_grad_(False)


def test_by_hand(lpips):
    perceptual = Perceptual(lpips, allow_code=True)
    assert perceptual.is_lpips and perceptual.identity.name == "vgg16"
    sampler = GeneratorSampler(StyleGAN2Generator(Linear()))
    lengths = path_lengths(sampler, perceptual, 0, 500, seed=0, epsilon=0.01)
    # One step changes each of 3 x 64 pixels by the sum of z1 - z0, which has variance 8; the same noise cancels.
    assert lengths.shape == (500,) and lengths.mean() == pytest.approx(3 * 64 * 8, rel=0.2)
    sampler.generator.truncation_psi = 0.5
    np.testing.assert_allclose(
        path_lengths(sampler, perceptual, 0, 500, 0, epsilon=0.01), lengths / 4, rtol=1e-3, atol=1e-3
    )
    assert path_lengths(sampler, perceptual, 0, 500, 1, epsilon=0.01)[0] != lengths[0]


def test_extremes_are_left_out():
    lengths = np.arange(1000.0)
    lengths[-1] = 1e9
    assert perceptual_path_length(lengths) == pytest.approx(np.arange(9, 991).mean(), abs=0.6)
    assert perceptual_path_length([3.0]) == 3
    for bad in ([], [np.nan], [[1.0]]):
        with pytest.raises(InputError, match="path lengths"):
            perceptual_path_length(bad)


def test_metric(lpips, generator):
    """Alone, and beside a metric of images; the number of progress steps is what was announced."""
    evaluator, seen = Evaluator("ppl1k_wend", perceptual=lpips, allow_code=True), []
    sampler = GeneratorSampler(StyleGAN2Generator(generator))
    (result,) = evaluator(sampler, seed=2, progress=seen.append)
    assert sum(seen) == evaluator.num_images(sampler) == 2000
    parts = [path_lengths(sampler, evaluator.perceptual, i, min(32, 1000 - i), 2)
             for i in range(0, 1000, 32)]  # fmt: skip
    assert result.value == pytest.approx(perceptual_path_length(np.concatenate(parts)), rel=1e-6)
    assert result.value > 0 and result.detector.name == "vgg16" and result.reference == {}
    assert result.num_images == 1000 and evaluator.warnings == []


def test_official_name_is_for_lpips(lpips, generator, tmp_path):
    save_small(SmallConvNet(16, 1, classes=4, width=4, feature_dim=8), tmp_path / "toy.safetensors", "toy")
    assert Evaluator("ppl2_wend", perceptual=lpips, allow_code=True).specs[0].num_images == 50_000
    assert Evaluator("ppl2_wend@toy", perceptual=tmp_path / "toy.safetensors").specs[0].name == "ppl2_wend@toy"
    with pytest.raises(InputError, match="toy and is no LPIPS network; write ppl2_wend@toy for ppl2_wend"):
        Evaluator("ppl2_wend", perceptual=tmp_path / "toy.safetensors")
    with pytest.raises(InputError, match="ppl2_wend needs a perceptual network.*`perceptual`"):
        Evaluator("ppl2_wend")
    with pytest.raises(InputError, match="`perceptual` is for path lengths"):
        Evaluator("is1k@toy", detector=tmp_path / "toy.safetensors", perceptual=lpips, allow_code=True)
    with pytest.raises(InputError, match="^perceptual=.*none.pt"):
        Evaluator("ppl2_wend", perceptual=tmp_path / "none.pt")

    def no_generator(first, count, seed):
        raise AssertionError

    no_generator.num_channels, no_generator.resolution, no_generator.label_dim = 1, 16, 0
    no_generator.law = None
    no_generator.num_images = None
    with pytest.raises(InputError, match="property of StyleGAN2 generators"):
        Evaluator("ppl2_wend", perceptual=lpips, allow_code=True).check(no_generator)
