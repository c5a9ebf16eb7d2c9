"""What the record of an EDM network is checked for before the network is built."""

import inspect

from di_refine.edm.networks import iDDPMPrecond
from torch_utils import persistence
from torch_utils.persistence import NetworkFormatError, Record, printable

MAX_LEVELS = 10_000  # published networks have up to 4,000; each level follows from the one before, one at a time


def check_levels(record: Record) -> None:
    """Refuse a table of noise levels that would take long to make; the records themselves need no translation.

    Raises:
        NetworkFormatError: there are more than `MAX_LEVELS`.
    """
    try:
        arguments = inspect.signature(iDDPMPrecond).bind(*record.init_args, **record.init_kwargs).arguments
    except TypeError:
        return  # which is said where the network is built
    levels = arguments.get("M", 0)
    if isinstance(levels, int) and levels > MAX_LEVELS:
        raise NetworkFormatError(f"M is {printable(levels)}, and there are at most {MAX_LEVELS} noise levels")


persistence.register_translator("iDDPMPrecond", check_levels)
