"""Copies of networks that share all weight matrices with the original, and train low-rank changes of them alone.

A weight W becomes W + B A with B [out, rank] and A [rank, in] (LoRA, arXiv 2106.09685); B begins at 0, so
that the copy begins as the original. Kernels of convolutions count as matrices with one column per input and place.
Biases, gains and whatever else has fewer than two dimensions are copied and trained whole.
"""

import copy

import torch
from torch.nn.utils import parametrize


class LowRank(torch.nn.Module):
    """Adds a product of two thin matrices to a weight.

    Args:
        weight: `[out, ...]`.
        rank: of the product; one above that of the weight is cut to it.
    """

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        out, columns = weight.shape[0], weight[0].numel()
        rank = min(rank, out, columns)
        self.down = torch.nn.Parameter(torch.randn(rank, columns, device=weight.device) / columns**0.5)
        self.up = torch.nn.Parameter(torch.zeros(out, rank, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape).to(weight.dtype)


def adapted(net: torch.nn.Module, rank: int, seed: int = 0) -> torch.nn.Module:
    """Return a copy of a network that shares its weight matrices and trains low-rank changes of them.

    Args:
        net: the network. It is frozen.
        rank: of the changes.
        seed: of their beginning, the matrices A.

    Returns:
        The copy. Those of its parameters that require gradients are what is trained, see `trained`.
    """
    net.requires_grad_(False)
    shared = {id(p): p for p in net.parameters() if p.ndim >= 2}
    twin = copy.deepcopy(net, dict(shared))
    for p in twin.parameters():
        p.requires_grad_(p.ndim < 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in list(twin.modules()):
            for name, p in list(module.named_parameters(recurse=False)):
                if id(p) in shared:
                    # `unsafe` leaves out PyTorch's check of shape and dtype, which are the weight's by construction.
                    parametrize.register_parametrization(module, name, LowRank(p, rank), unsafe=True)
    return twin


def trained(net: torch.nn.Module) -> torch.nn.ParameterList:
    """Return the parameters of a network that are trained, in a fixed order, as a module of their own."""
    return torch.nn.ParameterList(p for p in net.parameters() if p.requires_grad)
