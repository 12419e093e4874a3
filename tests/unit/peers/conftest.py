"""A tiny model for services and chains."""

from __future__ import annotations

import pytest

from blocks.source import ModelSource, find_model
from tests.unit.blocks.conftest import save_tiny


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A llama of six blocks with random weights."""
    directory = tmp_path_factory.mktemp("llama")
    save_tiny("llama", directory)
    return find_model(str(directory), cache_dir=directory / "cache")
