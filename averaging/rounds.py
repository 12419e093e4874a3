"""Rules of one round: when it begins, who must have come, and whether it counts. Pure: no clock, no network.

Who averages what with whom is in planning.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from averaging.config import MAX_GROUP_PEERS, AveragingConfig
from averaging.exchange import UnitClass, Vote
from averaging.robust import convicted
from peers.network import PeerId

MOST_WINDOW_SECONDS = 30.0
_CLOCK_SECONDS = 3.0  # clocks that are further apart cannot work together (their DHT records do not count)


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Moment:
    """When a round begins (DHT time, s), and how many seconds later its group closes though some are missing."""

    begin_at: float
    window: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerProgress:
    """What a live peer's progress record says: the round it works towards, its samples for it, and what it proposes."""

    peer: PeerId
    number: int
    samples: float
    moment: Moment | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """Every holder has the whole result, and it is the same one."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class Kept:
    """The class keeps its old values, and why."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Pacing:
    """What a peer knows of the time when it thinks of a round: now (DHT time), how long ago the last one was, and how
    long a group takes to form (see arrivals.py); all in seconds.
    """

    now: float
    since_last: float
    window: float


def should_begin(
    progress: Iterable[PeerProgress], number: int, config: AveragingConfig, pacing: Pacing
) -> Moment | None:
    """What to propose for round `number`: None while too little is in, or while a proposal stands already.

    A round begins when the run has seen enough samples, or any at all after `config.round_seconds`.
    """
    current = [entry for entry in progress if entry.number == number]
    if agreed_moment(current, number, pacing.now, config) is not None:
        return None
    samples = sum(entry.samples for entry in current if math.isfinite(entry.samples) and entry.samples > 0)
    overdue = 0 < config.round_seconds <= pacing.since_last
    if samples >= config.round_samples or (overdue and samples > 0):
        return Moment(begin_at=pacing.now + config.lead_seconds, window=pacing.window)
    return None


def agreed_moment(proposals: Iterable[PeerProgress], number: int, now: float, config: AveragingConfig) -> Moment | None:
    """When round `number` begins: the earliest proposal for it that still can be met.

    One that is over, as a dead peer leaves it, or further ahead than peers propose would hold up the round: it is
    ignored. A window is taken for as much of it as any peer can have learnt.
    """
    moments = [
        _with_bounded_window(entry.moment, config)
        for entry in proposals
        if entry.number == number and entry.moment is not None
    ]
    latest = now + config.lead_seconds + _CLOCK_SECONDS
    return min((each for each in moments if each.begin_at <= latest and now <= gives_up_at(each, config)), default=None)


def least_window(config: AveragingConfig) -> float:
    """In less than so many seconds no peer has asked another twice."""
    return 2 * config.request_seconds


def gives_up_at(moment: Moment, config: AveragingConfig) -> float:
    """When a round that has no group by then does not happen (DHT time, s)."""
    # Twice the window: hivemind declares itself anew once when nobody answered the first time.
    return moment.begin_at + 2 * moment.window + config.request_seconds


