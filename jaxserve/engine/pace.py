"""How long a decoding step takes, by its rows: what one row more costs is measured, not assumed."""

from __future__ import annotations

import math

_LEAST = 0.25  # of a usual step's time, for a step without rows: others' work can hide all of it


class Pace:
    """A line through the times of recent steps: seconds = base + each * rows.

    Most steps take as long as the line says, and some are held up by something else: those are
    taken for `most` times that.

    Attributes:
        doubles: base / each, the rows at which a step takes twice as long as it would without any;
            infinity where rows cost nothing, None until steps of different sizes have been seen.
    """

    def __init__(self, keep: float = 0.995, least: int = 24, most: float = 1.25):
        self._keep, self._least, self._most = keep, least, most
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of weights, rows, seconds, and products
        self._base = self._each = 0.0
        self.doubles: float | None = None

    def see(self, rows: int, seconds: float) -> None:
        """Learns from one step."""
        n, x, y, xx, xy = (self._keep * value for value in self._sums)
        if n > self._least:
            seconds = min(seconds, self._most * self.seconds(rows))
        n, x, y, xx, xy = n + 1, x + rows, y + seconds, xx + rows * rows, xy + rows * seconds
        self._sums = n, x, y, xx, xy
        spread = xx - x * x / n
        if spread < n * max(4.0, (0.2 * x / n) ** 2):  # steps of one size say nothing of a row
            self._base = (y - self._each * x) / n
        else:
            self._each = max((xy - x * y / n) / spread, 0.0)
            self._base = (y - self._each * x) / n
            if self._base < _LEAST * y / n:
                self._base = _LEAST * y / n
                self._each = (y / n - self._base) * n / x
            if n > self._least:
                self.doubles = self._base / self._each if self._each else math.inf

    def seconds(self, rows: int) -> float:
        """What a step of so many rows takes."""
        return max(self._base + self._each * rows, 0.0)
