"""Texts of one process share the client's weights, and compute their heads together where they meet."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from blocks.client import ClientModel, RemoteCall
from blocks.load import load_client
from blocks.shared_client import MAX_TOGETHER, SharedClient, SharedHead
from blocks.source import find_model
from tests.unit.blocks.conftest import save_tiny


class Slow(nn.Module):
    """A head whose first pass waits, so that others come meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16, bias=False)
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.sizes: list[int] = []

    def forward(self, hidden_ND: Tensor) -> Tensor:
        self.sizes.append(len(hidden_ND))
        self.begun.set()
        assert self.go_on.wait(60)
        if bool(torch.isnan(hidden_ND).any()):
            raise ValueError("no numbers")
        return cast(Tensor, self.linear(hidden_ND))


def run_together(head: SharedHead, slow: Slow, inputs: list[Tensor]) -> list[Tensor | Exception]:
    """Call the head with all inputs but the first while it computes the first."""
    results: list[Tensor | Exception] = [torch.empty(0)] * len(inputs)

    def call(i: int) -> None:
        try:
            with torch.no_grad():
                results[i] = head(inputs[i])
        except ValueError as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    threads[0].start()
    assert slow.begun.wait(60)
    for thread in threads[1:]:
        thread.start()
    while len(head._waiting) < len(inputs) - 1:
        threading.Event().wait(0.001)
    slow.go_on.set()
    for thread in threads:
        thread.join(60)
    return results


def test_heads_that_meet_are_computed_in_one_pass_and_each_gets_its_own() -> None:
    slow = Slow()
    head = SharedHead(slow)
    inputs = [torch.randn(1, tokens, 8) for tokens in (1, 1, 3, 2)]
    results = run_together(head, slow, inputs)
    for given, result in zip(inputs, results, strict=True):
        assert isinstance(result, Tensor)
        torch.testing.assert_close(result, slow.linear(given))
    assert slow.sizes == [1, 6]
    assert head.passes == 2


def test_an_error_meets_those_who_share_the_pass_and_nobody_after_them() -> None:
    slow = Slow()
    head = SharedHead(slow)
    results = run_together(head, slow, [torch.zeros(1, 1, 8), torch.full((1, 1, 8), torch.nan), torch.zeros(1, 1, 8)])
    assert isinstance(results[0], Tensor)
    assert [type(result) for result in results[1:]] == [ValueError, ValueError]
    with torch.no_grad():
        assert head(torch.zeros(1, 1, 8)).shape == (1, 1, 16)


def test_gradients_and_long_inputs_are_computed_alone() -> None:
    slow = Slow()
    slow.go_on.set()
    head = SharedHead(slow)
    hidden = torch.randn(1, 2, 8, requires_grad=True)
    head(hidden).sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        head(torch.zeros(1, MAX_TOGETHER + 1, 8))
    assert head.passes == 0


@pytest.fixture
def shared(tmp_path: Path) -> SharedClient:
    save_tiny("llama", tmp_path)
    source = find_model(str(tmp_path), cache_dir=tmp_path / "cache")
    return SharedClient(lambda: load_client(source, dtype=torch.float32, device=torch.device("cpu")))


def test_clients_share_weights_and_head_and_have_chains_of_their_own(shared: SharedClient) -> None:
    first, second = shared.another(), shared.another()

    def answer(factor: float) -> Tensor:
        return first_of(lambda call: call.hidden_BTD * factor, first if factor > 0 else second)

    def first_of(remote: object, client: ClientModel) -> Tensor:
        client.remote = remote  # type: ignore[assignment]
        ids = torch.tensor([[1, 2, 3]])
        return cast(Tensor, client(input_ids=ids).logits)  # type: ignore[attr-defined]

    def never(call: RemoteCall) -> Tensor:
        raise AssertionError("another client's chain was used")

    with torch.no_grad():
        first.remote = never
        assert not torch.equal(answer(-1.0), answer(1.0))
    modules = [cast(nn.Module, client) for client in (first, second)]
    pointers = [[tensor.data_ptr() for tensor in module.parameters()] for module in modules]
    assert pointers[0] == pointers[1]
    heads = [module.get_output_embeddings() for module in modules]  # type: ignore[operator]
    assert heads[0] is heads[1]
    assert isinstance(heads[0], SharedHead)
