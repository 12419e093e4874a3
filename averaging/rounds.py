"""Rules of one round: when it begins, who averages what with whom, and whether it counts. Pure: no clock, no network.

Every member of a group computes the same plan from the same signed contributions, so nothing here may depend on who
asks, save what is said to be "mine".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from averaging.config import AveragingConfig
from averaging.exchange import Contribution, Group, UnitClass, Vote
from blocks.spans import UnitId
from peers.network import PeerId

_MAX_LEAD_SECONDS = 60.0  # a proposal further ahead than this is an error or an attack: it would hold up the round


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerProgress:
    """What a live peer's progress record says: its round, its samples since then, and the moment it proposes."""

    peer: PeerId
    number: int
    samples: float
    proposed_at: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Something that was brought and does not count; `unit` is None where it holds for all that `peer` brought."""

    peer: PeerId
    unit: UnitId | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What this peer does in a round.

    `classes` are those that this peer holds; `shares` are its weight over the class's total, per unit; `totals` are
    the sums. `alone` are units that nobody else holds. `kept` are own units that take no part, with the reason.
    """

    behind: bool
    classes: tuple[UnitClass, ...]
    shares: Mapping[UnitId, float]
    totals: Mapping[UnitId, float]
    alone: tuple[UnitId, ...]
    kept: Mapping[UnitId, str]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """Every holder has the whole result, and it is the same one."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class Kept:
    """The class keeps its old values, and why."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Version:
    """Which state of a unit a peer has. Ordered: the greater is the newer, and equal ones are equal to the bit."""

    number: int
    weight: float
    digest: bytes


def should_begin(progress: Iterable[PeerProgress], number: int, config: AveragingConfig, now: float) -> float | None:
    """The moment to propose for round `number`, or None while too few samples are in or a proposal stands already."""
    current = [entry for entry in progress if entry.number == number]
    if agreed_start(current, number, now) is not None:
        return None
    samples = sum(entry.samples for entry in current if math.isfinite(entry.samples) and entry.samples > 0)
    return now + config.lead_seconds if samples >= config.round_samples else None


def agreed_start(proposals: Iterable[PeerProgress], number: int, now: float) -> float | None:
    """The moment at which round `number` begins: the earliest proposal for it. Absurd ones are ignored."""
    moments = [
        entry.proposed_at
        for entry in proposals
        if entry.number == number
        and entry.proposed_at is not None
        and abs(entry.proposed_at - now) <= _MAX_LEAD_SECONDS
    ]
    return min(moments, default=None)


