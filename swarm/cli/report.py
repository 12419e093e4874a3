"""What a person sees: errors in one line, progress, tables. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import click
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from swarm.cli.stopping import Stopped
from swarm.errors import EXPECTED_ERRORS

_SECONDS_BETWEEN_LINES = 10.0  # of progress, where the screen cannot replace a line


@contextmanager
def plain_errors(stopped: str = "stopped") -> Iterator[None]:
    """Turn expected errors, alone or in groups, into one line; `stopped` is said on Ctrl-C. Bugs keep their traceback.

    Raises:
        click.ClickException: for every expected error inside.
        SystemExit: with 130 after Ctrl-C, 143 after SIGTERM.
    """
    expected: list[str] = []
    interrupted = 0
    try:
        yield
    except* EXPECTED_ERRORS as group:
        expected = _messages(group)
    except* KeyboardInterrupt as group:
        interrupted = _exit_code(group)
    # Raised out here, because what is raised inside except* comes out in a group.
    if expected:
        raise click.ClickException("; ".join(expected))
    if interrupted:
        click.echo(stopped, err=True)
        raise SystemExit(interrupted)


class _EchoHandler(logging.Handler):
    """Writes to stderr as it is now: above the progress line while rich shows one, instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a log on a full disk: no reason for a host to end, and nobody to tell
            click.echo(self.format(record), err=True)


def set_up_logging(verbosity: int) -> None:
    """Log to stderr: warnings, with `-v` what happens, with `-vv` everything. Called once, by the group of commands."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    words = "%(message)s" if verbosity == 0 else "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler = _EchoHandler()
    handler.setFormatter(logging.Formatter(words))
    logging.basicConfig(level=level, handlers=[handler], force=True)


class TerminalScreen:
    """The command line's Screen (swarm.options). Progress is replaced on a terminal and thinned in a pipe."""

    def __init__(
        self,
        out: Console | None = None,
        err: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = out or Console(highlight=False, soft_wrap=True)
        self._err = err or Console(stderr=True, highlight=False, soft_wrap=True)
        self._clock = clock
        self._status: Status | None = None
        self._next_line_at = clock()
        self._said = ""
        self._shown_table = False

    def say(self, line: str) -> None:
        """One finished line for a person, on stderr. On a full disk rich says it with a later line."""
        with suppress(OSError):
            self._err.print(escape(line))

    def result(self, line: str) -> None:
        """One line of the result, on stdout."""
        self._out.print(line, markup=False)

    def now(self, line: str) -> None:
        """What is going on."""
        if self._err.is_terminal:
            if self._status is None:
                self._status = self._err.status(escape(line))
                self._status.start()
            self._status.update(escape(line))
        elif line != self._said and self._clock() >= self._next_line_at:
            self._next_line_at = self._clock() + _SECONDS_BETWEEN_LINES
            self._said = line
            self.say(line)

    def stream(self, piece: str) -> None:
        """A piece of generated text, at once."""
        self.close()
        self._out.out(piece, end="", highlight=False)
        self._out.file.flush()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, below: bool = False) -> None:
        """A table, on stdout; on a terminal the next one that is not `below` it takes its place."""
        self.close()
        table = Table(title=escape(title), title_justify="left")
        for column in columns:
            table.add_column(escape(column))
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        if self._shown_table and self._out.is_terminal and not below:
            self._out.clear()
        self._shown_table = True
        self._out.print(table)

    def data(self, value: Mapping[str, object]) -> None:
        """One JSON object, on one line of stdout."""
        self._out.out(json.dumps(value, sort_keys=True), highlight=False)

    def close(self) -> None:
        """Take the progress line away."""
        if self._status is not None:
            self._status.stop()
            self._status = None


@contextmanager
def screen(stopped: str = "stopped") -> Iterator[TerminalScreen]:
    """`plain_errors` with a screen that is tidied up before an error is shown."""
    with plain_errors(stopped):
        shown = TerminalScreen()
        try:
            yield shown
        finally:
            shown.close()


def _exit_code(group: BaseExceptionGroup[BaseException]) -> int:
    first = group.exceptions[0]
    if isinstance(first, BaseExceptionGroup):
        return _exit_code(first)
    return first.exit_code if isinstance(first, Stopped) else 128 + signal.SIGINT


def _messages(group: BaseExceptionGroup[Exception]) -> list[str]:
    """Each distinct message once, in one line, in order."""
    found: dict[str, None] = {}
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            found.update(dict.fromkeys(_messages(error)))
        else:
            found[" ".join(str(error).split()) or type(error).__name__] = None
    return list(found)
