"""A process that was told to end with whoever started it does so, and not before."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from swarm.cli.stopping import Stopped, stop_at_end_of, stop_on_signals


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Reader and writer; the test closes the writer. Signals are handled as in a command."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stop_on_signals()
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    for number, handler in before.items():
        signal.signal(number, handler)


def closed(writer: int) -> None:
    os.close(writer)
    threading.Event().wait(30)


def unreadable(stream: int) -> None:
    stop_at_end_of(stream)
    threading.Event().wait(30)


def test_the_end_of_the_pipe_is_as_good_as_a_signal(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    stop_at_end_of(reader)
    os.write(writer, b"words are not waited for\n")
    assert not threading.Event().wait(0.05), "it goes on while the other end is open"
    with pytest.raises(Stopped) as stopped:
        closed(writer)
    assert stopped.value.exit_code == 128 + signal.SIGTERM


def test_what_cannot_be_read_has_ended(pipe: tuple[int, int]) -> None:
    _, writer = pipe
    with pytest.raises(Stopped):
        unreadable(writer)
    os.close(writer)
