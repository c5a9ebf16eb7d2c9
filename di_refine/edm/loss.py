"""Denoising score matching: L = w(s) (D(y + s n; s) - y)^2 for clean images y, noise levels s, unit normals n.

The three training objectives of arXiv 2206.00364 (EDM: section 5; VP, VE: table 1) differ in how s is drawn and in w.
Losses are unreduced, [N, C, H, W]; training sums over pixels and averages over the batch.
"""

from collections.abc import Callable

import torch

Net = Callable[..., torch.Tensor]


def edm_weight(sigma: torch.Tensor, sigma_data: float = 0.5) -> torch.Tensor:
    """Return w(s) = (s^2 + d^2) / (s d)^2 with d = sigma_data.

    By it the expected loss of an untrained `EDMPrecond` is 1 at every s.
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def vp_sigma(t: torch.Tensor, beta_d: float = 19.9, beta_min: float = 0.1) -> torch.Tensor:
    """Return the noise level sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1) of the VP schedule at time t in (0, 1]."""
    return ((0.5 * beta_d * t**2 + beta_min * t).exp() - 1).sqrt()


def denoising_loss(
    net: Net,
    images: torch.Tensor,
    sigma: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | None = None,
    augment_labels: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return weight * (D(images + sigma * noise; sigma) - images)^2.

    Args:
        net: denoiser `net(x, sigma, labels)`, also taking `augment_labels` when those are given.
        images: [N, C, H, W] clean images in [-1, 1].
        sigma, weight: [N, 1, 1, 1] noise levels and weights.
        labels: [N, label_dim] class labels or None.
        augment_labels: [N, augment_dim] or None.
        noise: [N, C, H, W] unit normals; None draws them.

    Returns:
        [N, C, H, W] losses.
    """
    noise = torch.randn_like(images) if noise is None else noise
    extra = {} if augment_labels is None else {"augment_labels": augment_labels}
    denoised = net(images + noise * sigma, sigma, labels, **extra)
    return weight * (denoised - images) ** 2


class _DenoisingLoss:
    def draw(self, images: torch.Tensor) -> torch.Tensor:
        """Draw the random number [N, 1, 1, 1] that each sample's noise level follows from."""
        return torch.rand([images.shape[0], 1, 1, 1], device=images.device)

    def sigma_and_weight(self, rnd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return noise levels and loss weights for the numbers of `draw`."""
        raise NotImplementedError

    def __call__(
        self,
        net: Net,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_pipe=None,
        *,
        rnd: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss [N, C, H, W], not reduced.

        Args:
            net: denoiser, see `denoising_loss`.
            images: [N, C, H, W] clean images in [-1, 1].
            labels: [N, label_dim] class labels or None.
            augment_pipe: maps images to (images, augment labels), or None.
            rnd: [N, 1, 1, 1] numbers that fix the noise levels, as from `draw`; None draws them.
            noise: [N, C, H, W] unit normals; None draws them, after `rnd` and the augmentation.
        """
        rnd = self.draw(images) if rnd is None else rnd
        sigma, weight = self.sigma_and_weight(rnd)
        images, augment_labels = (images, None) if augment_pipe is None else augment_pipe(images)
        return denoising_loss(net, images, sigma, weight, labels, augment_labels, noise)


class EDMLoss(_DenoisingLoss):
    """EDM: ln s = P_mean + P_std n with a normal n, weight `edm_weight` (arXiv 2206.00364, section 5)."""

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5):
        self.P_mean = P_mean
        self.P_std = P_std
        self.sigma_data = sigma_data

    def draw(self, images: torch.Tensor) -> torch.Tensor:
        """Draw a unit normal for each sample, [N, 1, 1, 1]."""
        return torch.randn([images.shape[0], 1, 1, 1], device=images.device)

    def sigma_and_weight(self, rnd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = (rnd * self.P_std + self.P_mean).exp()
        return sigma, edm_weight(sigma, self.sigma_data)


class VPLoss(_DenoisingLoss):
    """VP: s = s(t) at a uniform time t in [epsilon_t, 1], weight 1 / s^2 (arXiv 2206.00364, table 1)."""

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_t: float = 1e-5):
        self.beta_d = beta_d
        self.beta_min = beta_min
        self.epsilon_t = epsilon_t

    def sigma_and_weight(self, rnd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = vp_sigma(1 + rnd * (self.epsilon_t - 1), self.beta_d, self.beta_min)
        return sigma, 1 / sigma**2


class VELoss(_DenoisingLoss):
    """VE: ln s uniform between ln sigma_min and ln sigma_max, weight 1 / s^2 (arXiv 2206.00364, table 1)."""

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100):
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def sigma_and_weight(self, rnd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** rnd
        return sigma, 1 / sigma**2
