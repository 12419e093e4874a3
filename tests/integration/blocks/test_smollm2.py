"""A real model from a GGUF file: SmolLM2-135M-Instruct in two spans against the same model whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from blocks.client import RemoteCall
from blocks.decoding.cache import SessionCaches
from blocks.decoding.sessions import StepRequest
from blocks.errors import UnsupportedModel
from blocks.load import SpanModel, load_client, load_span, load_tokenizer
from blocks.source import ModelSource, find_model
from blocks.spans import Span
from tests.conftest import SMOLLM2

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Halves:
    """The model whole, and in two spans."""

    local: PreTrainedModel
    spans: list[SpanModel]


@pytest.fixture(scope="module")
def source(smollm2: Path) -> ModelSource:
    return find_model(SMOLLM2, cache_dir=smollm2.parent)


@pytest.fixture(scope="module")
def halves(source: ModelSource) -> Halves:
    return Halves(
        local=AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval(),
        spans=[load_span(source, span, dtype=torch.float32, device=CPU) for span in (Span(0, 15), Span(15, 30))],
    )


def test_a_gguf_file_is_converted_once_and_leaves_nothing_else(source: ModelSource, smollm2: Path) -> None:
    before = (source.path / "model.safetensors").stat().st_mtime_ns
    assert find_model(SMOLLM2, cache_dir=smollm2.parent) == ModelSource(
        **{name: getattr(source, name) for name in ModelSource.__slots__}
    )
    assert (source.path / "model.safetensors").stat().st_mtime_ns == before
    assert list(smollm2.parent.iterdir()) == [source.path]
    assert (source.num_blocks, source.hidden_size, source.vocab_size) == (30, 576, 49152)


def test_two_spans_and_a_client_equal_the_local_model(source: ModelSource, halves: Halves) -> None:
    local, spans = halves.local, halves.spans
    client = load_client(source, dtype=torch.float32, device=CPU)
    sessions = [SessionCaches(model, 1 << 26) for model in spans]
    for model, caches in zip(spans, sessions, strict=True):
        caches.open("s", span=model.span, batch=1, max_length=96, version="live")

    def remote(call: RemoteCall) -> Tensor:
        hidden_BTD = call.hidden_BTD
        for caches in sessions:
            hidden_BTD = caches.step(
                "s",
                hidden_BTD,
                position=call.start,
                mask_BT=call.mask_BT,
                position_ids_BT=call.position_ids_BT,
            )
        return hidden_BTD

    client.remote = remote
    tokenizer = load_tokenizer(source)
    chat = [{"role": "user", "content": "Name three fruits."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        want_logits = local(**prompt).logits
        got_logits = client(**prompt, use_cache=True).logits  # type: ignore[attr-defined]
    assert torch.equal(got_logits, want_logits)
    want = local.generate(**prompt, max_new_tokens=24, do_sample=False)
    got = client.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert torch.equal(got, want)
    assert len(tokenizer.decode(got[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)) > 10


@torch.no_grad()
def test_sessions_that_decode_together_write_what_each_writes_alone(source: ModelSource, halves: Halves) -> None:
    local, spans = halves.local, halves.spans
    tokenizer = load_tokenizer(source)
    sentences = ("The capital of France is", "Once upon a time, in a village by the sea,", "def add(a, b):", "1, 2, 3,")
    prompts = [tokenizer(sentence, return_tensors="pt")["input_ids"] for sentence in sentences]
    wants = [local.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None) for prompt in prompts]
    hosts = [SessionCaches(model, 1 << 26) for model in spans]
    texts = dict(enumerate(prompts))
    seen = dict.fromkeys(texts, 0)
    for at in texts:
        for host, model in zip(hosts, spans, strict=True):
            host.open(str(at), span=model.span, batch=1, max_length=64, version="live")
    number = 0
    while any(texts[at].shape[1] < wants[at].shape[1] for at in texts):
        number += 1
        ready = [at for at in texts if at < number and texts[at].shape[1] < wants[at].shape[1]]  # one joins at a time
        hidden = {at: local.model.embed_tokens(texts[at][:, seen[at] :]) for at in ready}
        for host in hosts:
            requests = [StepRequest(session=str(at), hidden_BTD=hidden[at], position=seen[at]) for at in ready]
            for at, output in zip(ready, host.step_many(requests), strict=True):
                assert isinstance(output, Tensor)
                hidden[at] = output
        for at in ready:
            seen[at] = texts[at].shape[1]
            token = local.lm_head(local.model.norm(hidden[at][:, -1:])).argmax(-1)
            texts[at] = torch.cat([texts[at], token], 1)
    for at, want in enumerate(wants):
        assert torch.equal(texts[at], want)


def test_a_file_that_only_calls_itself_gguf_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf: pip install 'swarmtune[demo]'")
    (tmp_path / "fake.gguf").write_bytes(b"no gguf at all, but long enough to be read")
    with pytest.raises(UnsupportedModel, match=r"fake\.gguf"):
        find_model(str(tmp_path / "fake.gguf"), cache_dir=tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []
