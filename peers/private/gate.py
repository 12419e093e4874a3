"""The gate of a private run: asks whoever calls, or is to be called, for its membership, once; remembers the answer.

One place for every protocol, by transport identity. A peer that is not known is asked over a stream of its own, the
only one that is open to strangers; so nothing has to travel with any other call. No hivemind here.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from peers.errors import BadMembership, BadRecord, NetworkFailed, NotAdmitted
from peers.network import PeerId
from peers.private.membership import Membership, Role, open_membership
from peers.private.revocation import Revocations, open_revocations
from peers.streams.messages import StreamKind

logger = logging.getLogger(__name__)

T = TypeVar("T")

MEMBER = "member"  # the stream on which a peer gives its membership
_MAX_KNOWN = 4096
_MAX_ASKED = 64  # strangers that are asked at the same time
_FIRST_REFUSAL_SECONDS, _LONGEST_REFUSAL_SECONDS = 0.5, 10.0  # so long a refused peer is not asked again
_AGAIN_SECONDS = 5.0  # a member that wants more than it may have had a new invitation meanwhile

_BY_CALLER = {
    "DHTProtocol.rpc_ping": Role.CLIENT,
    "DHTProtocol.rpc_find": Role.CLIENT,
    "DHTProtocol.rpc_store": Role.TRAINER,
    StreamKind.INFO: Role.CLIENT,
    StreamKind.DECODE: Role.CLIENT,
    StreamKind.UNITS: Role.CLIENT,
    StreamKind.TRAIN: Role.TRAINER,
}
_BY_RECORD = {
    "peer": Role.HOST,
    "progress": Role.HOST,
    "trainer": Role.TRAINER,
    "evaluation": Role.TRAINER,
    "run": Role.TRAINER,
    "revoked": Role.TRAINER,
    "published": Role.HOST,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberConfig:
    """What a peer of a private run starts with: the owner's public key (32 bytes), its own membership, and the list of
    those revoked as this peer last knew it.
    """

    owner: bytes
    membership: bytes
    revoked: Revocations


@dataclass(frozen=True, slots=True)
class Shown:
    """What a peer answers on the `member` stream: its membership, and the newest list of those revoked (or nothing), so
    that who is refused by it learns why from the owner's own word. Both are unchecked bytes.
    """

    membership: bytes
    revoked: bytes


@dataclass(frozen=True, slots=True)
class _Stranger:
    """Why a peer is refused, and until when it is not asked again. `answered`: it was reached."""

    reason: str
    at: float
    seconds: float
    answered: bool


@dataclass(frozen=True, slots=True)
class _Member:
    """What a peer showed, and when."""

    membership: Membership
    at: float


class Gate:
    """Lets members of one run pass. `ask` fetches a peer's membership; `clock` is unix seconds."""

    def __init__(
        self,
        config: MemberConfig,
        *,
        run: str,
        me: PeerId,
        ask: Callable[[PeerId], Awaitable[Shown]],
        clock: Callable[[], float],
    ) -> None:
        """Raises BadMembership if this peer's own membership is not valid now."""
        self._owner, self._run, self._ask, self._clock = config.owner, run, ask, clock
        # Apart, so that any number of strangers pushes out no member.
        self._members: OrderedDict[PeerId, _Member] = OrderedDict()
        self._strangers: OrderedDict[PeerId, _Stranger] = OrderedDict()
        self._asking: dict[PeerId, asyncio.Task[None]] = {}
        self._streams: dict[PeerId, weakref.WeakSet[asyncio.StreamWriter]] = {}
        self._revoked = config.revoked
        self._refused_at = 0.0
        self._membership = config.membership
        self.own = open_membership(config.membership, owner=config.owner, run=run, peer=me)
        self.check_own()

    @property
    def shown(self) -> Shown:
        """What this peer answers on the `member` stream."""
        return Shown(self._membership, self._revoked.blob)

    @property
    def revoked(self) -> Revocations:
        """The newest list that this peer knows."""
        return self._revoked

    def check_own(self) -> None:
        """Whether this peer itself still belongs here.

        Raises:
            BadMembership: its time is over, or the owner revoked it.
        """
        if reason := self._refusal(self.own):
            raise BadMembership(f"this peer ({self.own.peer}) is not let into the private run: {reason}")

    async def let_in(self, peer: PeerId, protocol: str) -> None:
        """Whether `peer` may call `protocol` here.

        Raises:
            NotAdmitted: no; the reason is for the peer, too.
        """
        await self._check(peer, role_of_caller(protocol), f"call {_short(protocol)}")

    async def let_out(self, peer: PeerId, protocol: str) -> None:
        """Whether this peer may call `protocol` at `peer`: only hosts are told anything, `info` apart.

        Raises:
            NotAdmitted: no.
        """
        needed = Role.CLIENT if _short(protocol) == StreamKind.INFO else Role.HOST
        await self._check(peer, needed, f"serve {_short(protocol)}")

    def role(self, peer: PeerId) -> Role | None:
        """What `peer` may do, if it is known as a member now."""
        if peer == self.own.peer:
            return self.own.role
        member = self._members.get(peer)
        return None if member is None or self._refusal(member.membership) else member.membership.role

    def refused_by(self, peer: PeerId) -> None:
        """A peer does not let this one in: see soon whether it knows a newer list."""
        now = self._clock()
        if not 0 <= now - self._refused_at < _AGAIN_SECONDS and len(self._asking) < _MAX_ASKED:
            self._refused_at = now
            self._begin_asking(peer)

    def may_publish(self, peer: str, kind: str) -> bool:
        """Whether a record of `kind` by `peer` is believed. One who never answered is: who calls it asks it first."""
        who, needed = PeerId(peer), _BY_RECORD.get(kind, Role.HOST)
        if who in self._members and self._must_ask(who, needed) and len(self._asking) < _MAX_ASKED:
            self._begin_asking(who)  # it may have a new invitation, and call nothing that needs it
        if (role := self.role(who)) is not None:
            return role.covers(needed)
        stranger = self._strangers.get(who)
        is_refused = who in self._members or (stranger is not None and stranger.answered)
        return not is_refused and self._revoked.revoked_at(who) < 0

    def track(self, peer: PeerId, writer: asyncio.StreamWriter) -> None:
        """End this stream when `peer` stops being a member."""
        self._streams.setdefault(peer, weakref.WeakSet()).add(writer)

    def revoke(self, revoked: Revocations) -> bool:
        """Take a newer list, and end the streams of those on it. False, and nothing done, for one that is not newer."""
        if revoked.number <= self._revoked.number:
            return False
        logger.info("list of those revoked taken number=%d", revoked.number)
        self._revoked = revoked
        self.sweep()
        return True

    def sweep(self) -> None:
        """End the streams of peers that are no members any more: expired, or revoked."""
        for peer in list(self._streams):
            if self.role(peer) is None:
                ended = list(self._streams.pop(peer))
                logger.warning("streams of a peer that is no member ended peer=%s streams=%d", peer, len(ended))
                for writer in ended:
                    writer.transport.abort()
            elif not self._streams[peer]:
                del self._streams[peer]

    async def close(self) -> None:
        """Ask nobody any more."""
        asking = list(self._asking.values())
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    async def _check(self, peer: PeerId, needed: Role, what: str) -> None:
        if peer == self.own.peer:
            return
        if self._must_ask(peer, needed):
            await self._asked(peer)
        member = self._members.get(peer)
        if member is None:
            stranger = self._strangers.get(peer)
            reason = "it was not asked" if stranger is None else stranger.reason
            passing = stranger is None or not stranger.answered
            raise NotAdmitted(f"peer {peer} is not let into this private run: {reason}", passing=passing)
        self._members.move_to_end(peer)
        if reason := self._refusal(member.membership):
            raise NotAdmitted(f"peer {peer} is not let into this private run: {reason}")
        if not (role := member.membership.role).covers(needed):
            raise NotAdmitted(
                f"peer {peer} may not {what} in this private run: it was invited as {role}, this needs {needed};"
                f" ask the run's owner for an invitation with --role {needed}"
            )

    def _must_ask(self, peer: PeerId, needed: Role) -> bool:
        """Whether nothing is known of a peer, or what is known may have changed."""
        now = self._clock()
        if (member := self._members.get(peer)) is not None:
            is_fine = not self._refusal(member.membership) and member.membership.role.covers(needed)
            return not is_fine and not 0 <= now - member.at < _AGAIN_SECONDS
        stranger = self._strangers.get(peer)
        return stranger is None or not 0 <= now - stranger.at < stranger.seconds

    def _refusal(self, membership: Membership) -> str:
        try:
            membership.check_time(self._clock())
        except BadMembership as error:
            return str(error)
        return self._revoked.reason(membership)

    async def _asked(self, peer: PeerId) -> None:
        """Ask once for all who want to know. Whoever waits may give up; the answer is kept all the same."""
        task = self._asking.get(peer)
        if task is None:
            if len(self._asking) >= _MAX_ASKED:
                raise NotAdmitted("too many peers are asked for their memberships now; try again", passing=True)
            task = self._begin_asking(peer)
        await asyncio.shield(task)

    def _begin_asking(self, peer: PeerId) -> asyncio.Task[None]:
        task = self._asking.get(peer)
        if task is None:
            task = self._asking[peer] = asyncio.create_task(self._learn(peer), name=f"membership of {peer}")
            task.add_done_callback(lambda _: self._asking.pop(peer, None))
        return task

    async def _learn(self, peer: PeerId) -> None:
        """Ask a peer, and keep what it is."""
        answered = True
        try:
            shown = await self._ask(peer)
            self._take(shown.revoked)
            membership = open_membership(shown.membership, owner=self._owner, run=self._run, peer=peer)
            reason = self._refusal(membership)
        except BadMembership as error:
            reason = str(error)
        except NetworkFailed as error:
            if self.role(peer) is not None:
                _keep(self._members, peer, replace(self._members[peer], at=self._clock()))
                return
            reason, answered = f"it cannot be asked for its membership ({error})", False
        if not reason:
            self._strangers.pop(peer, None)
            _keep(self._members, peer, _Member(membership, self._clock()))
            return
        logger.info("not a member peer=%s reason=%s", peer, reason)
        before = self._strangers.get(peer)
        seconds = _FIRST_REFUSAL_SECONDS if before is None else min(2 * before.seconds, _LONGEST_REFUSAL_SECONDS)
        self._members.pop(peer, None)
        _keep(self._strangers, peer, _Stranger(reason, self._clock(), seconds, answered))

    def _take(self, blob: bytes) -> None:
        if blob and blob != self._revoked.blob:
            try:
                self.revoke(open_revocations(blob, owner=self._owner, run=self._run))
            except BadRecord as error:
                logger.info("a peer shows a list of those revoked that is none reason=%s", error)


def role_of_caller(protocol: str) -> Role:
    """The least role with which a peer may call `protocol`: hosts alone, where nothing else is said."""
    return _BY_CALLER.get(_short(protocol), Role.HOST)


def _short(protocol: str) -> str:
    """`swarmtune/RUN/train` is `train`, `RUN::AveragingServicer.rpc_vote` is `AveragingServicer.rpc_vote`."""
    return protocol.rpartition("/")[2].rpartition("::")[2]


def _keep(known: OrderedDict[PeerId, T], peer: PeerId, what: T) -> None:
    known[peer] = what
    known.move_to_end(peer)
    while len(known) > _MAX_KNOWN:
        known.popitem(last=False)
