"""Who averages what with whom in one round, from what the group's members have signed. Pure: no clock, no network.

Every member computes the same plan, so nothing here may depend on who asks, save what is said to be "mine".
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low

from averaging.config import MAX_GROUP_PEERS, AveragingConfig
from averaging.exchange import Brought, Contribution, Group, UnitClass, Version
from averaging.recipe import Recipe
from averaging.robust import MIN_HOLDERS
from blocks.spans import UnitId
from peers.network import PeerId

_USUAL_MEGABITS_PER_SECOND = 100.0
_LEAST_PART_BYTES = 2**14
_MOST_HELPERS = 4  # of one class; more would save little and keep more peers busy


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Something that was brought and does not count; `unit` is None where it holds for all that `peer` brought."""

    peer: PeerId
    unit: UnitId | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What this peer does in a round.

    `classes` are those that this peer holds, `helped` those of others that it reduces for; `shares` say, per unit, what
    each of its class's holders counts for, in their order (one entry for `alone`, units that nobody else brought).
    `samples` are those behind each unit's mean. `kept` are own units that take no part, with the reason; `stale` those
    of them of which another holder has a newer state. `unheard` are own units for which this peer counts for nothing.
    """

    behind: bool = False
    classes: tuple[UnitClass, ...] = ()
    helped: tuple[UnitClass, ...] = ()
    shares: Mapping[UnitId, tuple[float, ...]]
    samples: Mapping[UnitId, float]
    alone: tuple[UnitId, ...] = ()
    kept: Mapping[UnitId, str]
    stale: frozenset[UnitId] = frozenset()
    unheard: frozenset[UnitId] = frozenset()
    left_out: tuple[LeftOut, ...] = ()


def plan(group: Group, me: PeerId, config: AveragingConfig, *, is_mixing: bool = False) -> Plan:
    """Who averages what with whom. Groups that mix (grouping.py) bring whole values, on whatever state.

    Raises:
        ValueError: `me` is not in the group; an error of the caller.
    """
    mine = next((entry for entry in group.contributions if entry.peer == me), None)
    if mine is None:
        raise ValueError(f"peer {me} is not in the group that it plans for")
    outcasts = _outcasts(group.contributions)
    if me in outcasts:
        return _all_kept(mine, "most of the group distrust this peer; see their logs")
    trusted = [entry for entry in group.contributions if entry.peer not in outcasts]
    left_out = [LeftOut(peer=peer, unit=None, reason="most of the group distrust it") for peer in sorted(outcasts)]
    if _is_behind(mine, trusted, config):
        return _all_kept(mine, "others are at a newer round; fetch it first", behind=True)
    equals = _equals(mine, trusted, left_out)
    brought = _brought(equals, mine.number, config, left_out)
    if is_mixing:
        brought = {unit: _of_any_state(holders, config.recipe) for unit, holders in brought.items()}
    members = _Members(
        group_id=group.group_id, client_mode={entry.peer: entry.client_mode for entry in equals}, brought=brought
    )
    return _divide(mine, members, left_out, config)


def fractions(
    members: Sequence[PeerId], contributions: Iterable[Contribution], robust: str = "none"
) -> tuple[float, ...]:
    """Which part of a class each member reduces: in proportion to its bandwidth; nothing for peers behind NAT.

    Who does not know its bandwidth counts as the mean of those that do, and as a usual link at least, as those who
    know theirs may do so because they keep it low. All zeros when nobody can be reached.

    Under a `robust` mean nobody counts for more than twice what the one in the middle does: bandwidths are claims, and
    who reduces nearly all of a class is beyond comparison with the others.
    """
    by_peer = {entry.peer: entry for entry in contributions}
    reachable = [by_peer[peer] for peer in members if not by_peer[peer].client_mode]
    known = [entry.megabits_per_second for entry in reachable if _is_bandwidth(entry.megabits_per_second)]
    usual = max(_USUAL_MEGABITS_PER_SECOND, sum(known) / len(known)) if known else 1.0
    speeds = {
        entry.peer: entry.megabits_per_second if _is_bandwidth(entry.megabits_per_second) else usual
        for entry in reachable
    }
    if robust != "none" and speeds:
        most = 2 * median_low(speeds.values())
        speeds = {peer: min(speed, most) for peer, speed in speeds.items()}
    total = sum(speeds.values())
    return tuple(speeds.get(peer, 0.0) / total if total else 0.0 for peer in members)


def part_bytes(contributions: Iterable[Contribution], config: AveragingConfig) -> int:
    """How large the parts of a class are at most: a second of the slowest link that is known, so that none stalls."""
    known = [entry.megabits_per_second for entry in contributions if _is_bandwidth(entry.megabits_per_second)]
    return max(_LEAST_PART_BYTES, min([config.part_bytes, *(int(megabits * 125_000) for megabits in known)]))


def shares_of(brought: Sequence[Brought], recipe: Recipe) -> tuple[float, ...]:
    """What each holder's update counts for. They sum to 1, save under FedNova, which normalises by local steps.

    FedNova (2007.07481, eq. 6): sum of p_i tau, over p_i / tau_i, with AdamW's steps as tau_i: Adam's updates are of
    one size whatever the gradient's, so that their number is what a peer has gone ahead by. All zeros where nobody
    has a say.
    """
    weights = [_weight(entry, recipe) for entry in brought]
    total = math.fsum(weights)
    if total <= 0:
        return (0.0,) * len(weights)
    parts = [weight / total for weight in weights]
    if recipe.local != "fednova":
        return tuple(parts)
    steps = [max(1, entry.steps) for entry in brought]
    mean_steps = math.fsum(part * count for part, count in zip(parts, steps, strict=True))
    return tuple(part * mean_steps / count for part, count in zip(parts, steps, strict=True))


def agreed_version(versions: Sequence[Version]) -> Version:
    """The state that a unit's holders go on from: what more of them have than any other, the newest of equally many.

    So a single holder can neither pull the others back nor drag them to a state that nobody else has.
    """
    counts = Counter(versions)
    return max(counts, key=lambda version: (counts[version], version))


def _weight(brought: Brought, recipe: Recipe) -> float:
    match recipe.weighting:
        case "tokens":
            return brought.tokens if brought.samples > 0 else 0.0
        case "equal":
            return 1.0 if brought.samples > 0 else 0.0
        case _:
            return brought.samples


def _all_kept(mine: Contribution, reason: str, *, behind: bool = False) -> Plan:
    return Plan(behind=behind, shares={}, samples={}, kept=dict.fromkeys(mine.units, reason))


def _outcasts(contributions: Sequence[Contribution]) -> frozenset[PeerId]:
    """Members whom more than half of the others have banned. Of two, each could cast the other out: neither is."""
    accused = Counter(peer for entry in contributions for peer in entry.distrusts if peer != entry.peer)
    members = {entry.peer for entry in contributions}
    if len(members) < 3:
        return frozenset()
    return frozenset(peer for peer in members if 2 * accused[peer] > len(members) - 1)


def _is_behind(mine: Contribution, contributions: Sequence[Contribution], config: AveragingConfig) -> bool:
    """Whether others are at a newer round: most of the others, or most of all where it is absurdly far ahead.

    One alone of several does not stop the rest: it is left out, and what it has is looked at when this round is over.
    """
    others = [entry for entry in contributions if entry.layout == mine.layout and entry.peer != mine.peer]
    newer = [entry.number for entry in others if entry.number > mine.number]
    near = [number for number in newer if number - mine.number <= config.max_rounds_ahead]
    return 2 * len(near) > len(others) or 2 * len(newer) > len(contributions)


def _equals(mine: Contribution, contributions: Sequence[Contribution], left_out: list[LeftOut]) -> list[Contribution]:
    equals = []
    for entry in sorted(contributions, key=lambda contribution: contribution.peer):
        if entry.layout != mine.layout:
            reason = "its adapter or its rules of rounds differ"
        elif entry.number != mine.number:
            reason = f"it is at round {entry.number}, this is round {mine.number}"
        else:
            equals.append(entry)
            continue
        left_out.append(LeftOut(peer=entry.peer, unit=None, reason=reason))
    return equals


def _brought(
    equals: Sequence[Contribution], number: int, config: AveragingConfig, left_out: list[LeftOut]
) -> dict[UnitId, dict[PeerId, Brought]]:
    """Per unit, what each holder brings that takes part. A holder without samples takes the mean and adds nothing."""
    found: dict[UnitId, dict[PeerId, Brought]] = {}
    for entry in equals:
        for unit, brought in entry.units.items():
            reason = _refusal(brought, number, config)
            if reason:
                left_out.append(LeftOut(peer=entry.peer, unit=unit, reason=reason))
                continue
            found.setdefault(unit, {})[entry.peer] = brought
            if _weight(brought, config.recipe) == 0:
                reason = "weight 0: takes the mean and adds nothing"
                left_out.append(LeftOut(peer=entry.peer, unit=unit, reason=reason))
    return found


def _of_any_state(holders: Mapping[PeerId, Brought], recipe: Recipe) -> dict[PeerId, Brought]:
    """As if all stood on one state; under RoLoRA on one of each round, which says what half of a unit is trained."""
    has_halves = recipe.merging == "rolora"
    return {
        peer: replace(brought, version=Version(number=brought.version.number if has_halves else 0))
        for peer, brought in holders.items()
    }


def _refusal(brought: Brought, number: int, config: AveragingConfig) -> str:
    for value in (brought.samples, brought.tokens):
        if not math.isfinite(value) or value < 0 or value > config.max_weight:
            return f"weight {value} is refused; it must be between 0 and {config.max_weight:g}"
    if not 0 <= brought.steps <= max(1.0, brought.samples):
        return f"{brought.steps} local steps on {brought.samples:g} samples are refused"
    if not 0 <= brought.version.number < number:
        return f"its state is of round {brought.version.number}, which is not over"
    if not 0 <= brought.version.weight <= MAX_GROUP_PEERS * config.max_weight:
        return f"its state claims {brought.version.weight:g} samples behind it, which is refused"
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Members:
    """Who takes part, whether it is behind NAT, and what each brings, per unit."""

    group_id: bytes
    client_mode: Mapping[PeerId, bool]
    brought: Mapping[UnitId, Mapping[PeerId, Brought]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Division:
    """One unit's part in a round: who averages it, and what each of them counts for; or why it keeps its value."""

    holders: tuple[PeerId, ...]
    helpers: tuple[PeerId, ...] = ()
    shares: tuple[float, ...] = ()
    samples: float = 0.0
    kept: str = ""


