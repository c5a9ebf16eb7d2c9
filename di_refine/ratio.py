"""The density ratio r = q / p of teacher and generator at a noise level, learned by telling noised samples apart.

The optimal classifier of noised teacher-side samples (label 1) against noised generator samples (label 0), shown in
equal numbers at the same noise level, has the logit `log q(x_s) - log p(x_s)` (arXiv 1406.2661, proposition 1). The
classifier is a small head on the features of the student score's encoder, which knows noise level and class already.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from di_refine import denoisers


class DensityRatio(torch.nn.Module):
    """The head, and how it reads the student score's features. Its parameters are the head's alone.

    Args:
        student: the student score, called `(x, sigma, labels) -> denoised`.
        x: one sample `[1, ...]`, by which the width of the features is found.
        labels: its labels `[1, label_dim]`.
        layer: module within `student` whose output, `[N, F]` or `[N, C, H, W]`, are the features, such as
            `denoisers.encoder_layer(student)`.
        width: channels of the head.
        spectral_norm: bound the head's layers to a Lipschitz constant of one (arXiv 1802.05957).
    """

    def __init__(
        self,
        student: torch.nn.Module,
        x: torch.Tensor,
        labels: torch.Tensor,
        layer: torch.nn.Module,
        width: int = 128,
        spectral_norm: bool = False,
    ):
        super().__init__()
        self._student = (student, layer)  # in a tuple, so as not to own its parameters
        with torch.no_grad():
            features = self.features(x, torch.ones(len(x), device=x.device), labels)
        kernel, padding = (3, 1) if features.ndim == 4 else (1, 0)
        self.conv0 = torch.nn.Conv2d(features.shape[1], width, kernel, padding=padding)
        self.conv1 = torch.nn.Conv2d(width, width, kernel, padding=padding)
        self.out = torch.nn.Linear(width, 1)
        if spectral_norm:
            for name in ("conv0", "conv1", "out"):
                setattr(self, name, torch.nn.utils.parametrizations.spectral_norm(getattr(self, name)))
        else:
            torch.nn.init.zeros_(self.out.weight)  # nothing is known at first: the ratio is one everywhere
        torch.nn.init.zeros_(self.out.bias)
        self.to(x.device)

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[torch.Tensor]]:
        """While it is open, features of the student's passes are put into the list it gives."""
        seen: list[torch.Tensor] = []
        handle = self._student[1].register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            yield seen
        finally:
            handle.remove()

    def features(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
        """Features of `x` at noise levels `sigma` `[N]`, without the cost of the student's decoder."""
        return denoisers.encode(*self._student, x, sigma, labels, **kwargs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features `[N, ...]` -> unclamped logits `[N]`, float32: estimates of log q / p."""
        x = features.float()
        x = x.reshape(*x.shape[:2], *(x.shape[2:] or (1, 1)))
        x = F.silu(self.conv0(F.silu(x)))
        x = F.silu(self.conv1(x))
        return self.out(x.mean(dim=[2, 3])).squeeze(1)


def logistic_loss(generator_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """The classifier's cross-entropy per pair of samples, in nats; 2 log 2 for one that knows nothing."""
    return F.softplus(generator_logits) + F.softplus(-teacher_logits)
