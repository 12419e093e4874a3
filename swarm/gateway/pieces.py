"""From tokens to the text that may be shown: whole characters only, up to a stop string. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]

CONTEXT_TOKENS = 6  # of the prompt, with which the first new token is decoded: some decoders drop a leading space
_MAX_PENDING = 12  # tokens without a whole character among them; a character has at most four, so this is no text
_BROKEN = "\ufffd"


@dataclass(frozen=True, slots=True)
class Place:
    """A token, and the character of the text at which what it stands for begins."""

    token: int
    start: int


class TextPieces:
    """The text of one answer, token by token. `context` are the last tokens before it."""

    def __init__(self, decode: Decode, context: Sequence[int], stops: Sequence[str]) -> None:
        self._decode, self._stops = decode, tuple(stops)
        self._ids = list(context)[-CONTEXT_TOKENS:]
        self._shown = len(self._ids)  # tokens whose characters are in `_text`
        self._before = decode(self._ids) if self._ids else ""
        self._text = ""  # not handed out yet
        self._given = 0  # characters handed out
        self._places: list[Place] = []
        self.is_stopped = False

    def add(self, token: int) -> str:
        """What is certain after one more token: not the first part of a character, nor what may become a stop string.
        Nothing once a stop string was found.
        """
        if self.is_stopped:
            return ""
        self._places.append(Place(token, self._given + len(self._text)))
        self._ids.append(token)
        text = self._decode(self._ids)
        if len(text) <= len(self._before) or self._is_part(text):
            return ""
        self._settle(text)
        return self._give(self._find_stop())

    def finish(self) -> str:
        """What was held back; there is no next token."""
        if self.is_stopped:
            return ""
        text = self._decode(self._ids)
        if len(text) > len(self._before):
            self._settle(text)
        end = self._find_stop()
        return self._give(end if self.is_stopped else len(self._text))

    def told(self) -> list[Place]:
        """The tokens whose text has been handed out since the last call, so far as it has."""
        told = [place for place in self._places if place.start < self._given]
        self._places = [place for place in self._places if place.start >= self._given]
        return told

    def _is_part(self, text: str) -> bool:
        return text.endswith(_BROKEN) and len(self._ids) - self._shown < _MAX_PENDING

    def _settle(self, text: str) -> None:
        """Take over the new characters; decode what follows with the newest tokens as context."""
        self._text += text[len(self._before) :]
        self._ids = self._ids[self._shown :] if self._shown < len(self._ids) else self._ids
        self._shown = len(self._ids)
        self._before = self._decode(self._ids)

    def _find_stop(self) -> int:
        """How much may be handed out; notes whether a stop string ends the text there."""
        found = [place for stop in self._stops if (place := self._text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            return min(found)
        longest = max((_overlap(self._text, stop) for stop in self._stops), default=0)
        return len(self._text) - longest

    def _give(self, end: int) -> str:
        piece, self._text = self._text[:end], self._text[end:]
        self._given += len(piece)
        return piece


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
