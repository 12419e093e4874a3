"""The limits that a linter does not hold: sizes, where hivemind may be imported, who may read the environment."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("blocks", "peers", "averaging", "swarm")
MAX_FILE, MAX_CLASS, MAX_FUNCTION, MAX_PARAMETERS = 400, 200, 60, 6
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def too_large(path: Path, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and _num_lines(node) > MAX_CLASS:
            yield f"{path}:{node.lineno} class {node.name} has {_num_lines(node)} lines, at most {MAX_CLASS}"
        if isinstance(node, Function):
            if _num_lines(node) > MAX_FUNCTION:
                yield f"{path}:{node.lineno} {node.name}() has {_num_lines(node)} lines, at most {MAX_FUNCTION}"
            if (num_parameters := _num_parameters(node)) > MAX_PARAMETERS:
                yield f"{path}:{node.lineno} {node.name}() has {num_parameters} parameters, at most {MAX_PARAMETERS}"


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def reads_environment(tree: ast.Module) -> bool:
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    taken = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return bool((names | taken) & {"environ", "getenv", "environb", "putenv"})


def _num_lines(node: ast.ClassDef | Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _num_parameters(node: Function) -> int:
    arguments = node.args
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


@pytest.mark.parametrize("path", sources(*PACKAGES, "tests", "examples"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE


def test_no_class_function_or_parameter_list_is_too_long() -> None:
    found = [line for path in sources(*PACKAGES) for line in too_large(path, ast.parse(path.read_text()))]
    assert not found, "\n".join(found)


def test_hivemind_is_imported_only_behind_its_fence() -> None:
    for path in sources(*PACKAGES):
        fenced = path.name.startswith("hivemind_") and path.parent.name in ("peers", "averaging")
        names = [name for name in imported(ast.parse(path.read_text())) if name.split(".")[0] == "hivemind"]
        assert fenced or not names, f"{path} imports {names}; move it into a file named hivemind_*.py"


def test_only_the_command_line_reads_the_environment() -> None:
    readers = [path for path in sources(*PACKAGES) if reads_environment(ast.parse(path.read_text()))]
    assert {path.parent for path in readers} <= {ROOT / "swarm" / "cli"}, readers


def test_package_files_import_nothing() -> None:
    for path in [path for path in sources(*PACKAGES) if path.name == "__init__.py"]:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no docstring; it is the package's map"
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        heavy = [name for node in top for name in imported(ast.Module(body=[node], type_ignores=[]))]
        assert set(heavy) <= {"__future__", "typing"}, f"{path} imports {heavy}"


def test_public_names_are_not_hidden_by_modules() -> None:
    """`swarm.join` would be the module, not the function, once anything had imported `swarm/join.py`."""
    import swarm

    modules = {path.stem for path in (ROOT / "swarm").iterdir()}
    assert not modules & set(swarm.__all__)


def test_the_limits_can_fail() -> None:
    long = "class A:\n" + "    x = 1\n" * MAX_CLASS
    wide = "def f(a, b, c, d, e, *, g, h): ...\nclass B:\n    def m(self, a, b, c, d, e, f): ...\n"
    assert len(list(too_large(Path("x.py"), ast.parse(long)))) == 1
    assert len(list(too_large(Path("x.py"), ast.parse(wide)))) == 1
    assert reads_environment(ast.parse("import os\nos.environ['X']"))
    assert list(imported(ast.parse("def f():\n    from hivemind.p2p import P2P"))) == ["hivemind.p2p"]
