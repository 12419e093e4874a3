"""Files of text to rows: read, checked and dated by `file:line`. Knows nothing of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from blocks.checks import is_unicode
from swarm.data.hub_names import HUB_PREFIX, parse_hub
from swarm.errors import BadData

MAX_ROW_BYTES = 16 * 2**20
SUFFIXES = (".jsonl", ".parquet", ".txt")
_MAX_MESSAGES = 4096
_EXPECTED = "text; text and label; prompt and completion; messages; or instruction and output (input may be added)"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """Running text: loss on all of it. `packed` text is joined with its neighbours into full sequences."""

    where: str
    text: str
    packed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """Loss on the completion only."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRow:
    """A conversation: loss on the assistant's answers only. `plain` is for tokenizers without a template."""

    where: str
    messages: tuple[Mapping[str, object], ...]
    plain: PairRow | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRow:
    """A text and its class: loss on the label only, which stands behind the text after one space."""

    where: str
    text: str
    label: str

    @property
    def pair(self) -> PairRow:
        """The text, and the label as its completion."""
        return PairRow(where=self.where, prompt=self.text, completion=f" {self.label}")


Row = TextRow | PairRow | ChatRow | LabelRow


class Digest(Protocol):
    """What hashlib's objects can do: it takes every byte that is read, so that a changed file is noticed later."""

    def update(self, data: bytes, /) -> None:
        """Take more bytes."""


def check_files(sources: Iterable[Path]) -> None:
    """Refuse files that cannot be read at all, and names that no data set of the hub has, before anything else is done
    for them.

    Raises:
        BadData: one is missing, unreadable, a directory, of another kind, or no name.
    """
    for path in sources:
        if str(path).startswith(HUB_PREFIX):
            parse_hub(str(path))
            continue
        if path.suffix.lower() not in SUFFIXES:
            raise BadData(f"{path} is none of .jsonl, .parquet and .txt; rename or convert it")
        try:
            if not path.is_fifo():  # whoever writes to one writes once
                path.open("rb").close()
        except OSError as error:
            raise BadData(f"{path} cannot be read ({error.strerror}); check the path") from None


def read_rows(path: Path, digest: Digest | None = None) -> Iterator[Row]:
    """The rows of a `.jsonl`, `.txt` or `.parquet` file, one at a time: memory holds a few rows, never the file.

    Raises:
        BadData: missing, unreadable, empty, not UTF-8, another kind of file, or a row without the expected fields.
    """
    from swarm.data.tables import read_parquet

    check_files([path])
    readers = dict(zip(SUFFIXES, (_read_jsonl, read_parquet, _read_txt), strict=True))
    reader = readers[path.suffix.lower()]
    any_row = False
    for row in reader(path, digest or hashlib.sha256()):
        any_row = True
        yield row
    if not any_row:
        raise BadData(f"{path} has no rows; give a file with text in it")


