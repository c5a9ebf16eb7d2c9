"""What a person reads: progress on stderr, tables and the JSON result on stdout."""

import collections
import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

_USER = re.compile(r"(?<=://)[^\s/?#]+(?=@)")
_WORDS = "token|key|secret|password|passwd|signature|credential|auth"
_SECRET = re.compile(rf"(?<=[?&])([\w.-]*(?:{_WORDS})[\w.-]*=)[^\s&#]+", re.IGNORECASE)

FIRST_LINE = 2.0  # seconds until the first plain line of progress
RATE_SECONDS = 30.0  # of the newest progress, which a rate is taken from


def without_secrets(value: Any) -> Any:
    """Return a value, or a list or dict of values, in which user names, passwords and tokens in URLs are `***`."""
    if isinstance(value, str):
        return _SECRET.sub(r"\1***", _USER.sub("***", value))
    if isinstance(value, dict):
        return {without_secrets(key): without_secrets(item) for key, item in value.items()}
    return type(value)(map(without_secrets, value)) if type(value) in (list, tuple) else value


def clean(text: object) -> str:
    """Return a text for people: no secret, and control characters, but for line feeds, spelled as in Python.

    Names of files, texts from files and answers of servers may hold what moves a terminal's cursor, turns the direction
    of writing, or does worse.
    """
    safe = without_secrets(str(text))
    if safe.isprintable():
        return safe
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in safe)


def show(text: object, err: bool = False) -> None:
    """Write a text of one or several lines, cleaned, on stdout or stderr."""
    print(clean(text), file=sys.stderr if err else sys.stdout, flush=err)


def say(sentence: object) -> str:
    """Write a sentence as one line on stderr, cleaned, and return what was written."""
    line = clean(" ".join(str(sentence).splitlines()))
    show(line, err=True)
    return line


class progress:
    """Progress on stderr: a bar on a terminal, otherwise a plain line after two seconds and then every ten.

        with progress(50_000, "sampling", "img") as bar:
            bar.update(64)

    Args:
        total: how many units there will be, or None where that is unknown.
        desc: what is being done.
        unit: what is counted.
        enabled: False for silence, as on all but the first process of several.
        every: seconds between plain lines.
        done: units that were done before, in an earlier part of the same work. They count in the share, not in the
            rate.
        max_seconds: after so many seconds the work ends in any case; None for never.
        check: called at every update and `beat` of this and of what it contains; what it raises ends the work.
    """

    def __init__(
        self,
        total: int | None,
        desc: str,
        unit: str = "it",
        enabled: bool = True,
        every: float = 10.0,
        done: int = 0,
        max_seconds: float | None = None,
        check: Callable[[], None] | None = None,
    ):
        self.total, self.desc, self.unit, self.enabled, self.every = total, clean(desc), unit, enabled, every
        self.count = self._printed = self._done = done
        self._max_seconds, self._check = max_seconds, check
        self._note = ""
        self._bar = None

    def __enter__(self) -> "progress":
        now = time.monotonic()
        self._start, self._paused = now, 0.0
        self._next = now + min(FIRST_LINE, self.every)
        self._marks = collections.deque([(now, self.count)])
        _shown.append(self)
        if self.enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=self.total,
                desc=self.desc,
                unit=self.unit,
                unit_scale=self.unit == "B",
                dynamic_ncols=True,
                initial=self.count,
            )
        return self

    def __exit__(self, kind, *_) -> None:
        _shown.remove(self)
        if self._bar is not None:
            self._bar.close()
        elif self.enabled and kind is None and self.count > self._printed:
            now = time.monotonic()
            if self._printed > self._done or now >= self._next:  # what was quick is not worth a line
                self._print(now)

    def update(self, count: int = 1) -> None:
        """Add `count` units; those beyond the total are not shown."""
        before, self.count = self.count, self.count + count
        if self.total is not None:
            self.count = min(self.count, self.total)
        if self._bar is not None:
            self._bar.update(self.count - before)
        elif self.enabled and (now := time.monotonic()) >= self._next:
            self._print(now)
        for bar in list(_shown):
            if bar._check is not None:
                bar._check()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Other work, whose time does not count in the rate, but does in `max_seconds`."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self._paused += seconds
            self._marks = collections.deque((at + seconds, count) for at, count in self._marks)
            if self._bar is not None:
                self._bar.start_t += seconds
                self._bar.last_print_t += seconds

    def note(self, text: str) -> None:
        """A few words shown after the numbers, such as the current loss."""
        self._note = text = clean(text)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def _print(self, now: float) -> None:
        self._next, self._printed = now + self.every, self.count
        self._marks.append((now, self.count))
        finished = self.count == self.total
        while len(self._marks) > 2 and not finished and self._marks[1][0] <= now - RATE_SECONDS:
            self._marks.popleft()
        elapsed = now - self._start - self._paused
        since, seen = (self._start + self._paused, self._done) if finished else self._marks[0]
        rate = (self.count - seen) / max(now - since, 1e-9)
        share = f"/{self.total} {self.unit} ({self.count / self.total:.0%})" if self.total else f" {self.unit}"
        words = [f"{self.desc}: {self.count}{share}", f"{rate:.4g} {self.unit}/s"]
        if finished:
            words.append(f"took {format_time(elapsed)}")
        elif self.total and rate:
            words.append(self._left((self.total - self.count) / rate, now))
        words += [self._note] if self._note else []
        say(", ".join(words))

    def _left(self, seconds: float, now: float) -> str:
        limit = math.inf if self._max_seconds is None else max(self._start + self._max_seconds - now, 0)
        return f"{format_time(limit)} left to the time limit" if limit < seconds else f"{format_time(seconds)} left"


