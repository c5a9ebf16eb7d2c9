"""Distil a diffusion model into a generator of one step or a few: `python distill.py --help`.

The command is in `di_refine/commands/distill.py`.
"""

from di_refine import start

if __name__ == "__main__":
    start.distill()
