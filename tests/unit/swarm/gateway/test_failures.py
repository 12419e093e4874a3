"""Which status an asker is told where the swarm has what was asked for, only not now."""

from __future__ import annotations

import pytest

from peers.errors import NoRoute, PeerError, Refused
from peers.streams.messages import RefusalCode
from swarm.gateway.failures import failure_of


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NoRoute("nobody who holds blocks 0:3 serves adapter 'pirate' now"), 503, "no_route"),
        (Refused("adapter 70 is not served here", RefusalCode.ADAPTER), 503, "no_route"),
        (Refused("no room", RefusalCode.FULL), 503, "swarm_is_full"),
        (Refused("these blocks are not held here", RefusalCode.SPAN), 502, "swarm_failed"),
    ],
)
def test_what_may_be_there_later_is_told_so(error: PeerError, status: int, code: str) -> None:
    failure = failure_of(error)
    assert failure is not None
    assert (failure.status, failure.code) == (status, code)
    assert (failure.retry_seconds is not None) == (status == 503)
