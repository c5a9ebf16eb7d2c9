"""Floating-point operations of a whole command, convolutions and matrix products alone, printed as its last line.

python benchmarks/flop.py refine.py --network=stylegan2-digits.pkl --kimg=0.5 --metrics=none --outdir=/tmp/runs
"""

import runpy
import sys
from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode


def main() -> None:
    """Run the command that is named, with its arguments, and print the number; its exit status stays."""
    status: int | str | None = 0
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as if Python had been started with the command itself
    with FlopCounterMode(display=False) as counter:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
    print(counter.get_total_flops())
    sys.exit(status)


if __name__ == "__main__":
    main()
