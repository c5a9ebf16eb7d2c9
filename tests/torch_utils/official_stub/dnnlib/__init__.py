"""A stand-in for the official package of this name: what pickles and embedded source texts ask of it."""

from . import util
from .util import EasyDict as EasyDict

__all__ = ["EasyDict", "util"]
