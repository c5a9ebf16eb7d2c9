"""Draw images from a network: `python generate.py --help`.

The command is in `di_refine/commands/generate.py`.
"""

from di_refine.commands.generate import main

if __name__ == "__main__":
    main()
