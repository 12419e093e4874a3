"""docs/errors.md as values, and the word of a test that it has met one of its errors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "errors.md").read_text("utf-8")
_ENTRY = re.compile(r"^#### (`+) ?(.*?) ?\1\n\n`(\w+)`\.", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Entry:
    """A message of the page, with `…` for what differs, and the name of its error's class."""

    message: str
    kind: str

    def says(self, text: str) -> bool:
        """Whether `text` is this message, the whole of it and in one line."""
        return re.fullmatch(".*".join(map(re.escape, self.message.split("…"))), text) is not None


@cache
def entries() -> tuple[Entry, ...]:
    found = tuple(Entry(message, kind) for _, message, kind in _ENTRY.findall(PAGE))
    assert len(found) == PAGE.count("\n#### "), "an entry of docs/errors.md is not a message and the class of its error"
    return found


def entry(words: str) -> Entry:
    """The one entry of the page with these words."""
    found = [each for each in entries() if words in each.message]
    assert len(found) == 1, f"'{words}' is in {len(found)} messages of docs/errors.md"
    return found[0]


def met(words: str, error: BaseException) -> None:
    """Say in a test that `error`, as it was caught, is the page's entry with these words.

    tests/unit/test_errors_page.py looks for the calls: `words` are written out in each.
    """
    wanted = entry(words)
    assert type(error).__name__ == wanted.kind, f"{error!r} is no {wanted.kind}"
    assert wanted.says(str(error)), f"docs/errors.md has '{wanted.message}', the error says '{error}'"
