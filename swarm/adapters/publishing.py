"""The owner's side of published adapters: put one on the run's list and hand it to the hosts, or take it off."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from blocks.adapters import UnitTensors, block_of, unit_digest
from blocks.peft_directory import base_of, read_peft_directory
from blocks.spans import UnitId
from blocks.unit_state import UnitState
from peers.published.catalogue import Catalogue, Published, is_name, open_catalogue, sign_catalogue
from peers.published.content import content_named, content_of, shared_unit
from peers.records import MAX_ADDRESSES, PeerRecord
from peers.streams.messages import PROTOCOL_MAX, PROTOCOL_MIN
from swarm.adapters.finding import unknown_adapter
from swarm.adapters.spreading import Spread, spread_of
from swarm.adapters.watch import LIST_NAME
from swarm.config import RunSpec
from swarm.errors import BadConfig
from swarm.join_string import Join, RunDirectory, is_state
from swarm.node import Node, share
from swarm.run import KEY_NAME, load_owner_key, public_bytes
from swarm.run_model import find_run_model
from swarm.run_rules import lora_settings
from swarm.signed_lists import save_list

if TYPE_CHECKING:
    from swarm.peer_config import PeerConfig

logger = logging.getLogger(__name__)

RECORD_LIFE_SECONDS = 60.0
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnRun:
    """The run's directory and its owner's key."""

    path: Path
    key: Ed25519PrivateKey


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """An adapter in the run's form, ready to be published: its units by block, and the list of their digests."""

    adapter: Published
    listed: bytes
    units: Mapping[int, UnitState]

    def content(self, content: bytes) -> bytes | None:
        """See peers.published.service.SharedSource."""
        return self.listed if content == self.adapter.content else None

    async def read_unit(self, unit: UnitId, *, moments: bool) -> UnitState | None:
        """See SharedSource."""
        named = content_named(unit)
        return self.units.get(named[1]) if named is not None and named[0] == self.adapter.content else None


def own_run(target: Join | RunDirectory) -> OwnRun:
    """The run of whose list somebody wants to change something.

    Raises:
        BadConfig: only the run's owner can, by the directory that `swarm init` made.
    """
    if not isinstance(target, RunDirectory) or is_state(target.path) or not (target.path / KEY_NAME).exists():
        raise BadConfig(
            f"only the run's owner can publish adapters: give the directory that `swarm init` made, with its {KEY_NAME}"
        )
    return OwnRun(path=target.path, key=load_owner_key(target.path / KEY_NAME))


def check_new_name(name: str, spec: RunSpec) -> None:
    """Refuse a name for a published adapter that is none, or under which the run serves something else.

    Raises:
        BadConfig: it is.
    """
    if not is_name(name):
        raise BadConfig(
            f"{name!r:.80} cannot name a published adapter; use 1 to 48 of a-z, 0-9, '.', '_' and '-', beginning with "
            "a letter or digit, and not 'default'"
        )
    base = spec.model.name
    if name in {spec.name, base, base.lower(), Path(base).name, Path(base).name.lower()}:
        raise BadConfig(f"'{name}' is the name of the run or of its base model, which are asked by it; choose another")


def prepare(name: str, directory: Path, spec: RunSpec, config: PeerConfig) -> Prepared:
    """Read a peft directory, and bring it to the run's form.

    Raises:
        BadAdapter: it cannot be read, or does not fit the run.
        BadConfig: the name is not allowed, or the run's model is not here.
        UnknownModel: likewise.
    """
    check_new_name(name, spec)
    source = find_run_model(spec, config.model, config.cache_dir)
    lora = lora_settings(spec)
    units = read_peft_directory(directory, lora, source)
    base = base_of(directory)
    if base and Path(base).name != Path(source.name).name:
        logger.warning("the adapter says that it is for %.80r; the run's model is %s", base, source.name)
    return prepared_units(name, units)


