"""What members of a group bring, for tests of planning."""

from __future__ import annotations

from averaging.config import AveragingConfig
from averaging.exchange import Brought, Contribution, Group, Version
from blocks.spans import unit_of
from peers.network import PeerId

CONFIG = AveragingConfig(round_samples=100)
PEERS = [PeerId(f"peer{index}") for index in range(6)]
UNIT = unit_of("default", 0)
OLD, COMMON = Version(number=3, weight=9.0, digest=b"o"), Version(number=4, weight=5.0, digest=b"c")
STRANGE = Version(number=4, weight=1e9, digest=b"s")


def bring(peer: str, blocks, samples=1.0, brought=None, **changes) -> Contribution:
    units = {unit_of("default", block): Brought(samples=samples, **(brought or {})) for block in blocks}
    fields = {"peer": PeerId(peer), "number": 5, "layout": "same", "units": units}
    return Contribution(**(fields | changes))


def on(peer: str, version: Version, **changes) -> Contribution:
    return bring(peer, [0], brought={"version": version}, **changes)


def group_of(*contributions: Contribution) -> Group:
    return Group(group_id=b"group", contributions=contributions)
