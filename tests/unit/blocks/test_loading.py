"""Several threads of one process load at the same time, as two peers in a notebook do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import PreTrainedModel

from blocks.load import load_client, load_span
from blocks.source import ModelSource
from blocks.spans import Span

CPU = torch.device("cpu")


def test_loads_at_the_same_time_leave_transformers_whole(llama_source: ModelSource) -> None:
    before = PreTrainedModel.tie_weights

    def load(number: int) -> None:
        if number % 2:
            load_client(llama_source, dtype=torch.float32, device=CPU)
        else:
            load_span(llama_source, Span(0, 3), dtype=torch.float32, device=CPU)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(load, range(24)))
    assert PreTrainedModel.tie_weights is before