def _divide(mine: Contribution, members: _Members, left_out: list[LeftOut], config: AveragingConfig) -> Plan:
    kept: dict[UnitId, str] = {}
    stale: set[UnitId] = set()
    shares: dict[UnitId, tuple[float, ...]] = {}
    samples: dict[UnitId, float] = {}
    alone: list[UnitId] = []
    alike: dict[tuple[_Division, bool], list[UnitId]] = {}
    for unit in sorted({*mine.units, *members.brought}):
        is_own = unit in mine.units
        if is_own and mine.peer not in members.brought.get(unit, {}):
            kept[unit] = f"own {_refusal(mine.units[unit], mine.number, config)}"
            continue
        found = _unit_division(unit, members, left_out, config)
        if is_own and mine.peer not in found.holders:
            kept[unit] = "other holders have a newer state of it, which is fetched first"
            stale.add(unit)
        elif is_own and found.kept:
            kept[unit] = found.kept
        elif not found.kept and (is_own or mine.peer in found.helpers):
            samples[unit], shares[unit] = found.samples, found.shares
            if len(found.holders) == 1:
                alone.append(unit)
                continue
            # A robust mean compares the holders' whole updates, so that a class's units have one say each.
            one_say = found.shares if config.recipe.robust != "none" else ()
            alike.setdefault((replace(found, shares=one_say, samples=0.0), is_own), []).append(unit)
    classes = {
        is_own: tuple(
            _class_of(members.group_id, division, units)
            for (division, own), units in sorted(alike.items(), key=lambda item: (item[0][0].holders, item[1]))
            if own == is_own
        )
        for is_own in (True, False)
    }
    return Plan(
        classes=classes[True],
        helped=classes[False],
        shares=shares,
        samples=samples,
        alone=tuple(alone),
        kept=kept,
        stale=frozenset(stale),
        unheard=frozenset(
            unit for unit in shares if unit in mine.units and _weight(mine.units[unit], config.recipe) == 0
        ),
        left_out=tuple(left_out),
    )