async def publish_to_swarm(node: Node, own: OwnRun, prepared: Prepared) -> int:
    """Put an adapter on the run's list, in the place of one of its name, and let hosts fetch it from this peer.
    Returns the list's number.

    Raises:
        BadRecord: the list is full.
        BadConfig: the list cannot be written.
        NotInvited, NetworkFailed: this peer cannot be asked by others.
    """
    catalogue = await _known(node, own)
    await share(node, prepared)
    return await _sign(node, own, catalogue.with_adapter(prepared.adapter))


async def withdraw_from_swarm(node: Node, own: OwnRun, name: str) -> int:
    """Take an adapter off the run's list; hosts let go of it. Returns the list's number.

    Raises:
        BadConfig: it is not on the list, or that cannot be written.
    """
    catalogue = await _known(node, own)
    if catalogue.named(name) is None:
        raise unknown_adapter(name, catalogue)
    return await _sign(node, own, catalogue.without(name))


async def until_spread(
    node: Node, adapter: Published, *, seconds: float, show: Callable[[Spread], None] = lambda _: None
) -> Spread:
    """Wait until every live host serves an adapter and every block has one, and let them fetch it from here meanwhile;
    at most so many seconds. Returns how far it came.
    """
    deadline, announced = time.monotonic() + seconds, float("-inf")
    try:
        while True:
            if time.monotonic() - announced > RECORD_LIFE_SECONDS / 3:
                announced = time.monotonic()
                await _announce(node, (adapter.mark,))
                await node.catalogue.keep()
            await node.router.refresh()
            node.check()
            spread = spread_of(node.router.records, adapter, len(node.whole), node.router.health.is_usable)
            show(spread)
            if spread.is_whole or time.monotonic() >= deadline:
                return spread
            await asyncio.sleep(_LOOK_SECONDS)
    finally:
        await _announce(node, ())


async def _known(node: Node, own: OwnRun) -> Catalogue:
    await node.catalogue.read(own.path)
    return await node.catalogue.look()


async def _sign(node: Node, own: OwnRun, catalogue: Catalogue) -> int:
    blob = sign_catalogue(catalogue, own.key)
    await asyncio.to_thread(save_list, own.path / LIST_NAME, blob)
    node.catalogue.take(open_catalogue(blob, owner=public_bytes(own.key), run=node.config.run))
    if not await node.catalogue.keep():
        logger.warning("no peer took the list now; it is in the run's directory, publish again when peers run")
    return catalogue.number


def prepared_units(name: str, units: Mapping[UnitId, UnitTensors]) -> Prepared:
    """Units in the run's form as an adapter that can be published.

    Raises:
        BadRecord: there are too many blocks.
    """
    digests = {block_of(unit): unit_digest(tensors) for unit, tensors in units.items()}
    content, listed = content_of(digests)
    states = {}
    for unit, tensors in units.items():
        block = block_of(unit)
        states[block] = UnitState(
            unit=shared_unit(content, block),
            round=0,
            weight=0.0,
            total_samples=0,
            digest=digests[block],
            tensors=tensors,
        )
    num_bytes = sum(4 * tensor.numel() for tensors in units.values() for tensor in tensors.values())
    adapter = Published(name=name, content=content, num_bytes=num_bytes)
    return Prepared(adapter=adapter, listed=listed, units=states)


async def _announce(node: Node, marks: tuple[bytes, ...]) -> None:
    """A record without a role: nobody routes through this peer or counts on it, but hosts find what it has."""
    network = node.network
    await node.directory.publish(
        PeerRecord(
            run=node.config.run,
            peer=network.peer_id,
            span=node.whole,
            tokens_per_second=0.0,
            backward_tokens_per_second=0.0,
            queue_seconds=0.0,
            round=0,
            cache_free_bytes=0,
            addresses=(await network.addresses())[:MAX_ADDRESSES],
            protocol=(PROTOCOL_MIN, PROTOCOL_MAX),
            software=node.hello().software,
            dtype="float32",
            roles=(),
            pinned=True,
            adapters=marks,
            expires_at=network.dht_time() + RECORD_LIFE_SECONDS,
        )
    )
