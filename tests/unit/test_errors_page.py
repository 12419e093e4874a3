"""docs/errors.md says what the code says: every class, no message that is not there, and each produced by a test."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from swarm.errors import EXPECTED_ERRORS
from tests.unit.errors_made import ELSEWHERE, MADE

ROOT = Path(__file__).parents[2]
PACKAGES = ("blocks", "peers", "averaging", "swarm")
PAGE = (ROOT / "docs" / "errors.md").read_text("utf-8")

_NAMES = {"CONFIG_NAME": "swarm.toml"}  # values that a message always has


@cache
def classes() -> frozenset[str]:
    """The errors that can be expected, wherever they are defined, without their roots."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    roots = {root.__name__ for root in EXPECTED_ERRORS}
    found: set[str] = set()
    while more := {name for name, over in bases.items() if over & (roots | found)} - found:
        found |= more
    return frozenset(name for name in found if not name.startswith("_"))  # the others never leave their file


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def entries() -> list[tuple[str, str]]:
    """The page's messages and their classes."""
    found = re.findall(r"^#### (`+) ?(.*?) ?\1\n\n`(\w+)`\.", PAGE, re.MULTILINE)
    assert len(found) == PAGE.count("\n#### "), "an entry of docs/errors.md is not a message and the class of its error"
    return [(message, kind) for _, message, kind in found]


@cache
def said() -> frozenset[str]:
    """Every text of the code with a place for each value: `… is …; use one of …`."""
    return frozenset(
        text
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant) and (text := template(node))
    )


def template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    assert isinstance(node, ast.JoinedStr)
    return re.sub("…{2,}", "…", "".join(_part(part) for part in node.values))


def _part(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    return _NAMES.get(part.value.id, "…") if isinstance(part.value, ast.Name) else "…"


@pytest.mark.parametrize("name", sorted(classes()))
def test_every_class_of_errors_is_on_the_page(name: str) -> None:
    assert f"\n`{name}`. " in PAGE


def test_no_class_on_the_page_is_gone() -> None:
    named = {kind for _, kind in entries()}
    assert named <= classes(), sorted(named - classes())


@pytest.mark.parametrize("message", [message for message, _ in entries()])
def test_every_message_on_the_page_is_one_of_the_code(message: str) -> None:
    assert message in said()


@pytest.mark.parametrize("words", MADE)
def test_what_the_page_says_is_what_happens(words: str, tmp_path: Path) -> None:
    message, kind = entry(words)
    with pytest.raises(EXPECTED_ERRORS) as caught:
        MADE[words](tmp_path)
    assert type(caught.value).__name__ == kind
    assert re.fullmatch(".*".join(map(re.escape, message.split("…"))), str(caught.value))


@pytest.mark.parametrize("words", ELSEWHERE)
def test_the_test_that_meets_an_error_is_there(words: str) -> None:
    path, quote = ELSEWHERE[words]
    assert entry(words)
    assert quote in (ROOT / "tests" / path).read_text("utf-8")


def test_every_message_on_the_page_is_met_by_a_test() -> None:
    met = {entry(words) for words in (*MADE, *ELSEWHERE)}
    assert not [message for message, kind in entries() if (message, kind) not in met]


def entry(words: str) -> tuple[str, str]:
    """The one entry of the page with these words."""
    found = [each for each in entries() if words in each[0]]
    assert len(found) == 1, f"'{words}' is in {len(found)} messages of docs/errors.md"
    return found[0]
