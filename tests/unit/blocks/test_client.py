"""The client is a transformers model: generate() in all its ways, over sessions at spans."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from blocks.client import RemoteCall
from blocks.decoding.cache import SessionCaches
from blocks.errors import BadSession, BlockError
from tests.unit.blocks.conftest import Cluster, make_cluster

IDS_BT = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(4))
MASK_BT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


class Sessions:
    """A chain with one session at each span, opened anew at the first call of a text."""

    def __init__(self, cluster: Cluster) -> None:
        self.caches = [SessionCaches(model, 1 << 24) for model in cluster.spans]
        self.calls: list[RemoteCall] = []

    def __call__(self, call: RemoteCall) -> Tensor:
        assert call.cached
        self.calls.append(call)
        hidden_BTD = call.hidden_BTD
        for caches in self.caches:
            span = caches._model.span
            if call.start == 0:
                caches.close("s")
                caches.open("s", span=span, batch=hidden_BTD.shape[0], max_length=64, version="live")
            hidden_BTD = caches.step(
                "s",
                hidden_BTD,
                position=call.start,
                mask_BT=call.mask_BT,
                position_ids_BT=call.position_ids_BT,
                rows=call.rows,
            )
        return hidden_BTD


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return make_cluster(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    ],
    ids=["greedy", "sampling", "beams", "many-beams"],
)
def test_generated_tokens_equal_the_whole_models(cluster: Cluster, options: dict[str, object]) -> None:
    given = {"input_ids": IDS_BT, "attention_mask": MASK_BT, "max_new_tokens": 12, "pad_token_id": 0, **options}
    torch.manual_seed(6)
    want = cluster.whole.generate(**given)
    sessions = Sessions(cluster)
    cluster.client.remote = sessions
    torch.manual_seed(6)
    got = cluster.client.generate(**given)
    assert torch.equal(got, want)
    assert [call.hidden_BTD.shape[1] for call in sessions.calls] == [6] + [1] * (len(sessions.calls) - 1)


def test_tokens_stream_out_as_they_come(cluster: Cluster) -> None:
    pieces: list[list[int]] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            pieces.append(value.flatten().tolist())

        def end(self) -> None:
            pieces.append([])

    cluster.client.remote = Sessions(cluster)
    text = cluster.client.generate(input_ids=IDS_BT[1:], max_new_tokens=5, do_sample=False, streamer=Streamer())
    assert [token for piece in pieces for token in piece] == text[0].tolist()
    assert len(pieces) > 3


def test_prompt_lookup_rolls_back_and_gives_the_same_tokens(cluster: Cluster) -> None:
    prompt = IDS_BT[1:].repeat(1, 3)
    want = cluster.whole.generate(input_ids=prompt, max_new_tokens=16, do_sample=False)
    sessions = Sessions(cluster)
    cluster.client.remote = sessions
    got = cluster.client.generate(
        input_ids=prompt, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=4, max_matching_ngram_size=2
    )
    assert torch.equal(got, want)


def test_a_call_without_cache_asks_for_no_session(cluster: Cluster) -> None:
    seen: list[RemoteCall] = []

    def remote(call: RemoteCall) -> Tensor:
        seen.append(call)
        return cluster.forward(call)

    cluster.client.remote = remote
    with torch.no_grad():
        cluster.client(input_ids=IDS_BT, attention_mask=MASK_BT)
    assert [(call.cached, call.start, call.rows) for call in seen] == [(False, 0, None)]


def test_without_labels_the_loss_is_zero_and_so_is_its_gradient(cluster: Cluster) -> None:
    hidden_BTD = torch.randn(2, 6, 64)
    labels_BT = torch.full_like(IDS_BT, -100)
    loss, grad_BTD, tokens = cluster.client.loss(hidden_BTD, IDS_BT, MASK_BT, labels_BT)
    assert (float(loss), tokens) == (0.0, 0)
    assert not grad_BTD.any()


def test_likelihoods_of_tokens_are_the_whole_models(cluster: Cluster) -> None:
    labels_BT = IDS_BT.clone()
    labels_BT[0, :3] = labels_BT[1, 2:4] = -100
    labels_BT[MASK_BT == 0] = -100
    seen: list[Tensor] = []

    def remote(call: RemoteCall) -> Tensor:
        seen.append(cluster.forward(call))
        return seen[0]

    cluster.client.remote = remote
    with torch.no_grad():
        cluster.client(input_ids=IDS_BT, attention_mask=MASK_BT)
        logits_BTV = cluster.whole(input_ids=IDS_BT, attention_mask=MASK_BT).logits
    found_BT = cluster.client.log_likelihoods(seen[0], IDS_BT, MASK_BT, labels_BT)
    given_BT = torch.zeros(IDS_BT.shape)
    given_BT[:, 1:] = logits_BTV[:, :-1].log_softmax(-1).gather(2, IDS_BT[:, 1:, None]).squeeze(2)
    counted_BT = labels_BT != -100
    counted_BT[:, 0] = False  # nothing is before it
    assert torch.allclose(found_BT, given_BT * counted_BT, atol=1e-4)
    loss, tokens = cluster.client.evaluate(seen[0], IDS_BT, MASK_BT, labels_BT)
    assert tokens == int(counted_BT.sum())
    assert float(loss) == pytest.approx(-float(found_BT.sum()), rel=1e-5)
    assert not cluster.client.log_likelihoods(seen[0], IDS_BT, MASK_BT, torch.full_like(IDS_BT, -100)).any()


def test_misuse_is_said_in_a_sentence(cluster: Cluster) -> None:
    cluster.client.remote = None
    with pytest.raises(BlockError, match=r"client\.remote"):
        cluster.client(input_ids=IDS_BT)
    cluster.client.remote = lambda call: call.hidden_BTD[:, :2]
    with pytest.raises(BadSession, match="answered shape"):
        cluster.client(input_ids=IDS_BT)
    with pytest.raises(BadSession, match="DynamicCache"):
        cluster.client(input_ids=IDS_BT, past_key_values=DynamicCache(), use_cache=True)


def test_the_client_does_not_keep_blocks(cluster: Cluster, tmp_path: Path) -> None:
    path = cluster.spans[0].cut.layers_name
    assert not any(name.startswith(f"{path}.") for name, _ in cluster.client.named_parameters())  # type: ignore[attr-defined]
