"""Sharing a measurement among the processes of `torch.distributed`, so that any number of them gives the same result.

Each process takes whole batches, at the places where a single process would begin them, so every image goes through the
networks in the same company and gets the same features bit by bit. The first process collects them in order and does
the arithmetic; the others receive its result.
"""

from collections.abc import Callable, Iterator
from typing import Any

from di_refine.errors import InputError, RunError
from torch_utils import distributed as multi

BATCH_BYTES = 1 << 29  # of pictures that are held at once; 170 in colour of 1024x1024


class Ranks:
    """The processes that share a measurement, and which of them this is.

    Args:
        distributed: all processes of the default group take part; False is this one alone, whatever others there are.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    def __init__(self, distributed: bool = False):
        self.rank, self.size = (multi.rank(), multi.world_size()) if distributed else (0, 1)

    @property
    def is_first(self) -> bool:
        """Whether this process does the arithmetic."""
        return self.rank == 0

    @staticmethod
    def fitting(batch: int, images: Any) -> int:
        """Return a batch, or as many images of the size that a sampler or data set has as take half a gigabyte."""
        return max(1, min(batch, BATCH_BYTES // (images.num_channels * images.resolution**2)))

    def batches(self, count: int, batch: int) -> Iterator[range]:
        """Yield this process's share of the batches of images 0 to count - 1: neighbouring ones, in order."""
        total = -(-count // batch)
        first, stop = (total * part // self.size for part in (self.rank, self.rank + 1))
        for i in range(first, stop):
            yield range(i * batch, min((i + 1) * batch, count))

    def gather(self, item: Any) -> list:
        """Return the items of all processes in the order of their ranks, on the first; on the others an empty list."""
        return [item] if self.size == 1 else multi.gather_object(item)

    def on_first(self, function: Callable[[], Any]) -> Any:
        """Call a function on the first process and return its result, or raise its InputError or RunError, on all."""
        if self.size == 1:
            return function()
        outcome = None
        if self.is_first:
            try:
                outcome = function()
            except (InputError, RunError) as error:
                outcome = error
        outcome = multi.broadcast_object(outcome)
        if isinstance(outcome, (InputError, RunError)):
            raise outcome
        return outcome
