"""What a `di_refine.trainer.Trainer` needs of memory and disk, and how many images fit into a GPU at once.

Networks, their gradients, Adam's means and the files of a run are known without running anything. What a forward and a
backward pass need depends on the kernels, and is found out by trying.
"""

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from di_refine.critic import R1_INTERVAL
from di_refine.errors import RunError
from di_refine.trainer import Trainer
from torch_utils import distributed


def choose(make: Callable[[int], Trainer], share: int, device: torch.device) -> tuple[int, str]:
    """Choose how many images go through a network at once, where the user leaves that to the program.

    All processes call this together and get the same number, that of the one with the least room.

    Args:
        make: returns a trainer with so many images per pass, which is thrown away.
        share: images of the batch that belong to this process.
        device: where the trainers are.

    Returns:
        The number, a divisor of `share`, and how it was found, in words.

    Raises:
        RunError: not even one image fits into the GPU.
    """
    if device.type != "cuda":
        return share, "the whole share of this process; what fits is tried on CUDA alone"
    return largest_that_works(make, share), "the most that an update on the GPU had room for"


def largest_that_works(make: Callable[[int], Trainer], share: int) -> int:
    """Return the first of the falling divisors of `share` with which no process runs out of memory.

    Args, raises: as of `choose`.
    """
    for images in range(share, 0, -1):
        if share % images:
            continue
        # A process that runs out of memory leaves an update in its middle, where the others would wait for it.
        with distributed.alone():
            fits = _works(make, images)
        gc.collect()
        torch.cuda.empty_cache()
        if not distributed.any_rank(not fits):
            return images
    raise RunError(
        "batch_gpu=auto: the GPU's memory has no room for one image per pass; try precision=bf16 or "
        "`checkpoint_score`, or networks that are smaller"
    )


def _works(make: Callable[[int], Trainer], images: int) -> bool:
    """Return whether there is memory for two updates in which everything moves and every regularisation is due."""
    try:
        trainer = make(images)
        interval = R1_INTERVAL * trainer.config.batch
        start = math.ceil(trainer.config.warmup_nimg / interval) * interval
        for _ in range(2):  # Adam's means come into being at the end of the first and lie beside the second
            trainer.nimg = start
            trainer.step()
    except torch.OutOfMemoryError:
        return False
    return True


def tensor_sizes(trainer: Trainer) -> dict[str, int]:
    """Return the bytes of what an update needs besides activations, whatever the batch.

    Returns:
        'networks': parameters and buffers of all networks but the average. 'average': those of the generator's running
        average. 'gradients': of all parameters that are trained. 'optimizers': Adam's two means of them.
    """
    gradients = _bytes(_trained(trainer))
    networks = _bytes(tensor for net in _networks(trainer) for tensor in (*net.parameters(), *net.buffers()))
    with_average = _bytes(
        tensor for net in (*_networks(trainer), trainer.ema) for tensor in (*net.parameters(), *net.buffers())
    )
    return {
        "networks": networks,
        "average": with_average - networks,
        "gradients": gradients,
        "optimizers": 2 * gradients,
    }


def trained_parameters(trainer: Trainer) -> int:
    """Return how many numbers are trained, of all networks together."""
    return sum(p.numel() for p in _trained(trainer))


def file_sizes(trainer: Trainer, networks: dict[str, Any]) -> dict[str, int]:
    """Return, nearly, the bytes of the files that a run writes again and again.

    Args:
        trainer: before its first step, at which Adam's means are made.
        networks: what a snapshot holds.

    Returns:
        'network-snapshot' and 'training-state', of one file each.
    """
    modules = [value for value in networks.values() if isinstance(value, torch.nn.Module)]
    return {
        "network-snapshot": sum(_bytes(_tensors(module.state_dict())) for module in modules),
        "training-state": _bytes(_tensors(trainer.state_dict())) + 2 * _bytes(_trained(trainer)),
    }


def gib(size: float) -> float:
    """Return bytes in GiB, to three digits."""
    return float(f"{size / 2**30:.3g}")


def _networks(trainer: Trainer) -> list[torch.nn.Module]:
    critic = None if trainer.critic is None else trainer.critic.net
    networks = [trainer.generator, trainer.student, trainer.teacher, trainer.ratio, critic]
    return [net for net in networks if net is not None]


def _trained(trainer: Trainer) -> list[torch.nn.Parameter]:
    groups = [group for optimizer in trainer.optimizers.values() for group in optimizer.param_groups]
    return [p for group in groups for p in group["params"]]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested dicts and sequences."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, tuple, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return what tensors take; those that share memory count once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
