from __future__ import annotations

from collections.abc import Iterator

import pytest
from parts.chaos_hosts import is_running, until
from parts.chaos_swarm import ChaosSwarm, tiny_layout
from parts.tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosSwarm]:
    """One swarm for all tests, as each host takes seconds to start. At the end no process of it is left behind."""
    root = tmp_path_factory.mktemp("chaos")
    swarm = ChaosSwarm(root, tiny_layout(root, save_tiny_model(root / "model")))
    try:
        yield swarm
    finally:
        swarm.close()
    left = swarm.pids
    until(lambda: not any(map(is_running, left)), f"the end of every process among {sorted(left)}", seconds=20)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After the last of these tests the hosts end, not only with the session: they would take time from the others."""
    swarm = getattr(item, "funcargs", {}).get("swarm")
    if isinstance(swarm, ChaosSwarm) and (nextitem is None or nextitem.path.parent != item.path.parent):
        swarm.close()
