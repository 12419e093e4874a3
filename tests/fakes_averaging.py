"""A swarm's worth of exchanges in one process, whose peers die or are cut off in any phase. No clock, no network."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from averaging import merge
from averaging.exchange import Call, ClassWork, Contribution, Group, Reduced, UnitClass, Vote
from averaging.robust import combine
from peers.network import PeerId


class Crashed(Exception):
    """The peer's process is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """In `phase` what the peer sends reaches only `reached`; after that it is dead, unless it `survives`."""

    phase: Literal["gather", "reduce", "vote"]
    reached: frozenset[PeerId] = frozenset()
    survives: bool = False


@dataclass(slots=True)
class FakeSwarm:
    """What the peers of one round share. Each waits for what still can come, and for nothing else."""

    peers: tuple[PeerId, ...]
    faults: Mapping[PeerId, Fault] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    dead: set[PeerId] = field(default_factory=set)
    joined: dict[PeerId, Contribution] = field(default_factory=dict)
    group: Group | None = None
    parts: dict[tuple[bytes, PeerId], torch.Tensor | None] = field(default_factory=dict)
    votes: dict[tuple[bytes, PeerId], Vote] = field(default_factory=dict)

    def reaches(self, phase: str, sender: PeerId, receiver: PeerId) -> bool:
        fault = self.faults.get(sender)
        return sender == receiver or fault is None or fault.phase != phase or receiver in fault.reached

    async def pass_by(self, phase: str, peer: PeerId) -> None:
        """Tell the others that something changed, and die here if the plan says so."""
        fault = self.faults.get(peer)
        dies = fault is not None and fault.phase == phase and not fault.survives
        async with self.changed:
            if dies:
                self.dead.add(peer)
            self.changed.notify_all()
        if dies:
            raise Crashed(peer)

    async def wait_for(self, condition) -> None:
        async with self.changed:
            await self.changed.wait_for(condition)


class FakeExchange:
    """`averaging.exchange.Exchange` of one peer of a FakeSwarm."""

    def __init__(self, swarm: FakeSwarm, me: PeerId) -> None:
        self._swarm, self._me = swarm, me

    async def gather(self, mine: Contribution, call: Call) -> Group | None:
        swarm = self._swarm
        fault = swarm.faults.get(self._me)
        if fault is None or fault.phase != "gather":
            swarm.joined[self._me] = mine
        await swarm.pass_by("gather", self._me)
        if self._me not in swarm.joined:
            return None
        missing = {peer for peer, fault in swarm.faults.items() if fault.phase == "gather"}
        await swarm.wait_for(lambda: set(swarm.peers) <= swarm.joined.keys() | missing)
        if len(swarm.joined) < 2:
            return None
        names = sorted(swarm.joined)
        group_id = hashlib.sha256("".join(names).encode()).digest()
        return Group(group_id=group_id, contributions=tuple(swarm.joined[name] for name in names))

    async def reduce(self, group: Group, work: Sequence[ClassWork]) -> Mapping[bytes, Reduced]:
        swarm = self._swarm
        for entry in work:
            swarm.parts[entry.unit_class.class_id, self._me] = entry.vector
        await swarm.pass_by("reduce", self._me)
        results = {}
        for entry in work:
            unit_class = entry.unit_class
            keys = [(unit_class.class_id, holder) for holder in unit_class.holders]
            await swarm.wait_for(lambda keys=keys: all(key in swarm.parts or key[1] in swarm.dead for key in keys))
            lost = frozenset(
                holder
                for key, holder in keys
                if swarm.parts.get((key, holder)) is None or not swarm.reaches("reduce", holder, self._me)
            )
            if lost:
                results[unit_class.class_id] = Reduced(mean=None, reason=f"{sorted(lost)} lost", missing=lost)
            else:
                mean = combine("none", [swarm.parts[key] for key in keys], entry.segments)
                results[unit_class.class_id] = Reduced(mean=mean, digest=merge.digest([mean]))
        return results

    async def vote(
        self, group: Group, classes: Sequence[UnitClass], votes: Mapping[bytes, Vote], *, deadline: float
    ) -> Mapping[bytes, Mapping[PeerId, Vote]]:
        swarm = self._swarm
        for class_id, vote in votes.items():
            swarm.votes[class_id, self._me] = vote
        await swarm.pass_by("vote", self._me)
        heard = {}
        for entry in classes:
            keys = [(entry.class_id, holder) for holder in entry.holders]
            await swarm.wait_for(lambda keys=keys: all(key in swarm.votes or key[1] in swarm.dead for key in keys))
            heard[entry.class_id] = {
                holder: swarm.votes[key, holder]
                for key, holder in keys
                if (key, holder) in swarm.votes and swarm.reaches("vote", holder, self._me)
            }
        return heard
