"""Published adapters are names of the gateway while they are published, and no two things have one name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from peers.published.catalogue import Published
from swarm.gateway.catalog import Served
from swarm.gateway.live_catalog import LiveCatalog

PIRATE, COOK = (Published(name=name, content=name.encode() * 8, num_bytes=1) for name in ("pirate", "cook"))
NEWS_PIRATE = Published(name="pirate", content=b"n" * 32, num_bytes=1)
TALES, NEWS = "a peer of tales", "a peer of news"
Adapters = dict[Any, tuple[Published, ...]]


def served(name: str, *peers: object, adapter: bool) -> Served:
    through: Any = tuple(SimpleNamespace(peer=peer) for peer in peers)
    words: Any = SimpleNamespace(can_chat=False)
    return Served(name=name, words=words, through=through, adapter=adapter, is_live=lambda _: True)


class Around:
    def __init__(self, *others: Served) -> None:
        self.published: Adapters = {}
        stays = [
            served("tales", TALES, adapter=True),
            served("news", NEWS, adapter=True),
            *others,
            served("base", TALES, NEWS, adapter=False),
        ]
        self.catalog = LiveCatalog({each.name: each for each in stays}, lambda: self.published)


def test_names_come_and_go_with_what_is_published() -> None:
    around = Around()
    assert list(around.catalog) == ["tales", "news", "base"]
    around.published = {TALES: (COOK, PIRATE), NEWS: ()}
    assert list(around.catalog) == ["tales", "news", "base", "cook", "pirate"]
    found = around.catalog["pirate"]
    assert (found.adapter, found.through[0].peer) == (PIRATE, TALES)
    assert found.plain()["owned_by"] == "swarmtune-adapter"
    assert around.catalog["pirate"] is found, "it has been there since it came"
    around.published = {TALES: (COOK,), NEWS: ()}
    assert "pirate" not in around.catalog
    assert len(around.catalog) == 4


def test_a_name_that_two_runs_published_has_the_runs_name_before_it() -> None:
    around = Around()
    around.published = {TALES: (PIRATE, COOK), NEWS: (NEWS_PIRATE,)}
    assert list(around.catalog)[3:] == ["tales/pirate", "cook", "news/pirate"]
    assert around.catalog["news/pirate"].adapter == NEWS_PIRATE


def test_what_stays_keeps_its_name() -> None:
    around = Around(served("tales/cook", NEWS, adapter=False), served("cook", NEWS, adapter=False))
    around.published = {TALES: (COOK,), NEWS: (Published(name="tales", content=b"t" * 32, num_bytes=1),)}
    assert around.catalog["cook"].adapter is False
    assert around.catalog["tales/cook"].adapter is False
    assert around.catalog["tales"].adapter is True
    assert isinstance(around.catalog["news/tales"].adapter, Published)


def test_one_name_with_new_content_is_another_model() -> None:
    around = Around()
    around.published = {TALES: (PIRATE,)}
    before = around.catalog["pirate"]
    around.published = {TALES: (NEWS_PIRATE,)}
    assert around.catalog["pirate"] is not before
    assert around.catalog["pirate"].adapter == NEWS_PIRATE
