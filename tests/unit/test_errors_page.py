"""docs/errors.md says what the code says: every class, no message that is not there, and each raised in a test.

What makes most of them is in tests/unit/errors_made/. Those that need more than a few lines are met where they are
tested anyway: such a test hands the error that it caught to `tests.errors_page.met`, which compares all of it.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from swarm.errors import EXPECTED_ERRORS
from tests.errors_page import PAGE, entries, entry, met
from tests.unit.errors_made import data, entering, holding, models, peers, publishing, running, serving

ROOT = Path(__file__).parents[2]
PACKAGES = ("blocks", "peers", "averaging", "swarm")
PARTS = (entering, models, holding, data, running, publishing, serving, peers)
MADE = {words: make for part in PARTS for words, make in part.MADE.items()}

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


@cache
def met_elsewhere() -> frozenset[str]:
    """The words of every `met(words, error)` in a test that is not marked slow, so that all of them run in CI."""
    return frozenset(
        call.args[0].value
        for path in (ROOT / "tests").rglob("test_*.py")
        if "met(" in (text := path.read_text("utf-8")) and path != Path(__file__)
        for function in ast.walk(ast.parse(text))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and function.name.startswith("test_")
        if not any("slow" in ast.unparse(mark) for mark in function.decorator_list)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "met"
        if isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    )


@pytest.mark.parametrize("name", sorted(classes()))
def test_every_class_of_errors_is_on_the_page(name: str) -> None:
    assert f"\n`{name}`. " in PAGE


def test_no_class_on_the_page_is_gone() -> None:
    gone = {each.kind for each in entries()} - classes() - {root.__name__ for root in EXPECTED_ERRORS}
    assert not gone, sorted(gone)


@pytest.mark.parametrize("message", [each.message for each in entries()])
def test_every_message_on_the_page_is_one_of_the_code(message: str) -> None:
    assert message in said()


@pytest.mark.parametrize("words", MADE)
def test_what_the_page_says_is_what_happens(words: str, tmp_path: Path) -> None:
    with pytest.raises(EXPECTED_ERRORS) as caught:
        MADE[words](tmp_path)
    met(words, caught.value)


def test_every_message_on_the_page_is_raised_in_a_test() -> None:
    made = {entry(words) for words in {*MADE, *met_elsewhere()}}
    assert not [each.message for each in entries() if each not in made]


def test_what_is_met_has_to_be_the_whole_message_and_the_class() -> None:
    kind = next(each for each in EXPECTED_ERRORS if each.__name__ == "SwarmError")
    right = "the join string is cut off or mistyped; copy the whole of it again"
    met("mistyped; copy", type("BadJoinString", (kind,), {})(right))
    for name, text in (("BadConfig", right), ("BadJoinString", right + " or not"), ("BadJoinString", right[:-1])):
        with pytest.raises(AssertionError):
            met("mistyped; copy", type(name, (kind,), {})(text))
