"""Random numbers of threads that share torch's one generator."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from blocks.rng import forked_rng


def drawn(seed: int) -> torch.Tensor:
    with forked_rng(seed):
        return torch.cat([torch.rand(50) for _ in range(20)])


def test_threads_draw_as_if_they_were_alone_and_nobody_elses_dice_move() -> None:
    alone = [drawn(seed) for seed in range(4)]
    torch.manual_seed(11)
    expected = torch.rand(5)
    torch.manual_seed(11)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(drawn, [0, 1, 2, 3] * 50, timeout=300))
    assert all(torch.equal(each, alone[place % 4]) for place, each in enumerate(found))
    assert torch.equal(torch.rand(5), expected)


def test_without_a_seed_one_goes_on_where_the_process_stands() -> None:
    torch.manual_seed(5)
    with forked_rng():
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), first)
