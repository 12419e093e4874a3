"""Commands of `swarm` as documents and deployment files say them, held against click: does that command take that?"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from swarm.cli.main import main

ROOT = Path(__file__).parents[1]

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`(swarm [^`\n]+(?:\n[^`\n]+)?)`(?!`)")


def blocks(text: str, language: str = "") -> Iterator[str]:
    """The fenced blocks of a Markdown text, of one language or of all."""
    for found in _FENCE.finditer(text):
        if language in ("", found.group(1)):
            yield found.group(2)


def commands_of(text: str) -> Iterator[list[str]]:
    """The words after `swarm` in each command line of a script or a block; continued lines are one."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a line of prose or of a program's output
            continue
        while words:
            end = next((place for place, word in enumerate(words) if set(word) <= set("|&;<>")), len(words))
            if words[0] == "swarm" and end > 1:
                yield words[1:end]
            words = words[end + 1 :]


def said_in(text: str) -> Iterator[tuple[list[str], bool]]:
    """Every command in a Markdown text, and whether it is whole: in running text, only the point is named."""
    for block in blocks(text):
        lines = "\n".join(line for line in block.replace("\\\n", " ").splitlines() if not line.startswith(" "))
        yield from ((words, True) for words in commands_of(lines))
    for found in _INLINE.finditer(_FENCE.sub("", text)):
        words = found.group(1).split()[1:]
        if re.fullmatch(r"[a-z-]+", words[0]):
            yield words, False


def fault(words: Sequence[str], *, whole: bool = True) -> str:
    """What click would say against `swarm WORDS`, before anything is looked for on disk; empty if nothing.

    A command that is not `whole` may lack what is required.
    """
    words = list(words)
    while words and words[0] in ("-v", "-vv", "--verbose"):
        del words[0]
    if not words or words[0] in ("--help", "-h", "--version") or (words[0].isupper() and not whole):
        return ""
    name, *rest = words
    top = click.Context(main, info_name="swarm")
    command = main.get_command(top, name)
    if command is None:
        return f"there is no command '{name}'"
    try:
        return _fault_of(command, click.Context(command, info_name=name, parent=top), rest, whole)
    except click.UsageError as error:
        lacks_value = isinstance(error, click.BadOptionUsage) and not isinstance(error, click.NoSuchOption)
        return "" if lacks_value and not whole else error.format_message()


def _fault_of(command: click.Command, context: click.Context, words: list[str], whole: bool) -> str:
    values, left, _ = command.make_parser(context).parse_args(words)
    if left and whole:
        return f"{command.name} takes no '{left[0]}'"
    for parameter in command.params:
        value = values.get(str(parameter.name))
        missing = not isinstance(value, (str, tuple, list, bool, int)) or value in ((), [])
        if missing and parameter.required and whole and not values.get("help"):
            return f"{command.name} lacks {parameter.human_readable_name}"
        if not missing and _is_plain(parameter) and _is_concrete(value):
            parameter.type_cast_value(context, value)
    return ""


def _is_plain(parameter: click.Parameter) -> bool:
    """Whether its values can be checked without looking at this machine."""
    kinds = (click.Choice, click.types.IntParamType, click.types.FloatParamType)
    return isinstance(parameter.type, kinds) and not getattr(parameter, "is_flag", False)


def _is_concrete(value: object) -> bool:
    """Not a placeholder such as K, PORT or $PORT."""
    return isinstance(value, str) and re.search(r"[A-Z$…]", value) is None
