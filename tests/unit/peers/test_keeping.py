"""Who keeps which unit: the same for all who see the same hosts, enough, and few changes when peers come and go."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocks.spans import Span, UnitId
from peers.network import PeerId
from peers.records import Keeping, ProgressRecord
from peers.units.keeping import (
    ENOUGH_COPIES,
    PATIENCE_SECONDS,
    Copy,
    Hosts,
    handovers,
    is_spare,
    keepers_of,
    keepers_with,
    told,
)

FRONT, BACK = Span(0, 2), Span(2, 4)
UNIT = UnitId("default/block.2")
NEW = Copy(round=7, digest=b"newnewne")
OLD = Copy(round=6, digest=b"oldoldol")
names = st.sets(st.integers(0, 10_000).map(lambda n: PeerId(f"peer-{n}")), max_size=30)


def record(peer: str, span: Span, **kept: Copy) -> ProgressRecord:
    """A host of `span` that keeps `b2=Copy(…)`: that version of block 2."""
    keeps = tuple(
        Keeping(Span(int(block[1:]), int(block[1:]) + 1), copy.round, copy.digest) for block, copy in kept.items()
    )
    return ProgressRecord(
        run="r", peer=PeerId(peer), span=span, round=7, samples=0, total_samples=0, keeps=keeps, expires_at=1e9
    )


def seen_by(me: str, span: Span, *others: ProgressRecord) -> Hosts:
    return Hosts(me=PeerId(me), span=span, others=others)


@given(hosts=names, holders=names)
def test_with_its_keepers_a_unit_has_three_copies_or_all_hosts_have_one(
    hosts: set[PeerId], holders: set[PeerId]
) -> None:
    keepers = keepers_of(UNIT, holders, hosts)
    assert set(keepers) <= hosts - holders
    assert len(set(keepers)) == len(keepers) == max(0, min(ENOUGH_COPIES - len(holders), len(hosts - holders)))


@given(hosts=names, holder=st.just(PeerId("holder")))
def test_who_comes_or_goes_changes_at_most_its_own_place(hosts: set[PeerId], holder: PeerId) -> None:
    before = keepers_of(UNIT, {holder}, hosts)
    after = keepers_of(UNIT, {holder}, hosts | {PeerId("new")})
    assert set(after) - set(before) <= {"new"}
    assert [peer for peer in after if peer != "new"] == list(before[: len(after) - after.count(PeerId("new"))])


def test_the_work_of_keeping_is_spread_over_all() -> None:
    hosts = [PeerId(f"peer-{number}") for number in range(10)]
    units = [UnitId(f"default/block.{block}") for block in range(100)]
    taken = [keeper for unit in units for keeper in keepers_of(unit, {PeerId("holder")}, hosts)]
    assert len(taken) == 200
    assert all(8 <= taken.count(host) <= 35 for host in hosts)


def test_only_the_first_holder_hands_over_until_the_others_have_waited_for_it() -> None:
    keeper = record("zoe", FRONT)
    ann = seen_by("ann", BACK, record("bob", BACK), keeper)
    bob = seen_by("bob", BACK, record("ann", BACK), keeper)
    assert handovers(ann, {UNIT: NEW}, ()) == {"zoe": [UNIT]}
    assert handovers(bob, {UNIT: NEW}, ()) == {}
    late = replace(NEW, age_seconds=PATIENCE_SECONDS)
    assert handovers(bob, {UNIT: late}, ()) == {"zoe": [UNIT]}


@pytest.mark.parametrize(
    ("kept", "is_due"),
    [
        ({}, True),
        ({"b2": OLD}, True),
        ({"b3": NEW}, True),
        ({"b2": replace(NEW, digest=b"elsewise")}, True),  # the same round with another result
        ({"b2": NEW}, False),
        ({"b2": replace(OLD, round=8)}, False),  # newer than ours: we are the ones to catch up
    ],
)
def test_a_keeper_that_has_the_version_or_a_newer_one_is_left_alone(kept: dict[str, Copy], is_due: bool) -> None:
    hosts = seen_by("ann", BACK, record("zoe", FRONT, **kept))
    assert (handovers(hosts, {UNIT: NEW}, ()) == {"zoe": [UNIT]}) is is_due
    assert handovers(hosts, {UNIT: NEW}, {(PeerId("zoe"), UNIT)}) == {}, "it was offered a moment ago"


def test_a_unit_with_three_holders_needs_no_keeper_and_one_that_declines_is_passed_over() -> None:
    hosts = seen_by("ann", BACK, record("bob", BACK), record("cem", BACK), record("zoe", FRONT))
    assert handovers(hosts, {UNIT: NEW}, ()) == {}
    two = seen_by("ann", BACK, record("bob", BACK), *(record(name, FRONT) for name in ("xin", "yan", "zoe")))
    ((first, _),) = handovers(two, {UNIT: NEW}, ()).items()
    ((second, _),) = handovers(replace(two, declined={(first, UNIT)}), {UNIT: NEW}, ()).items()
    assert first != second


def test_a_kept_unit_may_go_only_when_it_is_safe_without_this_keeper() -> None:
    holders = [record(name, BACK) for name in ("ann", "bob", "cem")]
    assert is_spare(seen_by("zoe", FRONT, *holders), UNIT, NEW)
    assert not is_spare(seen_by("zoe", FRONT, *holders[:2]), UNIT, NEW), "this keeper is the third copy"
    assert not is_spare(seen_by("zoe", FRONT), UNIT, NEW), "nobody holds it"
    for name in ("xin", "yan", "eve", "kim", "lou"):
        keeper = keepers_of(UNIT, {PeerId("ann"), PeerId("bob")}, {PeerId("zoe"), PeerId(name)})[0]
        if keeper == name:  # the rule prefers this one to us
            there = seen_by("zoe", FRONT, *holders[:2], record(name, FRONT, b2=NEW))
            assert is_spare(there, UNIT, NEW)
            assert not is_spare(seen_by("zoe", FRONT, *holders[:2], record(name, FRONT, b2=OLD)), UNIT, NEW)
            assert not is_spare(seen_by("zoe", FRONT, *holders[:2], record(name, FRONT)), UNIT, NEW)
            break
    else:
        pytest.fail("the rule prefers one peer to all others")


def test_a_record_tells_of_kept_units_in_runs_and_readers_find_the_newest_keeper() -> None:
    kept = {UnitId(f"default/block.{block}"): NEW for block in (9, 3, 4)} | {UnitId("default/block.5"): OLD}
    keeps = told(kept, FRONT)
    assert {(str(each.span), each.round) for each in keeps} == {("3:5", 7), ("9:10", 7), ("5:6", 6)}
    there = [replace(record("zoe", FRONT), keeps=keeps), record("yan", FRONT, b5=NEW), record("xin", FRONT)]
    assert there[0].kept(4) == (7, NEW.digest)
    assert keepers_with(there, 5) == ["yan", "zoe"]
    assert keepers_with(there, 4) == ["zoe"]
    assert keepers_with(there, 8) == []


def test_holders_behind_nat_have_as_many_keepers_as_if_they_were_not_there_and_keep_for_nobody() -> None:
    hidden = [replace(record(name, BACK), behind_nat=True) for name in ("ann", "bob", "cat")]
    zoe, yan = record("zoe", FRONT), record("yan", FRONT)
    ann = seen_by("ann", BACK, *hidden[1:], zoe, yan, replace(record("xia", FRONT), behind_nat=True))
    assert handovers(ann, {UNIT: NEW}, []) == {PeerId("zoe"): [UNIT], PeerId("yan"): [UNIT]}
    keeper = seen_by("zoe", FRONT, *hidden, yan)
    assert not is_spare(keeper, UNIT, NEW)
    assert is_spare(seen_by("zoe", FRONT, *(record(name, BACK) for name in ("ann", "bob", "cat"))), UNIT, NEW)
