"""Asks peers at known addresses for the run of their group, by a nameless p2pd that lives for the question."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from peers.hivemind_daemon import Daemon, DaemonOptions

MOST_ANSWER_BYTES = 256


def group_protocol(group: str) -> str:
    """The stream on which peers of a group tell their run, to strangers, too."""
    return f"swarmtune/group/{group}"


async def ask_group(group: str, addresses: Sequence[str], *, seconds: float) -> dict[str, bytes]:
    """What the peers at `addresses` (multiaddrs ending in /p2p/PEER) answer within `seconds`; who does not is left out.

    Raises:
        NetworkFailed: p2pd does not start.
    """
    daemon = await Daemon.launch(DaemonOptions(listen=(), dht_client=True))
    try:
        found = await asyncio.gather(*(_ask(daemon, group, address, seconds) for address in addresses))
    finally:
        await daemon.shutdown()
    return {address: answer for address, answer in zip(addresses, found, strict=True) if answer is not None}


async def _ask(daemon: Daemon, group: str, address: str, seconds: float) -> bytes | None:
    where, _, who = address.rpartition("/p2p/")
    try:
        async with asyncio.timeout(seconds):
            await daemon.connect(who, (where,))
            reader, writer = await daemon.open_raw(who, group_protocol(group))
            try:
                answer = b""
                while len(answer) <= MOST_ANSWER_BYTES and (piece := await reader.read(MOST_ANSWER_BYTES + 1)):
                    answer += piece
                return answer if len(answer) <= MOST_ANSWER_BYTES else None
            finally:
                writer.close()
    except (P2PDaemonError, OSError, asyncio.IncompleteReadError, ValueError):  # a timeout is an OSError
        return None
