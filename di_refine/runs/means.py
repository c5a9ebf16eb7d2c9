"""Numbers for the log of a tick: the means of what a trainer reports, and the peaks of memory."""

import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch


class Means:
    """The means over the steps of a tick of what the trainer reports. Only `read` waits for the device.

    In vectors NaN entries are left out; a scalar that is NaN makes the mean NaN.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, torch.Tensor | float] = {}

    def add(self, values: Mapping[str, torch.Tensor | float]) -> None:
        """Add one step; a name that is not in every step is averaged over the steps that have it."""
        for name, value in values.items():
            count: torch.Tensor | float = 1
            if isinstance(value, torch.Tensor):
                value = value.detach()
                if value.ndim:
                    count = (~value.isnan()).float()
                    value = value.nan_to_num(nan=0.0, posinf=float("inf"), neginf=float("-inf"))
            for sums, more in ((self._sums, value), (self._counts, count)):
                before: torch.Tensor | float = sums.get(name, 0)
                if isinstance(before, torch.Tensor) and isinstance(more, torch.Tensor):
                    before = before.to(more.device)  # sums that were loaded are on the CPU
                sums[name] = before + more

    def read(self) -> dict[str, float | list[float]]:
        """Return name -> mean, NaN where there was nothing."""
        sizes = {name: max(torch.as_tensor(value).numel(), 1) for name, value in self._sums.items()}
        if not sizes:
            return {}
        both = torch.stack(
            [
                torch.cat([torch.as_tensor(part[name]).cpu().double().expand(size) for name, size in sizes.items()])
                for part in (self._sums, self._counts)
            ]
        )
        means = (both[0] / both[1]).split(list(sizes.values()))
        vectors = {name for name, value in self._sums.items() if isinstance(value, torch.Tensor) and value.ndim}
        return {name: m.tolist() if name in vectors else m.item() for name, m in zip(sizes, means)}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from sums that were saved.

        Raises:
            ValueError: they are something else.
        """
        sums, counts = dict(state["sums"]), dict(state["counts"])
        numbers = all(isinstance(value, (int, float, torch.Tensor)) for value in (*sums.values(), *counts.values()))
        if sums.keys() != counts.keys() or not numbers:
            raise ValueError("the sums of statistics are no numbers")
        self._sums, self._counts = sums, counts


def peak_memory() -> dict[str, float]:
    """Return peaks in GiB: of this process so far, and of what PyTorch had on its GPUs since the last call."""
    unit = 1 if sys.platform == "darwin" else 1024
    record = {"cpu_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        record["gpu_memory_gb"] = max(torch.cuda.max_memory_allocated(device) for device in devices) / 2**30
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
    return record
