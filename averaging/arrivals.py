"""How long a group waits for those who are expected, learnt from how long it took before. Pure: no clock."""

from __future__ import annotations

from collections import deque
from statistics import median

_DEVIATIONS = 4.0  # a group that is late by more than this many usual deviations is not on its way
_FLOOR_SECONDS = 0.1  # what any group may be later than usual: a busy machine, a lost packet
_PATIENCE, _MOST_PATIENCE = 0.25, 4  # longer by a quarter for each group in a row that was not full, at most doubled
_KEPT = 20


class Arrivals:
    """The seconds from a round's agreed moment until its group was full, of the last rounds.

    The window is the median plus four median absolute deviations (times 1.4826, which makes them standard deviations
    of a normal distribution), between `least` and `most` seconds. A group that was not full says only that the missing
    need longer, if they come at all.
    """

    def __init__(self, *, first: float, least: float, most: float) -> None:
        self._first, self._least, self._most = first, least, most
        self._seen: deque[float] = deque(maxlen=_KEPT)
        self._missed = 0

    def saw(self, seconds: float, *, is_full: bool) -> None:
        """A group stood after `seconds`, with all who were expected or, at its deadline, without some."""
        if is_full:
            self._seen.append(seconds)
        self._missed = 0 if is_full else min(_MOST_PATIENCE, self._missed + 1)

    def window(self) -> float:
        """How many seconds after the agreed moment the next group closes, if not all have come before."""
        usual = self._first
        if self._seen:
            middle = median(self._seen)
            deviation = 1.4826 * median(abs(seconds - middle) for seconds in self._seen)
            usual = middle + _DEVIATIONS * max(deviation, _FLOOR_SECONDS)
        return min(self._most, max(self._least, usual) * (1 + _PATIENCE * self._missed))