def _read_lines(path: Path, digest: Digest) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_ROW_BYTES + 1):
                number += 1
                digest.update(raw)
                if len(raw) > MAX_ROW_BYTES:
                    raise BadData(f"{path}:{number}: the line is longer than {MAX_ROW_BYTES >> 20} MB; split it")
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        raise BadData(f"{path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise BadData(f"{path}:{number}: not UTF-8 text; convert the file to UTF-8") from None


def _read_jsonl(path: Path, digest: Digest) -> Iterator[Row]:
    for number, line in _read_lines(path, digest):
        if line.strip():
            yield _parse_row(f"{path}:{number}", line)


def _read_txt(path: Path, digest: Digest) -> Iterator[Row]:
    """Paragraphs: runs of lines between empty ones."""
    paragraph: list[str] = []
    first = 1
    size = 0
    for number, line in _read_lines(path, digest):
        if line.strip() and size < MAX_ROW_BYTES:
            first = first if paragraph else number
            paragraph.append(line)
            size += len(line)
            continue
        if paragraph:
            yield TextRow(where=f"{path}:{first}", text="".join(paragraph).rstrip() + "\n\n", packed=True)
        paragraph, size = ([line], len(line)) if line.strip() else ([], 0)
        first = number
    if paragraph:
        yield TextRow(where=f"{path}:{first}", text="".join(paragraph).rstrip() + "\n\n", packed=True)


def _parse_row(where: str, line: str) -> Row:
    try:
        value: object = json.loads(line)
    except ValueError as error:
        detail = str(error).partition(": line")[0]
        raise BadData(f"{where}: not JSON ({detail}); write one JSON object per line") from None
    except RecursionError:
        raise BadData(f"{where}: nested too deeply; write one flat JSON object per line") from None
    return row_of(where, value)


def row_of(where: str, value: object) -> Row:
    """A row as its fields say; `where` is for messages.

    Raises:
        BadData: fields are missing or of another kind.
    """
    if not isinstance(value, Mapping):
        raise BadData(f"{where}: not a JSON object; write one on each line, with {_EXPECTED}")
    if "messages" in value:
        return _chat(where, value["messages"])
    if value.get("label") is not None and "completion" not in value and ("text" in value or "prompt" in value):
        return _labelled(where, value)
    if "text" in value:
        return TextRow(where=where, text=_text(where, value, "text"))
    if "prompt" in value and "completion" in value:
        return PairRow(where=where, prompt=_text(where, value, "prompt"), completion=_text(where, value, "completion"))
    if "instruction" in value and "output" in value:
        return _instruction(where, value)
    found = ", ".join(sorted(str(key)[:40] for key in value)[:12]) or "none"
    raise BadData(f"{where}: has the fields {found!r}, expected {_EXPECTED}")


def _labelled(where: str, row: Mapping[str, object]) -> LabelRow:
    label = row["label"]
    if not isinstance(label, (str, int)) or isinstance(label, bool):
        raise BadData(f"{where}: field 'label' is a {type(label).__name__}; use a string, or a whole number")
    text = _text(where, row, "text" if "text" in row else "prompt").rstrip()
    name = _whole(where, "label", str(label)).strip()
    if not text or not name:
        raise BadData(f"{where}: the label, or the text before it, is empty; write it, or drop the row")
    return LabelRow(where=where, text=text, label=name)


def _text(where: str, row: Mapping[str, object], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise BadData(f"{where}: field '{name}' is a {type(value).__name__}; use a string")
    return _whole(where, name, value)


def _whole(where: str, name: str, text: str) -> str:
    """JSON can say half of a character of UTF-16, which is no text to a tokenizer."""
    if not is_unicode(text):
        raise BadData(
            f"{where}: field '{name}' has half of a character, such as '\\ud83d' alone; write the whole of it"
        )
    return text


def _instruction(where: str, row: Mapping[str, object]) -> ChatRow:
    """The Alpaca shape, as two turns; https://github.com/tatsu-lab/stanford_alpaca has the plain form."""
    instruction, answer = _text(where, row, "instruction"), _text(where, row, "output")
    extra = _text(where, row, "input") if row.get("input") is not None else ""
    heading = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{extra}\n\n" if extra else "") + "### Response:\n"
    question = f"{instruction}\n\n{extra}" if extra else instruction
    return ChatRow(
        where=where,
        messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer}),
        plain=PairRow(where=where, prompt=heading, completion=answer),
    )


def _chat(where: str, value: object) -> ChatRow:
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_MESSAGES:
        raise BadData(
            f"{where}: 'messages' is not a list of 1 to {_MAX_MESSAGES} messages; use role and content in each"
        )
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadData(f"{where}: message {number} has no 'role'; use system, user or assistant")
        if not isinstance(message.get("content"), str):
            raise BadData(f"{where}: message {number} has no 'content' in text; use a string")
        _whole(where, "content", message["content"])
    if not any(message["role"] == "assistant" for message in value):
        raise BadData(f"{where}: no message has the role 'assistant', so there is nothing to learn; add the answer")
    return ChatRow(where=where, messages=tuple(value))
