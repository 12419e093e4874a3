"""The faults that benchmarks and chaos tests use do to a process what they say, and are undone."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
from parts import clocked_host
from parts.faults import ALL_KINDS, Fault, FaultKind, FaultPlan, storm
from parts.harm import CLOCK_SECONDS, Garbage, Later, allow_growth, forbid_growth

from tests.link import LOOPBACK

SECONDS = 20.0
WRITER = """
import sys
for line in sys.stdin:
    try:
        with open(sys.argv[1], "ab") as file:
            file.write(b"x")
        print("written", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""
READER = """
import sys, time
from pathlib import Path
true_time = time.time
sys.path.insert(0, sys.argv[1])
from clocked_host import follow_clock
follow_clock(Path(sys.argv[2]))
for line in sys.stdin:
    print(time.time() - true_time(), time.time_ns() / 1e9 - true_time(), flush=True)
"""


class Asked:
    """A process that answers each line with one."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *args: object) -> None:
        self.process.communicate()


def test_no_file_grows_while_growth_is_forbidden(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with Asked(WRITER, str(path)) as writer:
        assert writer.ask() == "written"
        forbid_growth(writer.process.pid)
        assert writer.ask() == "OSError"
        assert path.read_bytes() == b"x"
        allow_growth(writer.process.pid)
        assert writer.ask() == "written"
    forbid_growth(writer.process.pid)  # it is gone, and that is no error


def test_a_clock_jumps_and_jumps_back(tmp_path: Path) -> None:
    path = tmp_path / "clocks" / "a"
    clocked_host.set_clock(path, 0.0)
    with Asked(READER, str(Path(clocked_host.__file__).parent), str(path)) as reader:
        for seconds in (0.0, CLOCK_SECONDS, -3600.0, 0.0):
            clocked_host.set_clock(path, seconds)
            assert [float(off) for off in reader.ask().split()] == pytest.approx([seconds, seconds], abs=1.0)


def test_strangers_come_until_they_are_stopped() -> None:
    with socket.create_server((LOOPBACK, 0)) as server:
        server.settimeout(SECONDS)
        garbage = Garbage(server.getsockname()[1], seed=3)
        visits = [server.accept()[0] for _ in range(5)]
        garbage.stop()
        for visit in visits:
            visit.settimeout(SECONDS)
            while visit.recv(1 << 16):
                pass  # until the stranger has hung up
            visit.close()


def test_what_is_to_be_done_later_is_waited_for_and_its_failure_is_told() -> None:
    later, done = Later(), list[str]()
    later.add(0.05, lambda: later.add(0.05, lambda: done.append("second")))
    later.join()
    assert done == ["second"]

    def fail() -> None:
        raise ValueError("it failed")

    later.add(0.0, fail)
    with pytest.raises(ValueError, match="it failed"):
        later.join()
    began = time.monotonic()
    later.add(3600.0, fail)
    later.cancel()
    later.join()
    assert time.monotonic() - began < SECONDS


GROUPS = {"front": ["a", "b", "c"], "back": ["d", "e"]}


def test_a_storm_is_the_same_from_the_same_seed_and_another_from_another() -> None:
    def faults(seed: int) -> list[Fault]:
        return list(islice(storm(seed, GROUPS, every_seconds=10.0), 50))

    assert faults(1) == faults(1)
    assert faults(1) != faults(2)


def test_a_storm_brings_every_kind_at_the_asked_pace_and_leaves_one_of_each_group_alone() -> None:
    faults = list(islice(storm(5, GROUPS, every_seconds=10.0), 400))
    counts = {kind: sum(fault.kind is kind for fault in faults) for kind in ALL_KINDS}
    assert max(counts.values()) - min(counts.values()) <= 1
    assert 8.0 < faults[-1].at / len(faults) < 16.0
    for names in GROUPS.values():
        for fault in faults:
            begun = [each for each in faults if each.name in names and each.at <= fault.at]
            others = [each for each in begun if fault.at < each.at + (each.seconds or 0)]
            assert len({each.name for each in others}) < len(names)


def test_a_plan_tells_what_is_due_once() -> None:
    plan = FaultPlan(seed=1).add(FaultKind.KILL, "a", at=2, seconds=1.0).add_one_of(FaultKind.STOP, "bc", at=4)
    assert [fault.kind for fault in plan.due(1, 2)] == [FaultKind.KILL]
    assert plan.due(2, 3) == ()
    assert [fault.name in "bc" for fault in plan.due(0, 9)] == [False, True]
    again = FaultPlan(seed=1).add(FaultKind.KILL, "a", at=1).add_one_of(FaultKind.STOP, "bc", at=4)
    assert plan.faults[1] == again.faults[1]
