"""Measure networks, folders and data sets: `python calc_metrics.py --help`.

The command is in `di_refine/commands/calc_metrics.py`.
"""

from di_refine import start

if __name__ == "__main__":
    start.calc_metrics()
