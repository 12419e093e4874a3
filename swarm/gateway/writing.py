"""One text being written in a thread: its tokens become pieces as they come, and whoever asked for it may end it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StoppingCriteria

from blocks.decoding.sampling import Choice
from blocks.decoding.speculation import Speculation
from swarm.gateway.catalog import Served
from swarm.gateway.pieces import TextPieces
from swarm.interrupt import Interrupt, Interrupted
from swarm.model import Sampling, SwarmModel


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRequest:
    """One text to be written after the tokens `ids`. `top_logprobs` None: nothing is told of probabilities."""

    served: Served
    ids: tuple[int, ...]
    sampling: Sampling
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class ToldToken:
    """A token that was told, where its text begins, and what is known of its probability."""

    token: int
    start: int
    choice: Choice


@dataclass(frozen=True, slots=True)
class Piece:
    """More of the text; empty where only a first token has come, which has no whole character yet."""

    text: str
    tokens: tuple[ToldToken, ...] = ()
    is_first: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The text is complete: why ("stop" or "length"), and how many tokens it has."""

    reason: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The text ended too early."""

    error: BaseException


Event = Piece | Ended | Failed


class Writing(StoppingCriteria):  # type: ignore[misc]
    """A swarm.model.Watcher. `tell` is called in the thread that writes, with each event in order."""

    def __init__(self, request: TextRequest, tell: Callable[[Event], None]) -> None:
        self.interrupt = Interrupt()
        self.chooser = request.sampling.chooser(top_logprobs=request.top_logprobs)
        self._request, self._tell = request, tell
        self._pieces = TextPieces(request.served.words.text, request.ids, request.stops)
        self._seen = len(request.ids)
        self._choices: dict[int, Choice] = {}
        self._is_done = False
        self._ends: frozenset[int] = frozenset()

    def write(self, model: SwarmModel, speculation: Speculation) -> None:
        """All of it.

        Raises:
            Interrupted, NoRoute, Refused: see SwarmModel.continue_ids.
        """
        request = self._request
        self._ends = _ends(model)
        most = request.sampling.max_new_tokens
        model.continue_ids(request.ids, most, self, adapter=request.served.adapter, speculation=speculation)
        if self.interrupt.is_set and not self._is_done:
            raise Interrupted("the text was ended before it was complete")
        rest = self._pieces.finish()
        if rest or self._choices:
            self._tell(Piece(rest, self._told()))
        reason = "stop" if self._is_done or self._pieces.is_stopped else "length"
        self._tell(Ended(reason=reason, tokens=self._seen - len(request.ids)))

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """See Watcher."""
        for token in input_ids[0, self._seen :].tolist():
            if self._is_done:
                break  # guesses behind the end
            self._take(int(token))
        return torch.full((1,), self._is_done or self.interrupt.is_set)

    def _take(self, token: int) -> None:
        choice = self.chooser.noted(self._seen)
        is_first = self._seen == len(self._request.ids)
        self._seen += 1
        if token in self._ends:
            self._is_done = True
            if is_first:
                self._tell(Piece("", (), is_first))
            return
        if choice is not None:
            self._choices[self._seen - 1] = choice
        piece = self._pieces.add(token)
        self._is_done = self._pieces.is_stopped
        if piece or is_first:
            self._tell(Piece(piece, self._told() if piece else (), is_first))

    def _told(self) -> tuple[ToldToken, ...]:
        """The tokens of the last piece, in order; those behind a stop string are never told."""
        places = self._pieces.told()
        if self._request.top_logprobs is None:
            return ()
        numbers = list(self._choices)[: len(places)]
        return tuple(
            ToldToken(place.token, place.start, self._choices.pop(number))
            for place, number in zip(places, numbers, strict=True)
        )


def _ends(model: SwarmModel) -> frozenset[int]:
    """The tokens that end a text."""
    given = getattr(model.client.generation_config, "eos_token_id", None)
    if given is None:
        return frozenset()
    return frozenset([given] if isinstance(given, int) else (int(each) for each in given))
