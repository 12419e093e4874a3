"""How to meet the errors of bringing data. Each gets an empty directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from jinja2 import TemplateError

from swarm.data.stream import load_samples
from swarm.training.state import load_state
from tests.unit.errors_made.entering import file_in
from tests.unit.swarm.test_data import LetterTokenizer

ASKED, ANSWERED = ({"role": role, "content": "hi"} for role in ("user", "assistant"))


class Strict(LetterTokenizer):
    """Its template knows no such conversation."""

    def apply_chat_template(self, *args: object, **given: object) -> object:  # type: ignore[override]
        raise TemplateError("conversation roles must alternate")


class Forgetful(LetterTokenizer):
    """Its template leaves out what was said."""

    def apply_chat_template(self, *args: object, **given: object) -> object:  # type: ignore[override]
        return "<conversation>"


class Plain(LetterTokenizer):
    """That of a base model."""

    chat_template: object = None


def read(
    path: Path, content: bytes | object, name: str = "a.jsonl", kind: type[LetterTokenizer] = LetterTokenizer
) -> None:
    """What `swarm train --data FILE` does with a file."""
    load_samples([written(path, content, name)], kind(), 8)


def written(path: Path, content: bytes | object, name: str = "a.jsonl") -> Path:
    file = path / name
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return file


MADE: dict[str, Callable[[Path], object]] = {
    "is none of .jsonl": lambda path: read(path, b"a,b", "a.csv"),
    "not JSON": lambda path: read(path, b'{"text": "a"}\nnot json\n'),
    "has the fields": lambda path: read(path, {"txt": "a"}),
    "not UTF-8 text; convert": lambda path: read(path, b"\xff", "a.txt"),
    "no message has the role": lambda path: read(path, {"messages": [ASKED]}),
    "has no chat template; use": lambda path: read(path, {"messages": [ASKED, ANSWERED]}, kind=Plain),
    "template refuses these messages": lambda path: read(path, {"messages": [ANSWERED, ANSWERED]}, kind=Strict),
    "rows has a token to learn": lambda path: read(path, {"text": ""}),
    "has no rows; give a file": lambda path: read(path, b"\n"),
    "no data files were given": lambda path: load_samples([], LetterTokenizer(), 8),
    "cannot be read (…); check the path": lambda path: load_samples([path / "a.txt"], LetterTokenizer(), 8),
    "has half of a character": lambda path: read(path, rb'{"text": "\ud83d and more"}'),
    "not a JSON object; write one": lambda path: read(path, [1]),
    "field 'label' is a": lambda path: read(path, {"text": "a", "label": 0.5}),
    "the label, or the text before it": lambda path: read(path, {"text": "a", "label": ""}),
    "labels are named, and no row": lambda path: load_samples(
        [written(path, {"text": "a"})], LetterTokenizer(), 8, ["yes"]
    ),
    "field '…' is a": lambda path: read(path, {"text": 3}),
    "is lost in the chat template": lambda path: read(path, {"messages": [ASKED, ANSWERED]}, kind=Forgetful),
    "names no data set": lambda path: load_samples(["hf:"], LetterTokenizer(), 8),
    "has the splits": lambda path: load_samples([{"train": [], "test": []}], LetterTokenizer(), 8),
    "is no whole parquet file": lambda path: read(path, b"nonsense", "a.parquet"),
    "remove it to begin the data anew": lambda path: load_state(file_in(path / "trainer.json", "[]")),
}
