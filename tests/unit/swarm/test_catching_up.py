"""Who is asked for a newer state, what is believed, and what a peer costs that stalls or lies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import msgpack
import pytest
import torch

from averaging.averager import RoundOutcome
from averaging.config import AveragingConfig
from averaging.recipe import Recipe
from blocks.adapters import unit_digest
from blocks.spans import Span, parse_unit
from blocks.training.ledger import Counted
from blocks.unit_state import UnitState
from peers.network import ByteStream, PeerId
from peers.streams.fields import to_body
from peers.streams.messages import UnitReply
from peers.streams.wire import Frame, read_frame, write_frame
from peers.units.transfer import packed
from swarm.units.catching_up import CatchUp, CatchUpConfig
from swarm.units.own_work import MOST_CARRIED
from tests.fakes_network import fake_swarm
from tests.unit.swarm.kept_hosts import HELLO, FakeHost, KeptSwarm, trained, unit

FRONT, BACK = Span(0, 2), Span(2, 4)


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[KeptSwarm]:
    async with asyncio.timeout(30), fake_swarm() as network:
        made = KeptSwarm(network=network, root=tmp_path)
        yield made
        await made.close()


def catching_up(swarm: KeptSwarm, name: str, *, fetch_seconds: float = 5.0) -> CatchUp:
    config = CatchUpConfig(averaging=AveragingConfig(), fetch_seconds=fetch_seconds)
    return CatchUp(swarm.hosts[name], swarm.pools[name], config, lambda: swarm.now)  # type: ignore[arg-type]


async def run(swarm: KeptSwarm, catch_up: CatchUp, *, is_start: bool = False) -> FakeHost:
    """Catch up of `new` from all others' records."""
    new = swarm.hosts["new"]
    await catch_up.run([host.record() for host in swarm.hosts.values() if host is not new], is_start=is_start)
    return new


async def newcomer(swarm: KeptSwarm) -> CatchUp:
    """A host of the back half at the run's seed."""
    seeds = [trained(block, 0, weight=0.0, total_samples=0) for block in BACK.blocks()]
    await swarm.add("new", BACK, *seeds)
    swarm.hosts["new"].round = 0
    return catching_up(swarm, "new")


async def keeper(swarm: KeptSwarm, name: str, *states: UnitState) -> None:
    host = await swarm.add(name, FRONT)
    for state in states:
        host.kept.put(state)


async def test_where_the_holders_are_gone_the_newest_of_the_keepers_wins(swarm: KeptSwarm) -> None:
    catch_up = await newcomer(swarm)
    await keeper(swarm, "xin", trained(2, 3), trained(3, 3))
    await keeper(swarm, "yan", trained(2, 2), trained(3, 4))
    new = await run(swarm, catch_up, is_start=True)
    assert {name: state.version for name, state in new.units.items()} == {
        unit(2): trained(2, 3).version,
        unit(3): trained(3, 4).version,
    }
    assert new.units[unit(3)].moments.keys() == trained(3).moments.keys()


async def test_a_holder_that_is_newer_than_the_keeper_wins(swarm: KeptSwarm) -> None:
    catch_up = await newcomer(swarm)
    await keeper(swarm, "xin", trained(2, 2), trained(3, 2))
    await swarm.add("ann", BACK, trained(2, 3), trained(3, 3))
    new = await run(swarm, catch_up)
    assert {state.round for state in new.units.values()} == {3}


async def test_what_a_holder_left_after_its_round_is_taken_at_the_start_and_not_later(swarm: KeptSwarm) -> None:
    await newcomer(swarm)
    new = swarm.hosts["new"]
    new.units = {unit(2): trained(2, 3, weight=1.0), unit(3): trained(3, 3)}
    new.round = 3
    folded = {name: t + 1 for name, t in trained(2).tensors.items()}
    left = trained(2, 3, weight=9.0, tensors=folded, digest=unit_digest(folded))
    await keeper(swarm, "xin", left, trained(3, 3))
    catch_up = catching_up(swarm, "new")
    others = [swarm.hosts["xin"].record()]
    assert not catch_up.is_needed(others)
    await run(swarm, catch_up)
    assert new.units[unit(2)].weight == 1.0
    await run(swarm, catch_up, is_start=True)
    assert new.units[unit(2)].version == left.version
    assert new.adopted == [{unit(2): new.units[unit(2)]}], "what is the same already was fetched"


async def test_a_newer_kept_version_is_noticed_while_running(swarm: KeptSwarm) -> None:
    catch_up = await newcomer(swarm)
    swarm.hosts["new"].round = 3  # as when a keeper's record came after the start
    await keeper(swarm, "xin", trained(2, 3), trained(3, 3))
    assert catch_up.is_needed([swarm.hosts["xin"].record()])
    new = await run(swarm, catch_up)
    assert {state.round for state in new.units.values()} == {3}
    swarm.now += 10
    assert not catch_up.is_needed([swarm.hosts["xin"].record()])


