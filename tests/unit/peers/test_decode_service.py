"""Decoding sessions of strangers: named by their owner alone, pinned to a snapshot, freed however they end."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from blocks.adapters import LoraSettings, add_version, attach, drop_version, read_units, versions
from blocks.decoding.cache import SessionCaches
from blocks.errors import BadSession, CacheFull
from blocks.load import SpanModel, load_span
from blocks.snapshots import Snapshot, SnapshotShelf
from blocks.source import ModelSource
from blocks.spans import Span
from blocks.worker import ComputeThread, Priority
from peers.chains.decode_service import DecodeParts, DecodeService
from peers.chains.edge import Edge
from peers.errors import BadMessage, Refused
from peers.network import PeerId
from peers.streams.calls import Answer, Question
from peers.streams.messages import (
    CloseSession,
    Collect,
    Link,
    Message,
    Opened,
    OpenSession,
    RefusalCode,
    Resume,
    Step,
)
from peers.streams.values import Place
from tests.fakes_network import Nobody

HELD = Span(2, 4)
NUMBERS = itertools.count()
RESUME = Resume(session="s", number=0, depth=1, onward=Place(PeerId("mallory"), "m"))
HIDDEN_BTD = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(2))


@dataclass
class Host:
    service: DecodeService
    model: SpanModel
    caches: SessionCaches
    thread: ComputeThread
    shelf: SnapshotShelf
    now: float = 0.0

    async def ask(self, message: Message, *tensors: torch.Tensor, peer: str = "ann", stream: int = 1) -> Answer:
        question = Question(peer=PeerId(peer), stream=stream, message=message, tensors=tensors)
        return await self.service.answer(question)

    def publish(self, number: int) -> None:
        """A round ended."""
        add_version(self.model, f"s{number}", read_units(self.model))
        digests = {block: bytes([number]) * 8 for block in HELD.blocks()}
        self.drop_versions(self.shelf.add(Snapshot(label=f"s{number}", round=number, digests=digests)))

    def drop_versions(self, snapshots: list[Snapshot]) -> None:
        for snapshot in snapshots:
            self.thread.submit(Priority.STEP, lambda label=snapshot.label: drop_version(self.model, label))

    async def idle(self) -> None:
        await self.thread.run(Priority.CLOSE, lambda: None)


@pytest.fixture
def host(source: ModelSource) -> Iterator[Host]:
    model = load_span(source, HELD, dtype=torch.float32, device=torch.device("cpu"))
    attach(model, LoraSettings(seed=1, rank=2))
    caches, thread, shelf = SessionCaches(model, 120_000), ComputeThread(num_threads=1), SnapshotShelf(keep=2)
    made: list[Host] = []

    def drop_versions(gone: list[Snapshot]) -> None:
        made[0].drop_versions(gone)

    parts = DecodeParts(span=HELD, caches=caches, thread=thread, shelf=shelf, drop_versions=drop_versions)
    edge = Edge(hidden_size=64, max_positions=source.max_positions)
    service = DecodeService(parts, edge, Nobody(), idle_seconds=10.0, clock=lambda: made[0].now)
    made.append(Host(service=service, model=model, caches=caches, thread=thread, shelf=shelf))
    made[0].publish(1)
    yield made[0]
    thread.close()


def step(position: int, *, number: int | None = None, session: str = "s", **changes: object) -> Step:
    """The next step, unless its number is given."""
    return Step(
        session=session,
        number=next(NUMBERS) if number is None else number,
        position=position,
        **changes,  # type: ignore[arg-type]
    )


def opening(session: str = "s", *, max_length: int = 16, **changes: object) -> OpenSession:
    return OpenSession(session=session, span=HELD, batch=1, max_length=max_length, **changes)  # type: ignore[arg-type]


async def test_steps_and_rollback_give_what_one_pass_gives(host: Host) -> None:
    answer = await host.ask(opening())
    assert answer.message == Opened(round=1, digests={2: b"\1" * 8, 3: b"\1" * 8})
    (whole,) = (await host.ask(step(0), HIDDEN_BTD)).tensors
    (again,) = (await host.ask(step(5), HIDDEN_BTD[:, 5:])).tensors
    torch.testing.assert_close(again, whole[:, 5:], rtol=0, atol=1e-5)
    await host.ask(CloseSession(session="s"))
    await host.ask(CloseSession(session="s"))
    assert host.caches.sessions == ()


async def test_another_peer_cannot_name_a_session(host: Host) -> None:
    await host.ask(opening())
    with pytest.raises(BadSession, match="owner named"):
        await host.ask(step(0), HIDDEN_BTD, peer="mallory", stream=2)
    for message in (Collect(place="s", item="0"), Link(session="s"), RESUME):
        with pytest.raises(BadSession, match="not open here"):
            await host.ask(message, peer="mallory", stream=2)
    await host.ask(CloseSession(session="s"), peer="mallory", stream=2)
    with pytest.raises(BadSession, match="another id"):
        await host.ask(opening(), peer="mallory", stream=2)
    await host.ask(step(0), HIDDEN_BTD)
    with pytest.raises(BadSession, match="another id"):
        await host.ask(opening())


async def test_steps_come_from_the_neighbour_that_the_owner_named_and_from_nobody_else(host: Host) -> None:
    await host.ask(opening(previous=Place(PeerId("bob"), "b")))
    for peer in ("ann", "mallory"):
        with pytest.raises(BadSession, match="named"):
            await host.ask(step(0), HIDDEN_BTD, peer=peer)
    assert (await host.ask(step(0, number=0), HIDDEN_BTD, peer="bob")).tensors == ()
    (output,) = (await host.ask(Collect(place="s", item="0"))).tensors
    assert output.shape == HIDDEN_BTD.shape
    await host.ask(Link(session="s", previous=Place(PeerId("cem"), "c")))
    with pytest.raises(BadSession, match="named"):
        await host.ask(step(8), HIDDEN_BTD[:, :1], peer="bob")
    await host.ask(step(8), HIDDEN_BTD[:, :1], peer="cem")


async def test_a_step_that_comes_again_is_not_computed_again(host: Host) -> None:
    await host.ask(opening())
    (first,) = (await host.ask(step(0, number=3), HIDDEN_BTD)).tensors
    (again,) = (await host.ask(step(0, number=3), torch.zeros_like(HIDDEN_BTD))).tensors
    assert torch.equal(again, first)
    with pytest.raises(BadSession, match="comes after"):
        await host.ask(step(0, number=2), HIDDEN_BTD)
    with pytest.raises(BadSession, match="position 9"):
        await host.ask(step(9, number=4), HIDDEN_BTD[:, :1])
    await host.ask(step(8, number=4), HIDDEN_BTD[:, :1])


async def test_served_tokens_are_those_of_the_texts_and_not_of_the_work(host: Host) -> None:
    await host.ask(opening())
    await host.ask(step(0, number=3), HIDDEN_BTD)
    assert host.service.served_tokens == 8
    await host.ask(step(0, number=3), HIDDEN_BTD)  # came again
    assert host.service.served_tokens == 8
    await host.ask(step(8, number=4), HIDDEN_BTD[:, :4])
    await host.ask(step(9, number=5), HIDDEN_BTD[:, :1])  # three guesses were wrong
    assert host.service.served_tokens == 10
    with pytest.raises(BadSession, match="position 16"):
        await host.ask(step(16, number=6), HIDDEN_BTD[:, :1])
    await host.ask(CloseSession(session="s"))
    await host.ask(opening("t"))
    await host.ask(step(0, session="t", replay=3, depth=1), HIDDEN_BTD[:, :5])  # in the place of another host
    assert host.service.served_tokens == 15, "a text that is over stays counted"


async def test_what_only_fills_a_row_is_not_served(host: Host) -> None:
    two_rows = OpenSession(session="s", span=HELD, batch=2, max_length=16)
    await host.ask(two_rows)
    mask = torch.ones(2, 5, dtype=torch.uint8)
    mask[1, :3] = 0
    await host.ask(step(0, has_mask=True), HIDDEN_BTD[:, :5].repeat(2, 1, 1), mask)
    assert host.service.served_tokens == 7


@pytest.mark.parametrize(
    "changes", [{"replay": 8, "depth": 1}, {"replay": 4}, {"position": 1, "replay": 4, "depth": 1}]
)
async def test_a_replay_that_cannot_be_right_is_refused(host: Host, changes: dict[str, int]) -> None:
    await host.ask(opening())
    with pytest.raises(BadMessage, match="replay"):
        await host.ask(step(changes.pop("position", 0), **changes), HIDDEN_BTD)


async def test_what_does_not_fit_is_refused_and_the_session_goes_on(host: Host) -> None:
    await host.ask(opening(max_length=8))
    await host.ask(step(0), HIDDEN_BTD[:, :4])
    with pytest.raises(BadSession, match="position 6"):
        await host.ask(step(6), HIDDEN_BTD[:, :1])
    with pytest.raises(BadSession, match="ends at 8"):
        await host.ask(step(4), HIDDEN_BTD[:, :5])
    with pytest.raises(BadMessage, match="announced"):
        await host.ask(step(4, has_mask=True), HIDDEN_BTD[:, :1])
    await host.ask(step(4), HIDDEN_BTD[:, 4:])
    for message in (opening("x", max_length=129), OpenSession(session="x", span=Span(1, 3), batch=1, max_length=4)):
        with pytest.raises(Refused):
            await host.ask(message)
    with pytest.raises(Refused) as refused:
        await host.ask(opening("x", round=9))
    assert refused.value.code == RefusalCode.SNAPSHOT


async def test_a_full_cache_refuses_and_leaves_nothing(host: Host) -> None:
    held = host.caches.free_bytes
    with pytest.raises(CacheFull):
        await asyncio.gather(*(host.ask(opening(f"s{i}", max_length=128)) for i in range(9)))
    await host.service.stream_closed(PeerId("ann"), 1)
    await host.idle()
    assert host.caches.free_bytes == held
    await host.ask(opening())


async def test_silent_sessions_are_freed(host: Host) -> None:
    await host.ask(opening("quiet"))
    await host.ask(opening("busy"))
    host.now = 9.0
    await host.ask(step(0, session="busy"), HIDDEN_BTD)
    host.now = 12.0
    await host.service.sweep()
    assert host.caches.sessions == ("busy",)


async def test_a_pinned_snapshot_survives_rounds_and_goes_with_its_session(host: Host) -> None:
    await host.ask(opening())
    for number in range(2, 6):
        host.publish(number)
    await host.idle()
    assert "s1" in versions(host.model)
    assert "s2" not in versions(host.model)
    await host.ask(step(0), HIDDEN_BTD)
    await host.ask(opening("same", digests={2: b"\1" * 8, 3: b"\1" * 8}))
    await host.ask(CloseSession(session="s"))
    await host.ask(step(0, session="same"), HIDDEN_BTD)
    await host.ask(CloseSession(session="same"))
    await host.idle()
    assert "s1" not in versions(host.model)


async def test_a_session_on_a_very_old_snapshot_is_told_so(host: Host) -> None:
    await host.ask(opening())
    for number in range(2, 14):
        await host.ask(opening(f"n{number}", max_length=1), peer=f"peer{number % 2}", stream=2)
        host.publish(number)
    with pytest.raises(Refused) as refused:
        await host.ask(step(0), HIDDEN_BTD)
    assert refused.value.code == RefusalCode.SNAPSHOT
    assert len(versions(host.model)) < 12


@pytest.mark.parametrize("started", [True, False])
async def test_a_stream_that_closes_while_a_session_opens_leaves_nothing(host: Host, started: bool) -> None:
    free, go, begun = host.caches.free_bytes, threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    open_really = host.caches.open

    def slow_open(*args: object, **options: object) -> None:
        loop.call_soon_threadsafe(begun.set)
        go.wait(10)
        open_really(*args, **options)  # type: ignore[arg-type]

    host.caches.open = slow_open  # type: ignore[method-assign]
    if not started:
        host.thread.submit(Priority.DECODE, lambda: (loop.call_soon_threadsafe(begun.set), go.wait(10)))
    task = asyncio.create_task(host.ask(opening()))
    await begun.wait()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    closing = asyncio.create_task(host.service.stream_closed(PeerId("ann"), 1))
    go.set()
    await closing
    await host.idle()
    assert host.caches.sessions == ()
    assert host.caches.free_bytes == free
    host.caches.open = open_really  # type: ignore[method-assign]
    await host.ask(opening())


async def test_a_cancelled_close_frees_the_cache_all_the_same(host: Host) -> None:
    await host.ask(opening())
    task = asyncio.create_task(host.ask(CloseSession(session="s")))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await host.idle()
    assert host.caches.sessions == ()
