"""What the documents say is so: generated pages are whole, commands in them parse, errors in them are the code's."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import click
import pytest

from swarm.config import SECTIONS
from tests.said_commands import ROOT, blocks, fault, said_in

WRITTEN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@cache
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def all_commands() -> dict[str, click.Command]:
    return {name: command for name, command, _ in generate().commands()}


@pytest.mark.parametrize("name", all_commands())
def test_each_command_is_in_the_reference_with_its_words_its_options_and_an_example(name: str) -> None:
    page = generate().commands_page()
    section = page.split(f"\n## swarm {name}\n")[1].split("\n## ")[0]
    command = all_commands()[name]
    assert len((command.help or "").split()) > 5
    examples = [line for title, block in generate().examples(command) if title == "Examples" for line in block]
    assert any(line.startswith(f"swarm {name}") for line in examples)
    for line in examples:
        assert line in section
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            rows = [line for line in section.splitlines() if line.startswith("| `")]
            row = next(line for line in rows if f"`{parameter.opts[0]}`" in line.split(" | ")[0])
            assert row.split(" | ")[-1].strip(" |"), f"swarm {name} {parameter.opts[0]} has no words and no default"


def test_each_setting_is_in_the_reference_with_its_meaning() -> None:
    page = generate().settings_page()
    for section, kind in SECTIONS.items():
        rows = page.split(f"\n## [{section}]\n")[1].split("\n## ")[0].splitlines()
        for item in dataclasses.fields(kind):
            row = next(line for line in rows if line.startswith(f"| `{item.name}` |"))
            assert len(row.split(" | ")[-1].strip(" |")) > 10, row


def test_the_python_reference_has_every_public_name() -> None:
    import swarm

    page = generate().python_page()
    for name in swarm.__all__:
        section = page.split(f"\n## swarm.{name}\n")[1].split("\n## ")[0]
        assert len(section.split()) > 10
    assert "### Peer.train\n\n```python\ntrain(\n" in page


def test_the_source_page_names_every_file_with_what_it_does() -> None:
    page = generate().source_page()
    for package in ("blocks", "peers", "averaging", "swarm"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name == "__init__.py":
                continue
            section = page.split(f"\n## {path.parent.relative_to(ROOT)}\n")[1].split("\n## ")[0]
            row = next(line for line in section.splitlines() if line.startswith(f"| `{path.name}` |"))
            assert len(row.split(" | ")[-1].split()) > 3, row


@pytest.mark.parametrize("name", all_commands())
def test_examples_in_the_help_are_commands_that_parse(name: str) -> None:
    text = "\n".join(line for _, block in generate().examples(all_commands()[name]) for line in block)
    for words, whole in said_in(f"```sh\n{text}\n```"):
        assert not fault(words, whole=whole), f"swarm {' '.join(words)}: {fault(words)}"


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_commands_in_documents_parse(path: Path) -> None:
    for words, whole in said_in(path.read_text("utf-8")):
        assert not fault(words, whole=whole), f"swarm {' '.join(words)}: {fault(words, whole=whole)}"


def test_the_check_of_commands_can_fail() -> None:
    assert fault(["jion", "x"]) == "there is no command 'jion'"
    assert "--prot" in fault(["join", "x", "--prot", "1"])
    assert "lacks" in fault(["invite"])
    assert "lacks" in fault(["train", "x"])
    assert not fault(["train", "x"], whole=False)
    assert "takes no" in fault(["join", "x", "y"])
    assert "not one of" in fault(["join", "x", "--device", "tpu"])
    assert fault(["join", "x", "--port", "99999"])
    assert not fault(["-v", "join", "x", "--port", "31330"])
    text = "```\nswarm pause && swarm resume x   # words\nswarm status 'a b' | head\n```\nsee `swarm join --port`"
    said = list(said_in(text))
    assert [words for words, _ in said] == [["pause"], ["resume", "x"], ["status", "a b"], ["join", "--port"]]
    assert [whole for _, whole in said] == [True, True, True, False]


def test_python_in_documents_compiles() -> None:
    found = [(path, block) for path in WRITTEN for block in blocks(path.read_text("utf-8"), "python")]
    assert len(found) > 5
    for path, block in found:
        ast.parse(block, str(path))


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    """The site's build checks anchors, too; this holds for who reads the files as they are."""
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        target = link.partition("#")[0]
        if target and "://" not in target:
            assert (path.parent / target).exists() or target in generate().pages(), f"{path.name}: {link}"


def test_every_document_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text("utf-8")
    for name in [*(path.name for path in WRITTEN if path.parent == ROOT / "docs"), *generate().pages()]:
        assert f": {name}\n" in menu, name
