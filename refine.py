"""Refine a StyleGAN2 generator with a diffusion teacher: `python refine.py --help`.

The command is in `di_refine/commands/refine.py`.
"""

from di_refine import start

if __name__ == "__main__":
    start.refine()
