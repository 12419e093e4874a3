from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers.config import NetworkConfig
from peers.errors import BadIdentity, BadNetworkConfig, NetworkFailed
from peers.hivemind_network import HivemindNetwork
from peers.identity import load_or_create
from tests.errors_page import met
from tests.integration.peers.conftest import LOOPBACK, Start
from tests.integration.peers.echo_peer import echo


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the directories of this test's daemons are made; the path is short, as a socket's has to be.

    pytest's own directories are made before, or they would lie in it.
    """
    with tempfile.TemporaryDirectory() as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


async def test_a_taken_port_is_named_and_nothing_is_left_behind(sockets: Path, start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NetworkFailed, match=f"port {port} on 127.0.0.1 cannot be used") as caught:
            await start("ann", port=port)
        met("choose another --port (0 takes any)", caught.value)
    ann = await start("ann", port=port)  # the identity is free again, and the port as well
    assert f"/tcp/{port}/" in (await ann.addresses())[0]
    assert os.listdir(sockets)
    await ann.stop()
    assert not os.listdir(sockets)


async def test_a_port_of_another_peer_is_refused_although_libp2p_would_share_it(start: Start) -> None:
    ann = await start("ann")
    port = int((await ann.addresses())[0].split("/")[4])
    with pytest.raises(NetworkFailed, match=f"port {port}"):
        await start("bob", port=port)


async def test_an_address_that_is_not_of_this_machine_is_a_clear_error(start: Start) -> None:
    with pytest.raises(NetworkFailed) as caught:
        await start("ann", host="192.0.2.1")
    met("is no address of this machine", caught.value)


async def test_what_p2pd_says_against_its_start_is_told_without_its_clock(start: Start) -> None:
    with pytest.raises(NetworkFailed, match=r"^p2pd did not start: [^0-9]") as caught:
        await start("ann", announce=("/nonsense/1",))
    met("p2pd did not start", caught.value)


async def test_p2pd_is_of_its_peers_session_which_linux_schedules_as_one_and_not_hit_by_ctrl_c(start: Start) -> None:
    ann = await start("ann")
    assert os.getsid(ann.p2p.pid) == os.getsid(0)
    assert os.getpgid(ann.p2p.pid) == ann.p2p.pid != os.getpgid(0)


async def test_an_identity_in_use_on_this_machine_is_refused(start: Start) -> None:
    ann = await start("ann")
    with pytest.raises(
        BadIdentity, match=f"in use by process {os.getpid()}; stop it or give this peer another --state"
    ):
        await start("ann", ann)


async def test_an_identity_in_use_elsewhere_in_the_swarm_is_refused(start: Start, tmp_path: Path) -> None:
    ann = await start("ann")
    bob = await start("bob", ann)
    shutil.copy(tmp_path / "bob.id", tmp_path / "copy.id")
    with pytest.raises(BadIdentity) as caught:
        await start("copy", ann)
    met("is in use by another peer of this swarm", caught.value)
    await bob.stop()
    again = await start("copy", ann)
    assert again.peer_id == bob.peer_id


async def test_bootstrap_peers_that_do_not_answer_are_named(start: Start) -> None:
    nobody = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/Qm{'a' * 44}"
    began = time.monotonic()
    with pytest.raises(NetworkFailed, match="no bootstrap peer answered in 1 s") as caught:
        await start("ann", bootstrap=(nobody,), start_seconds=1)
    met("no bootstrap peer answered", caught.value)
    assert nobody in str(caught.value)
    assert time.monotonic() - began < 15


async def test_a_peer_under_another_identity_than_promised_does_not_count(start: Start) -> None:
    ann = await start("ann")
    wrong = (await ann.addresses())[0].replace(ann.peer_id, "Qm" + "a" * 44)
    with pytest.raises(NetworkFailed, match="no bootstrap peer answered"):
        await start("bob", bootstrap=(wrong,), start_seconds=1)


async def test_peers_that_start_at_the_same_moment_and_name_each_other_find_each_other(
    start: Start, tmp_path: Path
) -> None:
    ids = {name: load_or_create(tmp_path / f"{name}.id").peer for name in ("ann", "bob")}
    ports = {"ann": free_port(), "bob": free_port()}
    where = {name: f"/ip4/127.0.0.1/tcp/{ports[name]}/p2p/{ids[name]}" for name in ids}
    ann, bob = await asyncio.gather(
        start("ann", port=ports["ann"], bootstrap=(where["bob"],)),
        start("bob", port=ports["bob"], bootstrap=(where["ann"],)),
    )
    await ann.serve_stream("echo", echo)
    stream = await bob.open_stream(ann.peer_id, "echo")
    stream.writer.write(b"\0\0\0\1x")
    async with asyncio.timeout(20):
        assert await stream.reader.readexactly(5) == b"\0\0\0\1x"


async def test_a_peer_may_name_itself_among_its_bootstrap_peers(start: Start, tmp_path: Path) -> None:
    port, peer = free_port(), load_or_create(tmp_path / "ann.id").peer
    ann = await start("ann", port=port, bootstrap=(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}",))
    assert ann.peer_id == peer


async def test_a_restarted_peer_whose_bootstrap_peer_is_gone_finds_the_others(start: Start, tmp_path: Path) -> None:
    ann = await start("ann")
    bob = await start("bob", ann)
    book = tmp_path / "peers.json"
    eve = await start("eve", ann, address_book=book)
    await eve.remember([*await bob.addresses(), *await eve.addresses()])
    gone = await ann.addresses()
    await asyncio.gather(ann.stop(), eve.stop())
    await bob.serve_stream("echo", echo)
    eve = await start("eve", bootstrap=gone, address_book=book)
    stream = await eve.open_stream(bob.peer_id, "echo")
    stream.writer.write(b"\0\0\0\1x")
    async with asyncio.timeout(20):
        assert await stream.reader.readexactly(5) == b"\0\0\0\1x"


async def test_old_addresses_alone_do_not_keep_a_first_peer_from_starting(start: Start, tmp_path: Path) -> None:
    book = tmp_path / "peers.json"
    book.write_text(f'["/ip4/127.0.0.1/tcp/{free_port()}/p2p/Qm{"a" * 44}"]')
    ann = await start("ann", address_book=book)
    assert len(await ann.addresses()) == 1


async def test_a_run_with_an_odd_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NetworkFailed, match="cannot name"):
        await HivemindNetwork.start(LOOPBACK, run="a/b", identity_path=tmp_path / "id")


@pytest.mark.parametrize(
    "setting",
    [
        {"port": 70000},
        {"host": "example.org"},
        {"bootstrap": ("/ip4/1.2.3.4/tcp/1",)},
        {"bootstrap": ("1.2.3.4:80",)},
        {"announce": ("x" * 300,)},
        {"start_seconds": 0.0},
        {"max_streams": 0},
    ],
)
def test_a_setting_that_cannot_work_is_named(setting: dict[str, object]) -> None:
    with pytest.raises(BadNetworkConfig, match=f"network.{next(iter(setting))}"):
        NetworkConfig(**setting)  # type: ignore[arg-type]
