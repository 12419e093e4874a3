from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.swarm.small_swarm import SmallSwarm, Tables, save_tiny_model

MakeSwarm = Callable[..., SmallSwarm]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random llama of six blocks and its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def make_swarm(tmp_path: Path, tiny_model: Path) -> Iterator[MakeSwarm]:
    """Makes runs on the tiny model (or another); their peers are closed after the test."""
    made: list[SmallSwarm] = []

    def make(settings: Tables | None = None, *, model: str | None = None) -> SmallSwarm:
        root = tmp_path / f"swarm-{len(made)}"
        swarm = SmallSwarm.create(root, model or str(tiny_model), tmp_path / "cache", settings or {})
        made.append(swarm)
        return swarm

    yield make
    for swarm in made:
        swarm.close()
