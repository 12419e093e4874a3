"""Published adapters as somebody finds them who asks for text, or looks at a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocks.checks import check_kind
from peers.published.catalogue import Catalogue, Published
from swarm.errors import BadConfig

if TYPE_CHECKING:
    from swarm.node import Node


async def find_adapter(node: Node, name: str) -> Published:
    """The published adapter of that name.

    Raises:
        BadConfig: there is none.
    """
    check_kind(BadConfig, "adapter", name, str, "the name of a published adapter")
    catalogue = await node.catalogue.look()
    adapter = catalogue.named(name)
    if adapter is None:
        raise unknown_adapter(name, catalogue)
    return adapter


def unknown_adapter(name: str, catalogue: Catalogue) -> BadConfig:
    """What is said where a run has no adapter of that name."""
    there = ", ".join(each.name for each in catalogue.adapters) or "none"
    return BadConfig(f"this run has no published adapter '{name:.80}'; there are: {there}")
