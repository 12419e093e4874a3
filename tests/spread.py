"""How tests are spread over the workers of pytest-xdist: what shares a swarm stays together, and the longest go first.

Used by `make test`, which runs two workers, as a test mostly waits for processes or has one busy thread. Without
`--numprocesses` pytest does not come here.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

_ONE_SWARM = "tests/chaos/"  # all its tests share one swarm of processes
_ONE_GATEWAY = "tests/integration/gateway/"  # and most of these, two swarms in the test's process
_OWN_SWARM = ("tests/integration/swarm/", "tests/integration/averaging/")  # each test makes its own


def rank(nodeid: str) -> int:
    """The rings from the slowest to the fastest: short ones at the end keep all workers busy until then."""
    return next((number for number, ring in enumerate((_ONE_SWARM, "tests/integration/")) if ring in nodeid), 2)


class BySwarm(LoadScopeScheduling):
    """Gives workers the whole chaos ring, single tests that make swarms of their own, and else whole files."""

    def _split_scope(self, nodeid: str) -> str:
        for shared in (_ONE_SWARM, _ONE_GATEWAY):
            if nodeid.startswith(shared):
                return shared
        return nodeid if nodeid.startswith(_OWN_SWARM) else nodeid.partition("::")[0]
