"""Join strings and invitations: one line that names a run and a few peers to start from, and may let its reader in.

Also what JOIN may be instead of one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

import msgpack

from swarm.config_file import CONFIG_NAME, load_config
from swarm.errors import BadJoinString, NotInvited
from swarm.private.credential import Credential, credential_from
from swarm.run import KEY_NAME, RUN_NAME, RunId, load_owner_key, load_run, public_bytes, run_id_of, sign_run
from swarm.state import OWN_STATE
from swarm.whole_file import replace_file

JOIN_NAME = "join.txt"
MAX_BOOTSTRAP = 8
_PREFIX, _INVITE_PREFIX = "swarm1:", "swarminvite1:"
_CHECKSUM_BYTES = 4
_MAX_CHARACTERS = 8192
_ADDRESS = re.compile(
    r"(/[A-Za-z0-9._:%-]{1,255}){2,16}/p2p/[1-9A-HJ-NP-Za-km-z]{8,128}(/[A-Za-z0-9._:%-]{1,255}){0,4}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """What a newcomer needs: the run, its name for people, and multiaddrs (`/ip4/…/tcp/…/p2p/…`) of 1 to 8 peers.

    An invitation to a private run has a `credential`, too.

    Raises:
        BadJoinString: a field cannot be right.
    """

    run_id: RunId
    run_name: str
    peers: tuple[str, ...]
    credential: Credential | None = None

    def __post_init__(self) -> None:
        if re.fullmatch(r"[0-9a-f]{32}", self.run_id) is None:
            raise BadJoinString(f"'{self.run_id:.40}' is not a run id; copy the whole join string again")
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.run_name) is None:
            raise BadJoinString(f"{self.run_name!r:.80} is not a run's name; copy the whole join string again")
        if not 1 <= len(self.peers) <= MAX_BOOTSTRAP:
            raise BadJoinString(f"the join string names {len(self.peers)} peers; it needs 1 to {MAX_BOOTSTRAP}")
        for address in self.peers:
            check_address(address)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDirectory:
    """A directory made by `swarm init`, or the state directory of a peer, which has the run's settings as signed.

    `join` is there once its first peer has started.
    """

    path: Path
    join: Join | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A run before its swarm is entered: the owner's signed settings where they are here, and peers that are known."""

    run: RunId
    blob: bytes | None
    peers: tuple[str, ...]


def check_address(address: str) -> str:
    """`address` itself, if it is a multiaddr with a peer id.

    Raises:
        BadJoinString: it is not.
    """
    if _ADDRESS.fullmatch(address) is None:
        raise BadJoinString(
            f"{address!r:.120} is not a peer's address; use one such as /ip4/10.0.0.5/tcp/31330/p2p/12D3…"
        )
    return address


def format_join(join: Join) -> str:
    """The one line that `parse_join` reads: `swarm1:` and base64url of the fields and a checksum."""
    payload = bytes(msgpack.packb([join.run_id, join.run_name, list(join.peers)]))
    text = base64.urlsafe_b64encode(payload + _checksum(payload)).decode().rstrip("=")
    return _PREFIX + text


def format_invitation(join: Join) -> str:
    """The same for a join with a credential: `swarminvite1:…`.

    Raises:
        ValueError: it has none.
    """
    if join.credential is None:
        raise ValueError("this join string has no credential")
    payload = bytes(msgpack.packb([list(join.peers), join.credential.pack()]))
    return _INVITE_PREFIX + base64.urlsafe_b64encode(payload + _checksum(payload)).decode().rstrip("=")


def parse_join(text: str) -> Join:
    """Read a join string or an invitation as a person pasted it: spaces and line breaks in it do not matter.

    Raises:
        BadJoinString: truncated, mistyped, of another version, or no join string at all.
        NotInvited: an invitation that its run's owner has not signed.
    """
    packed = "".join(text[: 2 * _MAX_CHARACTERS].split()).strip("'\"`")
    version = re.match(r"swarm(?:invite)?(\d{1,9}):", packed)
    if version is None:
        raise BadJoinString(f"'{packed[:40]}' is not a join string; it starts with {_PREFIX} (`swarm join` prints it)")
    if version[0] not in (_PREFIX, _INVITE_PREFIX):
        raise BadJoinString(
            f"this join string has version {version[1]}, this swarmtune reads version 1; update swarmtune"
        )
    if len(packed) > _MAX_CHARACTERS:
        raise BadJoinString("the join string is far too long; copy it again")
    payload = _payload(packed[len(version[0]) :])
    return _parse_invitation(payload) if version[0] == _INVITE_PREFIX else _parse_payload(payload)


def resolve_join(text: str) -> Join | RunDirectory:
    """What JOIN on the command line means: a join string, a file that holds one, or a directory with swarm.toml.

    Raises:
        BadJoinString: none of these.
    """
    if re.match(r"\s*['\"`]?swarm(invite)?\d{1,9}\s*:", text):
        return parse_join(text)
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)  # from Python no shell has read it
    try:
        if text and path.is_dir():  # what is empty, such as an unset variable, does not mean this directory
            return _run_directory(path)
        if path.is_file():
            return _join_file(path)
    except OSError as error:
        raise BadJoinString(f"{text[:200]!r} cannot be read ({error.strerror}); check its permissions") from None
    raise BadJoinString(
        f"{text[:80]!r} is no join string, run directory or file; make a run with `swarm init`, or copy the join"
        " string again"
    )


