"""The stream on which peers of a private run show their memberships, and the gate that they pass by them.

It is open to strangers, reads nothing from them, and says two things, each after its length: this peer's own
membership, and the owner's list of those revoked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from peers.errors import BadMembership, NetworkFailed, NotAdmitted
from peers.hivemind_daemon import REFUSAL_SECONDS, Daemon, one_line, read_out
from peers.network import PeerId
from peers.owner_list import MAX_LIST_BYTES
from peers.private.gate import MEMBER, Gate, MemberConfig, Shown
from peers.private.membership import MAX_MEMBERSHIP_BYTES
from peers.streams.fields import to_body
from peers.streams.messages import Refusal, RefusalCode
from peers.streams.wire import Frame, write_frame

logger = logging.getLogger(__name__)

ASK_SECONDS = 5.0
_TELL_SECONDS = 2.0
_MAX_TOLD = 256  # strangers that are told at the same time
_SWEEP_SECONDS = 1.0


class Members:
    """The gate of a node, while it runs. Made by `start`, ended by `stop`."""

    def __init__(self, p2p: Daemon, config: MemberConfig, run: str, me: PeerId) -> None:
        """Raises BadMembership if this peer's own membership is not valid now."""
        self._p2p, self._protocol = p2p, f"swarmtune/{run}/{MEMBER}"
        self.gate = Gate(config, run=run, me=me, ask=self._ask, clock=time.time)
        self._told = 0
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """From now on nobody passes who is no member. Before anything else is served."""
        await self._p2p.serve_raw(self._protocol, self._tell, None)
        self._p2p.gate = self.gate
        self._sweeping = asyncio.create_task(self._sweep(), name="sweep of the gate")

    async def stop(self) -> None:
        """Ask nobody any more."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
        await self.gate.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self.gate.sweep()

    async def _tell(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._told < _MAX_TOLD:
                self._told += 1
                try:
                    async with asyncio.timeout(_TELL_SECONDS):
                        shown = self.gate.shown
                        for blob in (shown.membership, shown.revoked):
                            writer.write(len(blob).to_bytes(2, "big") + blob)
                        await writer.drain()
                finally:
                    self._told -= 1
        except (TimeoutError, OSError) as error:
            logger.debug("membership not taken peer=%s reason=%r", info.peer_id, error)
        finally:
            writer.close()

    async def _ask(self, peer: PeerId) -> Shown:
        """What `peer` shows.

        Raises:
            BadMembership: it does not serve this, or what it shows cannot be one.
            NetworkFailed: it cannot be reached, or says nothing in time.
        """
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(ASK_SECONDS):
                reader, writer = await self._p2p.open_to_anybody(peer, self._protocol)
                membership = await _read(reader, MAX_MEMBERSHIP_BYTES)
                return Shown(membership, await _read(reader, MAX_LIST_BYTES))
        except TimeoutError as error:
            raise NetworkFailed(f"no answer in {ASK_SECONDS:.0f} s") from error
        except (P2PDaemonError, OSError, asyncio.IncompleteReadError, ValueError) as error:
            if "protocols not supported" in str(error):
                raise BadMembership(
                    "it has no membership; send its id (`swarm id`) to the run's owner and join by the invitation"
                ) from error
            raise NetworkFailed(one_line(error)) from error
        finally:
            if writer is not None:
                writer.close()


async def _read(reader: asyncio.StreamReader, most: int) -> bytes:
    size = int.from_bytes(await reader.readexactly(2), "big")
    if size > most:
        raise BadMembership(f"it shows {size} bytes where at most {most} are read")
    return await reader.readexactly(size)


async def refuse(error: NotAdmitted, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The end of one of our own streams for a peer that is not let in: it gets the reason in place of a hello."""
    message = Refusal(code=RefusalCode.MEMBER, reason=str(error))
    try:
        async with asyncio.timeout(REFUSAL_SECONDS):
            await write_frame(writer, Frame(request=0, kind=message.kind, body=to_body(message)))
            await read_out(reader)
    except (TimeoutError, OSError, NetworkFailed) as gone:
        logger.debug("a refusal was not taken reason=%r", gone)
    finally:
        writer.close()
