"""Between latents and pictures: turning latents, mapping them to w, mixing w, and drawing them."""

from collections.abc import Sequence

import torch

from di_refine.errors import InputError
from di_refine.generators import NetworkSampler, StyleGAN2Generator, check_pictures


def has_styles(sampler: NetworkSampler) -> bool:
    """Whether a sampler draws from a StyleGAN2 generator, which has w."""
    return isinstance(getattr(sampler, "generator", None), StyleGAN2Generator)


def stylegan2(sampler: NetworkSampler, option: str, network: str) -> StyleGAN2Generator:
    """The StyleGAN2 generator of a sampler.

    Raises:
        InputError: naming the option that needs one, where the network is none.
    """
    generator = getattr(sampler, "generator", None)
    if not isinstance(generator, StyleGAN2Generator):
        raise InputError(f"{option} is for StyleGAN2 generators, and {network} is none")
    return generator


@torch.inference_mode()
def mapped(
    sampler: NetworkSampler, generator: StyleGAN2Generator, z: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The w `[N, layers, w_dim]` of latents `[N, z_dim]` and labels `[N, label_dim]`, truncated as the generator is."""
    at, c = z.to(sampler.device), labels.to(sampler.device)
    return generator.net.mapping(at, c, truncation_psi=generator.truncation_psi)


def first_half(generator: StyleGAN2Generator) -> range:
    """The layers whose styles are mixed where none are named: the first half, which are the coarse ones."""
    return range(generator.net.num_ws // 2)


def mixed(ws: torch.Tensor, styles: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """The w `[N, layers, w_dim]`, with some layers taken from others, `[N or 1, layers, w_dim]`.

    This is style mixing, arXiv 1812.04948, section 3.1.
    """
    found, chosen = ws.clone(), list(layers)
    found[:, chosen] = styles[:, chosen]
    return found


@torch.inference_mode()
def synthesize(sampler: NetworkSampler, generator: StyleGAN2Generator, ws: torch.Tensor) -> torch.Tensor:
    """Images `[N, C, R, R]` of w `[N, layers, w_dim]`; random noise inputs are the same each time."""
    with torch.random.fork_rng(devices=[sampler.device] if sampler.device.type == "cuda" else []):
        torch.manual_seed(0)
        images = generator.net.synthesis(ws.to(sampler.device), noise_mode=generator.noise_mode)
    check_pictures(images, sampler.name)
    return images


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Turn latents `[N, ...]` into others by the part t of the angle between them (Shoemake, SIGGRAPH 1985).

    The length goes straight from one to the other, so unit normals stay as long as unit normals are.
    """
    lengths = [x.flatten(1).norm(dim=1) for x in (a, b)]
    u, v = (x.flatten(1) / length[:, None] for x, length in zip((a, b), lengths))
    angle = (u * v).sum(dim=1, keepdim=True).clamp(-1, 1).acos().clamp(min=1e-4)  # equal latents stay as they are
    direction = (torch.sin((1 - t) * angle) * u + torch.sin(t * angle) * v) / torch.sin(angle)
    length = (1 - t) * lengths[0] + t * lengths[1]
    return (length[:, None] * direction).reshape(a.shape)