async def test_a_newer_kept_version_of_the_same_bits_is_taken_too(swarm: KeptSwarm) -> None:
    """A round on samples without a step changes nothing, and who stands before it is left out of the next one."""
    catch_up = await newcomer(swarm)
    new = swarm.hosts["new"]
    new.units = {unit(2): trained(2, 3), unit(3): trained(3, 3)}
    new.round = 4
    same = [replace(state, round=4) for state in new.units.values()]
    await keeper(swarm, "xin", *same)
    assert catch_up.is_needed([swarm.hosts["xin"].record()])
    await run(swarm, catch_up)
    assert {state.round for state in new.units.values()} == {4}
    swarm.now += 60
    assert not catch_up.is_needed([swarm.hosts["xin"].record()]), "once is enough"


async def test_a_newer_state_of_the_same_bits_is_fetched_once_a_round_has_told_of_it(swarm: KeptSwarm) -> None:
    catch_up = await newcomer(swarm)
    new = swarm.hosts["new"]
    new.units, new.round = {unit(2): trained(2, 3), unit(3): trained(3, 3)}, 5
    newer = [replace(state, round=4, weight=77.0) for state in new.units.values()]  # a round that changed nothing
    await swarm.add("ann", BACK, *newer)
    swarm.hosts["ann"].round = 5
    others = [swarm.hosts["ann"].record()]
    assert not catch_up.is_needed(others), "records tell of bits only"
    assert await catch_up.run(others) == frozenset()
    assert await catch_up.run(others, stale={unit(3)}) == {unit(3)}
    assert new.units[unit(3)].version == newer[1].version
    assert new.units[unit(2)].round == 3


class Rogue:
    """Answers fetches with whatever `reply` makes, or not at all; remembers how often it was asked."""

    told_samples = 0

    def __init__(self, swarm: KeptSwarm, name: str, round_: int = 9) -> None:
        self.asked = 0
        self.swarm, self.name, self.round = swarm, name, round_

    async def enter(self) -> None:
        """Claim to hold what everybody lacks."""
        states = [trained(block, self.round) for block in BACK.blocks()]
        await self.swarm.add(self.name, BACK, *states)
        self.swarm.hosts[self.name].round = self.round
        self.swarm.hosts[self.name].told_samples = self.told_samples
        await self.swarm.network.find(PeerId(self.name)).serve_stream("units", self.serve)

    async def serve(self, stream: ByteStream) -> None:
        await read_frame(stream.reader)
        ours = HELLO()
        await write_frame(stream.writer, Frame(request=0, kind=ours.kind, body=to_body(ours)))
        while True:
            frame = await read_frame(stream.reader)
            self.asked += 1
            await self.reply(stream, frame)

    async def reply(self, stream: ByteStream, frame: Frame) -> None:
        await asyncio.Event().wait()


class Misshapen(Rogue):
    async def reply(self, stream: ByteStream, frame: Frame) -> None:
        wrong = {"a.lora_A": torch.ones(4, 3), "a.lora_B": torch.ones(3, 2)}
        state = replace(trained(2, 9), unit=frame.body["unit"], tensors=wrong, digest=unit_digest(wrong), moments={})
        message, tensors = packed(state, UnitReply)
        body = to_body(message)
        await write_frame(stream.writer, Frame(request=frame.request, kind="unit", body=body, tensors=tensors))


class WrongHash(Rogue):
    async def reply(self, stream: ByteStream, frame: Frame) -> None:
        message, tensors = packed(replace(trained(2, 9), unit=frame.body["unit"], digest=bytes(32)), UnitReply)
        body = to_body(message)
        await write_frame(stream.writer, Frame(request=frame.request, kind="unit", body=body, tensors=tensors))


class TooLarge(Rogue):
    """Describes tensors of far more than anybody reads."""

    async def reply(self, stream: ByteStream, frame: Frame) -> None:
        message, _ = packed(replace(trained(2, 9), unit=frame.body["unit"]), UnitReply)
        described = [["f32", [1 << 26]]] * len(message.names)
        header = msgpack.packb({"q": frame.request, "k": "unit", "b": to_body(message), "t": described})
        stream.writer.write(len(header).to_bytes(4, "big") + header)


