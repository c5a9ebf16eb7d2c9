"""Requests to a running loop to stop, by a signal or by the clock, and the same on all processes.

SIGTERM (a batch system ends the job), SIGUSR1 (what SLURM sends before the time limit, with `--signal=USR1@120`) and
SIGINT (Ctrl-C) are remembered, and acted upon at the next boundary between steps. A second SIGINT quits at once.
"""

import os
import signal
import threading
import time
from typing import Any

from torch_utils import distributed

REASONS = (None, "max_minutes", "SIGUSR1", "SIGTERM", "SIGINT")
"""Why a loop stops before its end. Where processes have different reasons, the one further back here counts."""


class Interrupted(Exception):
    """Work that takes long and can be done again was given up, because a signal came."""


class StopRequest:
    """Collects requests to stop while its context is entered; signals then do not end the process.

    Signals reach the main thread alone; in another thread only the clock counts. The handlers from before come back at
    the end.

    Args:
        max_seconds: `reason()` is 'max_minutes' after so many seconds, whatever the system's clock does meanwhile; None
            for never.

    Attributes:
        signal: the name of the first signal so far, or None.
    """

    def __init__(self, max_seconds: float | None = None):
        self.signal: str | None = None
        self._limit, self._start = max_seconds, time.monotonic()
        self._interrupted_at: float | None = None
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGUSR1", "SIGTERM", "SIGINT"):
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self._previous[number] = signal.signal(number, self._receive)
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _active.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def reason(self) -> str | None:
        """Return why to stop now, one of `REASONS`. All processes must ask together, and get the same answer."""
        late = self._limit is not None and time.monotonic() - self._start > self._limit
        reason = self.signal or ("max_minutes" if late else None)
        return REASONS[distributed.highest(REASONS.index(reason))]

    def _receive(self, number: int, _frame: object) -> None:
        if os.getpid() != self._process:
            return  # a worker that loads data: it goes with its parent, who may still need it
        name = signal.Signals(number).name
        now = time.monotonic()
        if name == "SIGINT" and self._interrupted_at is not None:
            # Ctrl-C reaches the processes of torchrun twice: from the terminal and from torchrun.
            if "TORCHELASTIC_RUN_ID" not in os.environ or now - self._interrupted_at > 1:
                raise KeyboardInterrupt
            return
        if name == "SIGINT":
            self._interrupted_at = now
        if self.signal is None:
            self.signal = name
            again = "; once more quits at once" if name == "SIGINT" else ""
            # print() is not safe inside a signal handler
            os.write(2, f"{name}: finishing the step and saving{again}\n".encode())


_active: list[StopRequest] = []


def check() -> None:
    """Give up work that takes long, such as measuring, if a signal asks to stop.

    Where several processes work together nothing is given up, because the others would wait for one that leaves.

    Raises:
        Interrupted: a signal came.
    """
    if _active and _active[-1].signal is not None and distributed.world_size() == 1:
        raise Interrupted(_active[-1].signal)
