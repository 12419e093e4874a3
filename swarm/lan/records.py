"""What peers of a local network say of themselves by mDNS, and which run they mean: pure rules.

Everybody on the network can say anything, so all of it is parsed or left out, and two runs of one name are not mixed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swarm.errors import BadJoinString, SwarmError
from swarm.join_string import MAX_BOOTSTRAP, Join, check_address, parse_join
from swarm.run import RunId

SERVICE = "_swarmtune._tcp.local."
MOST_ADDRESSES = 4  # of one peer
MOST_PEERS = 64  # of those that answer; more are not looked at
_MOST_ADDRESS_CHARS = 200  # an mDNS text has 255 with its key
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_IP4 = re.compile(r"/ip4/[0-9.]{7,15}/tcp/[0-9]{1,5}/p2p/")  # what mDNS carries beside it, too
_RUN = re.compile(r"[0-9a-f]{32}")


class BadLan(SwarmError):
    """The name of a group on the local network, or what was found under it, cannot be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanPeer:
    """One peer on the local network: its group, its run, and multiaddrs that end in its id."""

    group: str
    run: RunId
    run_name: str
    addresses: tuple[str, ...]

    def to_texts(self) -> dict[str, str]:
        """As mDNS texts, each under 255 bytes."""
        addresses = {f"a{number}": address for number, address in enumerate(self.addresses[:MOST_ADDRESSES])}
        return {"v": "1", "group": self.group, "run": self.run, "name": self.run_name, **addresses}


def check_group(name: str) -> str:
    """`name` itself, if it can name a group.

    Raises:
        BadLan: it cannot.
    """
    if _GROUP.fullmatch(name) is None:
        raise BadLan(f"{name!r:.80} cannot name a group on a network; use 1 to 40 letters, digits, '.', '_', '-'")
    return name


def parse_texts(texts: Mapping[bytes, bytes | None]) -> LanPeer:
    """What `to_texts` made, from whoever.

    Raises:
        BadLan: it is something else.
    """
    if len(texts) > 16 or sum(len(key) + len(value or b"") for key, value in texts.items()) > 4096:
        raise BadLan("an mDNS record is far too long")
    try:
        plain = {key.decode("ascii"): (value or b"").decode("ascii") for key, value in texts.items()}
    except UnicodeDecodeError:
        raise BadLan("an mDNS record is not plain text") from None
    if plain.get("v") != "1":
        raise BadLan(f"an mDNS record has version {plain.get('v', 'none')!r:.20}, this swarmtune reads 1")
    if _RUN.fullmatch(plain.get("run", "")) is None:
        raise BadLan("an mDNS record names no run")
    addresses = tuple(plain[key] for key in sorted(plain) if re.fullmatch(r"a\d", key))[:MOST_ADDRESSES]
    try:
        join = Join(run_id=RunId(plain["run"]), run_name=plain.get("name", ""), peers=addresses)
    except BadJoinString as error:
        raise BadLan(f"an mDNS record cannot be used: {error}") from None
    return LanPeer(
        group=check_group(plain.get("group", "")), run=join.run_id, run_name=join.run_name, addresses=join.peers
    )


def format_answer(run: RunId, run_name: str) -> bytes:
    """What a peer says to whoever asks it for its group's run: the same as by mDNS, where that is blocked."""
    return f"{run} {run_name}".encode()


def parse_answer(group: str, answer: bytes, address: str) -> LanPeer:
    """What the peer at `address` said.

    Raises:
        BadLan: it is something else.
    """
    run, _, name = answer.decode("ascii", "replace").partition(" ")
    try:
        join = Join(run_id=RunId(run), run_name=name, peers=(address,))
    except BadJoinString as error:
        raise BadLan(f"{address} answers for '{group}' with what cannot be used: {error}") from None
    return LanPeer(group=group, run=join.run_id, run_name=join.run_name, addresses=join.peers)


def fitting_addresses(addresses: Sequence[str], *, loopback: bool) -> tuple[str, ...]:
    """Those by which others on the network reach this peer; on `loopback` those by which this machine does."""
    fits = [address for address in addresses if len(address) <= _MOST_ADDRESS_CHARS and _IP4.match(address)]
    return tuple(address for address in fits if address.startswith("/ip4/127.") == loopback)[:MOST_ADDRESSES]


def choose_join(group: str, found: Sequence[LanPeer]) -> Join:
    """The run that a group's peers are of, and where they are.

    Raises:
        BadLan: nobody is there, or the name stands for several runs.
    """
    mine = [peer for peer in found if peer.group == group]
    if not mine:
        raise BadLan(
            f"nobody on this network answers for '{group}'; start its first peer with `swarm join RUN --lan {group}`, "
            "or name a peer by --peer or --peers-file where multicast is blocked (`swarm doctor` tells)"
        )
    runs = {peer.run: peer for peer in mine}
    if len(runs) > 1:
        named = ", ".join(f"{run} at {peer.addresses[0]}" for run, peer in sorted(runs.items())[:4])
        raise BadLan(f"'{group}' stands for {len(runs)} runs on this network ({named}); use a join string of yours")
    peers = addresses_of(mine, mine[0].run)[:MAX_BOOTSTRAP]
    return Join(run_id=mine[0].run, run_name=mine[0].run_name, peers=peers)


def addresses_of(found: Sequence[LanPeer], run: RunId) -> tuple[str, ...]:
    """Where the peers of one run are, the first address of each first."""
    mine = [peer.addresses for peer in found if peer.run == run]
    ranked = [each[place] for place in range(MOST_ADDRESSES) for each in mine if place < len(each)]
    return tuple(dict.fromkeys(ranked))


def parse_peers_file(text: str, where: str) -> tuple[str, ...]:
    """Multiaddrs and join strings, one a line; `#` begins a comment.

    Raises:
        BadLan: a line is neither, or there are too many; it says which.
    """
    found: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        try:
            found += parse_join(words).peers if words.startswith("swarm") else [check_address(words)]
        except BadJoinString as error:
            raise BadLan(f"{where}, line {number}: {error}") from None
        if len(found) > MOST_PEERS:
            raise BadLan(f"{where} names more than {MOST_PEERS} addresses; a few are enough to find the others")
    return tuple(dict.fromkeys(found))