def target_run_id(target: Join | RunDirectory) -> RunId:
    """The id of the run that JOIN stands for.

    Raises:
        BadConfig: the run directory's settings or key cannot be read.
        BadJoinString: the join string left in the directory is of another run.
    """
    if isinstance(target, Join):
        return target.run_id
    if is_state(target.path):
        return load_run(target.path)[0]
    key_file = target.path / KEY_NAME
    if target.join is not None and not key_file.exists():
        return target.join.run_id
    run_id = run_id_of(public_bytes(load_owner_key(key_file)), load_config(target.path))
    if target.join is not None and target.join.run_id != run_id:
        raise BadJoinString(f"{target.path / JOIN_NAME} is of another run than {CONFIG_NAME} beside it; remove it")
    return run_id


def known_of(target: Join | RunDirectory) -> Known:
    """What JOIN says of its run by itself.

    Raises:
        BadConfig, BadRecord: the directory's settings or key cannot be read.
        BadJoinString: it has neither the owner's key nor a join string.
    """
    if isinstance(target, Join):
        return Known(run=target.run_id, blob=None, peers=target.peers)
    peers = () if target.join is None else target.join.peers
    if is_state(target.path):
        run, blob = load_run(target.path)
        return Known(run=run, blob=blob, peers=peers)
    spec = load_config(target.path / CONFIG_NAME)
    key_path = target.path / KEY_NAME
    if not key_path.exists():
        if target.join is None:
            raise BadJoinString(f"{target.path} has no {KEY_NAME} and no join string; ask the run's owner for one")
        return Known(run=target.join.run_id, blob=None, peers=peers)
    key = load_owner_key(key_path)
    return Known(run=run_id_of(public_bytes(key), spec), blob=sign_run(spec, key), peers=peers)


def is_state(path: Path) -> bool:
    """Whether a directory is a peer's state, not one that `swarm init` made."""
    return (path / RUN_NAME).is_file() and not (path / CONFIG_NAME).is_file()


def own_state(directory: RunDirectory) -> Path:
    """Where the host that is started from a directory keeps its state: a state directory is its own."""
    return directory.path if is_state(directory.path) else directory.path / OWN_STATE


def save_join(directory: Path, join: Join) -> Path:
    """Leave the join string in a run directory, for other commands on this machine, replacing an older one whole.

    Peers of the same run that the older one named come after those of `join`: they may run on when it is gone.
    """
    path = directory / JOIN_NAME
    join = replace(join, peers=(*join.peers, *_others_left(path, join))[:MAX_BOOTSTRAP])
    replace_file(path, f"{format_join(join)}\n".encode())
    return path


def _run_directory(path: Path) -> RunDirectory:
    if not (path / CONFIG_NAME).is_file() and not is_state(path):
        raise BadJoinString(
            f"directory {path} holds no {CONFIG_NAME}; make a run with `swarm init {path.name or 'NAME'}`"
        )
    saved = path / JOIN_NAME
    return RunDirectory(path=path, join=_join_file(saved) if saved.is_file() else None)


def _others_left(path: Path, join: Join) -> list[str]:
    """The addresses in an older join string of the run, without those of peers that `join` has newer ones of."""
    try:
        older = _join_file(path)
    except (BadJoinString, NotInvited, OSError):
        return []
    known = {_peer_of(address) for address in join.peers}
    return [each for each in older.peers if older.run_id == join.run_id and _peer_of(each) not in known]


def _peer_of(address: str) -> str:
    return address.rpartition("/p2p/")[2].partition("/")[0]


def _join_file(path: Path) -> Join:
    with path.open("rb") as file:
        text = file.read(_MAX_CHARACTERS).decode("utf-8", "replace")
    try:
        return parse_join(text)
    except BadJoinString as error:
        raise BadJoinString(f"{path}: {error}") from None


def _checksum(payload: bytes) -> bytes:
    return hashlib.sha256(b"swarmtune join 1\0" + payload).digest()[:_CHECKSUM_BYTES]


def _payload(text: str) -> bytes:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise BadJoinString("the join string is cut off or mistyped; copy the whole of it again") from None
    payload, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if not payload or _checksum(payload) != checksum:
        raise BadJoinString(
            "the join string is cut off or mistyped (its checksum is wrong); copy the whole of it again"
        )
    return payload


def _parse_payload(payload: bytes) -> Join:
    try:
        parts: object = msgpack.unpackb(payload)
    except (ValueError, RecursionError, msgpack.UnpackException):
        raise BadJoinString("the join string is malformed; ask for a new one") from None
    match parts:
        case [str(run_id), str(name), [*entries]]:
            peers = tuple(one for one in entries if isinstance(one, str))
            if len(peers) == len(entries):
                return Join(run_id=RunId(run_id), run_name=name, peers=peers)
    raise BadJoinString("the join string is malformed; ask for a new one")


def _parse_invitation(payload: bytes) -> Join:
    try:
        parts: object = msgpack.unpackb(payload)
    except (ValueError, RecursionError, msgpack.UnpackException):
        raise BadJoinString("the invitation is malformed; ask for a new one") from None
    match parts:
        case [[*entries], packed]:
            peers = tuple(one for one in entries if isinstance(one, str))
            if len(peers) == len(entries):
                credential = credential_from(packed)
                return Join(run_id=credential.run, run_name=credential.name, peers=peers, credential=credential)
    raise BadJoinString("the invitation is malformed; ask for a new one")
