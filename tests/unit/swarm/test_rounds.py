"""The rules by which a host believes others' rounds and counts what came of its own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from averaging.averager import RoundOutcome
from averaging.config import AveragingConfig
from averaging.rounds import has_quorum, plausible_round
from blocks.spans import Span, UnitId
from peers.network import PeerId
from peers.records import ProgressRecord
from swarm.units.rounds import withhold

CONFIG = AveragingConfig(round_samples=8)


def progress(peer: str, span: Span) -> ProgressRecord:
    return ProgressRecord(run="r", peer=PeerId(peer), span=span, round=3, samples=1, total_samples=1, expires_at=1e9)


def outcome(*peers: str, units: tuple[str, ...]) -> RoundOutcome:
    applied = {UnitId(unit): {} for unit in units}
    return RoundOutcome(
        number=4, peers=tuple(PeerId(p) for p in peers), applied=applied, samples=dict.fromkeys(applied, 1.0)
    )


@given(live=st.integers(1, 50), data=st.data())
def test_two_disjoint_groups_never_both_have_a_quorum(live: int, data: st.DataObject) -> None:
    present = data.draw(st.integers(0, live))
    assert not (has_quorum(present, live) and has_quorum(live - present, live))


def test_a_holder_alone_counts_when_nobody_else_is_alive() -> None:
    assert has_quorum(1, 1)


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (3, [], 3),
        (3, [4, 4, 4], 4),
        (3, [3, 4], 4),
        (3, [2**40], 3),  # one peer alone cannot send everybody into the future
        (3, [3, 3, 2**40], 3),
        (3, [500, 500, 501], 500),  # a peer that slept for long believes the others
        (7, [2, 3], 7),
    ],
)
def test_one_peer_alone_is_not_believed_far_ahead(own: int, others: list[int], expected: int) -> None:
    assert plausible_round(own, others, CONFIG) == expected


def test_units_whose_other_live_holders_did_not_come_keep_their_value() -> None:
    company = [progress("b", Span(0, 2)), progress("c", Span(1, 2))]
    found = withhold(outcome("a", "c", units=("x/block.0", "x/block.1", "x/block.5")), company)
    # Block 0: a of {a, b}. Block 1: a and c of {a, b, c}. Block 5: a alone holds it.
    assert set(found.applied) == {"x/block.1", "x/block.5"}
    assert set(found.kept) == {"x/block.0"}


def test_a_full_group_applies_everything() -> None:
    company = [progress("b", Span(0, 2))]
    found = withhold(outcome("a", "b", units=("x/block.0", "x/block.1")), company)
    assert len(found.applied) == 2
    assert not found.kept