def _unit_division(unit: UnitId, members: _Members, left_out: list[LeftOut], config: AveragingConfig) -> _Division:
    all_holders, recipe = members.brought[unit], config.recipe
    holders = _of_one_state(unit, all_holders, left_out)
    shares = shares_of([all_holders[holder] for holder in holders], recipe)
    active, least = sum(share > 0 for share in shares), MIN_HOLDERS[recipe.robust]
    if not active:
        what = "tokens" if recipe.weighting == "tokens" else "samples"
        return _Division(holders=holders, kept=f"no holder has brought {what} of it")
    if len(holders) > 1 and active < least:
        reason = f"{active} holders brought an update; the robust mean '{recipe.robust}' needs {least}"
        return _Division(holders=holders, kept=reason)
    helpers: tuple[PeerId, ...] = ()
    if len(holders) > 1 and all(members.client_mode[holder] for holder in holders):
        helpers = _helpers(members, holders)
        if not helpers:
            return _Division(holders=holders, kept="all its holders are behind NAT, and nobody can reduce")
        if recipe.merging == "power":  # in its second pass the sizes follow from ranks that a helper does not know
            reason = "all its holders are behind NAT; merging 'power' needs one that can be reached"
            return _Division(holders=holders, kept=reason)
    samples = math.fsum(all_holders[holder].samples for holder in holders)
    return _Division(holders=holders, helpers=helpers, shares=shares, samples=samples)