def plausible_round(own: int, others: Sequence[int], config: AveragingConfig) -> int:
    """The newest completed round among `own` and the others' claims that this peer believes.

    One peer alone may be a few rounds ahead, not absurdly many; what most others claim is believed whatever it is.
    """
    near = [number for number in others if number - own <= config.max_rounds_ahead]
    common = sorted(others)[(len(others) - 1) // 2] if len(others) > 1 else own  # at least half stand there or later
    return max([own, common, *near])


def has_quorum(present: int, live: int) -> bool:
    """Whether enough of a unit's live holders took part that no other group can have averaged it as well."""
    return 2 * present > live


def plan(group: Group, me: PeerId, config: AveragingConfig) -> Plan:
    """Who averages what with whom, from what the group's members have signed.

    Raises:
        ValueError: `me` is not in the group; an error of the caller.
    """
    mine = next((entry for entry in group.contributions if entry.peer == me), None)
    if mine is None:
        raise ValueError(f"peer {me} is not in the group that it plans for")
    if _is_behind(mine, group.contributions, config):
        kept = dict.fromkeys(mine.weights, "others are at a newer round; fetch it first")
        return Plan(behind=True, classes=(), shares={}, totals={}, alone=(), kept=kept, left_out=())
    equals, left_out = _equals(mine, group.contributions)
    weights, refused = _weights(equals, config)
    return _divide(mine, group.group_id, equals, weights, (*left_out, *refused))


def fractions(holders: Sequence[PeerId], contributions: Iterable[Contribution]) -> tuple[float, ...]:
    """Which part of a class each holder reduces: in proportion to its bandwidth; nothing for peers behind NAT.

    Who does not know its bandwidth counts as the mean of those that do. All zeros when nobody can be reached.
    """
    by_peer = {entry.peer: entry for entry in contributions}
    reachable = [by_peer[peer] for peer in holders if not by_peer[peer].client_mode]
    known = [entry.megabits_per_second for entry in reachable if _is_bandwidth(entry.megabits_per_second)]
    usual = sum(known) / len(known) if known else 1.0
    speeds = {
        entry.peer: entry.megabits_per_second if _is_bandwidth(entry.megabits_per_second) else usual
        for entry in reachable
    }
    total = sum(speeds.values())
    return tuple(speeds.get(peer, 0.0) / total if total else 0.0 for peer in holders)


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
    digests = {votes[peer].digest for peer in unit_class.holders}
    if len(digests) != 1:
        return Kept("the holders' results differ")
    return Applied(digests.pop())


def is_decided(unit_class: UnitClass, votes: Mapping[PeerId, Vote]) -> bool:
    """Whether waiting for more votes cannot change the outcome: all are in, or one says no."""
    return any(not vote.complete for vote in votes.values()) or votes.keys() >= set(unit_class.holders)


def newest(versions: Iterable[Version]) -> Version | None:
    """The version that wins where holders differ: latest round, then most weight, then the greater digest."""
    return max((version for version in versions if math.isfinite(version.weight)), default=None)


def _is_behind(mine: Contribution, contributions: Sequence[Contribution], config: AveragingConfig) -> bool:
    """Whether others are at a newer round. One peer alone may not claim to be absurdly far ahead; a majority may."""
    newer = [entry.number for entry in contributions if entry.layout == mine.layout and entry.number > mine.number]
    plausible = any(number - mine.number <= config.max_rounds_ahead for number in newer)
    return plausible or 2 * len(newer) > len(contributions)


def _equals(
    mine: Contribution, contributions: Sequence[Contribution]
) -> tuple[tuple[Contribution, ...], tuple[LeftOut, ...]]:
    equals, left_out = [], []
    for entry in sorted(contributions, key=lambda contribution: contribution.peer):
        if entry.layout != mine.layout:
            reason = "its adapter settings differ"
        elif entry.number != mine.number:
            reason = f"it is at round {entry.number}, this is round {mine.number}"
        else:
            equals.append(entry)
            continue
        left_out.append(LeftOut(peer=entry.peer, unit=None, reason=reason))
    return tuple(equals), tuple(left_out)


def _weights(
    equals: Sequence[Contribution], config: AveragingConfig
) -> tuple[dict[UnitId, dict[PeerId, float]], list[LeftOut]]:
    """Per unit, the weight of each holder that takes part. A holder with weight 0 takes the mean and adds nothing."""
    weights: dict[UnitId, dict[PeerId, float]] = {}
    refused = []
    for entry in equals:
        for unit, weight in entry.weights.items():
            if not math.isfinite(weight) or weight < 0 or weight > config.max_weight:
                reason = f"weight {weight} is refused; it must be between 0 and {config.max_weight:g}"
                refused.append(LeftOut(peer=entry.peer, unit=unit, reason=reason))
                continue
            weights.setdefault(unit, {})[entry.peer] = weight
            if weight == 0:
                reason = "weight 0: takes the mean and adds nothing"
                refused.append(LeftOut(peer=entry.peer, unit=unit, reason=reason))
    return weights, refused


def _divide(
    mine: Contribution,
    group_id: bytes,
    equals: Sequence[Contribution],
    weights: Mapping[UnitId, Mapping[PeerId, float]],
    left_out: tuple[LeftOut, ...],
) -> Plan:
    kept: dict[UnitId, str] = {}
    totals: dict[UnitId, float] = {}
    alone: list[UnitId] = []
    units_by_holders: dict[tuple[PeerId, ...], list[UnitId]] = {}
    client_mode = {entry.peer: entry.client_mode for entry in equals}
    for unit in sorted(mine.weights):
        holders = tuple(sorted(weights.get(unit, {})))
        if mine.peer not in holders:
            kept[unit] = f"own weight {mine.weights[unit]} is refused"
            continue
        total = math.fsum(weights[unit][holder] for holder in holders)
        if total <= 0:
            kept[unit] = "no holder has seen a sample of it"
        elif len(holders) == 1:
            totals[unit] = total
            alone.append(unit)
        elif all(client_mode[holder] for holder in holders):
            kept[unit] = "all its holders are behind NAT, and nobody can reduce"
        else:
            totals[unit] = total
            units_by_holders.setdefault(holders, []).append(unit)
    classes = tuple(
        UnitClass(class_id=_class_id(group_id, holders, units), holders=holders, units=tuple(units))
        for holders, units in sorted(units_by_holders.items())
    )
    shares = {unit: weights[unit][mine.peer] / total for unit, total in totals.items()}
    return Plan(
        behind=False,
        classes=classes,
        shares=shares,
        totals=totals,
        alone=tuple(alone),
        kept=kept,
        left_out=left_out,
    )


def _class_id(group_id: bytes, holders: Iterable[PeerId], units: Iterable[UnitId]) -> bytes:
    """Names a class so that peers who disagree on the group, the holders or the units never meet in one all-reduce."""
    digest = hashlib.sha256(b"swarmtune class 1")
    for text in (group_id.hex(), *holders, "", *units):
        digest.update(text.encode() + b"\0")
    return digest.digest()


def _is_bandwidth(megabits_per_second: float) -> bool:
    return math.isfinite(megabits_per_second) and 0 < megabits_per_second <= 1e6
