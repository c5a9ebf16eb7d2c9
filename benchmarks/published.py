"""Diff-Instruct's training as its paper states it (Luo et al. 2023, arXiv 2305.18455, algorithm 1), to compare speeds.

Plain on purpose: an update draws two batches from the generator, one for the student score and one for the generator,
each with a pass of the student; float32, eager, PyTorch's own operators and memory order.
"""

import copy

import torch
import torch.nn.functional as F

P_MEAN, P_STD, SIGMA_DATA = -1.2, 1.2, 0.5
EMA_IMAGES = 500_000


class PublishedLoop:
    """The student score and the generator in turns.

    Args:
        generator: `generator(z, labels)` gives images in [-1, 1].
        teacher: `teacher(x, sigma, labels)` denoises.
        batch: images per update.
        lr: learning rate of both.
    """

    def __init__(self, generator: torch.nn.Module, teacher: torch.nn.Module, batch: int, lr: float = 1e-5):
        self.batch, self.device = batch, next(teacher.parameters()).device
        self.generator = generator.train().requires_grad_(True)
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = copy.deepcopy(teacher).train().requires_grad_(True)
        self.average = copy.deepcopy(generator).eval().requires_grad_(False)
        self.student_optimizer = torch.optim.Adam(self.student.parameters(), lr, (0.0, 0.999))
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr, (0.0, 0.999))

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, labels and noise levels of a batch."""
        z = torch.randn(self.batch, *self.generator.latent_shape, device=self.device)
        classes = self.generator.label_dim
        labels = torch.zeros(self.batch, classes, device=self.device)
        if classes:
            labels = F.one_hot(torch.randint(classes, [self.batch], device=self.device), classes).float()
        sigma = (torch.randn(self.batch, 1, 1, 1, device=self.device) * P_STD + P_MEAN).exp()
        return z, labels, sigma

    def step(self) -> None:
        """Make one update of the student score and one of the generator."""
        z, labels, sigma = self._draw()
        with torch.no_grad():
            images = self.generator(z, labels)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        denoised = self.student(images + sigma * torch.randn_like(images), sigma.flatten(), labels)
        self.student_optimizer.zero_grad()
        (weight * (denoised - images) ** 2).sum().mul(1 / self.batch).backward()
        self.student_optimizer.step()

        z, labels, sigma = self._draw()
        images = self.generator(z, labels)
        with torch.no_grad():
            noised = images + sigma * torch.randn_like(images)
            teacher = self.teacher(noised, sigma.flatten(), labels)
            gradient = (self.student(noised, sigma.flatten(), labels) - teacher) / sigma**2
        self.generator_optimizer.zero_grad()
        (gradient * images).sum().mul(1 / self.batch).backward()
        self.generator_optimizer.step()

        decay = 0.5 ** (self.batch / EMA_IMAGES)
        with torch.no_grad():
            for old, new in zip(self.average.parameters(), self.generator.parameters()):
                old.lerp_(new, 1 - decay)
            for old, new in zip(self.average.buffers(), self.generator.buffers()):
                old.copy_(new)
