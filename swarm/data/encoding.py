"""Rows to token ids and a mask of where the loss is. The tokenizer is the model's own, seen through a Protocol."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray

from swarm.data.rows import ChatRow, LabelRow, PairRow, Row, TextRow
from swarm.errors import BadData

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token: str | None
    eos_token_id: int | None
    chat_template: object
    is_fast: bool

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, return_offsets_mapping: bool = False
    ) -> Mapping[str, object]:
        """Token ids under `input_ids`, and where asked for their character ranges under `offset_mapping`."""

    def apply_chat_template(
        self,
        conversation: list[Mapping[str, object]],
        *,
        tokenize: bool,
        add_generation_prompt: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
    ) -> object:
        """The conversation as text, or as ids with the mask of the template's own generation marks."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """`ids` int32 and `learn` bool of equal length: the tokens, and on which of them the loss is."""

    ids: NDArray[np.int32]
    learn: NDArray[np.bool_]


def encode_row(row: Row, tokenizer: Tokenizer) -> Encoded:
    """Token ids and loss mask of one row, however long.

    Raises:
        BadData: a conversation that the tokenizer's template cannot render; the message says where.
    """
    match row:
        case TextRow(packed=True):
            ids = _ids(tokenizer, row.text, special=False)
            return _encoded([(ids, True)])
        case TextRow():
            return _encoded([(_ids(tokenizer, row.text) + _end(tokenizer), True)])
        case PairRow():
            return _encode_pair(row, tokenizer)
        case LabelRow():
            return _encode_pair(row.pair, tokenizer)
        case ChatRow():
            return _encode_chat(row, tokenizer)


def label_ids(label: str, tokenizer: Tokenizer) -> NDArray[np.int32]:
    """The tokens of a label as they stand behind a text, without what ends an answer."""
    return np.asarray(_ids(tokenizer, f" {label}", special=False), dtype=np.int32)


def answer_end(tokenizer: Tokenizer) -> list[int]:
    """What ends an answer: one token, or none where the model has no such."""
    return _end(tokenizer)


def answer_spans(row: ChatRow, tokenizer: Tokenizer, whole: str) -> list[tuple[int, int]]:
    """Character ranges of the assistant's answers in the rendered conversation, each with its end-of-turn token.

    Found by rendering the conversation up to before and after each answer. Where a template rewrites earlier turns, so
    that these are no prefixes of the whole, the answer's text itself is looked for.
    """
    spans: list[tuple[int, int]] = []
    cursor = 0
    for number, message in enumerate(row.messages):
        found = _span_by_content(str(message["content"]), whole, cursor)
        if message["role"] != "assistant":
            cursor = found[1] if found else cursor  # so that a question is not taken for an answer of the same words
            continue
        span = _span_by_prefix(row, tokenizer, whole, number)
        if span is None or span[0] < cursor:
            span = found
        if span is None:
            raise BadData(f"{row.where}: message {number + 1} is lost in the chat template; use prompt and completion")
        start, end = span[0], _without_tail(tokenizer, whole, span)
        spans.append((start, end))
        cursor = end
    return spans


def _encode_pair(row: PairRow, tokenizer: Tokenizer) -> Encoded:
    completion = _ids(tokenizer, row.completion, special=False)
    if not completion:
        return _encoded([(_ids(tokenizer, row.prompt), False)])
    return _encoded([(_ids(tokenizer, row.prompt), False), (completion + _end(tokenizer), True)])


def _encode_chat(row: ChatRow, tokenizer: Tokenizer) -> Encoded:
    if not tokenizer.chat_template:
        if row.plain is not None:
            return _encode_pair(row.plain, tokenizer)
        raise BadData(f"{row.where}: this model's tokenizer has no chat template; use prompt and completion")
    if _GENERATION.search(str(tokenizer.chat_template)):
        return _encode_marked(row, tokenizer)
    whole = _render(row, tokenizer)
    spans = answer_spans(row, tokenizer, whole)
    return _encode_fast(tokenizer, whole, spans) if tokenizer.is_fast else _encode_pieces(tokenizer, whole, spans)


