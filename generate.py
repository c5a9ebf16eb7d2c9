"""Draw images from a network: `python generate.py --help`.

The command is in `di_refine/commands/generate.py`.
"""

from di_refine import start

if __name__ == "__main__":
    start.generate()
