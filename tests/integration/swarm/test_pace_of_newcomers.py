"""What a newcomer holds whose blocks nobody chose: as much as suits its own speed, measured before it chooses."""

from __future__ import annotations

import pytest

from swarm.hosts import loading
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import WHOLE, host_of


def test_a_slow_newcomer_takes_fewer_blocks_than_it_has_room_for(
    make_swarm: MakeSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_swarm({})
    measured: list[float] = []
    measure = loading.measure_block_rate

    async def as_slow(*args: object) -> float:
        rate = await measure(*args)  # type: ignore[arg-type]
        measured.append(rate)
        return rate / 1000

    monkeypatch.setattr(loading, "measure_block_rate", as_slow)
    assert swarm.hold(swarm.enter("ann"), None) == WHOLE
    assert not measured, "alone there is nothing to be slower than"
    slow = swarm.hold(swarm.enter("bob"), None)
    assert len(slow) == 1
    assert len(measured) == 1
    host = host_of(swarm.peers["ann"])
    announced = len(WHOLE) / (1 / host.tokens_per_second + 1 / host.backward_tokens_per_second)
    assert announced / 20 < measured[0] < 20 * announced, "of the same device, as it announces itself"
    monkeypatch.setattr(loading, "measure_block_rate", measure)
    assert len(swarm.hold(swarm.enter("cat"), None)) > 1
