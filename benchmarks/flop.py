"""Floating-point operations of a whole command, convolutions and matrix products alone.

    python benchmarks/flop.py refine.py --network=stylegan2-digits.pkl --kimg=0.5 --metrics=none --outdir=/tmp/runs

The number is the last line of what is printed.
"""

import runpy
import sys
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Counter(TorchDispatchMode):
    """Adds up operations. PyTorch's FlopCounterMode tells modules apart, too, and fails at R1's second derivatives."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:  # in inference mode convolutions and the like arrive whole
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        result = func(*args, **kwargs)
        self.total += count(*args, **kwargs, out_val=result)
        return result


def main() -> None:
    """Run the command that is named, with its arguments, and print the number; its exit status stays."""
    if len(sys.argv) < 2:
        sys.exit("usage: python benchmarks/flop.py COMMAND.py [ARGUMENTS]")
    status: int | str | None = 0
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as if Python had been started with the command itself
    with Counter() as counter:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
    print(counter.total)
    sys.exit(status)


if __name__ == "__main__":
    main()
