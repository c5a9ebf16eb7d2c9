"""Small pieces of the training update that know nothing of its networks."""

import contextlib
import functools
import re

import torch
import torch.utils.checkpoint

SIGMA_EDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Between the noise levels that statistics are given for."""


@contextlib.contextmanager
def frozen(params: list[torch.nn.Parameter]):
    """Keep the generator's objective from filling the gradients of networks that it flows through."""
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


def per_sample(values: torch.Tensor) -> torch.Tensor:
    """Means `[N]` over all but the first dimension, without their graph."""
    return values.detach().flatten(1).mean(dim=1)


def by_sigma(sigma: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sums of `values` `[N]` by noise level, and how many there are, `[2, len(SIGMA_EDGES) + 1]`."""
    edges = torch.tensor(SIGMA_EDGES, device=sigma.device)
    bins = torch.arange(len(SIGMA_EDGES) + 1, device=sigma.device)
    member = (torch.bucketize(sigma, edges)[:, None] == bins).to(values.dtype)
    return torch.stack([values @ member, member.sum(dim=0)])


def recompute_blocks(net: torch.nn.Module) -> None:
    """Gradient checkpointing of a U-Net: keep what enters each block, compute the rest again in the backward pass."""
    for name, block in net.named_modules():
        if re.fullmatch(r"model\.(enc|dec)\.\w+", name):
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


@torch.no_grad()
def relative_distance(tensors: list[torch.Tensor], reference: list[torch.Tensor]) -> torch.Tensor:
    """Length of the difference of all tensors together, relative to that of the reference."""
    difference = torch.nn.utils.get_total_norm(torch._foreach_sub(tensors, reference))
    return difference / torch.nn.utils.get_total_norm(reference)


def pairs(averages, current) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Both as lists without their graph, as `torch._foreach_lerp_` wants them."""
    return [t.detach() for t in averages], [t.detach() for t in current]
