"""A peer and a stranger that send nonsense: hosts live on and serve."""

from __future__ import annotations

import random
import socket
import struct
from contextlib import suppress

import pytest
from parts.chaos_swarm import SPANS, ChaosSwarm, run_in
from parts.tiny_model import WHOLE

from peers.errors import NetworkFailed
from peers.network import PeerId
from peers.records import PeerRecord
from peers.streams.fields import to_body
from peers.streams.messages import StreamKind
from peers.streams.wire import Frame, write_frame
from swarm.peer import Peer


def nonsense(dice: random.Random) -> list[bytes]:
    """Bytes that are no frames, in the ways in which a frame can be wrong."""
    return [
        dice.randbytes(1),
        dice.randbytes(4096),
        struct.pack(">I", 0xFFFFFFFF) + dice.randbytes(64),
        struct.pack(">I", 0),
        struct.pack(">I", 40) + dice.randbytes(40),
        struct.pack(">I", 4000) + b"\x93" * 4000,  # lists in lists
        struct.pack(">I", 100) + dice.randbytes(50),  # and no more
        b"\x00" * 100_000,
    ]


async def send_nonsense(peer: Peer, host: PeerId, kind: str, data: bytes, *, greet: bool) -> None:
    """One stream of one kind with `data`, after a proper hello or instead of one."""
    node = peer.node
    try:
        stream = await node.network.open_stream(host, kind)
    except NetworkFailed:
        return  # refused at the door, as it may be after much of this
    try:
        if greet:
            hello = node.hello()
            await write_frame(stream.writer, Frame(request=0, kind=hello.kind, body=to_body(hello)))
        stream.writer.write(data)
        await stream.writer.drain()
    except OSError:
        pass  # the host had enough before all was sent
    finally:
        stream.writer.close()


def test_nonsense_on_the_port_and_on_the_streams_costs_a_host_nothing(swarm: ChaosSwarm) -> None:
    swarm.ensure()
    dice = random.Random(5)
    mallory = swarm.enter("mallory")
    for name in SPANS:
        for kind in StreamKind:
            for data in nonsense(dice):
                run_in(mallory, send_nonsense(mallory, swarm.ids[name], kind, data, greet=dice.random() < 0.5))
        *_, ip, _, port, _, _ = swarm.hosts[name].join.peers[0].split("/")
        for data in nonsense(dice):
            with socket.create_connection((ip, int(port)), timeout=60) as raw, suppress(ConnectionError):
                raw.sendall(data)  # the host may have had enough before all was sent
    swarm.leave("mallory")
    story = swarm.train(swarm.enter("trainer"), 4)
    assert len(story.losses) == 4
    assert not story.repeated, "a host failed a call"
    assert set(swarm.alive) >= set(SPANS)


@pytest.mark.parametrize("kind", ["host", "progress"])
def test_forged_records_lead_nobody_anywhere(swarm: ChaosSwarm, kind: str) -> None:
    swarm.ensure(front=1, back=1)
    trainer = swarm.enter("trainer")
    real = set(swarm.ids.values())
    node = trainer.node
    victim = swarm.ids[swarm.alive[0]]
    key = f"swarmtune/{node.config.run}/{PeerRecord.kind if kind == 'host' else kind}/0"
    blobs = [b"", b"\x94" + b"x" * 40, random.Random(3).randbytes(300), b"\x94\xa4" + kind.encode()[:4] + b"\xc0" * 60]

    async def forge() -> None:
        for number, blob in enumerate(blobs):
            for subkey in (str(victim), f"Qm{number}"):
                await node.network.dht_node.store(key, blob, node.network.dht_time() + 60, subkey=subkey)
        await node.router.refresh()

    run_in(trainer, forge())
    assert {record.peer for record in node.router.records} <= real
    told = run_in(trainer, node.directory.find_progress(node.config.run, WHOLE))
    assert {record.peer for record in told} <= real
    assert len(swarm.train(trainer, 2).losses) == 2
