"""The pages of the site that nobody writes by hand, made from the code: commands, settings, the Python API.

mkdocs calls `on_files` (mkdocs.yml names this file as a hook). Python's source is read, not imported: no torch needed.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # where swarmtune is not installed
    sys.path.insert(0, str(ROOT))

from swarm.cli.main import main as swarm_command  # noqa: E402
from swarm.config import SECTIONS, Rule, RunSpec  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

_PACKAGES = ("blocks", "peers", "averaging", "swarm")
_MADE = "This page is made from the code by `make docs`."
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to the site."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def pages() -> dict[str, str]:
    """Every generated page, as Markdown, by its name in the site."""
    return {
        "commands.md": commands_page(),
        "settings.md": settings_page(),
        "python-reference.md": python_page(),
        "source.md": source_page(),
        "architecture.md": (ROOT / "ARCHITECTURE.md").read_text("utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text("utf-8"),
    }


def commands() -> Iterator[tuple[str, click.Command, click.Context]]:
    """Each command of `swarm`, in the order in which a newcomer meets them."""
    top = click.Context(swarm_command, info_name="swarm")
    for name in swarm_command.list_commands(top):
        command = swarm_command.get_command(top, name)
        if command is not None:
            yield name, command, click.Context(command, info_name=name, parent=top)


def commands_page() -> str:
    """All commands: what they do, their options, examples."""
    top = click.Context(swarm_command, info_name="swarm")
    lines = ["# Commands", "", f"{_MADE} `swarm COMMAND --help` says the same in a terminal.", ""]
    lines += [*_options(swarm_command, top), ""]
    for name, command, context in commands():
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        lines += [f"## swarm {name}", "", f"`{usage}`", "", *_paragraphs(command.help or ""), ""]
        for title, block in examples(command):
            lines += [f"**{title}**", "", "```sh" if title == "Examples" else "```text", *block, "```", ""]
        lines += [*_options(command, context), ""]
    return "\n".join(lines)


def examples(command: click.Command) -> Iterator[tuple[str, list[str]]]:
    """The blocks of a command's epilog: a title, and lines; words after a line's command are made a comment."""
    for block in re.split(r"^\x08$", command.epilog or "", flags=re.MULTILINE):
        title, _, body = block.strip("\n").partition("\n")
        if not title.strip():
            continue
        lines = inspect.cleandoc(body).splitlines()
        yield title.strip().rstrip(":"), [re.sub(r"(\S)\s{3,}(?=[^\s#])", r"\1   # ", line) for line in lines]


def _options(command: click.Command, context: click.Context) -> list[str]:
    rows = []
    for parameter in command.params:
        if not isinstance(parameter, click.Option):
            continue
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
        takes = "" if parameter.is_flag or parameter.count else f"`{parameter.make_metavar(context)}`"
        help_text, _, default = (parameter.help or "").rstrip("]").partition("  [default: ")
        words = [_plain(help_text) + "." * (help_text[-1:].isalnum())] if help_text else []
        if default or (parameter.show_default and parameter.default is not None):
            words.append(f"Default: `{default or parameter.default}`.")
        if parameter.required:
            words.append("Required.")
        rows.append(f"| {names} | {_cell(takes)} | {_cell(' '.join(words))} |")
    return ["| option | takes | meaning |", "| --- | --- | --- |", *rows] if rows else []


def settings_page() -> str:
    """Every setting of swarm.toml: its type, what it may be, where it starts, what it means."""
    lines = [
        "# Settings of a run",
        "",
        f"{_MADE} `swarm init` writes them to `swarm.toml`, each with its meaning. The owner's key signs them, and"
        " every peer takes them from the swarm. So they are the same everywhere, and cannot be changed once the "
        "run's first peer has started: make a new run instead.",
        "",
        "What belongs to one machine (memory, bandwidth, hours, ports) is an option of a [command](commands.md).",
        "",
        *_settings_table(RunSpec, "", {}),
        "",
    ]
    flags = {
        parameter.name: parameter.opts[0]
        for name, command, _ in commands()
        if name == "init"
        for parameter in command.params
        if isinstance(parameter, click.Option)
    }
    for section, kind in SECTIONS.items():
        lines += [f"## [{section}]", "", *_paragraphs(_before_raises(inspect.getdoc(kind) or "")), ""]
        lines += [*_settings_table(kind, section, flags), ""]
    return "\n".join(lines)


def _settings_table(kind: type, section: str, flags: dict[str | None, str]) -> list[str]:
    rows = ["| setting | type | default | may be | meaning |", "| --- | --- | --- | --- | --- |"]
    for item in dataclasses.fields(kind):
        rule: Rule | None = item.metadata.get("rule")
        if rule is None:
            continue
        default = "" if item.default is dataclasses.MISSING else f"`{_toml(item.default)}`"
        flag = flags.get(f"{section}__{item.name}")
        meaning = rule.help + ("" if flag is None else f" (`swarm init {flag}`)")
        cells = (f"`{item.name}`", str(item.type), default, _allowed(rule), _plain(meaning))
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return rows


def _allowed(rule: Rule) -> str:
    if rule.choices:
        return ", ".join(f"`{choice}`" for choice in rule.choices)
    if rule.expects:
        return _plain(rule.expects)
    if rule.low > -float("inf"):
        return f"{_number(rule.low)} to {_number(rule.high)}"
    return "" if rule.high == float("inf") else f"at most {rule.high:g} bytes"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def source_page() -> str:
    """Every file of the packages, with the first line of what it says of itself."""
    lines = ["# Source", "", f"{_MADE} A package imports only from those above it.", ""]
    for package in _PACKAGES:
        for folder in [ROOT / package, *sorted(path.parent for path in (ROOT / package).glob("*/__init__.py"))]:
            head = _first_line(folder / "__init__.py")
            lines += [
                f"## {folder.relative_to(ROOT)}",
                "",
                _plain(head),
                "",
                "| file | what it does |",
                "| --- | --- |",
            ]
            modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
            lines += [f"| `{path.name}` | {_cell(_plain(_first_line(path)))} |" for path in modules]
            lines.append("")
    return "\n".join(lines)


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]


def python_page() -> str:
    """The names of `import swarm`."""
    homes = _literal(ROOT / "swarm" / "__init__.py", "_HOMES")
    lines = ["# Python reference", "", f"{_MADE} See [From Python](python.md) for where to begin.", ""]
    for name in sorted(homes, key=lambda name: (not name.islower(), name)):
        lines += _definition(f"swarm.{name}", name, ROOT / (homes[name].replace(".", "/") + ".py"))
    return "\n".join(lines)


def _literal(path: Path, name: str) -> dict[str, str]:
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return dict(ast.literal_eval(node.value))
    raise ValueError(f"{path} has no {name}")


def _definition(title: str, name: str, path: Path) -> list[str]:
    body = ast.parse(path.read_text("utf-8")).body
    node = next((node for node in body if isinstance(node, Definition) and node.name == name), None)
    if node is None:
        raise ValueError(f"{path} has no {name}, which the Python reference is to show; correct docs/generate.py")
    lines = [f"## {title}", ""]
    if not isinstance(node, ast.ClassDef):
        return [*lines, *_signature(node), *_paragraphs(ast.get_docstring(node) or ""), ""]
    fields = [ast.unparse(one) for one in node.body if isinstance(one, ast.AnnAssign)]
    if fields:
        lines += ["```python", *fields, "```", ""]
    lines += [*_paragraphs(ast.get_docstring(node) or ""), ""]
    for method in node.body:
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and not method.name.startswith("_"):
            words = _paragraphs(ast.get_docstring(method) or "")
            lines += [f"### {name}.{method.name}", "", *_signature(method), *words, ""]
    return lines


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    decorators = {one.id for one in node.decorator_list if isinstance(one, ast.Name)}
    returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    if "property" in decorators:
        return [f"A property{returns.replace(' -> ', ' of type `') + '`' if returns else ''}.", ""]
    given = [one for one in _arguments(node.args) if one not in ("self", "cls")]
    lines = [f"{node.name}({', '.join(given)}){returns}"]
    if len(lines[0]) > 100:
        lines = [f"{node.name}(", *(f"    {one}," for one in given), f"){returns}"]
    return ["```python", *lines, "```", ""]


def _arguments(arguments: ast.arguments) -> Iterator[str]:
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    for argument, default in zip(plain, defaults, strict=True):
        yield _argument(argument, default)
    if arguments.vararg is not None:
        yield f"*{ast.unparse(arguments.vararg)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _argument(argument, default)
    if arguments.kwarg is not None:
        yield f"**{ast.unparse(arguments.kwarg)}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    equals = " = " if argument.annotation is not None else "="
    return ast.unparse(argument) + ("" if default is None else equals + ast.unparse(default))


def _paragraphs(text: str) -> list[str]:
    """A docstring or help text as Markdown: `\\b` keeps lines as they are, `Raises:` becomes a list."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith("\b"):
            lines += ["```text", *inspect.cleandoc(paragraph[1:]).splitlines(), "```", ""]
        elif paragraph.startswith("Raises:"):
            raised = re.sub(r"\n {8,}", " ", inspect.cleandoc(paragraph.removeprefix("Raises:"))).splitlines()
            lines += ["Raises:", "", *(f"- {_plain(line.strip())}" for line in raised if line.strip()), ""]
        else:
            lines += [_plain(" ".join(paragraph.split())), ""]
    return lines[:-1]


def _before_raises(text: str) -> str:
    return text.split("\n\nRaises:", maxsplit=1)[0]


def _plain(text: str) -> str:
    """Text as Markdown shows it unchanged: what is between backticks stays, the rest is escaped."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick without its pair
        return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", text)
    escaped = (
        re.sub(r"([\\*_\[\]<>#])", r"\\\1", part) if number % 2 == 0 else part for number, part in enumerate(parts)
    )
    return "`".join(escaped)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
