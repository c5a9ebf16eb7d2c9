"""What the trainer calls a generator, what the metrics call a sampler, and the ones that there are of both."""

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch

from di_refine import terminal
from di_refine.denoisers import Denoiser, check_labels
from di_refine.edm import sampler as edm_sampler
from di_refine.errors import InputError
from di_refine.files import label_laws, networks
from di_refine.files.datasets import ImageDataset
from di_refine.files.pictures import to_uint8
from di_refine.labels import LabelLaw
from di_refine.noise import edm_level
from stylegan2_ada import networks as stylegan2
from torch_utils import distributed, misc


class Generator(Protocol):
    """A module that makes images of latents; any differentiable one can be trained.

    The trainer needs no more than this. To be sampled and measured it has `img_channels` and `img_resolution`, too.

    Called as `generator(z [N, *latent_shape], labels [N, label_dim])`, it returns images, `[N, C, R, R]` with values
    about [-1, 1].

    Attributes:
        latent_shape: shape of one latent. Latents are unit normals.
        label_dim: length of a label; 0 without labels.
    """

    latent_shape: tuple[int, ...]
    label_dim: int

    def __call__(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor: ...


class Sampler(Protocol):
    """A source of images to be measured.

    Called as `sampler(first_index, count, seed)`, it returns uint8 images `[count, C, R, R]` and their labels
    `[count, label_dim]`, or None without labels. It is a pure function of image index and seed: the same image has the
    same pixels whatever the batch size.

    Attributes:
        resolution, num_channels: of the images.
        label_dim: length of a label; 0 without labels.
        num_images: how many images there are; None where there is no limit.
        law: what the labels are drawn from; None where they are not drawn.
    """

    resolution: int
    num_channels: int
    label_dim: int
    num_images: int | None

    @property
    def law(self) -> LabelLaw | None: ...

    def __call__(self, first_index: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]: ...


# ----------------------------------------------------------------------------------------------------------------------
# Generators


class StyleGAN2Generator(torch.nn.Module):
    """A StyleGAN2 network as a `Generator`.

    Args:
        net: `stylegan2_ada.networks.Generator`.
        noise_mode: 'random', 'const' or 'none', see the network.
        truncation_psi: see the network; 1 does not truncate.
    """

    def __init__(self, net: stylegan2.Generator, noise_mode: str = "random", truncation_psi: float = 1.0):
        super().__init__()
        self.net, self.noise_mode, self.truncation_psi = net, noise_mode, truncation_psi
        self.training = net.training
        self.latent_shape: tuple[int, ...] = (net.z_dim,)
        self.label_dim: int = net.c_dim
        self.img_resolution, self.img_channels = net.img_resolution, net.img_channels

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`[N, z_dim]`, `[N, c_dim]` -> images `[N, C, R, R]`."""
        return self.net(z, labels, truncation_psi=self.truncation_psi, noise_mode=self.noise_mode)


class DistilledGenerator(torch.nn.Module):
    """A diffusion network that makes images in one step or a few, as a `Generator`.

    One step is `x0 = D(s_1 z, s_1, c)` (arXiv 2305.18455, section 4.1). Further steps put noise of lower levels on the
    result and denoise again, `x0 <- D(x0 + s_k z_k, s_k, c)`. In training mode the images of a random step are
    returned, with the earlier ones as givens, so that every step learns from the images that it will meet (the backward
    simulation of DMD2, arXiv 2405.14867, section 4.5).

    Args:
        net: the denoiser. Its dropout stays off, in training as well.
        sigmas: falling noise levels, one per step.
    """

    def __init__(self, net: torch.nn.Module, sigmas: Sequence[float] = (1.0,)):
        super().__init__()
        self.net = net
        self.sigmas = tuple(float(sigma) for sigma in sigmas)
        model = cast(Denoiser, net)
        self.img_resolution, self.img_channels = model.img_resolution, model.img_channels
        image = (model.img_channels, model.img_resolution, model.img_resolution)
        self.latent_shape: tuple[int, ...] = image if len(self.sigmas) == 1 else (len(self.sigmas), *image)
        self.label_dim = model.label_dim

    def train(self, mode: bool = True) -> "DistilledGenerator":
        """Return a random step's images from now on, or the last step's."""
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Unit normals `[N, C, R, R]` or `[N, steps, C, R, R]`, labels `[N, label_dim]` -> images `[N, C, R, R]`."""
        z = z.reshape(len(z), len(self.sigmas), *z.shape[-3:])
        last = len(self.sigmas) - 1
        if self.training and last:
            last = int(torch.randint(last + 1, []))  # drawn on the CPU: the device is not waited for
        x0: torch.Tensor | float = 0.0
        for step, sigma in enumerate(self.sigmas[: last + 1]):
            x = x0 + sigma * z[:, step]
            with torch.set_grad_enabled(torch.is_grad_enabled() and step == last):
                x0 = self.net(x, torch.full([len(z)], sigma, device=z.device), labels)
        return torch.as_tensor(x0)


def step_sigmas(steps: int, init_sigma: float) -> list[float]:
    """Noise levels of a generator of a few steps: EDM's spacing (arXiv 2206.00364, equation 5, rho 7) from `init_sigma`
    down to 0.1, below which images hardly change, without that end.
    """
    position = torch.arange(1, steps, dtype=torch.float64) / steps
    return [init_sigma, *edm_level(position, min(0.1, init_sigma), init_sigma).tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# Samplers


def check_pictures(images: torch.Tensor, name: str) -> None:
    """Say on stderr, once for a network, that its pictures are not finite, or all of one colour.

    Either is what a damaged network makes, and neither is seen in files of pictures or in the numbers of a metric.

    Args:
        images: `[N, C, R, R]` in [-1, 1].
        name: of the network.
    """
    if not torch.isfinite(images).all():
        _warn(f"pictures of {name} are not finite")
        return
    pixels = to_uint8(images)
    first = pixels[:1, :, :1, :1]
    if len(pixels) and (pixels == first).all():
        _warn(f"pictures of {name} are constant: every pixel is {', '.join(map(str, first.flatten().tolist()))} of 255")


@functools.cache
def _warn(sentence: str) -> None:
    if distributed.is_first():
        terminal.say(f"warning: {sentence}; the network is damaged, or was never trained")


def latents(seeds: list[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Unit normal latents `[len(seeds), *shape]`, float32 on the CPU; sample i depends on `seeds[i]` alone.

    NumPy's legacy generator is frozen, so a seed means the same latent on every machine, and the same as in the
    StyleGAN family's own tools.
    """
    draws = [np.random.RandomState(seed % 2**32).randn(*shape) for seed in seeds]
    return torch.from_numpy(np.stack(draws)).float()


def edm_latents(
    seeds: list[int], shape: tuple[int, ...], label_dim: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents `[n, *shape]` and one-hot labels `[n, label_dim]` as EDM's tools draw them from seeds.

    Each image has a generator of its own on the device, which gives the latent first and then the class; the numbers of
    another kind of device are others.
    """
    rngs = [torch.Generator(device).manual_seed(seed % 2**32) for seed in seeds]
    z = torch.stack([torch.randn(shape, generator=rng, device=device) for rng in rngs])
    if not label_dim:
        return z, torch.zeros(len(seeds), 0)
    classes = [int(torch.randint(label_dim, size=[], generator=rng, device=device)) for rng in rngs]
    return z, torch.eye(label_dim)[classes]


class NetworkSampler(ABC):
    """A `Sampler` that draws latents and labels and lets a network make images of them.

    Args:
        net: the network. It is moved to the device, and put into eval mode while it makes images.
        latent_shape: shape of one latent.
        image: channels and resolution of what the network makes.
        label_dim: length of a label.
        device: where to run.
        law: what labels are drawn from; None draws all classes equally often.
        chunk: images per forward pass. Chunks begin at multiples of it, whatever is asked for, so random noise inputs
            do not depend on the caller's batch size.
        bridge: applied to the images, see `di_refine.bridge`.
        name: of the network, for messages.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        latent_shape: tuple[int, ...],
        image: tuple[int, int],
        label_dim: int,
        device: torch.device | str = "cpu",
        law: LabelLaw | None = None,
        chunk: int = 128,
        bridge: torch.nn.Module | None = None,
        name: str = "the network",
    ):
        self.net = net.to(device)
        self.name = name
        self.device = torch.device(device)
        self.latent_shape = latent_shape
        self.num_channels, self.resolution = image
        self.label_dim = label_dim
        self.num_images: int | None = None
        self.law, self.chunk = LabelLaw(label_dim) if law is None else law, chunk
        self.bridge = torch.nn.Identity() if bridge is None else bridge.to(device)

    @abstractmethod
    def _forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Images `[N, C, R, R]` of latents `[N, *latent_shape]` and labels `[N, label_dim]`."""

    def labels(self, seeds: list[int]) -> torch.Tensor:
        """Labels `[n, label_dim]`, one draw per seed."""
        return self.law.of_seeds(seeds)

    @torch.inference_mode()
    def images(
        self,
        seeds: list[int],
        labels: torch.Tensor | None = None,
        noise_seed: int = 0,
        z: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Float images `[n, C, R, R]` for latent seeds.

        Args:
            seeds: one for each image.
            labels: `[n, label_dim]`; None draws one per seed.
            noise_seed: seeds what the network draws by itself, such as noise inputs.
            z: latents `[n, *latent_shape]`; None draws them from the seeds.
        """
        z = misc.to_device(latents(seeds, self.latent_shape) if z is None else z, self.device)
        c = misc.to_device(self.labels(seeds) if labels is None else labels, self.device)
        training = self.net.training
        self.net.eval()
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(noise_seed)
                images = self.bridge(self._forward(z, c))
        finally:
            self.net.train(training)
        check_pictures(images, self.name)
        return images

    def __call__(self, first_index: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """uint8 images `[count, C, R, R]` and their labels for the indices from `first_index` on."""
        stop = first_index + count
        parts, all_labels = [], []
        for start in range(first_index // self.chunk * self.chunk, stop, self.chunk):
            seeds = [misc.derive_seed(seed, index) for index in range(start, start + self.chunk)]
            labels = self.labels(seeds)
            images = self.images(seeds, labels, noise_seed=misc.derive_seed(seed, start, "noise"))
            keep = slice(max(first_index - start, 0), min(stop - start, self.chunk))
            parts.append(to_uint8(images[keep]))
            all_labels.append(labels[keep])
        return torch.cat(parts), torch.cat(all_labels) if self.label_dim else None


class GeneratorSampler(NetworkSampler):
    """A `Sampler` over a `Generator`.

    Args:
        generator: such as `StyleGAN2Generator` or `DistilledGenerator`; any other one needs `img_channels` and
            `img_resolution` besides what a `Generator` has.
        settings: the arguments of `NetworkSampler` from `device` on.
    """

    def __init__(self, generator: Any, device: torch.device | str = "cpu", **settings):
        image = (generator.img_channels, generator.img_resolution)
        super().__init__(generator, generator.latent_shape, image, generator.label_dim, device, **settings)

    @property
    def generator(self) -> Any:
        """The generator."""
        return self.net

    def _forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.net(z, labels)


class DiffusionSampler(NetworkSampler):
    """A `Sampler` over a diffusion model: EDM's deterministic Heun sampler (arXiv 2206.00364, algorithm 1).

    Args:
        net: a module that is a `Denoiser`.
        device: where to run.
        num_steps: steps of the sampler.
        solver: its other settings, arguments of `edm.sampler.sample`.
        settings: the further arguments of `NetworkSampler`.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        device: torch.device | str = "cpu",
        num_steps: int = 18,
        solver: Mapping[str, Any] | None = None,
        **settings,
    ):
        model = cast(Denoiser, net)
        shape = (model.img_channels, model.img_resolution, model.img_resolution)
        super().__init__(net, shape, shape[:2], model.label_dim, device, **settings)
        self.num_steps, self.solver = num_steps, dict(solver or {})

    def _forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        given = labels if self.label_dim else None

        def beat(*_: int) -> None:  # of a large network a batch takes minutes
            terminal.beat()

        return edm_sampler.sample(self.net, z, given, num_steps=self.num_steps, progress=beat, **self.solver).float()


def load_sampler(
    path: str | os.PathLike,
    steps: int = 18,
    truncation: float = 1.0,
    device: torch.device | str = "cpu",
    init_sigma: float | None = None,
    noise_mode: str = "random",
    labels: str | None = None,
    dataset: ImageDataset | None = None,
    label: str | None = None,
    **settings,
) -> NetworkSampler:
    """A sampler over the averaged network in a file.

    Args:
        path: what `files.networks.load` reads: a StyleGAN2 generator, a diffusion model, or a distilled one, which
            knows its noise levels.
        steps: of the sampler, for a diffusion model.
        truncation: truncation psi, for a StyleGAN2 generator.
        device: where to run.
        init_sigma: makes any diffusion model a generator of one step from this noise level.
        noise_mode: 'random', 'const' or 'none', for a StyleGAN2 generator.
        labels, dataset, label: what labels are drawn from, see `files.label_laws.choose`; without any, what the
            file says, or where it says nothing, all classes equally often.
        settings: further arguments of `NetworkSampler`.

    Raises:
        InputError: the file holds no such network, another kind than a setting is for, or a one-step generator of
            another project and no `init_sigma`; or `labels` does not suit the network.
    """
    file = networks.load(path)
    law = label_laws.choose(labels, file.labels, dataset, label)
    settings = {"law": law, "name": os.fspath(path), **settings}
    if file.kind == networks.STYLEGAN2:
        if init_sigma is not None:
            raise InputError(f"init_sigma={init_sigma:g} is for EDM networks, and {path} is a StyleGAN2 generator")
        return GeneratorSampler(StyleGAN2Generator(file.average, noise_mode, truncation), device, **settings)
    if truncation != 1:
        raise InputError(f"truncation={truncation:g} is for StyleGAN2 generators, and {path} is a diffusion network")
    check_labels(file.average, law)
    sigmas = file.sigmas if init_sigma is None else [init_sigma]
    if sigmas is None and file.kind == networks.ONE_STEP:
        raise InputError(
            f"`init_sigma` is needed: {path} is {networks.NAMES[file.kind]}; it makes images from one noise level, "
            "which the file does not say (2.5 is usual)"
        )
    if sigmas is not None:
        return GeneratorSampler(DistilledGenerator(file.average, sigmas), device, **settings)
    return DiffusionSampler(file.average, device, steps, **settings)
