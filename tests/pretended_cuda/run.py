"""Run a command of the project on the pretended device: `run.py GUARD COMMAND ARGS...`.

The last line is JSON: the lines that made the host wait for the device, and how often.
"""

import ctypes
import json
import sys
from pathlib import Path

ctypes.CDLL(sys.argv[1])  # before PyTorch, which looks for such hooks once
sys.path[0] = str(Path(__file__).resolve().parents[2])

import importlib

import torch

from tests.pretended_cuda import device

torch.set_num_threads(1)
device.install()
command = importlib.import_module(f"di_refine.commands.{sys.argv[2]}").main
command(sys.argv[3:], standalone_mode=False)
print(json.dumps(device.waits))
