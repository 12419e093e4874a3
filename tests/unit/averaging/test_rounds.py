"""When a round begins, which of it counts, and who is accused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from averaging import rounds
from averaging.config import AveragingConfig
from averaging.exchange import UnitClass, Vote
from averaging.rounds import Moment, Pacing, PeerProgress
from blocks.spans import unit_of
from peers.network import PeerId

CONFIG = AveragingConfig(round_samples=100)
CLASS = UnitClass(class_id=b"class", holders=(PeerId("a"), PeerId("b")), units=(unit_of("default", 0),))
NOBODY: frozenset[PeerId] = frozenset()


def peers(names: str) -> frozenset[PeerId]:
    return frozenset(PeerId(name) for name in names)


def class_of(names: str) -> UnitClass:
    return replace(CLASS, holders=tuple(PeerId(name) for name in names))


def vote(**changes) -> Vote:
    return Vote(**({"class_id": b"class", "complete": True, "digest": b"x"} | changes))


def at(now: float, *, since_last: float = 0.0, window: float = 1.5) -> Pacing:
    return Pacing(now=now, since_last=since_last, window=window)


def moment_at(begin_at: float, window: float = 1.0) -> Moment:
    return Moment(begin_at=begin_at, window=window)


accusations = st.frozensets(st.sampled_from([PeerId(name) for name in "abcdz"]), max_size=3)
votes_of_any = st.builds(
    Vote,
    class_id=st.sampled_from([b"class", b"class", b"class", b"other"]),
    complete=st.sampled_from([True, True, True, False]),
    digest=st.sampled_from([b"x", b"x", b"y"]),
    dropped=accusations,
    doubted=accusations,
)


def accused_by_most(holders: str, by_peer: dict[str, frozenset[PeerId]]) -> set[str]:
    """Counted anew: whom more than half of the other holders name; of two holders nobody."""
    others = {name: [one for one in holders if one != name] for name in holders}
    return {
        name
        for name, rest in others.items()
        if len(holders) > 2 and sum(name in by_peer.get(one, NOBODY) for one in rest) > len(rest) / 2
    }


@given(
    st.dictionaries(
        st.sampled_from(["a", "b"]),
        st.builds(
            Vote,
            class_id=st.sampled_from([b"class", b"class", b"other"]),
            complete=st.booleans(),
            digest=st.sampled_from([b"x", b"y"]),
        ),
    )
)
def test_a_class_applies_only_when_all_are_complete_and_equal(votes):
    decision = rounds.decide(CLASS, votes, PeerId("a"))
    unanimous = (
        votes.keys() == {"a", "b"}
        and all(vote.complete and vote.class_id == b"class" for vote in votes.values())
        and votes["a"].digest == votes["b"].digest
    )
    assert isinstance(decision, rounds.Applied) == unanimous
    if unanimous:
        assert decision.digest == votes["a"].digest


@given(st.sampled_from(["ab", "abc", "abcd"]), st.dictionaries(st.sampled_from("abcdz"), votes_of_any))
def test_all_holders_decide_alike_and_a_class_that_most_doubt_does_not_apply(holders, votes):
    unit_class = class_of(holders)
    decisions = [rounds.decide(unit_class, votes, PeerId(me)) for me in holders]
    present = [votes.get(name) for name in holders]
    unanimous = (
        None not in present
        and all(one.complete and one.class_id == b"class" for one in present)
        and len({one.digest for one in present}) == 1
    )
    doubted = accused_by_most(holders, {peer: one.doubted for peer, one in votes.items()})
    assert {isinstance(one, rounds.Applied) for one in decisions} == {unanimous and not doubted}
    dropped = accused_by_most(holders, {peer: one.dropped for peer, one in votes.items()})
    assert rounds.offenders(unit_class, votes) == doubted | dropped, "two accusations by one each do not add up to one"


@pytest.mark.parametrize("holders", ["abc", "abcd", "abcdef"])
def test_who_is_doubted_by_most_of_the_others_is_named_and_the_class_keeps_its_values(holders):
    unit_class, liar = class_of(holders), holders[0]
    enough = (len(holders) - 1) // 2 + 1
    for num_accusers, is_convicted in ((enough - 1, False), (enough, True)):
        votes = {
            PeerId(name): vote(doubted=peers(liar) if 0 < place <= num_accusers else NOBODY)
            for place, name in enumerate(holders)
        }
        decision = rounds.decide(unit_class, votes, PeerId(holders[1]))
        assert rounds.offenders(unit_class, votes) == (peers(liar) if is_convicted else NOBODY)
        if is_convicted:
            assert decision == rounds.Kept(f"what {liar} combined is out of line with all others")
        else:
            assert decision == rounds.Applied(b"x")


def test_values_that_were_dropped_do_not_stop_a_class_but_who_sent_them_offends():
    votes = {PeerId(name): vote(dropped=peers("c") if name != "c" else NOBODY) for name in "abc"}
    assert rounds.decide(class_of("abc"), votes, PeerId("a")) == rounds.Applied(b"x")
    assert rounds.offenders(class_of("abc"), votes) == peers("c")
    assert rounds.offenders(class_of("abc"), {**votes, PeerId("b"): vote()}) == NOBODY


def test_of_two_holders_neither_convicts_the_other():
    votes = {
        PeerId("a"): vote(dropped=peers("b"), doubted=peers("b")),
        PeerId("b"): vote(dropped=peers("a"), doubted=peers("a")),
    }
    assert rounds.offenders(CLASS, votes) == NOBODY
    assert rounds.decide(CLASS, votes, PeerId("a")) == rounds.Applied(b"x")
    assert rounds.offenders(CLASS, {PeerId("a"): votes[PeerId("a")]}) == NOBODY


def test_only_holders_accuse_and_nobody_is_accused_who_is_no_holder():
    strangers = {PeerId(name): vote(doubted=peers("a"), dropped=peers("a")) for name in "xyz"}
    own = {PeerId(name): vote(doubted=peers("x"), dropped=peers("x")) for name in "abc"}
    assert rounds.offenders(class_of("abc"), own | strangers) == NOBODY
    assert rounds.decide(class_of("abc"), own | strangers, PeerId("a")) == rounds.Applied(b"x")


def test_nobody_convicts_itself_and_one_word_counts_once():
    votes = {PeerId(name): vote() for name in "abc"}
    votes[PeerId("a")] = vote(doubted=peers("ab"), dropped=peers("ab"))
    assert rounds.offenders(class_of("abc"), votes) == NOBODY


def test_a_kept_class_says_why_and_its_own_lack_first():
    cases = {
        "no vote from b": {"a": vote()},
        "b voted on another class": {"a": vote(), "b": vote(class_id=b"other")},
        "parts were missing here": {"a": vote(complete=False), "b": vote(complete=False)},
        "parts were missing at b": {"a": vote(), "b": vote(complete=False)},
        "the holders' results differ": {"a": vote(), "b": vote(digest=b"y")},
    }
    for reason, votes in cases.items():
        assert rounds.decide(CLASS, votes, PeerId("a")) == rounds.Kept(reason)
    assert rounds.decide(CLASS, cases["parts were missing at b"], PeerId("b")) == rounds.Kept("parts were missing here")


def test_waiting_ends_when_all_have_voted_or_one_says_no():
    assert not rounds.is_decided(CLASS, {PeerId("a"): vote()})
    assert rounds.is_decided(CLASS, {PeerId("a"): vote(), PeerId("b"): vote()})
    assert rounds.is_decided(CLASS, {PeerId("b"): vote(complete=False)})


VOTES = {"-": None, "x": vote(), "y": vote(digest=b"y"), "n": vote(complete=False), "o": vote(class_id=b"other")}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_who_spoils_a_class_is_the_only_one_without_whom_it_would_apply(size):
    holders = "abcde"[:size]
    for said in itertools.product(VOTES, repeat=size):
        votes = {PeerId(name): VOTES[one] for name, one in zip(holders, said, strict=True) if VOTES[one] is not None}
        named = rounds.spoiler(class_of(holders), votes)
        if isinstance(rounds.decide(class_of(holders), votes, PeerId("a")), rounds.Applied) or size < 3:
            assert named is None
            continue
        without = [
            peer
            for peer in holders
            if isinstance(rounds.decide(class_of(holders.replace(peer, "")), votes, PeerId("z")), rounds.Applied)
        ]
        assert without in ([], [named]), "never two of them"
        assert (named is None) == (without == [])


def test_one_no_alone_is_waited_on_for_a_moment_to_see_whether_there_are_more():
    all_of = {PeerId(name): vote() for name in "abc"}
    no = {PeerId("a"): vote(complete=False)}
    assert not rounds.is_judged(class_of("abc"), {})
    assert not rounds.is_judged(class_of("abc"), {PeerId("a"): vote(), PeerId("b"): vote()})
    assert rounds.is_judged(class_of("abc"), all_of)
    assert not rounds.is_judged(class_of("abc"), no)
    assert not rounds.is_judged(class_of("abc"), {**no, PeerId("b"): vote()})
    assert rounds.is_judged(class_of("abc"), {**all_of, **no})
    assert rounds.is_judged(class_of("abc"), {**no, PeerId("b"): vote(complete=False)}), "it is not the only one"
    assert rounds.is_judged(CLASS, no), "of two neither can be judged"


def test_a_round_is_proposed_when_enough_samples_are_in_and_not_twice():
    progress = [
        PeerProgress(peer=PeerId("a"), number=5, samples=60),
        PeerProgress(peer=PeerId("b"), number=5, samples=39),
        PeerProgress(peer=PeerId("c"), number=4, samples=1000),
        PeerProgress(peer=PeerId("d"), number=5, samples=math.inf),
    ]
    assert rounds.should_begin(progress, 5, CONFIG, at(1000.0)) is None
    enough = [*progress, PeerProgress(peer=PeerId("e"), number=5, samples=1)]
    moment = rounds.should_begin(enough, 5, CONFIG, at(1000.0))
    assert moment == Moment(begin_at=1000.0 + CONFIG.lead_seconds, window=1.5)
    proposed = [*enough, PeerProgress(peer=PeerId("f"), number=5, samples=1, moment=moment)]
    assert rounds.should_begin(proposed, 5, CONFIG, at(1000.5)) is None


def test_an_overdue_round_begins_with_any_sample_at_all_and_never_without_one():
    config = replace(CONFIG, round_seconds=30.0)
    little = [PeerProgress(peer=PeerId("a"), number=5, samples=1)]
    assert rounds.should_begin(little, 5, config, at(1000.0, since_last=29.9)) is None
    moment = rounds.should_begin(little, 5, config, at(1000.0, since_last=30.0, window=0.7))
    assert moment == Moment(begin_at=1000.0 + config.lead_seconds, window=0.7)
    assert rounds.should_begin(little, 5, CONFIG, at(1000.0, since_last=1e9)) is None, "0 turns it off"
    for samples in (0, -5, math.nan, math.inf):
        none = [PeerProgress(peer=PeerId("a"), number=5, samples=samples)]
        assert rounds.should_begin(none, 5, config, at(1000.0, since_last=1e9)) is None
    stale = [PeerProgress(peer=PeerId("a"), number=4, samples=50)]
    assert rounds.should_begin(stale, 5, config, at(1000.0, since_last=1e9)) is None
    proposed = [replace(little[0], moment=moment)]
    assert rounds.should_begin(proposed, 5, config, at(1000.0, since_last=1e9)) is None
    many = [PeerProgress(peer=PeerId("a"), number=5, samples=100)]
    assert rounds.should_begin(many, 5, config, at(1000.0)) is not None, "enough samples need no waiting"


def test_the_earliest_valid_proposal_wins_and_absurd_ones_are_ignored():
    proposals = [
        PeerProgress(peer=PeerId("a"), number=5, samples=1, moment=moment_at(1003.0)),
        PeerProgress(peer=PeerId("b"), number=5, samples=1, moment=moment_at(1002.0)),
        PeerProgress(peer=PeerId("c"), number=4, samples=1, moment=moment_at(1001.0)),
        PeerProgress(peer=PeerId("d"), number=5, samples=1, moment=moment_at(-1e9)),
        PeerProgress(peer=PeerId("e"), number=5, samples=1, moment=moment_at(math.nan)),
        PeerProgress(peer=PeerId("f"), number=5, samples=1, moment=moment_at(1e12)),
        PeerProgress(peer=PeerId("g"), number=5, samples=1),
    ]
    assert rounds.agreed_moment(proposals, 5, 1000.0, CONFIG) == moment_at(1002.0)
    assert rounds.agreed_moment(proposals[2:], 5, 1000.0, CONFIG) is None


def test_of_two_proposals_for_one_moment_all_take_the_shorter_window():
    two = [
        PeerProgress(peer=PeerId("a"), number=5, samples=1, moment=moment_at(1002.0, 3.0)),
        PeerProgress(peer=PeerId("b"), number=5, samples=1, moment=moment_at(1002.0, 2.0)),
    ]
    for proposals in (two, two[::-1]):
        assert rounds.agreed_moment(proposals, 5, 1000.0, CONFIG) == moment_at(1002.0, 2.0)


def agreed_on(moment: Moment, now: float, config: AveragingConfig = CONFIG) -> Moment | None:
    return rounds.agreed_moment([PeerProgress(peer=PeerId("a"), number=5, samples=1, moment=moment)], 5, now, config)


@pytest.mark.parametrize("lead", [0.5, 2.0, 600.0])
def test_no_moment_that_is_over_or_further_ahead_than_peers_propose_holds_up_a_round(lead):
    config = replace(CONFIG, lead_seconds=lead)
    progress = PeerProgress(peer=PeerId("a"), number=5, samples=100)
    proposed = rounds.should_begin([progress], 5, config, at(1000.0))
    assert agreed_on(proposed, 1000.0, config) == proposed, "a peer's own proposal must hold"
    assert agreed_on(proposed, 1000.0 - 2.9, config) == proposed, "clocks may differ by a little"
    far = moment_at(1000.0 + lead + 3.1)
    assert agreed_on(far, 1000.0, config) is None
    over = moment_at(1000.0)
    end = rounds.gives_up_at(over, config)
    assert agreed_on(over, end, config) == over
    assert agreed_on(over, end + 0.01, config) is None
    for blocking in (far, moment_at(900.0)):
        standing = [replace(progress, moment=blocking), progress]
        assert rounds.should_begin(standing, 5, config, at(1000.0)) == proposed


@pytest.mark.parametrize(("said", "taken"), [(1e-9, 0.8), (0.79, 0.8), (5.0, 5.0), (30.0, 30.0), (60.0, 30.0)])
def test_a_window_that_no_peer_can_have_learnt_is_taken_for_the_nearest_that_one_can(said, taken):
    assert CONFIG.request_seconds == 0.4
    assert agreed_on(moment_at(1000.0, said), 1000.0) == moment_at(1000.0, taken)


def test_one_claim_of_a_far_round_is_not_believed_and_most_peers_are():
    far = 7 + CONFIG.max_rounds_ahead + 1
    assert rounds.plausible_round(7, [], CONFIG) == 7
    assert rounds.plausible_round(7, [3, 6], CONFIG) == 7
    assert rounds.plausible_round(7, [far - 1], CONFIG) == far - 1
    assert rounds.plausible_round(7, [far], CONFIG) == 7
    assert rounds.plausible_round(7, [8, far], CONFIG) == 8
    assert rounds.plausible_round(7, [7, far, far + 5], CONFIG) == far


def test_samples_are_believed_as_far_as_rounds_can_have_counted_them_or_most_others_have_seen_them():
    a_round = 64 * CONFIG.round_samples
    for number, own, others, most in [
        (0, (0, 0), [], a_round),
        (4, (0, 0), [], 5 * a_round),
        (4, (3, 70), [], 70 + 2 * a_round),
        (4, (4, 70), [], 70 + a_round),
        (3, (4, 70), [], 70 + a_round),  # an older one than ours
        (4, (3, 70), [2**53], 70 + 2 * a_round),  # one alone is not most
        (4, (3, 70), [2**53, 80], 70 + 2 * a_round),
        (4, (3, 70), [9 * a_round, 2**53, 8 * a_round], 10 * a_round),
        (4, (3, 70), [9 * a_round, 9 * a_round, 0, 0], 70 + 2 * a_round),
        (4, (3, 70), [9 * a_round, 9 * a_round, 9 * a_round, 0], 10 * a_round),
    ]:
        assert rounds.plausible_samples(number, own, others, CONFIG) == most


def test_two_groups_cannot_both_have_a_quorum_of_one_units_holders():
    for live in range(1, 9):
        for present in range(live + 1):
            assert not (rounds.has_quorum(present, live) and rounds.has_quorum(live - present, live))
        assert rounds.has_quorum(live, live)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("round_samples", 0), ("min_peers", 1), ("vote_seconds", 0), ("request_seconds", 0.9), ("part_bytes", 1),
        ("round_seconds", -1), ("round_seconds", math.nan), ("max_update", math.inf), ("group_peers", 1),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"averaging.{field}"):
        AveragingConfig(**{field: value})


def test_who_reduces_for_holders_behind_nat_is_judged_by_most_of_them_and_has_no_say():
    ann, bob, cat, dan = (PeerId(name) for name in ("ann", "bob", "cat", "dan"))
    unit_class = UnitClass(class_id=b"c", holders=(ann, bob, cat), units=(unit_of("default", 0),), helpers=(dan,))

    def vote(*doubted):
        return Vote(class_id=b"c", complete=True, digest=b"d", doubted=frozenset(doubted))

    votes = {ann: vote(dan), bob: vote(dan), cat: vote()}
    assert rounds.offenders(unit_class, votes) == {dan}
    assert isinstance(rounds.decide(unit_class, votes, ann), rounds.Kept)
    assert not rounds.offenders(unit_class, {ann: vote(bob), cat: vote(), dan: vote(bob)})
