"""Convert images into a data set: `python dataset_tool.py --help`.

The command is in `di_refine/commands/dataset_tool.py`.
"""

from di_refine import start

if __name__ == "__main__":
    start.dataset_tool()
