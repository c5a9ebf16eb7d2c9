"""Train a diffusion teacher, a GAN or a feature network: `python pretrain.py --help`.

The command is in `di_refine/commands/pretrain.py`.
"""

from di_refine import start

if __name__ == "__main__":
    start.pretrain()
