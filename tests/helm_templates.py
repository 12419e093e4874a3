"""Renders the templates of a Helm chart without Helm: as much of Go's templates and of sprig as our chart uses.

Anything else is an error, so that a template which uses more is not taken for one that was tried.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Node:
    """A piece of a template: text, an action, or a block with two branches."""

    words: str
    text: str = ""
    body: list[Node] = field(default_factory=list)
    other: list[Node] = field(default_factory=list)


def parse(source: str) -> list[Node]:
    """Text and actions, blocks nested."""
    source = re.sub(r"\s*\{\{-", "{{", source)
    source = re.sub(r"-\}\}\s*", "}}", source)
    root = Node("root")
    stack, branches = [root], [root.body]
    at = 0
    for found in re.finditer(r"\{\{(.*?)\}\}", source, re.DOTALL):
        branches[-1].append(Node("text", source[at : found.start()]))
        at = found.end()
        words = found.group(1).strip()
        kind = words.partition(" ")[0]
        if kind in ("if", "with", "range", "define"):
            node = Node(words)
            branches[-1].append(node)
            stack.append(node)
            branches.append(node.body)
        elif kind == "else":
            if words != "else":
                raise ValueError(f"'{words}' is not understood here")
            branches[-1] = stack[-1].other
        elif kind == "end":
            stack.pop()
            branches.pop()
        elif not words.startswith("/*"):
            branches[-1].append(Node(words))
    if len(stack) != 1:
        raise ValueError(f"'{stack[-1].words}' has no end")
    root.body.append(Node("text", source[at:]))
    return root.body


class Chart:
    """A chart's templates with its values, some of them set by hand."""

    def __init__(self, directory: Path, values: Mapping[str, Any], release: str = "lab") -> None:
        about = yaml.safe_load((directory / "Chart.yaml").read_text())
        defaults = yaml.safe_load((directory / "values.yaml").read_text())
        unknown = set(values) - set(defaults)
        if unknown:
            raise ValueError(f"the chart has no values {unknown}")
        self._data = {
            "Values": {**defaults, **values},
            "Chart": {"Name": about["name"], "Version": about["version"], "AppVersion": about["appVersion"]},
            "Release": {"Name": release, "Namespace": "default", "Service": "Helm"},
        }
        self._files = {path.name: parse(path.read_text()) for path in sorted((directory / "templates").iterdir())}
        self._defined: dict[str, list[Node]] = {}
        for nodes in self._files.values():
            for node in nodes:
                if node.words.startswith("define "):
                    self._defined[shlex.split(node.words)[1]] = node.body

    def render(self, name: str) -> str:
        """One file of templates/ as text."""
        return self._nodes(self._files[name], self._data)

    def _nodes(self, nodes: list[Node], dot: Any) -> str:
        return "".join(self._node(node, dot) for node in nodes)

    def _node(self, node: Node, dot: Any) -> str:
        kind, _, words = node.words.partition(" ")
        match kind:
            case "text":
                return node.text
            case "define":
                return ""
            case "if":
                return self._nodes(node.body if self._value(words, dot) else node.other, dot)
            case "with":
                value = self._value(words, dot)
                return self._nodes(node.body, value) if value else self._nodes(node.other, dot)
            case "range":
                return "".join(self._nodes(node.body, each) for each in self._value(words, dot))
        return _shown(self._value(node.words, dot))

    def _value(self, words: str, dot: Any) -> Any:
        """A pipeline: each stage gets what the one before gave as its last argument."""
        given: list[Any] = []
        for stage in re.split(r"\s\|\s", words):
            tokens = re.findall(r'"(?:[^"\\]|\\.)*"|\S+', stage)
            arguments = [*(self._word(token, dot) for token in tokens[1:]), *given]
            if tokens[0][0] in '."0123456789':
                given = [self._word(tokens[0], dot)]
            else:
                given = [self._call(tokens[0], arguments)]
        return given[0]

    def _word(self, token: str, dot: Any) -> Any:
        if token[0] == '"':
            return token[1:-1]
        if token.isdigit():
            return int(token)
        if token[0] != ".":
            raise ValueError(f"'{token}' is not understood here")
        for name in filter(None, token.split(".")):
            if name not in dot:
                raise ValueError(f"{token}: there is no '{name}'")
            dot = dot[name]
        return dot

    def _call(self, name: str, given: list[Any]) -> Any:
        functions: dict[str, Callable[..., Any]] = {
            "include": lambda template, dot: self._nodes(self._defined[template], dot),
            "required": _required,
            "toYaml": lambda value: yaml.safe_dump(value, default_flow_style=False, sort_keys=False).rstrip("\n"),
            "nindent": lambda count, text: "\n" + "\n".join(" " * count + line for line in text.splitlines()),
            "quote": lambda value: '"' + _shown(value).replace("\\", "\\\\").replace('"', '\\"') + '"',
            "default": lambda fallback, value: value or fallback,
            "contains": lambda part, text: part in text,
            "trunc": lambda count, text: text[:count],
            "trimSuffix": lambda suffix, text: text.removesuffix(suffix),
            "printf": lambda form, *values: form % values,
            "not": lambda value: not value,
        }
        return functions[name](*given)


def _required(words: str, value: Any) -> Any:
    if not value:
        raise ValueError(words)
    return value


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
