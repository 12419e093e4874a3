"""What a long run under faults does to its processes and to what is learnt: memory, files, rounds, gaps in training."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from parts.chaos_hosts import children_of

_LONG = 3.0  # times the usual gap between two steps, and no shorter than a second: time was lost
_YOUNG_SECONDS = 60.0  # a process that has just started still grows


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Of a process and those that it started: resident memory, open files, how many they are."""

    megabytes: float
    files: int
    processes: int


def usage(pids: Iterable[int]) -> Usage:
    """Of these processes and all that they started; those that are gone count nothing."""
    everybody = {found for pid in pids for found in family_of(pid)}
    megabytes, files, processes = 0.0, 0, 0
    for pid in everybody:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            files += len(os.listdir(f"/proc/{pid}/fd"))
        except (OSError, IndexError):
            continue
        megabytes += pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        processes += 1
    return Usage(megabytes=round(megabytes, 1), files=files, processes=processes)


def family_of(pid: int) -> set[int]:
    """A process and all that descend from it."""
    found = {pid}
    for child in children_of(pid):
        found |= family_of(child)
    return found


@dataclass
class Ages:
    """Memory of processes by their age, so that growth shows though most of them are young."""

    first: dict[int, tuple[float, float]] = field(default_factory=dict)  # when, and megabytes
    last: dict[int, tuple[float, float]] = field(default_factory=dict)
    born: dict[int, float] = field(default_factory=dict)

    def note(self, pid: int, now: float) -> None:
        """One sample of a host's process and its p2pd."""
        age = now - self.born.setdefault(pid, now)
        megabytes = usage([pid]).megabytes
        if not megabytes:
            return
        if age >= _YOUNG_SECONDS:
            self.first.setdefault(pid, (now, megabytes))
        self.last[pid] = now, megabytes

    def rows(self) -> list[dict[str, float]]:
        """Of each process that was watched for a minute or more: from its second minute on; the oldest first."""
        rows = []
        for pid, (began, before) in self.first.items():
            ended, after = self.last[pid]
            if ended - began >= _YOUNG_SECONDS:
                rows.append({"minutes": round((ended - began) / 60, 1), "from_mb": before, "to_mb": after})
        return sorted(rows, key=lambda row: -row["minutes"])


@dataclass
class TrainerWatch:
    """A trainer in another process, by the file in which it keeps where it stands."""

    path: Path
    step: int = 0
    samples: int = 0
    gaps: list[float] = field(default_factory=list)
    steps_back: int = 0
    _stepped_at: float | None = None

    def look(self, now: float) -> None:
        """Read the file; a step that was done since the last look is one gap, or several equal ones."""
        try:
            saved = json.loads(self.path.read_text())
            step, samples = int(saved["step"]), int(saved["samples"])
        except (OSError, ValueError, KeyError):
            return
        self.steps_back = max(self.steps_back, self.step - step)
        if step > self.step:
            if self._stepped_at is not None:
                self.gaps += [(now - self._stepped_at) / (step - self.step)] * (step - self.step)
            self._stepped_at = now
        self.step, self.samples = step, samples

    def waits(self, now: float) -> float:
        """Seconds since its last step."""
        return 0.0 if self._stepped_at is None else now - self._stepped_at

    def lost_seconds(self) -> float:
        """The sum of what long gaps took beyond a usual one."""
        if not self.gaps:
            return 0.0
        usual = statistics.median(self.gaps)
        return sum(gap - usual for gap in self.gaps if gap > max(1.0, _LONG * usual))


@dataclass
class RoundWatch:
    """The newest round of each block among the living, which must never fall."""

    newest: dict[int, int] = field(default_factory=dict)
    back: int = 0

    def note(self, rounds: Mapping[int, int]) -> None:
        """The newest round told by a living holder, by block."""
        for block, number in rounds.items():
            self.back = max(self.back, self.newest.get(block, 0) - number)
            self.newest[block] = max(number, self.newest.get(block, 0))
