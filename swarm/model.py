"""A distributed model with `generate()`: a transformers model whose blocks are somewhere in the swarm.

Calls come from the caller's thread; the chain lives on the node's loop.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from blocks.checks import check_kind, check_number, check_whole, is_unicode, refuse
from blocks.client import ClientModel, RemoteCall
from blocks.decoding.sampling import Chooser
from blocks.decoding.speculation import LOOKUP_TOKENS, PLAIN, Speculation, load_draft
from blocks.errors import BadSession
from blocks.spans import Span
from peers.chains.decode_chain import DecodeSession
from peers.chains.decode_legs import SessionConfig
from peers.chains.history import StepInput
from peers.published.catalogue import Published
from peers.routes.router import Router
from peers.streams.pool import Pool
from swarm.errors import BadConfig
from swarm.interrupt import Interrupt
from swarm.loop import LEFT

_MAX_TEMPERATURE = 100
_EXPECTED_TOKENS = 256  # of an answer: most end before, and those that go on grow where there is room


class RemoteBlocks:
    """What a client's only layer calls: one decoding session after another over the chain."""

    def __init__(
        self, pool: Pool, router: Router, whole: Span, config: SessionConfig, *, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._pool, self._router, self._whole, self._config, self._loop = pool, router, whole, config, loop
        self._most = config.max_length
        self._session: DecodeSession | None = None
        self._length = 0
        self._interrupt = Interrupt()
        self._published: Published | None = None

    def prepare(
        self, *, length: int, max_new_tokens: int, adapter: bool | Published, interrupt: Interrupt | None = None
    ) -> None:
        """The next text's prompt and longest answer, and with which adapter it goes (True: the run's, False: none).
        Ends the one before. Through `interrupt` another thread may end this text.

        Raises:
            BadSession: prompt and answer are more than the model takes.
            BadConfig: the peer has left its run.
        """
        if self._loop.is_closed():
            raise BadConfig(LEFT)
        if length + max_new_tokens > self._most:
            raise BadSession(
                f"this model takes {self._most} tokens, and the prompt has {length} and {max_new_tokens} are to be"
                " written; shorten the prompt, or lower max_new_tokens (--max-tokens)"
            )
        self.close()
        self._interrupt = interrupt or Interrupt()
        self._published = adapter if isinstance(adapter, Published) else None
        self._config = replace(
            self._config,
            max_length=length + max_new_tokens,
            expected_length=length + min(max_new_tokens, _EXPECTED_TOKENS),
            plain=adapter is False,
            adapter=None if self._published is None else self._published.content,
        )

    def __call__(self, call: RemoteCall) -> Tensor:
        """One step of the session, in the caller's thread.

        Raises:
            NoRoute, Refused: see DecodeSession.step.
            Interrupted: another thread ended this text.
            BadSession: the call needs no cache, which the hosts only serve to trainers.
        """
        if not call.cached:
            raise BadSession("a pass without a cache is not served; call generate(), or pass use_cache=True")
        if self._session is None or (call.start == 0 and self._length > 0):
            self.close()
            config = replace(self._config, batch=call.hidden_BTD.shape[0])
            router = self._router if self._published is None else self._router.with_adapter(self._published)
            self._session = DecodeSession(self._pool, router, self._whole, config)
        is_plain = _is_plain(call)
        step = StepInput(
            hidden_BTD=call.hidden_BTD.detach(),
            position=call.start,
            mask_BS=None if is_plain else call.mask_BT,
            positions_BT=None if is_plain else call.position_ids_BT,
            rows=call.rows,
        )
        self._length = call.start + call.hidden_BTD.shape[1]
        return self._interrupt.wait(self._session.step(step), self._loop)

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
        if session is not None and not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(session.close(), self._loop).result()


def _texts(prompt: object) -> list[str]:
    found = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, list | tuple) else None
    if found is None or not all(_is_text(text) for text in found):
        refuse(BadConfig, "prompt", prompt, "text, or a list of texts, without halves of characters")
    return found


def _check_messages(messages: object) -> None:
    found = messages if isinstance(messages, list | tuple) else ()
    if not found or not all(isinstance(each, Mapping) and _says_something(each) for each in found):
        refuse(BadConfig, "messages", messages, 'a list such as [{"role": "user", "content": "Hello"}]')


def _says_something(message: Mapping[object, object]) -> bool:
    return _is_text(message.get("role")) and _is_text(message.get("content"))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and is_unicode(value)


