"""Generators as the training loop sees them, and samplers as the metrics see them.

A generator for `di_refine.trainer.Trainer` is any module called as `generator(z, labels) -> images` that has
`latent_shape` (of one sample) and `label_dim` (0 without labels). A sampler is called as
`sampler(first_index, count, seed) -> (uint8 images [n, C, H, W], labels [n, L] or None)` and is a pure function of
image index and seed: the same image has the same pixels whatever the batch size.
"""

from collections.abc import Sequence

import numpy as np
import torch

from di_refine.edm import sampler as edm_sampler
from di_refine.errors import InputError
from di_refine.files.pictures import to_uint8
from di_refine.noise import EdmGrid
from torch_utils import misc, persistence


class StyleGAN2Generator(torch.nn.Module):
    """A StyleGAN2 network with the training loop's face."""

    def __init__(self, net: torch.nn.Module, noise_mode: str = "random"):
        super().__init__()
        self.net = net
        self.noise_mode = noise_mode
        self.latent_shape = (net.z_dim,)
        self.label_dim = net.c_dim

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`[N, z_dim]`, `[N, c_dim]` -> images `[N, C, R, R]`."""
        return self.net(z, labels, noise_mode=self.noise_mode)


class DistilledGenerator(torch.nn.Module):
    """A diffusion network that makes images in one step or a few.

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
        image = (net.img_channels, net.img_resolution, net.img_resolution)
        self.latent_shape = image if len(self.sigmas) == 1 else (len(self.sigmas), *image)
        self.label_dim = net.label_dim

    def train(self, mode: bool = True) -> "DistilledGenerator":
        """Whether a random step's images are returned, or the last one's."""
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
        return x0


def step_sigmas(steps: int, init_sigma: float) -> list[float]:
    """Noise levels of a generator of a few steps: EDM's spacing (arXiv 2206.00364, equation 5, rho 7) from `init_sigma`
    down to 0.1, below which images hardly change, without that end.
    """
    grid = EdmGrid(min(0.1, init_sigma), init_sigma)
    return [init_sigma, *grid.level(1 - torch.arange(1, steps, dtype=torch.float64) / steps).tolist()]


