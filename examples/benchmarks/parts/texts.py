"""Texts and their times: prompts of a given length, the local model, and a clock that sees each token come."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import torch
from parts.swarms import CACHE, MODEL
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from blocks.loading import loading
from blocks.source import ModelSource, find_model
from swarm.data.demo_text import demo_text
from swarm.model import Sampling, SwarmModel
from swarm.peer import Peer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TokenClock(BaseStreamer):  # type: ignore[misc]
    """Notes when each new token came, in seconds since it was made, and calls `at_token` with their number."""

    def __init__(self, at_token: Mapping[int, Callable[[], None]] | None = None) -> None:
        self.began = time.perf_counter()
        self.moments: list[float] = []
        self._prompt_seen = False
        self._at_token = at_token or {}

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # transformers begins with the prompt
            self._prompt_seen = True
            return
        self.moments += [time.perf_counter() - self.began] * value.numel()
        if (action := self._at_token.get(len(self.moments))) is not None:
            action()

    def end(self) -> None:
        """Nothing is kept back."""

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next."""
        return [after - before for before, after in zip(self.moments, self.moments[1:], strict=False)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Local:
    """The whole model in this process, with as many threads as torch has been given."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def generate(self, prompt: str, num_tokens: int, clock: TokenClock | None = None) -> str:
        """Greedy; exactly `num_tokens`."""
        batch = self.tokenizer(prompt, return_tensors="pt")
        output = self.model.generate(
            **batch,
            streamer=clock,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        return str(self.tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))


def source() -> ModelSource:
    """The model's files; unpacked the first time."""
    return find_model(MODEL, cache_dir=CACHE / "swarmtune")


def load_local(tokenizer: PreTrainedTokenizerBase, dtype: str) -> Local:
    """The local model, which writes on past an end of text."""
    model = load_whole(dtype)
    model.generation_config.eos_token_id = None
    return Local(model=model, tokenizer=tokenizer)


def load_whole(dtype: str) -> PreTrainedModel:
    """The whole model, as transformers loads it."""
    with loading():
        return AutoModelForCausalLM.from_pretrained(source().path, dtype=DTYPES[dtype])


def load_models(peer: Peer, count: int) -> list[SwarmModel]:
    """Models of one client process for `count` sessions at a time, over one copy of the weights; no end of text."""
    models = [peer.model() for _ in range(count)]
    for model in models:
        model.client.generation_config.eos_token_id = None  # type: ignore[attr-defined]
        own = cast(torch.nn.Module, model.client).parameters()
        first = cast(torch.nn.Module, models[0].client).parameters()
        for mine, shared in zip(own, first, strict=True):
            mine.data = shared.data
    return models


def prompts(tokenizer: PreTrainedTokenizerBase, count: int, num_tokens: int) -> list[str]:
    """Different pieces of Python's own reference, of about `num_tokens` each."""
    ids = tokenizer("\n\n".join(demo_text().train[:40]))["input_ids"]
    stride = (len(ids) - num_tokens) // max(1, count)
    return [str(tokenizer.decode(ids[at * stride : at * stride + num_tokens])) for at in range(count)]


def rate(models: Sequence[SwarmModel], texts: Sequence[str], num_tokens: int) -> float:
    """Tokens/s of all models together, each writing on from its own text, from the first's start to the last's end."""

    def write(pair: tuple[SwarmModel, str]) -> None:
        pair[0].generate(pair[1], Sampling(max_new_tokens=num_tokens))

    began = time.perf_counter()
    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(write, zip(models, texts, strict=True)))
    return len(models) * num_tokens / (time.perf_counter() - began)


def first_difference(tokenizer: PreTrainedTokenizerBase, one: str, other: str) -> int | None:
    """The first token in which two continuations differ, counted from 0; None where they are equal."""
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one, other)]
    pairs = zip(*tokens, strict=False)
    differs = next((number for number, (left, right) in enumerate(pairs) if left != right), None)
    return differs if differs is not None or one == other else min(map(len, tokens))
