"""Import torch, transformers and peft without what a process that holds blocks never uses: half of its start.

torch imports kernels for meta tensors that are written in Python, most of which it has in C++ as well. transformers
imports, whatever one wants of it, torch's compiler (`torch._dynamo`, and sympy with it), tensors spread over a cluster
(`torch.distributed.tensor`) and scipy for losses of object detection; it looks through the files of all its models
twice. Here they are told "not there" or "later" while they are imported, and everything is put back at once: each of
the modules that were left out can be imported as ever, and is by whoever uses it.

This knows the insides of the versions in TESTED; others are imported whole.

What it takes from the process: transformers' own parallelism and object-detection losses, and marks for `torch.compile`
on FP8 kernels. That is for a process of ours, such as a command; a script or notebook is left alone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TypeVar

F = TypeVar("F")

TESTED = {"torch": "2.13.", "transformers": "5.23."}
_META = "torch._meta_registrations"
_DYNAMO = "torch._dynamo"
_INDEXING = f"{_DYNAMO}._trace_wrapped_higher_order_op"
_NEEDS_META = (_DYNAMO, "torch._decomp", "torch._refs")
_WANTED = ("transformers.models", "transformers.modeling_utils", "transformers.generation.utils", "peft")


def import_torch() -> ModuleType:
    """torch; its Python kernels for meta tensors come when `register_meta_kernels` is called."""
    if not _is_tested():
        return importlib.import_module("torch")
    with stand_ins(ModuleType(_META)):
        torch = importlib.import_module("torch")
        importlib.import_module("torch._prims.rng_prims")  # without it torch.Generator refuses to work
    if _META not in sys.modules and not any(isinstance(finder, _MetaKernelsFirst) for finder in sys.meta_path):
        vars(torch).pop(_META.rpartition(".")[2], None)
        sys.meta_path.insert(0, _MetaKernelsFirst())
    return torch


def register_meta_kernels() -> bool:
    """Let torch have its Python kernels for meta tensors; False where it has them already."""
    absent = _META not in sys.modules
    importlib.import_module(_META)
    return absent


def import_models() -> None:
    """torch, transformers and peft; nothing is done about those that are imported already."""
    torch = import_torch()
    if not _is_tested():
        for name in _WANTED:
            importlib.import_module(name)
        return
    found = importlib.import_module("transformers.utils.import_utils")
    utils = importlib.import_module("transformers.utils")
    with ExitStack() as stack:
        stack.enter_context(_replaced(torch.distributed, "is_available", _no))  # peft asks torch itself
        for module in (utils, found):
            for question in ("is_torch_distributed_available", "is_scipy_available"):
                stack.enter_context(_replaced(module, question, _no))
        stack.enter_context(_replaced(found, "define_import_structure", partial(_once, found.define_import_structure)))
        if _DYNAMO not in sys.modules:
            stack.enter_context(_replaced(torch.compiler, "disable", partial(_disable_later, torch._disable_dynamo)))
            stack.enter_context(_replaced(torch.compiler, "allow_in_graph", _as_it_is))
            dynamo, indexing = ModuleType(_DYNAMO), ModuleType(_INDEXING)
            vars(dynamo).update(__path__=[], assume_constant_result=_as_it_is, allow_in_graph=_as_it_is)
            vars(indexing).update(TransformGetItemToIndex=_indexing)
            stack.enter_context(stand_ins(dynamo, indexing))
            stack.enter_context(_replaced(torch, "_dynamo", dynamo))
        for name in _WANTED:
            importlib.import_module(name)


def _is_tested() -> bool:
    """Whether the insides of the installed libraries are those that are known here."""
    return all(version(name).startswith(start) for name, start in TESTED.items())


class _MetaKernelsFirst(MetaPathFinder):
    """Finds nothing itself: what is built on the Python kernels is to find them there, as after a plain import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None, after the kernels were imported where `fullname` needs them."""
        if fullname in _NEEDS_META and _META not in sys.modules:
            importlib.import_module(_META)
        return None


@contextmanager
def stand_ins(*modules: ModuleType) -> Iterator[None]:
    """Let `modules` stand for those of their names while others are imported; those that are there already stay."""
    absent = [module for module in modules if module.__name__ not in sys.modules]
    sys.modules.update((module.__name__, module) for module in absent)
    try:
        yield
    finally:
        for module in absent:
            if sys.modules.get(module.__name__) is module:
                del sys.modules[module.__name__]


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    absent = object()
    before = vars(module).get(name, absent)  # not getattr: torch imports _dynamo when it is asked for it
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is absent:
            delattr(module, name)
        else:
            setattr(module, name, before)


def _no(*_: object) -> bool:
    return False


def _as_it_is(function: F) -> F:
    """For marks that only torch.compile reads."""
    return function


def _disable_later(later: Callable[..., object], fn: object = None, recursive: bool = True, **_: object) -> object:
    """torch.compiler.disable, which imports the compiler, by torch's own decorator that waits until it is called."""
    return later(fn, recursive)


def _indexing() -> object:
    """The context manager of that name; its module imports the compiler."""
    return importlib.import_module(_INDEXING).TransformGetItemToIndex()


def _once(read: Callable[..., object], path: str | Path, prefix: str | None = None) -> object:
    """A package's `__init__` and its directory are the same to `read`, but not to its cache."""
    where = Path(path)
    return read(where.parent if where.name == "__init__.py" else where, prefix)
