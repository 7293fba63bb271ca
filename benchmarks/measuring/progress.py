"""How far a long measurement is: a line on standard error now and then, which a log can keep."""

import re
import sys
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import TypeVar

T = TypeVar("T")
EVERY = 5.0  # seconds between two lines


class Progress:
    """Counts what is done of a total.

    Args:
        total: how much there is.
        description: of what is under way.
        unit: of what is counted.
    """

    def __init__(self, total: int, description: str = "", unit: str = "part") -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done = 0
        self._began = monotonic()
        self._said: float | None = None

    def update(self, count: int = 1) -> None:
        """So much more is done."""
        self.done += count
        self._say(self.done == self.total)

    def describe(self, description: str) -> None:
        """What is under way from now on."""
        self.description = description
        self._say(False)

    def _say(self, last: bool) -> None:
        now = monotonic()
        if last or self._said is None or now >= self._said + EVERY:
            self._said = now
            print(self._line(now), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        line = f"{self.description}: {self.done} of {self.total} {self.unit}s"
        if 0 < self.done < self.total:
            line += f", {duration((now - self._began) / self.done * (self.total - self.done))} left"
        return line


def duration(seconds: float) -> str:
    """Seconds as a reader counts them: ``40 s``, ``3 min``."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def last_said(log: str) -> tuple[str, float] | None:
    """The last line of progress in a log, less the time left, and how much of its total is done; None if none is."""
    lines = re.findall(r"^(.*: (\d+) of (\d+) \w+)(?:, \d+ \w+ left)?$", log, re.MULTILINE)
    if not lines:
        return None
    said, done, total = lines[-1]
    return said, int(done) / max(1, int(total))


def following(parts: Iterable[T], total: int, description: str, unit: str = "round") -> Iterator[T]:
    """The parts, counted as they are done."""
    progress = Progress(total, description, unit)
    for part in parts:
        yield part
        progress.update()