_shown: list[progress] = []


def beat() -> None:
    """Say, within one unit of work that takes long, that it goes on; the innermost progress is shown where it is due.

    Raises:
        Exception: what the `check` of a progress raises.
    """
    if _shown:
        _shown[-1].update(0)


def format_time(seconds: float) -> str:
    """'8s', '2m 05s', '3h 07m', '2d 04h'."""
    total = round(seconds)
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if not minutes:
        return f"{total}s"
    if not hours:
        return f"{minutes}m {total % 60:02d}s"
    return f"{hours}h {minutes % 60:02d}m" if not days else f"{days}d {hours % 24:02d}h"


def plain(value: Any) -> Any:
    """The JSON form of a value.

    Floats keep six significant digits, and never less than their whole part; NaN and infinity become None; numpy
    scalars, arrays and tensors become numbers and lists; anything else becomes text.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return round(value, max(0, 5 - math.floor(math.log10(abs(value))))) if value else 0.0
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def print_result(result: dict[str, Any]) -> None:
    """Write a command's result as one JSON object on one line of stdout; it must be the last thing printed there."""
    print(json.dumps(without_secrets(plain(result)), allow_nan=False))


def table(rows: Iterable[Sequence[Any]], header: Sequence[str], width: int = 100) -> None:
    """Write an aligned plain-text table to stdout; columns of numbers are flush right.

    Args:
        rows: the cells.
        header: a word for each column.
        width: characters in a line. What does not fit comes below, in tables with the same first column.
    """
    rows = [["" if (cell := plain(item)) is None else cell for item in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[i], (int, float)) or row[i] == "" for row in rows) for i in range(len(header))
    ]
    text = [[clean(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    text.insert(1, ["-" * width for width in widths])
    blocks: list[list[int]] = []
    room = 0
    for i in range(1, len(header)):
        if not blocks or widths[i] + 2 > room:
            blocks.append([])
            room = width - widths[0]
        blocks[-1].append(i)
        room -= widths[i] + 2
    for number, block in enumerate(blocks or [[]]):
        if number:
            show("")
        for row in text:
            cells = [row[i].rjust(widths[i]) if numeric[i] else row[i].ljust(widths[i]) for i in (0, *block)]
            show("  ".join(cells).rstrip())