class Shorter(Rogue):
    """Says so many bytes, sends fewer, and closes."""

    async def reply(self, stream: ByteStream, frame: Frame) -> None:
        message, _ = packed(replace(trained(2, 9), unit=frame.body["unit"]), UnitReply)
        described = [["f32", [2, 3]]] * len(message.names)
        header = msgpack.packb({"q": frame.request, "k": "unit", "b": to_body(message), "t": described})
        stream.writer.write(len(header).to_bytes(4, "big") + header + b"x" * 10)
        stream.writer.close()


class FromTheFuture(Rogue):
    """Whole in itself, and of a round that nobody will reach."""

    changes: ClassVar[dict[str, object]] = {"round": 2**40}

    async def reply(self, stream: ByteStream, frame: Frame) -> None:
        block = parse_unit(frame.body["unit"])[1]
        message, tensors = packed(trained(block, 9, **self.changes), UnitReply)
        body = to_body(message)
        await write_frame(stream.writer, Frame(request=frame.request, kind="unit", body=body, tensors=tensors))


class Weighty(FromTheFuture):
    """Of a weight that no round takes, so that it would stay for ever."""

    changes: ClassVar[dict[str, object]] = {"weight": 1e300}


class Endless(FromTheFuture):
    """Would put an end to everybody's schedule, and tells the same in its record."""

    changes: ClassVar[dict[str, object]] = {"total_samples": 2**53}
    told_samples = 2**53


class Longer(FromTheFuture):
    """Goes on with what nobody asked for; the unit before that is as good as any."""

    changes: ClassVar[dict[str, object]] = {"round": 2, "weight": 0.0}

    async def reply(self, stream: ByteStream, frame: Frame) -> None:
        await super().reply(stream, frame)
        stream.writer.write(b"\xff" * 4096)


@pytest.mark.parametrize("kind", [Rogue, Misshapen, WrongHash, TooLarge, Shorter, FromTheFuture, Weighty, Endless])
async def test_who_stalls_or_lies_is_dropped_and_the_next_one_asked(
    swarm: KeptSwarm, kind: type[Rogue], caplog: pytest.LogCaptureFixture
) -> None:
    await newcomer(swarm)
    rogue = kind(swarm, "mallory")
    await rogue.enter()
    await keeper(swarm, "xin", trained(2, 3), trained(3, 3))
    catch_up = catching_up(swarm, "new", fetch_seconds=1.5 if kind is Rogue else 5.0)
    began = time.monotonic()
    new = await run(swarm, catch_up, is_start=True)
    assert {name: state.version for name, state in new.units.items()} == {
        unit(block): trained(block, 3).version for block in BACK.blocks()
    }
    assert rogue.asked == 1, "it was asked again for the next unit"
    assert time.monotonic() - began < 10
    (line,) = [each.getMessage() for each in caplog.records if "mallory" in each.getMessage()]
    assert "\n" not in line
    await run(swarm, catch_up, is_start=True)
    assert rogue.asked == 1, "it was asked again at once"
    swarm.now += 11
    await run(swarm, catch_up, is_start=True)
    assert rogue.asked == 2


async def test_a_run_that_has_seen_far_more_than_its_rounds_tell_is_believed_if_most_say_so(swarm: KeptSwarm) -> None:
    many = 100 * 64 * AveragingConfig().round_samples
    states = [trained(block, 3, total_samples=many) for block in BACK.blocks()]
    for told, expected in ((0, 0), (many, many)):
        await newcomer(swarm)
        for name in ("ann", "bob"):
            (await swarm.add(name, BACK, *states)).told_samples = told
        await run(swarm, catching_up(swarm, "new"))
        assert {state.total_samples for state in swarm.hosts["new"].units.values()} == {expected}
        for name in ("new", "ann", "bob"):
            swarm.lose(name)


async def test_what_a_peer_sends_after_a_unit_costs_only_that_peer(swarm: KeptSwarm) -> None:
    await newcomer(swarm)
    rogue = Longer(swarm, "mallory")
    await rogue.enter()
    await keeper(swarm, "xin", trained(2, 3), trained(3, 3))
    catch_up = catching_up(swarm, "new", fetch_seconds=1.5)
    new = await run(swarm, catch_up, is_start=True)
    assert {state.round for state in new.units.values()} == {3}
    assert rogue.asked


async def test_of_two_keepers_with_other_bits_of_one_round_everybody_takes_the_same(swarm: KeptSwarm) -> None:
    await newcomer(swarm)
    other = {name: tensor + 1 for name, tensor in trained(2).tensors.items()}
    states = [trained(2, 3), trained(2, 3, tensors=other, digest=unit_digest(other))]
    for name, state in zip(("xin", "yan"), states, strict=True):
        await keeper(swarm, name, state, trained(3, 3))
    new, taken = swarm.hosts["new"], []
    seeds = dict(new.units)
    for names in (["xin", "yan"], ["yan", "xin"]):
        new.units, new.round = dict(seeds), 0
        await catching_up(swarm, "new").run([swarm.hosts[name].record() for name in names], is_start=True)
        taken.append(new.units[unit(2)].digest)
    assert taken == [max(state.digest for state in states)] * 2