def latents(seeds: list[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Unit normal latents `[len(seeds), *shape]`, float32 on the CPU; sample i depends on `seeds[i]` alone.

    NumPy's legacy generator is frozen, so a seed means the same latent on every machine, and the same as in the
    StyleGAN family's own tools.
    """
    draws = [np.random.RandomState(seed % 2**32).randn(*shape) for seed in seeds]
    return torch.from_numpy(np.stack(draws)).float()


class NetworkSampler:
    """A sampler over a loaded network; see the module's text for the contract. Leaves the network's mode as it was.

    Args:
        net: a StyleGAN2 generator, or an EDM-preconditioned denoiser.
        device: where to run.
        num_steps: Heun steps for a denoiser.
        truncation_psi: for StyleGAN2.
        label: fixed class; None draws classes with `class_probs`.
        class_probs: `[label_dim]` frequencies; None is uniform.
        chunk: images per forward pass. Chunks begin at multiples of it, whatever is asked for, so random noise inputs
            do not depend on the caller's batch size.
        sigmas: makes a denoiser a `DistilledGenerator` of these noise levels; None samples it.
        bridge: applied to the images, see `di_refine.bridge`.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        device: torch.device | str = "cpu",
        num_steps: int = 18,
        truncation_psi: float = 1.0,
        label: int | None = None,
        class_probs: np.ndarray | None = None,
        chunk: int = 128,
        sigmas: Sequence[float] | None = None,
        bridge: torch.nn.Module | None = None,
    ):
        self.net = net.to(device)
        self.device = torch.device(device)
        self.resolution, self.num_channels = net.img_resolution, net.img_channels
        self.is_diffusion = hasattr(net, "round_sigma")
        self.label_dim = net.label_dim if self.is_diffusion else net.c_dim
        self.num_steps, self.truncation_psi = num_steps, truncation_psi
        self.label, self.class_probs, self.chunk = label, class_probs, chunk
        self.distilled = None if sigmas is None else DistilledGenerator(self.net, sigmas).eval()
        image = (self.num_channels, self.resolution, self.resolution)
        self.latent_shape = image if self.is_diffusion else (net.z_dim,)
        if self.distilled is not None:
            self.latent_shape = self.distilled.latent_shape
        self.bridge = torch.nn.Identity() if bridge is None else bridge.to(device)
        if label is not None and not 0 <= label < max(self.label_dim, 1):
            known = f"0 to {self.label_dim - 1}" if self.label_dim else "no classes"
            raise InputError(f"--class={label} is not a class of this network, which has {known}.")

    def labels(self, seeds: list[int]) -> torch.Tensor:
        """One-hot labels `[n, label_dim]`, one draw per seed."""
        labels = torch.zeros(len(seeds), self.label_dim)
        if self.label_dim == 0:
            return labels
        for row, seed in enumerate(seeds):
            draw = np.random.RandomState(misc.derive_seed(seed, "label") % 2**32)
            index = draw.choice(self.label_dim, p=self.class_probs) if self.label is None else self.label
            labels[row, index] = 1
        return labels

    @torch.inference_mode()
    def images(
        self, seeds: list[int], labels: torch.Tensor | None = None, noise_seed: int = 0, noise_mode: str = "random"
    ):
        """Float images `[n, C, R, R]` for latent seeds; `labels` default to one draw per seed."""
        z = latents(seeds, self.latent_shape).to(self.device)
        c = (self.labels(seeds) if labels is None else labels).to(self.device)
        training = self.net.training
        self.net.eval()
        try:
            return self.bridge(self._forward(z, c, noise_seed, noise_mode))
        finally:
            self.net.train(training)

    def _forward(self, z: torch.Tensor, c: torch.Tensor, noise_seed: int, noise_mode: str) -> torch.Tensor:
        if self.distilled is not None:
            return self.distilled(z, c)
        if self.is_diffusion:
            return edm_sampler.sample(self.net, z, c if self.label_dim else None, num_steps=self.num_steps).float()
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(noise_seed)
            return self.net(z, c, truncation_psi=self.truncation_psi, noise_mode=noise_mode)

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


def load_networks(path) -> tuple[str, dict]:
    """Read a pickle and say what it is: ('stylegan2' or 'edm', its dict).

    Raises:
        torch_utils.persistence.NetworkFormatError: not a network file.
    """
    networks = persistence.load(path)
    if "G_ema" in networks and hasattr(networks["G_ema"], "mapping"):
        return "stylegan2", networks
    if any(hasattr(networks.get(key), "round_sigma") for key in ("ema", "G_ema")):
        return "edm", networks
    raise persistence.NetworkFormatError(
        f"{path}: holds neither a StyleGAN2 generator (G_ema) nor an EDM network (ema)"
    )


def averaged(networks: dict) -> torch.nn.Module:
    """The averaged network of a pickle: `ema` of an EDM file, which other tools call `G_ema` as StyleGAN2 does."""
    return networks["ema"] if "ema" in networks else networks["G_ema"]


def load_kind(path, kind: str, option: str) -> dict:
    """A network file that has to be of one kind, 'stylegan2' or 'edm': a diffusion model that was not distilled.

    Raises:
        InputError: naming the option, when it is no network file or of another kind.
    """
    names = {"stylegan2": "a StyleGAN2 generator", "edm": "an EDM diffusion model"}
    try:
        found, networks = load_networks(path)
    except persistence.NetworkFormatError as error:
        raise InputError(f"{option}: {error}") from None
    if found != kind:
        raise InputError(f"{option}={path} is {names[found]}, not {names[kind]}")
    if networks.get("distilled_sigmas") is not None:
        raise InputError(f"{option}={path} was distilled to few steps, so it is no diffusion model any more")
    return networks


def load_sampler(
    path,
    steps: int = 18,
    truncation: float = 1.0,
    device: torch.device | str = "cpu",
    label: int | None = None,
    class_probs: np.ndarray | None = None,
    init_sigma: float | None = None,
) -> NetworkSampler:
    """A sampler over the averaged network in a pickle; arguments as for `NetworkSampler`.

    A distilled generator says so in its file (`distilled_sigmas`); `init_sigma` makes any denoiser one of one step.
    """
    kind, networks = load_networks(path)
    net = averaged(networks)
    if init_sigma is not None and kind != "edm":
        raise InputError(f"--init-sigma is for EDM networks, and {path} is a StyleGAN2 generator")
    sigmas = networks.get("distilled_sigmas") if init_sigma is None else [init_sigma]
    return NetworkSampler(net, device, steps, truncation, label, class_probs, sigmas=sigmas)