def plausible_round(own: int, others: Sequence[int], config: AveragingConfig) -> int:
    """The newest completed round among `own` and the others' claims that this peer believes.

    One peer alone may be a few rounds ahead, not absurdly many; what most others claim is believed whatever it is.
    """
    near = [number for number in others if number - own <= config.max_rounds_ahead]
    common = sorted(others)[(len(others) - 1) // 2] if len(others) > 1 else own  # at least half stand there or later
    return max([own, common, *near])


def is_plausible(number: int, weight: float, newest: int, config: AveragingConfig) -> bool:
    """Whether a unit's state can be what a round has made of it: of round `number`, with `weight` samples behind it.

    `newest` is the newest completed round that one believes in. The state may be of a newer one than its holder's
    record told, but not of one in which nobody else would follow.
    """
    near = 0 <= number <= newest + config.max_rounds_ahead
    return near and 0 <= weight <= MAX_GROUP_PEERS * config.max_weight


def plausible_samples(number: int, own: tuple[int, int], others: Sequence[int], config: AveragingConfig) -> int:
    """The most samples from which a unit can have learnt in all when it is of round `number`.

    `own` is the round and the samples of what this peer has already, `others` the samples that the others' records
    tell. Each round since may have counted as if every member of a full group had brought a whole round's samples, and
    so may what came after the last. What at least half of the others have seen is believed whatever it is.
    """
    own_round, own_samples = own
    a_round = MAX_GROUP_PEERS * config.round_samples
    common = sorted(others)[(len(others) - 1) // 2] if len(others) > 1 else 0
    return max(own_samples + (max(0, number - own_round) + 1) * a_round, common + a_round)


def has_quorum(present: int, live: int) -> bool:
    """Whether enough of a unit's live holders took part that no other group can have averaged it as well."""
    return 2 * present > live


def decide(unit_class: UnitClass, votes: Mapping[PeerId, Vote], me: PeerId) -> Applied | Kept:
    """Whether a class applies: only when every holder has every part, and all have the same bits."""
    for peer in sorted(unit_class.holders, key=lambda holder: holder != me):
        vote = votes.get(peer)
        if vote is None:
            return Kept(f"no vote from {peer}")
        if vote.class_id != unit_class.class_id:
            return Kept(f"{peer} voted on another class")
        if not vote.complete:
            return Kept("parts were missing here" if peer == me else f"parts were missing at {peer}")
    liars = _accused(unit_class, {peer: vote.doubted for peer, vote in votes.items()})
    if liars:
        return Kept(f"what {', '.join(sorted(liars))} combined is out of line with all others")
    digests = {votes[peer].digest for peer in unit_class.holders}
    if len(digests) != 1:
        return Kept("the holders' results differ")
    return Applied(digests.pop())


def offenders(unit_class: UnitClass, votes: Mapping[PeerId, Vote]) -> frozenset[PeerId]:
    """Whom most holders of a class accuse: of values that no update can have, or of combining others' falsely."""
    dropped = _accused(unit_class, {peer: vote.dropped for peer, vote in votes.items()})
    return dropped | _accused(unit_class, {peer: vote.doubted for peer, vote in votes.items()})


def spoiler(unit_class: UnitClass, votes: Mapping[PeerId, Vote]) -> PeerId | None:
    """The one holder that keeps a class from applying while all others, two at least, have every part and the same
    bits: by its no, its silence, or another result. Once that can be a bad line or a death, so `bans.Misses` counts.
    None where there is no such holder.
    """
    holders = unit_class.holders
    results = {peer: _result(unit_class, votes.get(peer)) for peer in holders}
    alone = [
        peer
        for peer in holders
        if None not in (rest := {results[other] for other in holders if other != peer}) and len(rest) == 1
    ]
    return alone[0] if len(alone) == 1 and len(holders) > 2 else None


def _result(unit_class: UnitClass, vote: Vote | None) -> bytes | None:
    """The digest of a holder's whole result; None where it has none."""
    return vote.digest if vote is not None and vote.complete and vote.class_id == unit_class.class_id else None


def is_decided(unit_class: UnitClass, votes: Mapping[PeerId, Vote]) -> bool:
    """Whether waiting for more votes cannot change the outcome: all are in, or one says no."""
    return any(not vote.complete for vote in votes.values()) or votes.keys() >= set(unit_class.holders)


def is_judged(unit_class: UnitClass, votes: Mapping[PeerId, Vote]) -> bool:
    """Whether waiting for more votes cannot tell who alone has spoilt the class, either."""
    says_no = [peer for peer, vote in votes.items() if not vote.complete]
    return len(unit_class.holders) < 3 or len(says_no) > 1 or votes.keys() >= set(unit_class.holders)


def _with_bounded_window(moment: Moment, config: AveragingConfig) -> Moment:
    return replace(moment, window=min(MOST_WINDOW_SECONDS, max(least_window(config), moment.window)))


def _accused(unit_class: UnitClass, by_peer: Mapping[PeerId, frozenset[PeerId]]) -> frozenset[PeerId]:
    """Whom most of the other holders accuse. Of two, each could convict the other by itself: nobody is.

    Who reduces for the holders is judged as they are, but has no say.
    """
    holders = set(unit_class.holders)
    if len(holders) < 3:
        return frozenset()
    accusations = {peer: accused for peer, accused in by_peer.items() if peer in holders}
    return convicted(accusations, len(holders)) & set(unit_class.reducers)
