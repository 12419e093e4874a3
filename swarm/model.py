"""A distributed model with `generate()`: a transformers model whose blocks are somewhere in the swarm.

Calls come from the caller's thread; the chain lives on the node's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from blocks.client import ClientModel, RemoteCall
from blocks.errors import BadSession
from blocks.spans import Span
from blocks.speculation import LOOKUP_TOKENS, PLAIN, Speculation, load_draft
from peers.decode_chain import DecodeSession
from peers.decode_legs import SessionConfig
from peers.history import StepInput
from peers.pool import Pool
from peers.router import Router

_EXPECTED_TOKENS = 256  # of an answer: most end before, and those that go on grow where there is room


class RemoteBlocks:
    """What a client's only layer calls: one decoding session after another over the chain."""

    def __init__(
        self, pool: Pool, router: Router, whole: Span, config: SessionConfig, *, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._pool, self._router, self._whole, self._config, self._loop = pool, router, whole, config, loop
        self._session: DecodeSession | None = None
        self._length = 0

    def prepare(self, *, length: int, max_new_tokens: int, plain: bool) -> None:
        """The next text's prompt and longest answer, and whether it goes without the adapter; ends the one before."""
        self.close()
        self._config = replace(
            self._config,
            max_length=length + max_new_tokens,
            expected_length=length + min(max_new_tokens, _EXPECTED_TOKENS),
            plain=plain,
        )

    def __call__(self, call: RemoteCall) -> Tensor:
        """One step of the session, in the caller's thread.

        Raises:
            NoRoute, Refused: see DecodeSession.step.
            BadSession: the call needs no cache, which the hosts only serve to trainers.
        """
        if not call.cached:
            raise BadSession("a pass without a cache is not served; call generate(), or pass use_cache=True")
        if self._session is None or (call.start == 0 and self._length > 0):
            self.close()
            config = replace(self._config, batch=call.hidden_BTD.shape[0])
            self._session = DecodeSession(self._pool, self._router, self._whole, config)
        is_plain = _is_plain(call)
        step = StepInput(
            hidden_BTD=call.hidden_BTD.detach(),
            position=call.start,
            mask_BS=None if is_plain else call.mask_BT,
            positions_BT=None if is_plain else call.position_ids_BT,
            rows=call.rows,
        )
        self._length = call.start + call.hidden_BTD.shape[1]
        return asyncio.run_coroutine_threadsafe(self._session.step(step), self._loop).result()

    @property
    def rounds(self) -> frozenset[int]:
        """The rounds whose adapter serves the present text."""
        return frozenset() if self._session is None else self._session.rounds

    @property
    def replaced(self) -> int:
        """How many hosts were replaced in the present text."""
        return 0 if self._session is None else self._session.replaced

    def close(self) -> None:
        """Free the hosts' caches."""
        session, self._session, self._length = self._session, None, 0
        if session is not None:
            asyncio.run_coroutine_threadsafe(session.close(), self._loop).result()


def _is_plain(call: RemoteCall) -> bool:
    """Whether nothing is padded, so that mask and positions say what the hosts know without them."""
    if call.mask_BT is not None and not bool(call.mask_BT.bool().all()):
        return False
    end = call.start + call.hidden_BTD.shape[1]
    return call.position_ids_BT is None or bool((call.position_ids_BT == torch.arange(call.start, end)).all())


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; `seed` makes a sampled text repeatable."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    num_beams: int = 1

    def options(self) -> dict[str, object]:
        """As transformers' generate takes them."""
        if self.temperature <= 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": self.num_beams}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "num_beams": self.num_beams,
        }


class SwarmModel:
    """Text from the swarm. `client` is the transformers model itself, for everything beyond `generate` and `chat`."""

    def __init__(self, client: ClientModel, tokenizer: PreTrainedTokenizerBase, blocks: RemoteBlocks) -> None:
        self.client, self.tokenizer, self.blocks = client, tokenizer, blocks
        client.remote = blocks

    def generate(
        self,
        prompt: str | Sequence[str],
        sampling: Sampling | None = None,
        *,
        adapter: bool = True,
        streamer: BaseStreamer | None = None,
        speculation: Speculation = PLAIN,
    ) -> list[str]:
        """Continue one text or several together; returns only what is new. `adapter` False is the base model.

        `speculation` guesses tokens of a single text ahead: fewer round trips, and in fp32 the same greedy text.

        Raises:
            NoRoute: some blocks have no live holder.
            BadSpeculation: there are several texts, or beams.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        return self._complete(batch, sampling or Sampling(), adapter, streamer, speculation)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling: Sampling | None = None,
        *,
        adapter: bool = True,
        streamer: BaseStreamer | None = None,
        speculation: Speculation = PLAIN,
    ) -> str:
        """Answer a conversation through the tokenizer's chat template; see `generate`.

        Raises:
            NoRoute: some blocks have no live holder.
            BadSpeculation: there are beams.
        """
        batch = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return self._complete(batch, sampling or Sampling(), adapter, streamer, speculation)[0]

    def speculation(self, draft: str | None, lookup: bool, cache_dir: Path) -> Speculation:
        """Guesses by a small model on this machine (a name as `find_model` takes), else from the text, else none.

        Raises:
            BlockError: the draft cannot be loaded, or has other tokens than this model.
        """
        if draft is None:
            return Speculation(lookup=LOOKUP_TOKENS) if lookup else PLAIN
        size = self.client.token_count
        return Speculation(draft=load_draft(draft, self.tokenizer, vocab_size=size, cache_dir=cache_dir))

    def close(self) -> None:
        """Free the hosts' caches."""
        self.blocks.close()

    def _complete(
        self,
        batch: Mapping[str, Tensor],
        sampling: Sampling,
        adapter: bool,
        streamer: BaseStreamer | None,
        speculation: Speculation,
    ) -> list[str]:
        texts, length = batch["input_ids"].shape
        guesses = speculation.options(texts=texts, num_beams=sampling.num_beams)
        self.blocks.prepare(length=length, max_new_tokens=sampling.max_new_tokens, plain=not adapter)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        try:
            output = self.client.generate(
                **batch, streamer=streamer, pad_token_id=self.tokenizer.pad_token_id, **sampling.options(), **guesses
            )
        finally:
            self.blocks.close()
        return [str(text) for text in self.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)]
