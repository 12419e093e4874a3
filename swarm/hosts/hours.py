"""At which hours of the day a peer takes part, as `--hours 22-07` says. Pure: the time of day comes from outside.

Only the local wall clock counts, looked at anew each time: a clock that jumps, or summer time, needs no rule.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import time

from swarm.errors import BadConfig

MAX_STRETCHES = 24
_DAY_MINUTES = 24 * 60
_MAX_CHARACTERS = 512
_STRETCH = re.compile(r"(\d{1,2})(?::(\d{2}))?-(\d{1,2})(?::(\d{2}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Stretch:
    """From one minute of the day up to another, not included; over midnight where `end` is not after `begin`."""

    begin: int
    end: int

    def includes(self, minute: int) -> bool:
        """Whether a minute of the day lies inside."""
        if self.begin < self.end:
            return self.begin <= minute < self.end
        return minute >= self.begin or minute < self.end


@dataclass(frozen=True, slots=True)
class Hours:
    """The stretches of the day in which a peer takes part; they may overlap."""

    stretches: tuple[Stretch, ...]

    def includes(self, moment: time) -> bool:
        """Whether a peer takes part at this time of day."""
        return self._includes(_minute(moment))

    def next_change(self, moment: time) -> time | None:
        """When `includes` next says something else; None where the stretches cover the whole day."""
        now = _minute(moment)
        for ahead in range(1, _DAY_MINUTES):
            minute = (now + ahead) % _DAY_MINUTES
            if self._includes(minute) != self._includes(now):
                return time(minute // 60, minute % 60)
        return None

    def _includes(self, minute: int) -> bool:
        return any(stretch.includes(minute) for stretch in self.stretches)


def parse_hours(text: str) -> Hours:
    """Read `22-07`, `22:30-07:15`, or several of these with commas between; 24 is the end of the day.

    Raises:
        BadConfig: it is malformed, no time of day, or a stretch is empty.
    """
    pieces = text[:_MAX_CHARACTERS].split(",")
    if len(text) > _MAX_CHARACTERS or len(pieces) > MAX_STRETCHES:
        raise BadConfig(f"--hours has more than {MAX_STRETCHES} stretches; use fewer")
    return Hours(tuple(_stretch(piece.strip()) for piece in pieces))


def _stretch(text: str) -> Stretch:
    found = _STRETCH.fullmatch(text)
    if found is None:
        raise BadConfig(f"--hours has {text!r:.40}; use times of day such as 22-07 or 22:30-07:15,12-13")
    begin, end = _parse_minute(text, found[1], found[2]), _parse_minute(text, found[3], found[4])
    if begin == _DAY_MINUTES:
        raise BadConfig(f"--hours has '{text}', which begins at the end of the day; write 0 for midnight")
    if begin == end % _DAY_MINUTES:
        raise BadConfig(f"--hours has '{text}', which ends when it begins; leave --hours out to take part at all hours")
    return Stretch(begin, end % _DAY_MINUTES)


def _parse_minute(text: str, hour: str, minute: str | None) -> int:
    found = int(hour) * 60 + int(minute or 0)
    if int(minute or 0) >= 60 or found > _DAY_MINUTES:
        raise BadConfig(f"--hours has '{text}', which is no time of day; hours go from 0 to 24, minutes from 00 to 59")
    return found


def _minute(moment: time) -> int:
    return moment.hour * 60 + moment.minute
