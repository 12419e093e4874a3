"""What is served: each run's adapter under the run's name, and each base model under its own.

A model is lent to one text at a time; those of a base model share its weights and its tokenizer.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from swarm.gateway.failures import ApiFailure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peers.published.catalogue import Published
    from swarm.model import SwarmModel
    from swarm.peer import Peer

_UNSAID = re.compile(r"[^A-Za-z0-9_.:/-]")


class Words:
    """A base model's tokenizer, for all who use it. The library's may be asked to encode by one thread at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_positions: int, token_count: int) -> None:
        self.tokenizer, self.max_positions, self.token_count = tokenizer, max_positions, token_count
        self._lock = threading.Lock()

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return self.tokenizer.chat_template is not None

    def of_text(self, text: str) -> list[int]:
        """A prompt's tokens."""
        with self._lock:
            return [int(token) for token in self.tokenizer(text)["input_ids"]]

    def of_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation's tokens, up to where the answer begins.

        Raises:
            ApiFailure: 400, the model has no chat template, or its template refuses this conversation.
        """
        if not self.can_chat:
            raise ApiFailure(400, "this model has no chat template; use /v1/completions", "no_chat_template", "model")
        try:
            with self._lock:
                text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
                return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        except TemplateError as error:
            why = f"the model's chat template refuses these messages: {error}"
            raise ApiFailure(400, why, "bad_messages", "messages") from error

    def text(self, ids: Sequence[int]) -> str:
        """What tokens say; special ones say nothing."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def piece(self, token: int) -> str:
        """One token as text, a special one by its name."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Models:
    """The models of one run's peer, lent to one text each; as many are made as are used at once."""

    def __init__(self, peer: Peer, words: Words) -> None:
        self.peer, self._words = peer, words
        self._lock = threading.Lock()
        self._idle: list[SwarmModel] = []

    @contextmanager
    def lend(self) -> Iterator[SwarmModel]:
        """A model for one text, in the calling thread."""
        with self._lock:
            model = self._idle.pop() if self._idle else None
        model = model or self.peer.model(tokenizer=self._words.tokenizer)
        try:
            yield model
        finally:
            with self._lock:
                self._idle.append(model)


@dataclass(eq=False, frozen=True, kw_only=True)
class Served:
    """One name under which text can be asked for: a run's adapter (True), or one that was published in it; or without
    any the base model, `through` the blocks of any run on it.
    """

    name: str
    words: Words
    through: tuple[Models, ...]
    adapter: bool | Published
    is_live: Callable[[Peer], bool]
    created: int = field(default_factory=lambda: int(time.time()))

    def models(self) -> Models:
        """Those of the first run that has all blocks now."""
        return next((models for models in self.through if self.is_live(models.peer)), self.through[0])

    def plain(self) -> dict[str, object]:
        """As /v1/models lists it; `can_chat` is for the page."""
        owner = "swarmtune-base" if self.adapter is False else "swarmtune-adapter"
        head = {"id": self.name, "object": "model", "created": self.created, "owned_by": owner}
        return {**head, "can_chat": self.words.can_chat}


def read_words(peer: Peer) -> Words:
    """The tokenizer of a peer's run, and what its model can take. Loads the client's ends of the model.

    Raises:
        BlockError, SwarmError: the model is not on this machine, or another one is.
    """
    from swarm.run_model import find_run_model

    model = peer.model()
    source = find_run_model(peer.node.spec, peer.config.model, peer.config.cache_dir)
    return Words(model.tokenizer, max_positions=source.max_positions, token_count=model.client.token_count)


def make_catalog(
    peers: Sequence[Peer], read: Callable[[Peer], Words], is_live: Callable[[Peer], bool]
) -> dict[str, Served]:
    """All names, adapters first. Names that several runs or base models have are told apart by the end of their id."""
    bases: dict[str, list[Peer]] = {}
    for peer in peers:
        bases.setdefault(peer.node.spec.model.fingerprint, []).append(peer)
    words = {fingerprint: read(alike[0]) for fingerprint, alike in bases.items()}
    for alike in bases.values():
        for other in alike[1:]:
            if other.node.spec.model.compute_dtype == alike[0].node.spec.model.compute_dtype:
                other.ends = alike[0].ends
    models = {peer: Models(peer, words[peer.node.spec.model.fingerprint]) for peer in peers}
    named = [(peer.node.spec.name, str(peer.node.config.run), [peer], True) for peer in peers]
    named += [(base_name(alike[0].node.spec.model.name), mark, alike, False) for mark, alike in bases.items()]
    times = Counter(name for name, *_ in named)
    served: dict[str, Served] = {}
    for name, mark, through, adapter in named:
        unique = name if times[name] == 1 else f"{name}-{mark[-6:]}"
        served[unique] = Served(
            name=unique,
            words=words[through[0].node.spec.model.fingerprint],
            through=tuple(models[peer] for peer in through),
            adapter=adapter,
            is_live=is_live,
        )
    return served


def base_name(name: str) -> str:
    """A base model's public name: a path on somebody's machine is only its last part."""
    path = PurePath(name)
    return _UNSAID.sub("-", path.name if path.is_absolute() or name.startswith(("~", ".")) else name)
