"""Real text of several kinds that every machine with this project has, cut into rows; each kind is one peer's data.

Documents are split before anything is cut: of every eight one is held out, one chooses learning rates, six train.
"""

from __future__ import annotations

import hashlib
import sysconfig
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

PARTS = ("held_out", "tuning", "train")
Encode = Callable[[str], Sequence[int]]
_PARTS_OF_EIGHT = ("held_out", "tuning", *["train"] * 6)
_MOST_CHARACTERS = 600_000  # of one kind
_LINES_A_DOCUMENT = 64


class Rows:
    """One kind of text as rows of token ids, int64 [rows, T], in an order of its own for every seed."""

    def __init__(self, rows_NT: Tensor, seed: int) -> None:
        order = torch.randperm(len(rows_NT), generator=torch.Generator().manual_seed(seed))
        self._rows_NT = rows_NT[order]

    def take(self, start: int, count: int) -> Tensor:
        """Rows `[start, start + count)`, from the beginning again after the last."""
        return self._rows_NT[torch.arange(start, start + count) % len(self._rows_NT)]


def kinds() -> dict[str, list[str]]:
    """Documents by kind: a language reference, C++ headers, descriptions of packages, a table of characters."""
    headers = Path(torch.__file__).parent / "include" / "c10"
    return {
        "prose": [topics[name] for name in sorted(topics)],
        "headers": _files(sorted(headers.rglob("*.h"))),
        "readmes": _readmes(),
        "characters": _characters(),
    }


def sources() -> list[str]:
    """The standard library's own modules: what the small model knows before."""
    return _files(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))


def split(documents: Sequence[str]) -> dict[str, str]:
    """The text of each of `PARTS`; which document is in which is drawn by its contents."""
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    shuffled = sorted(set(documents), key=lambda text: hashlib.sha256(text.encode()).digest())
    length = 0
    for number, text in enumerate(shuffled):
        if length < _MOST_CHARACTERS:
            found[_PARTS_OF_EIGHT[number % len(_PARTS_OF_EIGHT)]].append(text[: _MOST_CHARACTERS // 4])
            length += len(found[_PARTS_OF_EIGHT[number % len(_PARTS_OF_EIGHT)]][-1])
    return {part: "\n\n".join(texts) for part, texts in found.items()}


def as_bytes(text: str) -> Sequence[int]:
    """Token ids 0 to 255."""
    return text.encode()


def cut(text: str, encode: Encode, length: int) -> Tensor:
    """All whole rows of `length` tokens, int64 [rows, length]."""
    ids = torch.tensor(list(encode(text)), dtype=torch.int64)
    return ids[: len(ids) // length * length].view(-1, length)


def mixture(parts: Mapping[str, Tensor], rows_of_each: int) -> Tensor:
    """As many rows of each kind, evenly spread over its text: [kinds * rows_of_each, T]."""
    found = []
    for name, rows_NT in parts.items():
        if len(rows_NT) < rows_of_each:
            raise SystemExit(f"only {len(rows_NT)} rows of '{name}' are here; {rows_of_each} are needed")
        found.append(rows_NT[torch.linspace(0, len(rows_NT) - 1, rows_of_each).long()])
    return torch.cat(found)


def _files(paths: Sequence[Path]) -> list[str]:
    if not paths:
        raise SystemExit("a directory of source files that this benchmark reads is empty on this machine")
    return [path.read_text(encoding="utf-8", errors="ignore") for path in paths]


def _readmes() -> list[str]:
    """The descriptions of all packages that are installed; a machine with others has other text."""
    found = {}
    for one in metadata.distributions():
        _, _, text = (one.read_text("METADATA") or "").partition("\n\n")
        if len(text) > 500:
            found[one.name] = text
    return [found[name] for name in sorted(found)]


def _characters() -> list[str]:
    """Unicode's table as this Python knows it, some lines at a time: code, name, category, direction, parts, number."""
    lines = []
    for code in range(0x20000):
        letter = chr(code)
        name = unicodedata.name(letter, "")
        if name and not name.startswith(("CJK", "HANGUL", "TANGUT", "KHITAN", "NUSHU", "EGYPTIAN", "CUNEIFORM")):
            number = unicodedata.numeric(letter, "")
            kind, direction = unicodedata.category(letter), unicodedata.bidirectional(letter)
            lines.append(f"{code:04X};{name};{kind};{direction};{unicodedata.decomposition(letter)};{number}")
    return ["\n".join(lines[at : at + _LINES_A_DOCUMENT]) for at in range(0, len(lines), _LINES_A_DOCUMENT)]
