"""Tiny checkpoints on disk, and a whole model cut into spans beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from blocks.client import ClientModel, RemoteCall
from blocks.load import SpanModel, load_client, load_span
from blocks.source import ModelSource, find_model
from blocks.spans import Span
from blocks.worker import ComputeThread
from tests.families import FAMILIES

CPU = torch.device("cpu")
SPANS = (Span(0, 2), Span(2, 5), Span(5, 6))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def save_tiny(family: str, directory: Path) -> torch.nn.Module:
    """A whole model with random weights, saved in many shards."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    whole.save_pretrained(directory, max_shard_size="100KB")
    return whole


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One model twice: whole, and as a client with three spans."""

    family: str
    whole: torch.nn.Module
    source: ModelSource
    spans: list[SpanModel]
    client: ClientModel

    def hops(self) -> list[tuple[SpanModel, Span]]:
        """A chain in which the second span is computed in two parts."""
        first, second, third = self.spans
        return [(first, Span(0, 2)), (second, Span(2, 4)), (second, Span(4, 5)), (third, Span(5, 6))]

    def forward(self, call: RemoteCall) -> Tensor:
        """A chain without caches."""
        hidden_BTD = call.hidden_BTD
        for model, span in self.hops():
            hidden_BTD = model.forward(
                hidden_BTD, span=span, mask_BT=call.mask_BT, position_ids_BT=call.position_ids_BT
            )
        return hidden_BTD


def make_cluster(family: str, directory: Path) -> Cluster:
    whole = save_tiny(family, directory)
    source = find_model(str(directory), cache_dir=directory / "cache")
    return Cluster(
        family=family,
        whole=whole,
        source=source,
        spans=[load_span(source, span, dtype=torch.float32, device=CPU) for span in SPANS],
        client=load_client(source, dtype=torch.float32, device=CPU),
    )


@pytest.fixture(scope="session")
def llama_source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = tmp_path_factory.mktemp("llama")
    save_tiny("llama", directory)
    return find_model(str(directory), cache_dir=directory / "cache")


@pytest.fixture
def llama_span(llama_source: ModelSource) -> SpanModel:
    return load_span(llama_source, Span(2, 5), dtype=torch.float32, device=CPU)


@pytest.fixture
def thread() -> Iterator[ComputeThread]:
    thread = ComputeThread(num_threads=1)
    yield thread
    thread.close()
