"""Holders hand units to keepers, keepers believe only what can be right, and what is kept can be fetched."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blocks.adapters import unit_digest
from blocks.errors import BadAdapter
from blocks.spans import Span, UnitId, parse_unit
from blocks.unit_state import UnitState
from peers.errors import PeerLost, Refused
from peers.network import PeerId
from peers.streams.pool import Pool
from peers.streams.traffic import Traffic
from peers.units.client import Fetching, fetch_unit, hand_over, offer_of, offer_units
from peers.units.keeping import keepers_of
from swarm.units import files as unit_files
from swarm.units import safekeeping
from tests.fakes_network import fake_swarm
from tests.logged import logged_by
from tests.unit.swarm.kept_hosts import HELLO, KeptSwarm, trained, unit

FRONT, BACK = Span(0, 2), Span(2, 4)
ZOE = PeerId("zoe")


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[KeptSwarm]:
    async with asyncio.timeout(30), fake_swarm() as network:
        made = KeptSwarm(network=network, root=tmp_path)
        yield made
        await made.close()


def frames_sent(swarm: KeptSwarm, name: str) -> dict[str, int]:
    """How many bytes of each kind of question a host has sent."""
    counted: dict[str, int] = {}
    for kinds in swarm.pools[name]._traffic.by_peer.values():
        for kind, used in kinds.items():
            counted[kind] = counted.get(kind, 0) + used.sent
    return counted


async def test_a_sole_holders_units_reach_every_host_that_is_needed_and_only_once(swarm: KeptSwarm) -> None:
    await swarm.add("ann", BACK, trained(2), trained(3))
    for name in ("xin", "yan", "zoe"):
        await swarm.add(name, FRONT, trained(0), trained(1))
    await swarm.handing["ann"].tend()
    copies = [(name, block) for name in ("xin", "yan", "zoe") for block in swarm.kept(name)]
    assert sorted(block for _, block in copies) == [2, 2, 3, 3], "two keepers for each unit of one holder"
    sent = frames_sent(swarm, "ann")["keep"]
    await swarm.handing["ann"].tend()
    assert frames_sent(swarm, "ann")["keep"] == sent, "what is kept was sent again"


async def test_a_new_round_replaces_what_is_kept_and_comes_back_with_moments(swarm: KeptSwarm) -> None:
    ann = await swarm.add("ann", BACK, trained(2), trained(3))
    await swarm.add("zoe", FRONT)
    await swarm.handing["ann"].tend()
    ann.units = {unit(2): trained(2, 4), unit(3): trained(3, 3, weight=5.0)}
    await swarm.handing["ann"].tend()
    assert swarm.kept("zoe") == {2: (4, 4.0), 3: (3, 4.0)}, "an offer to the same keeper waits, unless the state is new"
    swarm.now += 11
    await swarm.handing["ann"].tend()
    swarm.lose("ann")
    bob = await swarm.add("bob", BACK)
    assert bob.units == {}
    fetched = await fetch_unit(swarm.pools["bob"], ZOE, unit(2), Fetching(digest=unit_digest, seconds=5, moments=True))
    assert fetched.version == trained(2, 4).version
    assert all(torch.equal(fetched.moments[name], tensor) for name, tensor in trained(2, 4).moments.items())
    bare = await fetch_unit(swarm.pools["bob"], ZOE, unit(2), Fetching(digest=unit_digest, seconds=5))
    assert bare.moments == {}


async def test_what_nobody_has_trained_is_not_handed_over(swarm: KeptSwarm) -> None:
    await swarm.add("ann", BACK, trained(2, 0, weight=0.0), trained(3, 0, weight=2.0))
    await swarm.add("zoe", FRONT)
    await swarm.handing["ann"].tend()
    assert swarm.kept("zoe") == {3: (0, 2.0)}


async def test_the_second_holder_does_it_when_the_first_does_not(swarm: KeptSwarm) -> None:
    for name in ("ann", "bob"):
        await swarm.add(name, BACK, trained(2), trained(3))
    await swarm.add("zoe", FRONT)
    await swarm.handing["bob"].tend()
    assert swarm.kept("zoe") == {}
    swarm.now += 11
    await swarm.handing["bob"].tend()
    assert swarm.kept("zoe").keys() == {2, 3}


async def test_a_keeper_without_room_is_passed_over_for_one_that_has_some(swarm: KeptSwarm) -> None:
    await swarm.add("ann", BACK, trained(2), trained(3))
    names = [PeerId(f"host-{number}") for number in range(6)]
    chosen = {keeper for block in BACK.blocks() for keeper in keepers_of(unit(block), {PeerId("ann")}, names)}
    roomy = next(name for name in names if name not in chosen)  # the rule comes to it last
    for name in names:
        await swarm.add(name, FRONT, most_bytes=1 << 20 if name == roomy else 100)
    for _ in range(3):
        await swarm.handing["ann"].tend()
    assert {name for name in names if swarm.kept(name)} == {roomy}
    assert swarm.kept(roomy).keys() == {2, 3}


async def test_a_keeper_that_is_gone_ends_nothing(swarm: KeptSwarm) -> None:
    await swarm.add("ann", BACK, trained(2))
    await swarm.add("zoe", FRONT)
    swarm.network.kill("zoe")
    await swarm.handing["ann"].tend()
    assert swarm.kept("zoe") == {}


async def test_a_full_disk_at_the_keeper_is_told_and_leaves_the_old_version(
    swarm: KeptSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    await swarm.add("ann", BACK)
    await swarm.add("zoe", FRONT)
    await hand_over(swarm.pools["ann"], ZOE, trained(2), seconds=5)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(unit_files.os, "fsync", full)
    with pytest.raises(Refused, match="cannot be written here") as refused:
        await hand_over(swarm.pools["ann"], ZOE, trained(2, 4), seconds=5)
    assert refused.value.code == "full"
    monkeypatch.undo()
    assert swarm.kept("zoe") == {2: (3, 4.0)}
    assert swarm.hosts["zoe"].kept.get(unit(2)) is not None


async def test_what_is_here_or_newer_is_not_wanted(swarm: KeptSwarm) -> None:
    await swarm.add("ann", Span(1, 4))
    await swarm.add("zoe", FRONT, trained(1))
    await hand_over(swarm.pools["ann"], ZOE, trained(2, 5), seconds=5)
    offers = [offer_of(state) for state in (trained(1, 9), trained(2, 4), trained(2, 5), trained(2, 6), trained(3))]
    wanted = await offer_units(swarm.pools["ann"], ZOE, offers, seconds=5)
    assert (wanted.units, wanted.no_room) == ((unit(2), unit(3)), ())
    await hand_over(swarm.pools["ann"], ZOE, trained(2, 4), seconds=5)
    assert swarm.kept("zoe") == {2: (5, 4.0)}, "an older version took a newer one's place"


def altered(state: UnitState, **tensors: torch.Tensor) -> UnitState:
    """Other tensors under a digest that is right."""
    changed = {**state.tensors, **tensors}
    return replace(state, tensors=changed, digest=unit_digest(changed))


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (trained(1), "peer ann holds block 1"),
        (replace(trained(2), unit=UnitId("default/block.7")), "not one of this run's"),
        (replace(trained(2), unit=UnitId("other/block.2")), "not one of this run's"),
        (trained(2, 68), "round 68 of default/block.2 with 4 samples is not believed"),
        (trained(2, 3, weight=1e300), "with 1e.300 samples is not believed"),
        (
            trained(2, total_samples=2**53),
            "9007199254740992 samples by round 3 of .* are not believed, at most",
        ),
        (replace(trained(2), digest=bytes(32)), "does not match its tensors"),
        (replace(trained(2), weight=-1.0), "negative weight"),
        (altered(trained(2), **{"a.lora_A": torch.ones(3, 3)}), "must be"),
        (altered(trained(2), **{"b.lora_A": torch.ones(2, 3)}), "other tensors than expected"),
        (altered(trained(2), **{"a.lora_A": torch.ones(2, 3, dtype=torch.float16)}), "not fp32"),
        (altered(trained(2), **{"a.lora_A": torch.full((2, 3), torch.nan)}), "not finite"),
        (replace(trained(2), moments={"a.lora_A/exp_avg": torch.ones(2, 3)}), "missing or misshapen"),
        (replace(trained(2), moments={"c/exp_avg": torch.ones(2, 3)}), "optimizer state of 'c'"),
        (replace(trained(2), moments={"c/exp_avg": torch.ones(200, 200)}), "bytes are too many"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_cannot_be_right_is_refused_and_nothing_changes(
    swarm: KeptSwarm, state: UnitState, reason: str
) -> None:
    await swarm.add("ann", BACK)
    await swarm.add("zoe", FRONT)
    await hand_over(swarm.pools["ann"], ZOE, trained(2, 2), seconds=5)
    with pytest.raises(Refused, match=reason):
        await hand_over(swarm.pools["ann"], ZOE, state, seconds=5)
    assert swarm.kept("zoe") == {2: (2, 4.0)}


async def test_an_offer_by_who_does_not_hold_it_is_refused(swarm: KeptSwarm) -> None:
    await swarm.add("ann", BACK)
    await swarm.add("zoe", FRONT)
    with pytest.raises(Refused, match="no record says here that peer ann holds block 0"):
        await offer_units(swarm.pools["ann"], ZOE, [offer_of(trained(0))], seconds=5)
    pool = Pool(swarm.network.join("stranger"), HELLO, Traffic(), {})
    with pytest.raises(Refused, match="peer stranger holds block 2"):
        await offer_units(pool, ZOE, [offer_of(trained(2))], seconds=5)
    await pool.close()


async def test_room_is_made_by_dropping_what_is_safe_elsewhere_and_never_the_last_copy(swarm: KeptSwarm) -> None:
    zoe = await swarm.add("zoe", FRONT, most_bytes=70_000)  # an offer counts 64 kB on top of its tensors
    await swarm.add("ann", Span(2, 3))
    filling = replace(trained(3), moments={"x/exp_avg": torch.zeros(2000)})
    zoe.kept.put(filling)
    offers = [offer_of(trained(2))]
    wanted = await offer_units(swarm.pools["ann"], ZOE, offers, seconds=5)
    assert wanted.no_room == (unit(2),), "block 3 has no holder: its copy is the last one"
    with pytest.raises(Refused, match="no room") as refused:
        await hand_over(swarm.pools["ann"], ZOE, trained(2), seconds=5)
    assert refused.value.code == "full"
    for name in ("bob", "cem", "dan"):
        await swarm.add(name, Span(3, 4))
    wanted = await offer_units(swarm.pools["ann"], ZOE, offers, seconds=5)
    assert wanted.units == (unit(2),)
    assert swarm.kept("zoe") == {}, "three hosts hold block 3, so its copy could go"


async def test_what_was_kept_beyond_a_lowered_limit_goes_oldest_first_and_never_the_last_copy(
    swarm: KeptSwarm, caplog: pytest.LogCaptureFixture
) -> None:
    zoe = await swarm.add("zoe", FRONT)
    oldest, newer, last = trained(2, 3), trained(3, 4), trained(1, 2)  # ann holds the first two as they are here
    zoe.span = Span(0, 1)
    for state in (newer, last, oldest):
        zoe.kept.put(state)
    sizes = {parse_unit(name)[1]: there.num_bytes for name, there in zoe.kept.units.items()}
    zoe.kept._most_bytes = sizes[1] + sizes[3]
    ann = await swarm.add("ann", BACK, oldest, newer)
    swarm.safe["zoe"].keep_to_limit()
    assert swarm.kept("zoe").keys() == {1, 3}, "the oldest of those that others have is enough"
    (line,) = logged_by(safekeeping, caplog)
    assert "1 that others have were dropped" in line
    zoe.kept._most_bytes = 10
    ann.units[unit(3)] = replace(newer, digest=bytes(32))
    swarm.safe["zoe"].keep_to_limit()
    assert swarm.kept("zoe").keys() == {1, 3}, "ann has other bits of block 3, nobody any of block 1"
    ann.units[unit(3)] = newer
    swarm.safe["zoe"].keep_to_limit()
    assert swarm.kept("zoe").keys() == {1}
    said = len(logged_by(safekeeping, caplog))
    swarm.safe["zoe"].keep_to_limit()
    assert len(logged_by(safekeeping, caplog)) == said, "it is said once"


async def test_of_two_keepers_beyond_their_limit_only_one_lets_go(swarm: KeptSwarm) -> None:
    for name in ("yan", "zoe"):
        host = await swarm.add(name, FRONT, most_bytes=10)
        host.kept.put(trained(3))
    seen = [swarm.hosts[name].record() for name in ("yan", "zoe")]
    for name, other in (("yan", seen[1]), ("zoe", seen[0])):  # both look before either record tells of it
        swarm.safe[name]._others = lambda other=other: [other]  # type: ignore[misc]
        swarm.safe[name].keep_to_limit()
    assert [bool(swarm.kept(name)) for name in ("yan", "zoe")].count(True) == 1


async def test_a_keeper_behind_nat_or_with_an_older_copy_is_no_reason_to_let_go(swarm: KeptSwarm) -> None:
    for name, number in (("yan", 2), ("zoe", 3)):
        host = await swarm.add(name, FRONT, most_bytes=10)
        host.kept.put(trained(3, number))
    swarm.safe["zoe"].keep_to_limit()
    assert swarm.kept("zoe")
    hidden = replace((await swarm.add("ann", BACK, trained(2), trained(3))).record(), behind_nat=True)
    swarm.safe["zoe"]._others = lambda: [hidden]
    swarm.safe["zoe"].keep_to_limit()
    assert swarm.kept("zoe")


async def test_a_kept_unit_that_is_damaged_is_not_served(swarm: KeptSwarm) -> None:
    await swarm.add("ann", BACK)
    zoe = await swarm.add("zoe", FRONT)
    await hand_over(swarm.pools["ann"], ZOE, trained(2), seconds=5)
    (path,) = (swarm.root / "zoe").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Refused, match="not held here"):
        await fetch_unit(swarm.pools["ann"], ZOE, unit(2), Fetching(digest=unit_digest, seconds=5))
    assert zoe.kept.units == {}, "and the holders see in the record that it is gone"


async def test_a_fetched_state_that_fails_the_askers_check_is_the_peers_fault(swarm: KeptSwarm) -> None:
    await swarm.add("ann", BACK)
    await swarm.add("zoe", FRONT, trained(1))

    def refuse(state: UnitState) -> None:
        raise BadAdapter("it has another rank")

    with pytest.raises(PeerLost, match="peer zoe is not believed: it has another rank"):
        await fetch_unit(swarm.pools["ann"], ZOE, unit(1), Fetching(digest=unit_digest, seconds=5, check=refuse))
