"""Whether another peer can be dialled from here, for a peer that asks it about itself: one connection, one token read.

Nobody can use it to look for open ports elsewhere: only the address that the asker's own connection comes from is
dialled, nothing is written there, seldom, and a failure looks alike and comes at the same time whatever it was.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address

from peers.errors import NetworkFailed, Refused
from peers.network import PeerId
from peers.streams.messages import AskDial, Dialled, RefusalCode
from peers.streams.values import TOKEN_BYTES

logger = logging.getLogger(__name__)

DIAL_SECONDS = 4.0
AGAIN_SECONDS = 10.0  # between two dials to one address
_MOST_AT_ONCE = 4
_MOST_KNOWN = 1024


class DialBack:
    """`seen_at` gives the multiaddrs that a peer's connections to this one come from; `dial_seconds` bounds a dial."""

    def __init__(
        self,
        seen_at: Callable[[PeerId], Awaitable[Sequence[str]]],
        *,
        clock: Callable[[], float] = time.monotonic,
        dial_seconds: float = DIAL_SECONDS,
    ) -> None:
        self._seen_at, self._clock, self._dial_seconds = seen_at, clock, dial_seconds
        self._again_at: dict[str, float] = {}
        self._running = 0

    async def answer(self, peer: PeerId, ask: AskDial) -> Dialled:
        """Dial a peer where it is seen.

        Raises:
            Refused: it is seen nowhere that could be dialled, or was dialled just now, or too many others ask.
        """
        try:
            seen = await self._seen_at(peer)
        except NetworkFailed as error:
            raise Refused(str(error), RefusalCode.INTERNAL) from error
        address = next(filter(None, map(ip_of, seen)), None)
        if address is None:
            raise Refused("this host has no direct connection from you, so it knows no address to dial")
        self._admit(str(address))
        self._running += 1
        try:
            reached = await self._dial(str(address), ask)
        finally:
            self._running -= 1
        logger.info("dialled back peer=%s address=%s port=%d reached=%s", peer, address, ask.port, reached)
        return Dialled(address=str(address), reached=reached)

    def _admit(self, address: str) -> None:
        now = self._clock()
        self._again_at = {known: at for known, at in self._again_at.items() if at > now}
        if address in self._again_at:
            seconds = self._again_at[address] - now
            raise Refused(f"{address} was dialled just now; ask again in {seconds:.0f} s", RefusalCode.BUSY)
        if self._running >= _MOST_AT_ONCE or len(self._again_at) >= _MOST_KNOWN:
            raise Refused("this host dials others now; ask again in a minute", RefusalCode.BUSY)
        self._again_at[address] = now + AGAIN_SECONDS

    async def _dial(self, address: str, ask: AskDial) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._dial_seconds):
                if await _says(address, ask.port, ask.token):
                    return True
                await asyncio.Event().wait()  # refused at once, or silent: the asker is not to know
        return False


def ip_of(multiaddr: str) -> IPv4Address | IPv6Address | None:
    """The address in `/ip4/1.2.3.4/tcp/5` or its like; None for relayed connections, names, and what is no address."""
    parts = multiaddr.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6") or "p2p-circuit" in parts:
        return None
    try:
        return ip_address(parts[2])
    except ValueError:
        return None


async def _says(address: str, port: int, token: bytes) -> bool:
    """Whether somebody there says the token. Reads so many bytes at most, and writes none."""
    try:
        reader, writer = await asyncio.open_connection(address, port, limit=TOKEN_BYTES)
    except OSError:
        return False
    try:
        return hmac.compare_digest(await reader.readexactly(TOKEN_BYTES), token)
    except (OSError, asyncio.IncompleteReadError):
        return False
    finally:
        writer.close()
