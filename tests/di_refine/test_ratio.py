"""The learned density ratio: against the exact one in the plane, and its mechanics on a real U-Net."""

import itertools
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from di_refine import ratio
from di_refine.commands.plane import MixtureDenoiser, PlaneDenoiser, reference
from di_refine.denoisers import encoder_layer
from di_refine.edm.networks import EDMPrecond
from di_refine.noise import LogNormal
from di_refine.ratio import DensityRatio
from di_refine.trainer import Trainer, TrainerConfig


class Bumps(torch.nn.Module):
    """A generator whose density is known: two equal Gaussians, which of them is decided by the first latent's sign."""

    latent_shape = (3,)
    label_dim = 0

    def __init__(self, mixture: MixtureDenoiser):
        super().__init__()
        self.mixture = mixture
        self.shift = torch.nn.Parameter(torch.zeros(2))

    def forward(self, z, labels=None):
        return self.mixture.means[(z[:, 0] > 0).long()] + self.mixture.std * z[:, 1:] + self.shift


def unet(augment_dim: int = 0, label_dim: int = 3) -> EDMPrecond:
    torch.manual_seed(0)
    unet = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
    net = EDMPrecond(8, 3, label_dim, attn_resolutions=[4], augment_dim=augment_dim, dropout=0.0, **unet)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net


def test_calibration_against_the_exact_ratio():
    """While the generator stands still, the head's logits become log q - log p, at every noise level it is shown."""
    teacher = MixtureDenoiser(torch.tensor([[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]]), std=0.5)
    ours = MixtureDenoiser(torch.tensor([[1.0, 1.0], [-1.0, -0.5]]), std=0.6)
    torch.manual_seed(0)
    student = PlaneDenoiser()
    config = TrainerConfig(
        objective="f-js",
        batch=512,
        score_lr=2e-3,
        ratio_weight=1.0,
        score_warmup=1e06,
        ema_kimg=0,
    )
    samples = reference(teacher, 512, seed=1)
    trainer = Trainer(
        Bumps(ours),
        teacher,
        config,
        student,
        reference=samples,
        ratio_layer=student.last_hidden,
        sigma=LogNormal(-0.5, 1.0, 0.1, 10.0),
    )
    for _ in range(700):
        stats = trainer.step()
    assert 0.5 < stats["ratio_loss"] < 2 * math.log(2)
    rng = torch.Generator().manual_seed(5)
    for sigma in (0.3, 1.0, 3.0):
        # Both kinds of samples in equal numbers: where the classifier has been, and where objectives ask it.
        x = torch.cat([ours.sample(2000, rng), teacher.sample(2000, rng)])
        x = x + sigma * torch.randn(x.shape, generator=rng)
        exact = teacher.log_prob(x, sigma) - ours.log_prob(x, sigma)
        with torch.no_grad():
            level = torch.full([len(x)], sigma)
            learned = trainer.ratio(trainer.ratio.features(x, level, torch.zeros(len(x), 0)))
        error = (learned - exact).square().mean().sqrt()
        print(f"sigma {sigma}: rms log ratio {exact.square().mean().sqrt():.3f}, rms error {error:.3f}")
        assert error < 0.25 * exact.square().mean().sqrt() + 0.05


def test_class_frequencies_of_the_reference_do_not_matter():
    """The logit minus the log ratio of the class frequencies is the ratio within a class."""
    net = unet(label_dim=2)
    generator = ImagesOfClass()

    class Stream:
        class_frequencies = [0.9, 0.1]

        def __call__(self, start):
            for nimg in itertools.count(start, 64):
                rng = torch.Generator().manual_seed(nimg)
                labels = torch.nn.functional.one_hot((torch.rand(64, generator=rng) > 0.9).long(), 2).float()
                yield generator(torch.randn(64, 1, generator=rng), labels), labels

    config = TrainerConfig(objective="f-js", batch=64, score_lr=1e-3, ratio_lr=1e-2, score_warmup=1e06, ema_kimg=0)
    trainer = Trainer(generator, net, config, reference=Stream())
    for _ in range(40):
        trainer.step()
    # Both sides make the same images of a class, so the ratio is one, though classes are not as frequent on both.
    labels = torch.eye(2).repeat(50, 1)
    with torch.no_grad():
        x = generator(torch.randn(100, 1), labels) + 0.3 * torch.randn(100, 3, 8, 8)
        logits = trainer.ratio(trainer.ratio.features(x, torch.full([100], 0.3), labels))
    by_class = logits.reshape(50, 2).mean(dim=0)
    assert by_class.abs().max() < 0.5, by_class
    trainer._log_prior.zero_()  # without the correction the frequencies would be taken for quality
    for _ in range(40):
        trainer.step()
    with torch.no_grad():
        logits = trainer.ratio(trainer.ratio.features(x, torch.full([100], 0.3), labels))
    by_class = logits.reshape(50, 2).mean(dim=0)
    assert by_class[0] - by_class[1] > 1


class ImagesOfClass(torch.nn.Module):
    """Even images, bright or dark by class."""

    latent_shape = (1,)
    label_dim = 2

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.2))

    def forward(self, z, labels):
        level = labels[:, 0] - 0.5 + self.scale * z[:, 0]
        return level[:, None, None, None].expand(-1, 3, 8, 8)


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_features_come_from_the_encoder_alone(spectral_norm):
    net = unet()
    x, sigma, labels = torch.randn(4, 3, 8, 8), torch.tensor([0.1, 0.5, 1.0, 5.0]), torch.eye(3)[[0, 1, 2, 0]]
    head = DensityRatio(net, x[:1], labels[:1], encoder_layer(net), spectral_norm=spectral_norm)
    with head.watching() as seen:
        net(x, sigma, labels)
    features = head.features(x, sigma, labels)
    assert len(seen) == 1 and torch.equal(seen[0], features) and features.shape == (4, 16, 4, 4)
    decoder = [p for name, p in net.named_parameters() if ".dec." in name]
    (head(features).sum() + 0).backward()
    assert all(p.grad is None for p in decoder)
    assert not any(p is q for p in head.parameters() for q in net.parameters())
    if spectral_norm:
        assert torch.linalg.matrix_norm(head.out.weight, 2) < 1.5
    else:
        assert torch.equal(head(features), torch.zeros(4)), "at first the ratio is one"


def test_differentiable_in_x_twice():
    """Exact ratio gradients and the R1 penalty go through the encoder, attention included."""
    net = unet()
    x, sigma, labels = torch.randn(2, 3, 8, 8, requires_grad=True), torch.tensor([0.3, 1.0]), torch.eye(3)[:2]
    head = DensityRatio(net, x[:1], labels[:1], encoder_layer(net))
    torch.nn.init.normal_(head.out.weight)
    with sdpa_kernel(SDPBackend.MATH):
        logits = head(head.features(x, sigma, labels))
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    assert gradient.abs().sum() > 0
    gradient.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_losses_and_unknown_networks():
    zeros = torch.zeros(3)
    torch.testing.assert_close(ratio.logistic_loss(zeros, zeros), torch.full([3], 2 * math.log(2)))
    with pytest.raises(ValueError, match="name the layer"):
        encoder_layer(torch.nn.Linear(2, 2))
