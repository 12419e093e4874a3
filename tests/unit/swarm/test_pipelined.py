"""How a batch is cut for a chain of hosts."""

from __future__ import annotations

import numpy as np
import pytest

from swarm.data.stream import Sample
from swarm.training.trainer import pipelined


@pytest.mark.parametrize(
    ("rows", "length", "in_flight", "expected"),
    [
        (8, 128, 8, [1, 2, 2, 2, 1]),
        (32, 128, 8, [2, 4, 4, 4, 4, 4, 4, 4, 2]),
        (4, 2048, 8, [1, 1, 1, 1]),
        (1, 16, 8, [1]),
        (8, 16, 8, [8]),
    ],
)
def test_the_ends_of_a_batch_are_small_so_that_hosts_wait_little(
    rows: int, length: int, in_flight: int, expected: list[int]
) -> None:
    ids = np.ones(length, dtype=np.int32)
    cut = pipelined([Sample(ids, ids.copy()) for _ in range(rows)], 2048, in_flight)
    assert [microbatch.num_samples for microbatch in cut] == expected
