"""Answers as OpenAI's clients read them: whole ones and the chunks of streams."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from starlette.responses import JSONResponse

from blocks.decoding.sampling import Likely
from swarm.gateway.catalog import Words
from swarm.gateway.failures import ApiFailure
from swarm.gateway.writing import Ended, Piece, ToldToken

_IMPOSSIBLE = -9999.0  # what OpenAI says for a probability of zero; JSON has no infinity


class AsciiResponse(JSONResponse):
    """JSON in ASCII: text from outside may hold what UTF-8 cannot carry, such as half of a surrogate pair."""

    def render(self, content: object) -> bytes:
        """See Response."""
        return dumps(content).encode("ascii")


def dumps(content: object) -> str:
    """JSON on one line of ASCII."""
    return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def error_response(failure: ApiFailure) -> JSONResponse:
    """An answer that is an error."""
    return AsciiResponse(failure.body(), status_code=failure.status, headers=failure.headers())


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


@dataclass(kw_only=True)
class Gathered:
    """One choice as far as it has come."""

    text: str = ""
    tokens: list[ToldToken] = field(default_factory=list)
    reason: str | None = None
    count: int = 0

    def add(self, event: Piece | Ended) -> None:
        """More of it."""
        if isinstance(event, Piece):
            self.text += event.text
            self.tokens.extend(event.tokens)
        else:
            self.reason, self.count = event.reason, event.tokens


class ChatShape:
    """Answers of /v1/chat/completions for one request. `with_logprobs`: they were asked for."""

    prefix, whole_kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, words: Words, *, with_logprobs: bool) -> None:
        self._words, self._with_logprobs = words, with_logprobs
        self._head = {"id": self.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Gathered], counts: Mapping[str, int]) -> dict[str, object]:
        """A complete answer."""
        shaped = [
            self._choice(number, choice.text, choice.tokens) | {"finish_reason": choice.reason}
            for number, choice in enumerate(choices)
        ]
        return {**self._head, "object": self.whole_kind, "choices": shaped, "usage": dict(counts)}

    def chunk(self, choices: Sequence[Mapping[str, object]], **more: object) -> dict[str, object]:
        """A piece of a stream."""
        return {**self._head, "object": self.chunk_kind, "choices": list(choices), **more}

    def first(self, number: int) -> dict[str, object] | None:
        """What a choice of a stream begins with."""
        return self._delta(number, {"role": "assistant", "content": ""}, ())

    def piece(self, number: int, piece: Gathered) -> dict[str, object]:
        """More of a choice."""
        return self._delta(number, {"content": piece.text}, piece.tokens)

    def end(self, number: int, reason: str) -> dict[str, object]:
        """What a choice of a stream ends with."""
        return self._delta(number, {}, ()) | {"finish_reason": reason}

    def _choice(self, number: int, text: str, tokens: Sequence[ToldToken]) -> dict[str, object]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": number, "message": message, "logprobs": self._logprobs(tokens)}

    def _delta(self, number: int, delta: Mapping[str, object], tokens: Sequence[ToldToken]) -> dict[str, object]:
        logprobs = self._logprobs(tokens) if tokens else None
        return {"index": number, "delta": dict(delta), "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[ToldToken]) -> dict[str, object] | None:
        if not self._with_logprobs:
            return None
        told = [
            self._token(token.choice.chosen) | {"top_logprobs": [self._token(best) for best in token.choice.best]}
            for token in tokens
        ]
        return {"content": told, "refusal": None}

    def _token(self, likely: Likely) -> dict[str, object]:
        text = self._words.piece(likely.token)
        whole = "\ufffd" not in text  # else it is a part of a character, whose bytes this text does not show
        return {"token": text, "logprob": _finite(likely.logprob), "bytes": list(text.encode()) if whole else None}


class CompletionShape(ChatShape):
    """Answers of /v1/completions."""

    prefix, whole_kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def first(self, number: int) -> dict[str, object] | None:
        """Nothing."""
        return None

    def piece(self, number: int, piece: Gathered) -> dict[str, object]:
        """More of a choice."""
        return self._choice(number, piece.text, piece.tokens) | {"finish_reason": None}

    def end(self, number: int, reason: str) -> dict[str, object]:
        """What a choice of a stream ends with."""
        return {"index": number, "text": "", "logprobs": None, "finish_reason": reason}

    def _choice(self, number: int, text: str, tokens: Sequence[ToldToken]) -> dict[str, object]:
        return {"index": number, "text": text, "logprobs": self._logprobs(tokens)}

    def _logprobs(self, tokens: Sequence[ToldToken]) -> dict[str, object] | None:
        if not self._with_logprobs:
            return None
        return {
            "tokens": [self._words.piece(token.token) for token in tokens],
            "token_logprobs": [_finite(token.choice.chosen.logprob) for token in tokens],
            "top_logprobs": [
                {self._words.piece(best.token): _finite(best.logprob) for best in token.choice.best} for token in tokens
            ],
            "text_offset": [token.start for token in tokens],
        }


def _finite(logprob: float) -> float:
    return max(_IMPOSSIBLE, logprob)  # in this order a nan is impossible, too
