"""Sharing a measurement among the processes of `torch.distributed`, so that any number of them gives the same result.

Each process takes whole batches, at the places where a single process would begin them, so every image goes through the
networks in the same company and gets the same features bit by bit. The first process collects them in order and does
the arithmetic; the others receive its result.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from di_refine.errors import InputError, RunError


class Ranks:
    """The processes that share a measurement, and which of them this is.

    Args:
        distributed: all of the default group; False is this process alone, whether or not there are others.

    Attributes:
        rank, size: number of this process, and of processes.
    """

    def __init__(self, distributed: bool = False):
        self.rank, self.size = 0, 1
        if distributed:
            self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def batches(self, count: int, batch: int) -> Iterator[range]:
        """This process's share of the batches of images 0 to count - 1: neighbouring ones, in order."""
        total = -(-count // batch)
        first, stop = (total * part // self.size for part in (self.rank, self.rank + 1))
        for i in range(first, stop):
            yield range(i * batch, min((i + 1) * batch, count))

    def gather(self, item: Any) -> list:
        """The items of all processes in the order of their ranks, on the first; an empty list on the others."""
        if self.size == 1:
            return [item]
        everyone = [None] * self.size if self.is_first else None
        torch.distributed.gather_object(item, everyone)
        return everyone or []

    def on_first(self, function: Callable[[], Any]) -> Any:
        """What a function returns on the first process, for all of them; so with its InputError or RunError."""
        if self.size == 1:
            return function()
        outcome = [None]
        if self.is_first:
            try:
                outcome = [function()]
            except (InputError, RunError) as error:
                outcome = [error]
        torch.distributed.broadcast_object_list(outcome)
        if isinstance(outcome[0], (InputError, RunError)):
            raise outcome[0]
        return outcome[0]


@contextlib.contextmanager
def process_group() -> Iterator[bool]:
    """Join the processes that torchrun started; says whether there are several.

    Features and moments travel as CPU tensors a few times per run, so gloo serves every device.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield False
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield True
    finally:
        torch.distributed.destroy_process_group()
