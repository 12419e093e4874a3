"""A peer in a process of its own that answers each length-prefixed message with itself; prints where it is."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from peers.config import NetworkConfig
from peers.hivemind_network import HivemindNetwork
from peers.network import ByteStream


async def echo(stream: ByteStream) -> None:
    while True:
        header = await stream.reader.readexactly(4)
        stream.writer.write(header + await stream.reader.readexactly(int.from_bytes(header, "big")))
        await stream.writer.drain()


async def main(run: str, identity_path: Path) -> None:
    network = await HivemindNetwork.start(NetworkConfig(host="127.0.0.1"), run=run, identity_path=identity_path)
    await network.serve_stream("echo", echo)
    where = {"peer": network.peer_id, "addresses": await network.addresses(), "p2pd": network.p2p.pid}
    sys.stdout.write(json.dumps(where) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await network.stop()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