def _is_plain(call: RemoteCall) -> bool:
    """Whether nothing is padded, so that mask and positions say what the hosts know without them."""
    if call.mask_BT is not None and not bool(call.mask_BT.bool().all()):
        return False
    end = call.start + call.hidden_BTD.shape[1]
    return call.position_ids_BT is None or bool((call.position_ids_BT == torch.arange(call.start, end)).all())


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; `seed` makes a sampled text repeatable, except with beams.

    Raises:
        BadConfig: a value is of the wrong kind or out of range; the message names it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    num_beams: int = 1

    def __post_init__(self) -> None:
        check_whole(BadConfig, "max_new_tokens", self.max_new_tokens, 1)
        check_number(BadConfig, "temperature", self.temperature, 0, _MAX_TEMPERATURE)
        check_number(BadConfig, "top_p", self.top_p, 0, 1)
        if self.seed is not None:
            check_whole(BadConfig, "seed", self.seed, -(2**63), 2**64)
        check_whole(BadConfig, "num_beams", self.num_beams, 1)

    def options(self) -> dict[str, object]:
        """As transformers' generate takes them; for one call of it."""
        common: dict[str, object] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if self.temperature <= 0:
            return common | {"do_sample": False}
        if self.num_beams > 1:  # beams compare whole texts, which needs every token's score
            return common | {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return common | {"do_sample": False, "logits_processor": LogitsProcessorList([self.chooser()])}

    def chooser(self, *, top_logprobs: int | None = None) -> Chooser:
        """Who chooses the tokens of one text; without a seed, of a text unlike any other."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return Chooser(temperature=self.temperature, top_p=self.top_p, seed=seed, top_logprobs=top_logprobs)


class Watcher(Protocol):
    """Somebody who chooses a text's tokens, sees each as it comes, and may end the text."""

    chooser: Chooser
    interrupt: Interrupt

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """A stopping criterion of transformers: called after each step with prompt and text [1, T]; True ends it."""


class SwarmModel:
    """Text from the swarm. `client` is the transformers model itself, for everything beyond `generate` and `chat`.
    `published` takes the place of the adapter that the run trains.
    """

    def __init__(
        self,
        client: ClientModel,
        tokenizer: PreTrainedTokenizerBase,
        blocks: RemoteBlocks,
        published: Published | None = None,
    ) -> None:
        self.client, self.tokenizer, self.blocks, self.published = client, tokenizer, blocks, published
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
            BadSession: a prompt is empty, or longer than the model takes.
            BadSpeculation: there are several texts, or beams.
            BadConfig: the prompt is no text.
        """
        prompts = _texts(prompt)
        if not prompts:
            return []
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
            BadSession: the model has no chat template, its template refuses these messages, or they are too long.
            BadSpeculation: there are beams.
            BadConfig: the messages are none.
        """
        _check_messages(messages)
        if self.tokenizer.chat_template is None:
            raise BadSession("this model has no chat template; continue plain text instead: generate(), or --raw")
        try:
            batch = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise BadSession(f"the model's chat template refuses these messages ({error}); change them") from None
        return self._complete(batch, sampling or Sampling(), adapter, streamer, speculation)[0]

    def speculation(self, draft: str | None, lookup: bool, cache_dir: Path) -> Speculation:
        """Guesses by a small model on this machine (a name as `find_model` takes), else from the text, else none.

        Raises:
            BlockError: the draft cannot be loaded, or has other tokens than this model.
            BadConfig: it is no name.
        """
        check_kind(BadConfig, "draft", draft, (str, type(None)), "the name or the path of a small model")
        if draft is None:
            return Speculation(lookup=LOOKUP_TOKENS) if lookup else PLAIN
        size = self.client.token_count
        return Speculation(draft=load_draft(draft, self.tokenizer, vocab_size=size, cache_dir=cache_dir))

    def continue_ids(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        watcher: Watcher,
        *,
        adapter: bool | Published,
        speculation: Speculation,
    ) -> None:
        """Continue one text of token ids; all that comes of it, `watcher` has seen. `adapter` may be another one than
        this model's.

        Raises:
            NoRoute: some blocks have no live holder.
            Interrupted: the watcher's interrupt was set from another thread.
        """
        input_ids = torch.tensor([list(ids)])
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        guesses = speculation.options(texts=1, num_beams=1)
        self.blocks.prepare(
            length=len(ids), max_new_tokens=max_new_tokens, adapter=self._chosen(adapter), interrupt=watcher.interrupt
        )
        try:
            self.client.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                pad_token_id=pad,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([watcher.chooser]),
                stopping_criteria=StoppingCriteriaList([watcher]),
                **guesses,
            )
        finally:
            self.blocks.close()

    def close(self) -> None:
        """Free the hosts' caches."""
        self.blocks.close()

    def _chosen(self, adapter: bool | Published) -> bool | Published:
        return self.published if adapter is True and self.published is not None else adapter

    def _complete(
        self,
        batch: Mapping[str, Tensor],
        sampling: Sampling,
        adapter: bool,
        streamer: BaseStreamer | None,
        speculation: Speculation,
    ) -> list[str]:
        check_kind(BadConfig, "sampling", sampling, Sampling, "swarm.Sampling(...), or leave it out")
        texts, length = batch["input_ids"].shape
        if not bool(batch["attention_mask"].any(dim=1).all()):
            raise BadSession("a prompt is empty; write some text for the model to continue")
        guesses = speculation.options(texts=texts, num_beams=sampling.num_beams)
        self.blocks.prepare(length=length, max_new_tokens=sampling.max_new_tokens, adapter=self._chosen(adapter))
        try:
            output = self.client.generate(
                **batch, streamer=streamer, pad_token_id=self.tokenizer.pad_token_id, **sampling.options(), **guesses
            )
        finally:
            self.blocks.close()
        return [str(text) for text in self.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)]
