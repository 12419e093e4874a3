"""What usually goes wrong with a peer, checked one by one; each finding says in one line what is and what to do."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires, version
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from peers.config import NetworkConfig
from peers.dialling_back import ip_of
from peers.errors import PeerError
from swarm.being_dialled import Attempt, Door, ask_to_dial, port_of
from swarm.errors import SwarmError

if TYPE_CHECKING:
    from peers.network import PeerId
    from peers.records import PeerRecord
    from swarm.peer import Peer

LOW_DISK_BYTES = 4 << 30
LOW_MEMORY_BYTES = 2 << 30
_PROBE_SECONDS = 6.0


class Verdict(StrEnum):
    """How a check came out; only BAD keeps a peer from working."""

    OK = "ok"
    LOOK = "look"
    BAD = "bad"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One check: what is, and, unless all is well, what to do."""

    check: str
    verdict: Verdict
    words: str
    remedy: str = ""

    def to_plain(self) -> dict[str, str]:
        """For JSON."""
        return {"check": self.check, "verdict": self.verdict, "words": self.words, "remedy": self.remedy}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a peer would live: its address and port, what it would announce, and the directories that it writes to.

    Raises:
        BadNetworkConfig: no peer could be started with that host, port or announced addresses.
    """

    host: str
    port: int
    directories: tuple[Path, ...]
    announce: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        NetworkConfig(host=self.host, port=self.port, announce=self.announce)


def examine(
    place: Place, enter: Callable[[], Peer] | None = None, ask_first: Sequence[PeerId] = ()
) -> Iterator[Finding]:
    """Every check, as each is done; `enter` opens a peer of the run that is to be reached, if there is one, and peers
    of it, `ask_first` before others, are asked to dial this machine.
    """
    yield judge_python(sys.version_info[:2])
    yield from judge_packages([Requirement(words) for words in requires("swarmtune") or ()], _installed)
    yield check_port(place.host, place.port)
    yield asyncio.run(check_p2pd())
    yield check_clock()
    for directory in place.directories:
        yield check_directory(directory)
    yield check_memory()
    yield check_gpu()
    yield judge_addresses(_own_addresses())
    yield check_multicast(place.host)
    if enter is not None:
        yield from check_run(enter, place, ask_first)


def judge_python(found: tuple[int, ...]) -> Finding:
    """3.11 is the oldest that this runs on."""
    words = ".".join(map(str, found))
    if found >= (3, 11):
        return Finding(check="python", verdict=Verdict.OK, words=words)
    return Finding(check="python", verdict=Verdict.BAD, words=words, remedy="install Python 3.11 or newer")


def judge_packages(wanted: Sequence[Requirement], installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """One finding for each package that is missing or of another version; one for all if none is. Extras are left."""
    wrong = 0
    for need in wanted:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        found = installed(need.name)
        if found is not None and need.specifier.contains(found, prereleases=True):
            continue
        wrong += 1
        words = f"{need.name} {'is not installed' if found is None else found}, {need.specifier or 'any'} is needed"
        yield Finding(check="packages", verdict=Verdict.BAD, words=words, remedy=f"pip install '{need}'")
    if not wrong:
        yield Finding(check="packages", verdict=Verdict.OK, words="all in the versions that are needed")


def check_port(host: str, port: int) -> Finding:
    """Whether a peer could listen there; 0 is any free port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, port))
        except OSError as error:
            words = f"{host}:{port} cannot be used ({error.strerror})"
            return Finding(check="port", verdict=Verdict.BAD, words=words, remedy="choose another --port or --host")
    words = f"{host}:{port} is free" if port else f"{host} takes any free port"
    remedy = "" if port else "behind a router, choose one with --port and forward it there"
    return Finding(check="port", verdict=Verdict.OK, words=words, remedy=remedy)


async def check_p2pd() -> Finding:
    """Whether the libp2p daemon starts."""
    from peers.hivemind_daemon import Daemon, DaemonOptions

    try:
        daemon = await Daemon.launch(DaemonOptions(listen=("/ip4/127.0.0.1/tcp/0",), dht_client=True))
    except PeerError as error:
        remedy = "install hivemind again; where /tmp is mounted noexec, install into another place"
        return Finding(check="p2pd", verdict=Verdict.BAD, words=str(error), remedy=remedy)
    await daemon.shutdown()
    return Finding(check="p2pd", verdict=Verdict.OK, words="starts and ends")


