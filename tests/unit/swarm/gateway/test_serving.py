"""What `swarm serve` refuses before it enters a swarm: one line each."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.commands import GATEWAY_PACKAGES, run_serve
from swarm.errors import BadConfig, SwarmError
from swarm.gateway.serve import gateway_config, listen
from swarm.join_string import Join
from swarm.options import Screen, ServeOptions
from swarm.run import RunId

ADDRESS = "/ip4/127.0.0.1/tcp/31330/p2p/12D3KooWEhjTZkKK4DN2rbq2zMkLKrxjYPGGfXhQJ8KmWPzXHtXb"


def options(tmp_path: Path, *, keys: Path | None = None, port: int = 0) -> ServeOptions:
    join = Join(run_id=RunId("ab" * 16), run_name="tales", peers=(ADDRESS,))
    return ServeOptions(target=join, state_root=tmp_path, cache_dir=tmp_path, keys=keys, port=port)


@pytest.mark.parametrize("package", GATEWAY_PACKAGES)
def test_a_missing_package_is_told_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in list(sys.modules):
        if name.startswith("swarm.gateway") or name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadConfig, match=r"pip install 'swarmtune\[gateway\]'"):
        run_serve(options(tmp_path), Silent())


def test_bad_keys_are_refused_first(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text("[ann]")
    with pytest.raises(BadConfig, match="the key of 'ann'"):
        run_serve(options(tmp_path, keys=keys), Silent())


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SwarmError, match=f"cannot listen on 127.0.0.1 port {port}"):
            run_serve(options(tmp_path, port=port), Silent())
    with pytest.raises(SwarmError, match="--host"):
        listen("no.such.host.invalid", 0)


def test_who_listens_for_others_may_be_asked_by_this_machines_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Box.lab.example")

    def names(host: str, *allowed: str) -> frozenset[str]:
        return gateway_config(replace(options(tmp_path), host=host, allow_hosts=allowed)).door.names

    for host in ("127.0.0.1", "::1", "localhost"):
        assert names(host) == {"localhost"}
    assert names("127.0.0.1", "Chat.Example.org.") == {"localhost", "chat.example.org"}
    own = {"box.lab.example", "box", "box.local"}
    assert own <= names("0.0.0.0")
    assert own | {"gate.lab"} <= names("gate.lab")


class Silent(Screen):
    def now(self, line: str) -> None:
        pass
