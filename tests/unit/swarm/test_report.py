"""What the terminal shows: results on stdout, progress replaced on a terminal and thinned in a pipe."""

import errno
import io
import json
import logging
from collections.abc import Iterator

import pytest
from rich.console import Console

from swarm.cli.report import TerminalScreen, set_up_logging


class FullDisk(io.StringIO):
    """Takes nothing while it is full."""

    is_full = True

    def write(self, text: str) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Shown:
    """A screen whose two ends can be read."""

    def __init__(self, *, terminal: bool) -> None:
        self.out, self.err, self.clock = io.StringIO(), io.StringIO(), Clock()
        self.screen = TerminalScreen(
            Console(file=self.out, force_terminal=terminal, width=80, highlight=False, soft_wrap=True),
            Console(file=self.err, force_terminal=terminal, width=80, highlight=False, soft_wrap=True),
            self.clock,
        )


def test_a_pipe_gets_progress_now_and_then() -> None:
    shown = Shown(terminal=False)
    for step in range(30):
        shown.clock.now = 100.0 + step
        shown.screen.now(f"step {step}")
    assert shown.err.getvalue().split("\n") == ["step 0", "step 10", "step 20", ""]
    assert shown.out.getvalue() == ""


def test_a_terminal_shows_progress_until_the_text_begins() -> None:
    shown = Shown(terminal=True)
    shown.screen.now("looking for [hosts]")
    shown.screen.stream("Once")
    shown.screen.stream(" upon")
    assert "looking for [hosts]" in shown.err.getvalue()
    assert shown.out.getvalue() == "Once upon"


def test_long_results_stay_on_one_line() -> None:
    shown = Shown(terminal=False)
    shown.screen.result("swarm1:" + "x" * 500)
    shown.screen.data({"text": "y" * 500 + "[b]", "round": 3})
    first, second = shown.out.getvalue().splitlines()
    assert first == "swarm1:" + "x" * 500
    assert json.loads(second) == {"text": "y" * 500 + "[b]", "round": 3}


def test_a_table_shows_every_cell_as_it_is() -> None:
    shown = Shown(terminal=False)
    shown.screen.table("run [a]", ["peer", "blocks"], [["[ann]", "0:15"], ["bob", "15:30"]])
    for cell in ("run [a]", "[ann]", "0:15", "bob", "15:30"):
        assert cell in shown.out.getvalue()


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(("verbosity", "level"), [(0, logging.WARNING), (1, logging.INFO), (5, logging.DEBUG)])
def test_verbosity_sets_the_level(root_logger: logging.Logger, verbosity: int, level: int) -> None:
    set_up_logging(verbosity)
    assert root_logger.level == level


def test_what_cannot_be_written_ends_nothing(root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk()
    monkeypatch.setattr("sys.stderr", disk)
    set_up_logging(0)
    screen = TerminalScreen(err=Console(file=disk))
    root_logger.warning("logged on a full disk")
    screen.say("said on a full disk")
    screen.now("going on")
    disk.is_full = False
    root_logger.warning("logged")
    screen.say("said")
    assert disk.getvalue().splitlines()[0] == "logged"
    assert disk.getvalue().splitlines()[-1] == "said"
