"""An adversarial term beside the objective, for those who do have data: a discriminator that goes on training.

The pickle of a StyleGAN2-ADA generator brings its discriminator along, already trained against that very generator.
"""

from collections.abc import Callable

import torch

from stylegan2_ada.adversarial import discriminator_loss, generator_loss, r1_penalty

R1_INTERVAL = 16
"""R1 is computed at every sixteenth update, with that much more weight (arXiv 1912.04958, section 3.1)."""


class Critic:
    """A discriminator's part in the alternating update.

    Args:
        net: `(images [N, C, R, R], labels [N, label_dim]) -> logits [N, 1]`; trained in place.
        gamma: weight of the R1 penalty (arXiv 1801.04406).
        augment: applied to all images it sees, such as the pickle's own augmentation at the strength of its training.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        gamma: float = 0.01,
        augment: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.net, self.gamma = net.train().requires_grad_(True), gamma
        self._augment = augment or (lambda images: images)

    def loss(
        self,
        real: torch.Tensor,
        real_labels: torch.Tensor,
        fake: torch.Tensor,
        fake_labels: torch.Tensor,
        penalty: bool,
    ) -> torch.Tensor:
        """Mean discriminator loss; with `penalty`, R1 on the real images as well."""
        real = self._augment(real).detach().requires_grad_(penalty)
        logits = self.net(real, real_labels)
        loss = discriminator_loss(logits, self.net(self._augment(fake.detach()), fake_labels)).mean()
        if penalty:
            loss = loss + r1_penalty(logits, real).mean() * (self.gamma / 2 * R1_INTERVAL)
        return loss

    def generator_loss(self, fake: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean non-saturating loss of images `[N, C, R, R]`."""
        return generator_loss(self.net(self._augment(fake), labels)).mean()