def _helpers(members: _Members, holders: Sequence[PeerId]) -> tuple[PeerId, ...]:
    """Who reduces for holders behind NAT: a few reachable members, others in each round, so that all do their part."""
    reachable = [peer for peer, is_client in members.client_mode.items() if not is_client and peer not in holders]
    seed = members.group_id + "".join(holders).encode()
    drawn = sorted(reachable, key=lambda peer: hashlib.sha256(seed + peer.encode()).digest())
    return tuple(sorted(drawn[:_MOST_HELPERS]))


def _class_of(group_id: bytes, division: _Division, units: Sequence[UnitId]) -> UnitClass:
    return UnitClass(
        class_id=_class_id(group_id, division.holders, units),
        holders=division.holders,
        units=tuple(units),
        helpers=division.helpers,
    )


def _of_one_state(unit: UnitId, brought: Mapping[PeerId, Brought], left_out: list[LeftOut]) -> tuple[PeerId, ...]:
    """The holders that go on from the same state; the others must fetch it before their changes mean anything."""
    agreed = agreed_version([entry.version for entry in brought.values()])
    for peer, entry in brought.items():
        if entry.version != agreed:
            reason = f"its state is of round {entry.version.number}, not the one that most or the newest have"
            left_out.append(LeftOut(peer=peer, unit=unit, reason=reason))
    return tuple(sorted(peer for peer, entry in brought.items() if entry.version == agreed))


def _class_id(group_id: bytes, holders: Iterable[PeerId], units: Iterable[UnitId]) -> bytes:
    """Names a class so that peers who disagree on the group, the holders or the units never meet in one all-reduce."""
    digest = hashlib.sha256(b"swarmtune class 2")
    for text in (group_id.hex(), *holders, "", *units):
        digest.update(text.encode() + b"\0")
    return digest.digest()


def _is_bandwidth(megabits_per_second: float) -> bool:
    return math.isfinite(megabits_per_second) and 0 < megabits_per_second <= 1e6