def check_clock() -> Finding:
    """Whether this machine keeps network time: peers refuse records of one that is 3 s off."""
    remedy = "timedatectl set-ntp true"
    try:
        asked = subprocess.run(
            ["timedatectl", "show", "--property=NTPSynchronized", "--value"],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        words = "whether it is kept by network time cannot be told here"
        return Finding(check="clock", verdict=Verdict.LOOK, words=words, remedy="compare it with another machine's")
    if asked.stdout.strip() == "yes":
        return Finding(check="clock", verdict=Verdict.OK, words="kept by network time")
    words = "not kept by network time; peers more than 3 s apart cannot work together"
    return Finding(check="clock", verdict=Verdict.LOOK, words=words, remedy=remedy)


def check_directory(path: Path) -> Finding:
    """Whether a directory, or what it would be made in, can be written and has room."""
    there = next(each for each in (path, *path.parents) if each.exists())
    try:
        probe = there / ".swarmtune-doctor"
        probe.write_bytes(b"x")
        probe.unlink()
        free = shutil.disk_usage(there).free
    except OSError as error:
        words = f"{there} cannot be written ({error.strerror})"
        return Finding(check="disk", verdict=Verdict.BAD, words=words, remedy="check its owner, or choose --state")
    words = f"{path}: {free / 2**30:.1f} GB free"
    if free < LOW_DISK_BYTES:
        remedy = "models and checkpoints take some GB; free some, or set XDG_CACHE_HOME and XDG_DATA_HOME"
        return Finding(check="disk", verdict=Verdict.LOOK, words=words, remedy=remedy)
    return Finding(check="disk", verdict=Verdict.OK, words=words)


def check_memory() -> Finding:
    """What is left of this machine's memory."""
    free = _available_bytes()
    if free is None:
        return Finding(
            check="memory", verdict=Verdict.LOOK, words="cannot be told here", remedy="see your system's tool"
        )
    words = f"{free / 2**30:.1f} GB available"
    if free < LOW_MEMORY_BYTES:
        return Finding(check="memory", verdict=Verdict.LOOK, words=words, remedy="hold fewer blocks: --max-memory")
    return Finding(check="memory", verdict=Verdict.OK, words=words)


def check_gpu() -> Finding:
    """Whether torch has a GPU, and how much of its memory is free."""
    import torch

    if not torch.cuda.is_available():
        words = "none that torch can use; blocks are computed by the CPU"
        built = torch.version.cuda is not None
        remedy = "check the driver with nvidia-smi" if built else "for one, install a CUDA build of torch"
        return Finding(check="gpu", verdict=Verdict.LOOK, words=words, remedy=remedy)
    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    words = f"{name}: {free / 2**30:.1f} of {total / 2**30:.1f} GB free"
    if free < LOW_MEMORY_BYTES:
        return Finding(check="gpu", verdict=Verdict.LOOK, words=words, remedy="end what uses it, or --device cpu")
    return Finding(check="gpu", verdict=Verdict.OK, words=words)


def judge_addresses(addresses: Sequence[str]) -> Finding:
    """Whether others on the internet can dial one of this machine's addresses."""
    public = [each for each in addresses if ip_address(each).is_global]
    if public:
        return Finding(check="nat", verdict=Verdict.OK, words=f"public address {public[0]}")
    words = f"only private addresses ({', '.join(addresses[:3]) or 'none'}): the internet cannot dial this peer"
    remedy = "forward a port and name it by --port and --announce; or only train, generate, or hold with --behind-nat"
    return Finding(check="nat", verdict=Verdict.LOOK, words=words, remedy=remedy)


def check_multicast(host: str) -> Finding:
    """Whether what is said by mDNS comes back, as `--lan` needs."""
    from swarm.lan.discovery import LanPresence, search
    from swarm.lan.records import LanPeer
    from swarm.run import RunId

    remedy = "allow UDP port 5353, or name peers by --peer or --peers-file"
    address = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    peer = LanPeer(
        group="doctor",
        run=RunId("0" * 32),
        run_name="doctor",
        addresses=(f"/ip4/{address}/tcp/9/p2p/12D3KooWDoctorDoctor",),
    )
    try:
        presence = LanPresence(peer, host=host)
        try:
            heard = peer in search("doctor", host=host)
        finally:
            presence.close()
    except (SwarmError, OSError) as error:
        return Finding(check="multicast", verdict=Verdict.LOOK, words=str(error), remedy=remedy)
    if heard:
        return Finding(
            check="multicast", verdict=Verdict.OK, words="works on this machine; a switch may still block it"
        )
    return Finding(check="multicast", verdict=Verdict.LOOK, words="nothing comes back", remedy=remedy)


def check_run(enter: Callable[[], Peer], place: Place, ask_first: Sequence[PeerId] = ()) -> Iterator[Finding]:
    """Whether the run can be entered, who of it answers, whether all blocks are held, and who can dial this machine."""
    try:
        peer = enter()
    except (PeerError, SwarmError) as error:
        yield Finding(check="run", verdict=Verdict.BAD, words=str(error), remedy="see the message")
        return
    with peer:
        status = peer.status()
        yield judge_hosts([host.peer for host in status.hosts], [*status.traffic])
        if status.missing:
            words = f"nobody holds {len(status.missing)} of {status.num_blocks} blocks"
            yield Finding(check="blocks", verdict=Verdict.LOOK, words=words, remedy="start a host: swarm join")
        else:
            yield Finding(check="blocks", verdict=Verdict.OK, words=f"all {status.num_blocks} are held")
        yield check_dialled(peer, place, [*ask_first, *by_distance(status.hosts, status.traffic)])


def by_distance(hosts: Sequence[PeerRecord], answered: Collection[PeerId]) -> list[PeerId]:
    """The hosts that answer, those first that have an address of the internet: what they say tells most."""

    def is_near(host: PeerRecord) -> bool:
        return not any(ip.is_global for ip in map(ip_of, host.addresses) if ip is not None)

    return [host.peer for host in sorted(hosts, key=is_near) if host.peer in answered]


def check_dialled(peer: Peer, place: Place, asked: Sequence[PeerId]) -> Finding:
    """Whether other peers can dial this machine where a peer of it would listen."""
    others = [each for each in dict.fromkeys(asked) if each != peer.id]
    door = Door(host=place.host, port=place.port, announced_port=port_of(place.announce))
    try:
        attempts = peer.run(ask_to_dial(peer.node.pool, others, door))
    except OSError as error:
        words = f"not tried, as {place.host}:{place.port} cannot be used ({error.strerror})"
        remedy = "stop the peer that listens there while this looks"
        return Finding(check="dialled", verdict=Verdict.LOOK, words=words, remedy=remedy)
    return judge_attempts(attempts)


def judge_attempts(attempts: Sequence[Attempt]) -> Finding:
    """Whether this machine can be dialled, by what those say who see it from farthest off."""
    tried = [each for each in attempts if each.address is not None]
    if not tried:
        words = f"nobody could try: {attempts[0].peer} says: {attempts[0].why}" if attempts else "nobody could be asked"
        remedy = "try again in a minute, or name another peer of the run by --peer"
        return Finding(check="dialled", verdict=Verdict.LOOK, words=words, remedy=remedy)
    far = [each for each in tried if each.is_far] or [each for each in tried if not each.is_here] or tried
    best = next((each for each in far if each.reached), far[0])
    where = f"{best.address} port {best.port}"
    if not best.reached:
        words = f"{best.peer} sees this machine at {best.address}, and cannot dial it at port {best.port}"
        remedy = f"forward TCP port {best.port} to it, let it through its firewall, and start with --port {best.port}"
        remedy += " and --announce; or only train, generate, or hold with --behind-nat"
        return Finding(check="dialled", verdict=Verdict.LOOK, words=words, remedy=remedy)
    words = f"{best.peer} can dial this machine at {where}"
    if best.is_here:
        remedy = "it is on this machine itself; name one elsewhere by --peer"
        return Finding(check="dialled", verdict=Verdict.LOOK, words=words, remedy=remedy)
    remedy = "" if best.is_far else "it is on this network; whether others can dial this machine is not known"
    return Finding(check="dialled", verdict=Verdict.OK, words=words, remedy=remedy)


def judge_hosts(hosts: Sequence[PeerId], answered: Sequence[PeerId]) -> Finding:
    """How many hosts of the run answer this machine."""
    silent = [host for host in hosts if host not in answered]
    words = f"{len(hosts) - len(silent)} of {len(hosts)} hosts answer"
    if not hosts:
        return Finding(check="run", verdict=Verdict.LOOK, words="no host", remedy="start one: swarm join")
    if not silent:
        return Finding(check="run", verdict=Verdict.OK, words=words)
    verdict = Verdict.BAD if len(silent) == len(hosts) else Verdict.LOOK
    remedy = f"{silent[0]} does not: its owner should check its port and --announce"
    return Finding(check="run", verdict=verdict, words=words, remedy=remedy)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)


def _own_addresses() -> list[str]:
    from ifaddr import get_adapters

    found = [str(each.ip) for adapter in get_adapters() for each in adapter.ips if each.is_IPv4]
    return [address for address in found if not ip_address(address).is_loopback]
