"""What `swarm serve` refuses before it enters a swarm: one line each."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from swarm.commands import GATEWAY_PACKAGES, run_serve
from swarm.errors import BadConfig, SwarmError
from swarm.gateway.serve import listen
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


class Silent(Screen):
    def now(self, line: str) -> None:
        pass
