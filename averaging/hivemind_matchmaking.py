"""One matchmaking for a whole run, on hivemind's own, without a process of its own.

All who take part begin at one agreed moment and declare one expiration, so that hivemind's order of leaders (earliest
expiration, then peer id) is the same for everybody: the lowest peer id leads, and the group closes as soon as all who
are expected have joined.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import dataclass
from typing import Any

from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.matchmaking import Matchmaking, MatchmakingException
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError
from hivemind.utils.timed_storage import get_dht_time

from averaging.config import MAX_GROUP_PEERS, AveragingConfig
from averaging.exchange import Call
from averaging.hivemind_servicer import AveragingServicer

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1  # hivemind asks the DHT without a pause; on a busy machine that starves the joins themselves
_GRACE_SECONDS = 1.0  # for the leader to send its followers away before the wait is cut


class _Facade:
    """The part of hivemind's `DHT` that matchmaking uses, over a `DHTNode` on this loop."""

    num_workers = 4
    client_mode = False

    def __init__(self, node: DHTNode) -> None:
        self._node = node
        self.peer_id = node.peer_id
        self._next_get = 0.0

    def store(self, *args: Any, return_future: bool = True, **kwargs: Any) -> asyncio.Future[Any]:
        stored: asyncio.Future[Any] = asyncio.ensure_future(self._node.store(*args, **kwargs))
        return stored

    def get(self, key: Any, latest: bool = False, return_future: bool = True) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._get(key, latest))

    async def _get(self, key: Any, latest: bool) -> Any:
        loop = asyncio.get_running_loop()
        delay = self._next_get - loop.time()
        self._next_get = max(loop.time(), self._next_get) + _POLL_SECONDS
        if delay > 0:
            await asyncio.sleep(delay)
        return await self._node.get(key, latest=latest)


@dataclass(frozen=True, slots=True)
class _Step:
    """What matchmaking needs of hivemind's `StepControl`, which only works in a process that forked.

    hivemind declares the later of `scheduled_time` and now plus its `min_matchmaking_time`. No wait takes more than
    `longest` seconds, though the clock were set back by hours meanwhile.
    """

    scheduled_time: float
    deadline: float
    data_for_gather: bytes
    longest: float

    def get_timeout(self) -> float:
        return max(0.0, min(self.longest, self.deadline - float(get_dht_time())))


@dataclass(frozen=True, kw_only=True, slots=True)
class Joining:
    """One peer's wish to meet others: when and whom, and its signed bytes."""

    call: Call
    data: bytes
    client_mode: bool = False


async def find_group(
    p2p: P2P, node: DHTNode, servicer: AveragingServicer, run: str, config: AveragingConfig, joining: Joining
) -> GroupInfo | None:
    """Find the others who begin at `call.begin_at`; None when too few came before `call.deadline`.

    Each round has a `Matchmaking` of its own, so that nothing is left over from one that went wrong; the key in the
    DHT is the run's (and the group's own, where there are several), so that a peer that is behind meets the others and
    learns of it.
    """
    call = joining.call
    matchmaking = Matchmaking(
        p2p,
        hashlib.sha256(run.encode()).digest(),
        _Facade(node),
        servicer_type=AveragingServicer,
        prefix=run,
        initial_group_bits=call.label,
        target_group_size=None,  # set below: the key manager warns of sizes that are no power of two, which we ignore
        min_group_size=config.min_peers,
        min_matchmaking_time=call.window / 2,  # less, so that all declare the same moment: see `_Step`
        request_timeout=min(config.request_seconds, call.window / 2.5),
        client_mode=joining.client_mode,
    )
    matchmaking.target_group_size = min(call.expected, MAX_GROUP_PEERS)
    matchmaking.potential_leaders.target_group_size = matchmaking.target_group_size
    await asyncio.sleep(max(0.0, call.begin_at - get_dht_time()))
    step = _Step(call.begin_at + call.window, call.deadline, joining.data, call.deadline - call.begin_at)
    servicer.matchmaking = matchmaking
    try:
        async with asyncio.timeout(step.get_timeout() + _GRACE_SECONDS):
            return await matchmaking.look_for_group(step)
    except (TimeoutError, AssertionError, ValueError, MatchmakingException) as error:
        # hivemind asserts on what a leader sends: a bad leader costs this round, not this peer
        logger.warning("matchmaking ended run=%s reason=%s", run, str(error) or type(error).__name__)
        return None
    except (P2PDaemonError, P2PHandlerError, OSError, EOFError) as error:
        logger.warning("matchmaking failed run=%s reason=%s", run, error)
        return None
    finally:
        servicer.matchmaking = None
        _wake_all(matchmaking)


def _wake_all(matchmaking: Matchmaking) -> None:
    """hivemind waits for events in tasks that it never ends; once all events are set, these tasks end by themselves."""
    leaders = matchmaking.potential_leaders
    for event in (
        matchmaking.was_accepted_to_group,
        leaders.running,
        leaders.update_triggered,
        leaders.update_finished,
        leaders.declared_expiration,
    ):
        event.set()
