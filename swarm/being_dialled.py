"""Whether others can dial this machine: peers of the run are asked to try, where they see it and on its own port."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING

from peers.dialling_back import DIAL_SECONDS
from peers.errors import PeerLost, Refused
from peers.network import PeerId
from peers.streams.messages import AskDial, Dialled, RefusalCode, StreamKind
from peers.streams.values import TOKEN_BYTES

if TYPE_CHECKING:
    from peers.streams.pool import Pool

MOST_ASKED = 3
_ANSWER_SECONDS = DIAL_SECONDS + 6.0
_PORT = re.compile(r"/tcp/(\d{1,5})(/|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Door:
    """What others would dial: where a peer listens here, and the port that it announces (0: the one it listens on)."""

    host: str
    port: int
    announced_port: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """What one peer said. `address` is where it sees this machine; None: it did not try, and `why` says why."""

    peer: PeerId
    port: int
    address: str | None = None
    reached: bool = False
    why: str = ""

    @property
    def is_far(self) -> bool:
        """Whether that peer sees this machine at an address of the internet."""
        return self.address is not None and ip_address(self.address).is_global

    @property
    def is_here(self) -> bool:
        """Whether that peer is on this very machine."""
        return self.address is not None and ip_address(self.address).is_loopback


def port_of(announce: Sequence[str]) -> int:
    """The TCP port in the first multiaddr that has one; 0 where none has."""
    found = next(filter(None, map(_PORT.search, announce)), None)
    return 0 if found is None else int(found[1])


async def ask_to_dial(pool: Pool, peers: Sequence[PeerId], door: Door) -> list[Attempt]:
    """Listen as a peer would, and have the first MOST_ASKED of `peers` try, all at once.

    Raises:
        OSError: nothing can listen there.
    """
    token = secrets.token_bytes(TOKEN_BYTES)

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # who had connected is gone
            writer.write(token)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(tell, door.host, door.port) as server:
        port = door.announced_port or server.sockets[0].getsockname()[1]
        asked = AskDial(port=port, token=token)
        return await asyncio.gather(*(_ask(pool, peer, asked) for peer in peers[:MOST_ASKED]))


async def _ask(pool: Pool, peer: PeerId, asked: AskDial) -> Attempt:
    try:
        answer = await pool.call(peer, StreamKind.INFO, asked, seconds=_ANSWER_SECONDS)
    except (PeerLost, Refused) as error:
        is_old = isinstance(error, Refused) and error.code == RefusalCode.MALFORMED
        return Attempt(peer=peer, port=asked.port, why="its version cannot do this" if is_old else _shown(str(error)))
    if not isinstance(answer.message, Dialled):
        return Attempt(peer=peer, port=asked.port, why=f"it answered with a '{answer.message.kind}'")
    return Attempt(peer=peer, port=asked.port, address=answer.message.address, reached=answer.message.reached)


def _shown(words: str) -> str:
    """What another peer said, for a terminal."""
    return "".join(char for char in words[:300] if char.isprintable())