async def test_who_fetched_what_is_newer_than_any_record_told_comes_to_the_round_after_that(swarm: KeptSwarm) -> None:
    catch_up = await newcomer(swarm)
    ann = await swarm.add("ann", BACK, trained(2, 3), trained(3, 3))
    told = ann.record()
    ann.units, ann.round = {unit(2): trained(2, 4), unit(3): trained(3, 4)}, 4
    await catch_up.run([told])
    assert swarm.hosts["new"].round == 4


SAMPLES = Counted(samples=8, tokens=80, steps=2)


async def missed_a_round(swarm: KeptSwarm, recipe: Recipe | None = None) -> CatchUp:
    """`new` has trained on round 3 while ann went on to round 4."""
    await newcomer(swarm)
    new = swarm.hosts["new"]
    new.units, new.round = {unit(2): trained(2, 3), unit(3): trained(3, 3)}, 3
    new.work = {unit(2): SAMPLES, unit(3): SAMPLES}
    ann = await swarm.add("ann", BACK, trained(2, 4), trained(3, 4))
    ann.round = 4
    config = CatchUpConfig(averaging=AveragingConfig(recipe=recipe or Recipe()), fetch_seconds=5.0)
    return CatchUp(new, swarm.pools["new"], config, lambda: swarm.now)  # type: ignore[arg-type]


def outcome(*peers: str, **changes: object) -> RoundOutcome:
    return replace(RoundOutcome(number=4, peers=tuple(PeerId(peer) for peer in peers)), **changes)  # type: ignore[arg-type]


async def test_what_was_trained_for_a_round_that_was_missed_goes_on_top_of_its_result(
    swarm: KeptSwarm, caplog: pytest.LogCaptureFixture
) -> None:
    catch_up = await missed_a_round(swarm)
    caplog.set_level("INFO")
    new = await run(swarm, catch_up)
    assert new.stayed == [{unit(2), unit(3)}]
    assert "samples_kept=8 samples_lost=0" in caplog.text


@pytest.mark.parametrize(
    "recipe", [Recipe(merging="rolora"), Recipe(merging="power"), Recipe(local="scaffold")], ids=lambda r: r.merging
)
async def test_under_rules_by_which_it_means_nothing_elsewhere_it_goes(swarm: KeptSwarm, recipe: Recipe) -> None:
    new = await run(swarm, await missed_a_round(swarm, recipe))
    assert new.stayed == [set()]


async def test_what_others_may_have_counted_is_not_brought_again(
    swarm: KeptSwarm, caplog: pytest.LogCaptureFixture
) -> None:
    catch_up = await missed_a_round(swarm)
    caplog.set_level("INFO")
    catch_up.came_of(outcome("new", "ann", kept={unit(2): "no vote from ann"}))
    new = await run(swarm, catch_up)
    assert new.stayed == [{unit(3)}]
    assert "samples_kept=8 samples_lost=8" in caplog.text


@pytest.mark.parametrize(
    "came",
    [
        outcome("new", kept={unit(2): "alone"}),
        outcome("new", "ann", behind=True, kept={unit(2): "others are at a newer round"}),
        outcome("new", "ann", kept={unit(2): "stale"}, stale=frozenset({unit(2)})),
        outcome("new", "ann", applied={unit(2): None}),  # after one whose end was not known
    ],
    ids=["alone", "behind", "stale", "applied"],
)
async def test_what_no_round_can_have_counted_is_brought_to_the_next(swarm: KeptSwarm, came: RoundOutcome) -> None:
    catch_up = await missed_a_round(swarm)
    if came.applied:
        catch_up.came_of(outcome("new", "ann", kept={unit(2): "no vote from ann"}))
    catch_up.came_of(came)
    new = await run(swarm, catch_up)
    assert new.stayed == [{unit(2), unit(3)}]


async def test_work_that_misses_round_after_round_is_given_up(swarm: KeptSwarm) -> None:
    catch_up = await missed_a_round(swarm)
    new, ann = swarm.hosts["new"], swarm.hosts["ann"]
    for number in range(4, 4 + MOST_CARRIED + 2):
        ann.units = {unit(block): trained(block, number) for block in BACK.blocks()}
        ann.round = number
        await run(swarm, catch_up)
    both = {unit(2), unit(3)}
    assert new.stayed == [both] * MOST_CARRIED + [set(), both]
