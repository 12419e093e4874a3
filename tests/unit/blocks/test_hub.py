"""Models of the Hugging Face hub: the normal cache, without network, and shards only when a span needs them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from blocks.errors import MissingTensors
from blocks.load import load_span
from blocks.source import ModelSource, find_model
from blocks.spans import Span
from tests.unit.blocks.conftest import CPU, save_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache on disk with one model, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--tiny"
    directory = repository / "snapshots" / COMMIT
    directory.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    save_tiny("llama", directory)
    return directory


def test_a_cached_hub_model_works_without_network(snapshot: Path) -> None:
    source = find_model("owner/tiny", cache_dir=snapshot)
    assert (source.hub_id, source.revision, source.path) == ("owner/tiny", COMMIT, snapshot)
    model = load_span(source, Span(1, 3), dtype=torch.float32, device=CPU)
    assert model.forward(torch.zeros(1, 2, 64), span=Span(1, 3)).shape == (1, 2, 64)


def test_a_shard_that_is_not_cached_is_asked_of_the_hub_under_the_same_commit(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_model("owner/tiny", cache_dir=snapshot)
    hub = tmp_path / "hub"
    hub.mkdir()
    for shard in snapshot.glob("*.safetensors"):
        shutil.move(shard, hub / shard.name)
    asked: list[tuple[str, str, str | None]] = []

    def download(repository: str, file: str, *, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(hub / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    load_span(source, Span(3, 4), dtype=torch.float32, device=CPU)
    assert 0 < len(asked) < len(list(hub.iterdir()))
    assert {(repository, revision) for repository, _, revision in asked} == {("owner/tiny", COMMIT)}


def test_a_shard_that_the_hub_does_not_give_is_named(snapshot: Path) -> None:
    source: ModelSource = find_model("owner/tiny", cache_dir=snapshot)
    for shard in snapshot.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(MissingTensors, match="owner/tiny"):
        load_span(source, Span(3, 4), dtype=torch.float32, device=CPU)
