"""Twenty families, cut into three spans, against the whole model in fp32."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers.cache_utils import DynamicCache

from blocks.adapters import LoraSettings, UnitTensors, read_units, write_units
from blocks.compute import SpanCompute
from blocks.decoding.cache import SessionCaches
from blocks.export import export_adapter
from blocks.skip import find_layers
from blocks.spans import UnitId
from tests.families import FAMILIES, NUM_LAYERS, VOCAB_SIZE
from tests.unit.blocks.conftest import Cluster, make_cluster

# peft asks transformers a question under its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return make_cluster(request.param, tmp_path_factory.mktemp(request.param))


def padded_batch() -> tuple[Tensor, Tensor]:
    """Two rows of token ids, the first with left padding, longer than the sliding windows."""
    ids_BT = torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0
    return ids_BT, mask_BT


@torch.no_grad()
def test_the_chain_of_spans_computes_the_whole_models_logits(cluster: Cluster) -> None:
    ids_BT, mask_BT = padded_batch()
    want = cluster.whole(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    cluster.client.remote = cluster.forward
    got = cluster.client(input_ids=ids_BT, attention_mask=mask_BT).logits
    assert torch.equal(got[mask_BT == 1], want[mask_BT == 1])


@torch.no_grad()
def test_decoding_with_sessions_equals_decoding_with_the_whole_model(cluster: Cluster) -> None:
    ids_BT, mask_BT = padded_batch()
    cache = DynamicCache(config=cluster.whole.config)
    sessions = [SessionCaches(model, 1 << 24) for model in cluster.spans]
    for (model, span), number in zip(cluster.hops(), (0, 1, 1, 2), strict=True):
        sessions[number].open(f"s{span}", span=span, batch=2, max_length=32, version="live")
        assert model is cluster.spans[number]

    def remote(call: object) -> Tensor:
        hidden_BTD = call.hidden_BTD  # type: ignore[attr-defined]
        for (_, span), number in zip(cluster.hops(), (0, 1, 1, 2), strict=True):
            hidden_BTD = sessions[number].step(
                f"s{span}",
                hidden_BTD,
                position=call.start,  # type: ignore[attr-defined]
                mask_BT=call.mask_BT,  # type: ignore[attr-defined]
                position_ids_BT=call.position_ids_BT,  # type: ignore[attr-defined]
            )
        return hidden_BTD

    cluster.client.remote = remote
    own = None
    start = 0
    for end in (5, 6, 7, 10, 11, 12):
        given = {"input_ids": ids_BT[:, start:end], "attention_mask": mask_BT[:, :end], "use_cache": True}
        want = cluster.whole(**given, past_key_values=cache).logits
        output = cluster.client(**given, past_key_values=own)
        own = output.past_key_values
        seen = mask_BT[:, start:end] == 1
        assert torch.equal(output.logits[seen], want[seen]), f"tokens {start}:{end}"
        start = end
    for length, end in ((9, 12), (2, 8), (4, 12)):  # roll back deeper than the window, go on, and roll back again
        own.crop(length - own.get_seq_length())
        given = {"input_ids": ids_BT[:, length:end], "attention_mask": mask_BT[:, :end], "use_cache": True}
        got = cluster.client(**given, past_key_values=own).logits
        want = cluster.whole(input_ids=ids_BT[:, :end], attention_mask=mask_BT[:, :end], use_cache=False).logits
        seen = mask_BT[:, length:end] == 1
        torch.testing.assert_close(got[seen], want[:, length:end][seen], rtol=0, atol=2e-5)


def trained_units(cluster: Cluster) -> dict[UnitId, UnitTensors]:
    """Every span's adapter, moved away from its beginning, where B is zero and hides mistakes."""
    units: dict[UnitId, UnitTensors] = {}
    for model in cluster.spans:
        own = {
            unit: {name: tensor + 0.02 * torch.randn(tensor.shape) for name, tensor in named.items()}
            for unit, named in read_units(model).items()
        }
        write_units(model, own)
        units |= own
    return units


def test_gradients_and_the_exported_adapter_equal_the_whole_models(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = LoraSettings(rank=4, seed=3)
    computes = {id(model): SpanCompute(model, settings) for model in cluster.spans}
    units = trained_units(cluster)
    assert len(units) == NUM_LAYERS
    directory = tmp_path_factory.mktemp("out") / "adapter"
    export_adapter(units, settings, cluster.source, directory)
    whole = PeftModel.from_pretrained(cluster.whole, directory, is_trainable=True).eval()

    ids_BT, mask_BT = padded_batch()
    labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
    labels_BT[1, 6:9] = -100
    entered: list[Tensor] = []
    _, layers = find_layers(cluster.whole, NUM_LAYERS)

    def capture(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])
        if not entered[0].requires_grad:
            entered[0].requires_grad_(True)
        entered[0].retain_grad()

    hook = layers[0].register_forward_pre_hook(capture, with_kwargs=True)
    logits = whole(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    hook.remove()
    want_loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    want_loss.backward()

    hidden_BTD = cluster.client.embed(ids_BT, mask_BT)
    assert torch.equal(hidden_BTD, entered[0].detach())
    stashes = []
    for number, (model, span) in enumerate(cluster.hops()):
        hidden_BTD, stash = computes[id(model)].forward_train(
            hidden_BTD, span=span, mask_BT=mask_BT, seed=5, keep_graph=number % 2 == 0
        )
        stashes.append((computes[id(model)], stash))
    loss, grad_BTD, tokens = cluster.client.loss(hidden_BTD, ids_BT, mask_BT, labels_BT)
    evaluated, same_tokens = cluster.client.evaluate(hidden_BTD, ids_BT, mask_BT, labels_BT)
    assert tokens == same_tokens == int((labels_BT[:, 1:] != -100).sum())
    torch.testing.assert_close(loss, want_loss.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(evaluated, loss)
    got = {}
    for compute, stash in reversed(stashes):
        grad_BTD, by_unit = compute.backward(stash, grad_BTD)
        got |= by_unit
    torch.testing.assert_close(grad_BTD, entered[0].grad, rtol=1e-4, atol=1e-6)
    wanted = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.requires_grad}
    assert sum(len(named) for named in got.values()) == len(wanted)
    path = cluster.spans[0].cut.layers_name
    for unit, named in got.items():
        for name, gradient in named.items():
            module, _, kind = name.rpartition(".")
            full = f"base_model.model.{path}.{unit.rpartition('.')[2]}.{module}.{kind}.default.weight"
            torch.testing.assert_close(gradient, wanted[full], rtol=1e-4, atol=1e-6)
