"""How long a group waits for those who are expected, learnt from how long it took before. Pure: no clock."""

from __future__ import annotations

from collections import deque
from statistics import median

_DEVIATIONS = 4.0  # a group that is late by more than this many usual deviations is not on its way
_FLOOR_SECONDS = 0.1  # what any group may be later than usual: a busy machine, a lost packet
_PATIENCE = 1.5  # a group that was not full in time may have needed this much longer
_KEPT = 20


class Arrivals:
    """The seconds from a round's agreed moment until its group stood, of the last rounds.

    The window is the median plus four median absolute deviations (times 1.4826, which makes them standard deviations
    of a normal distribution), between `least` and `most` seconds.
    """

    def __init__(self, *, first: float, least: float, most: float) -> None:
        self._first, self._least, self._most = first, least, most
        self._seen: deque[float] = deque(maxlen=_KEPT)

    def saw(self, seconds: float, *, is_full: bool) -> None:
        """A group stood after `seconds`; one that was not full closed at its deadline, and was cut off, not done."""
        self._seen.append(seconds if is_full else seconds * _PATIENCE)

    def window(self) -> float:
        """How many seconds after the agreed moment the next group closes, if not all have come before."""
        if not self._seen:
            return self._first
        middle = median(self._seen)
        deviation = 1.4826 * median(abs(seconds - middle) for seconds in self._seen)
        return min(self._most, max(self._least, middle + _DEVIATIONS * max(deviation, _FLOOR_SECONDS)))
