"""What hosts say of their bytes, as `swarm status` asks for it and shows it."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import pytest
from rich.console import Console

from blocks.spans import Span
from peers.info_service import InfoService
from peers.network import PeerId
from peers.streams.answering import CallServer
from peers.streams.calls import Answer, hello_maker
from peers.streams.pool import Pool
from peers.streams.traffic import KindTraffic, Traffic
from swarm.cli.report import TerminalScreen
from swarm.reports.status import Status
from swarm.reports.traffic import TRAFFIC_COLUMNS, ask_traffic, size_words, traffic_rows
from tests.fakes_network import fake_swarm

HELLO = hello_maker("run-1", "swarmtune 1")
ANN, BOB, GONE, STALLED = PeerId("ann"), PeerId("12D3KooWbob"), PeerId("gone"), PeerId("stalled")
COUNTS = {
    ANN: (KindTraffic("ask", 10, 20), KindTraffic("step", 5_000_000, 1_250_000)),
    BOB: (KindTraffic("forward", 999, 1_000),),
}


class Hurried(Pool):
    """Leaves the one that never answers little time, and the others, who share two cores with much else, all of it."""

    async def call(self, peer: PeerId, *question: Any, seconds: float, **more: Any) -> Answer:
        return await super().call(peer, *question, seconds=0.05 if peer == STALLED else seconds, **more)


async def test_hosts_are_asked_at_once_and_those_that_do_not_answer_are_left_out() -> None:
    async with asyncio.timeout(60), fake_swarm() as swarm:
        for name, sent in ((ANN, 3), (BOB, 4)):
            counts = Traffic()
            counts.add(PeerId("someone"), "step", sent=sent)
            service = InfoService(lambda: b"", counts)
            await swarm.join(name).serve_stream("info", CallServer(HELLO, service, Traffic()).serve)
        stalled = swarm.join(STALLED)
        await stalled.serve_stream("info", CallServer(HELLO, InfoService(lambda: b"", Traffic()), Traffic()).serve)
        stalled.stall()
        pool = Hurried(swarm.join("client"), HELLO, Traffic(), {})
        found = await ask_traffic(pool, [ANN, GONE, STALLED, BOB], seconds=20)
        assert found == {ANN: (KindTraffic("step", 3, 0),), BOB: (KindTraffic("step", 4, 0),)}
        await pool.close()


def test_rows_name_the_host_and_end_with_its_total() -> None:
    assert traffic_rows(COUNTS, {ANN: "Ann"}) == [
        ("Ann", "step", "5.00 MB", "1.25 MB"),
        ("Ann", "ask", "10 B", "20 B"),
        ("Ann", "total", "5.00 MB", "1.25 MB"),
        ("3KooWbob", "forward", "999 B", "1.00 kB"),
        ("3KooWbob", "total", "999 B", "1.00 kB"),
    ]


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.00 kB"), (999_499, "999 kB"), (999_600, "1.00 MB"), (1 << 63, "9.22 EB")],
)
def test_sizes_are_short(num_bytes: int, words: str) -> None:
    assert size_words(num_bytes) == words


def test_status_has_the_counts_in_json_and_in_a_table_below_the_first() -> None:
    status = Status(run="r", name="tales", num_blocks=2, hosts=(), progress={}, trainers=(), traffic={BOB: COUNTS[BOB]})
    assert status.missing == tuple(Span(0, 2).blocks())
    plain = json.loads(json.dumps(status.to_plain()))["traffic"]
    assert plain == {BOB: {"kinds": {"forward": {"sent": 999, "received": 1000}}, "sent": 999, "received": 1000}}
    out = io.StringIO()
    screen = TerminalScreen(Console(file=out, force_terminal=True, width=80), Console(file=io.StringIO()))
    screen.table("first", ("peer",), [])
    screen.table("bytes", TRAFFIC_COLUMNS, status.traffic_rows(), below=True)
    assert "\x1b[2J" not in out.getvalue()  # the first table was not cleared away
    screen.table("again", ("peer",), [])
    assert "\x1b[2J" in out.getvalue()