def _encode_marked(row: ChatRow, tokenizer: Tokenizer) -> Encoded:
    """By the template's own {% generation %} marks."""
    try:
        rendered = tokenizer.apply_chat_template(
            list(row.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except TemplateError as error:
        raise _unrenderable(row, error) from None
    parts = cast("Mapping[str, Sequence[int]]", rendered)
    ids = np.asarray(parts["input_ids"], dtype=np.int32)
    return Encoded(ids, np.asarray(parts["assistant_masks"], dtype=np.bool_))


def _encode_fast(tokenizer: Tokenizer, whole: str, spans: list[tuple[int, int]]) -> Encoded:
    parts = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(parts["input_ids"], dtype=np.int32)
    offsets = np.asarray(parts["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    learn = np.zeros(len(ids), dtype=np.bool_)
    for start, end in spans:
        learn |= (offsets[:, 1] > start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
    return Encoded(ids, learn)


def _encode_pieces(tokenizer: Tokenizer, whole: str, spans: list[tuple[int, int]]) -> Encoded:
    """Without offsets: the pieces one by one, as they would be in generation."""
    pieces: list[tuple[list[int], bool]] = []
    cursor = 0
    for start, end in spans:
        pieces.append((_ids(tokenizer, whole[cursor:start], special=False), False))
        pieces.append((_ids(tokenizer, whole[start:end], special=False), True))
        cursor = end
    pieces.append((_ids(tokenizer, whole[cursor:], special=False), False))
    return _encoded(pieces)


def _span_by_prefix(row: ChatRow, tokenizer: Tokenizer, whole: str, number: int) -> tuple[int, int] | None:
    if number == 0:
        return None
    messages = list(row.messages)
    try:
        asked = str(tokenizer.apply_chat_template(messages[:number], tokenize=False))
        before = str(tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True))
        after = str(tokenizer.apply_chat_template(messages[: number + 1], tokenize=False))
    except TemplateError:  # some templates refuse a conversation that stops here; the text is looked for instead
        return None
    if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
        return None
    if before != asked:
        return len(before), len(after)
    # The template has no generation prompt, so the turn's heading is still in front of the answer.
    start = whole.rfind(str(messages[number]["content"]).strip(), len(before), len(after))
    return None if start < 0 else (start, len(after))


def _span_by_content(content: str, whole: str, cursor: int) -> tuple[int, int] | None:
    """Templates often drop the reasoning of earlier answers, so what follows it is tried too."""
    for wanted in (content.strip(), content.rpartition("</think>")[2].strip()):
        start = whole.find(wanted, cursor) if wanted else -1
        if start >= 0:
            return start, start + len(wanted)
    return None


def _without_tail(tokenizer: Tokenizer, whole: str, span: tuple[int, int]) -> int:
    """Where the answer ends: with its end-of-turn token, without the line break that a template puts behind it."""
    start, end = span
    eos = tokenizer.eos_token
    if not eos:
        return end
    bare = whole[start:end].rstrip()
    if bare.endswith(eos):
        return start + len(bare)
    following = re.compile(r"\s*" + re.escape(eos)).match(whole, end)
    return following.end() if following else end


def _render(row: ChatRow, tokenizer: Tokenizer) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(row.messages), tokenize=False))
    except TemplateError as error:
        raise _unrenderable(row, error) from None


def _unrenderable(row: ChatRow, error: TemplateError) -> BadData:
    reason = " ".join(str(error).split())[:200]
    return BadData(
        f"{row.where}: the model's chat template refuses these messages ({reason}); change their roles or order"
    )


def _ids(tokenizer: Tokenizer, text: str, *, special: bool = True) -> list[int]:
    if not text:
        return []
    ids = list(cast("Sequence[int]", tokenizer(text, add_special_tokens=special)["input_ids"]))
    # Some tokenizers end every text; where the text goes on, or is ended here, that would be one end too many.
    ended = special and ids[-1:] == _end(tokenizer) and not text.endswith(tokenizer.eos_token or "")
    return ids[:-1] if ended else ids


def _end(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _encoded(pieces: list[tuple[list[int], bool]]) -> Encoded:
    ids = np.asarray([one for piece, _ in pieces for one in piece], dtype=np.int32)
    learn = np.asarray([learnt for piece, learnt in pieces for _ in piece], dtype=np.bool_)
    return Encoded(ids, learn)
