"""What fits under --max-memory, and what is left beside it."""

import subprocess
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from blocks.training.open_work import TrainingLimits
from swarm.errors import BadConfig
from swarm.hosts.memory import Allowance, Room, affordable
from swarm.hosts.memory_now import free_bytes

MB = 10**6
MUCH = 1 << 40


def allowance(most: int, *, taken: int = 500 * MB, block: int = 100 * MB) -> Allowance:
    return Allowance(most_bytes=most, taken_bytes=taken, block_bytes=block)


def test_half_of_what_the_program_leaves_is_for_weights() -> None:
    assert allowance(2500 * MB).most_blocks() == 10
    assert allowance(2499 * MB).most_blocks() == 9


def test_small_blocks_leave_room_for_work_all_the_same() -> None:
    assert allowance(600 * MB, block=MB).most_blocks() == 36


def test_not_one_block_is_refused_with_what_one_needs() -> None:
    with pytest.raises(BadConfig, match=r"--max-memory 650 MB leaves no room for one block: it needs 100 MB") as caught:
        allowance(650 * MB).most_blocks()
    assert "beside the 500 MB of the program itself" in str(caught.value)
    assert "give at least 707 MB" in str(caught.value)
    assert allowance(707 * MB).most_blocks() == 1


def test_less_than_the_program_takes_is_refused() -> None:
    with pytest.raises(BadConfig, match="no room for one block"):
        allowance(MB).most_blocks()


def test_chosen_blocks_that_do_not_fit_are_refused_with_what_would() -> None:
    allowance(2500 * MB).check(10)
    with pytest.raises(BadConfig, match="has room for 10 blocks, not for 11") as caught:
        allowance(2500 * MB).check(11)
    assert "fewer --blocks" in str(caught.value)
    with pytest.raises(BadConfig, match="no room for one block"):
        allowance(MB).check(1)


@given(most=st.integers(1, MUCH), taken=st.integers(0, MUCH), block=st.integers(0, MUCH), blocks=st.integers(1, 200))
def test_weights_caches_and_work_never_exceed_what_is_allowed(most: int, taken: int, block: int, blocks: int) -> None:
    try:
        room = allowance(most, taken=taken, block=block).room(blocks, Room(cache_bytes=512 << 20))
    except BadConfig:
        assume(False)
    assert room.cache_bytes > 0
    assert room.limits.held_bytes > 0
    assert room.limits.stash_bytes <= room.limits.held_bytes
    assert taken + blocks * block + room.cache_bytes + room.limits.held_bytes <= most


@given(taken=st.integers(0, 10**12), block=st.integers(1, 10**11), blocks=st.integers(1, 80))
def test_what_a_refusal_asks_for_is_enough(taken: int, block: int, blocks: int) -> None:
    from swarm.sizes import parse_memory

    with pytest.raises(BadConfig) as caught:
        allowance(taken + blocks * block, taken=taken, block=block).check(blocks)
    words = str(caught.value).split("give at least ")[1].split(",")[0]
    wanted = 1 if "no room for one block" in str(caught.value) else blocks
    allowance(parse_memory(words), taken=taken, block=block).check(wanted)


def test_what_a_person_chose_is_not_raised() -> None:
    wanted = Room(cache_bytes=512 << 20, limits=TrainingLimits(stash_bytes=1 << 30))
    room = allowance(MUCH).room(1, wanted)
    assert (room.cache_bytes, room.limits) == (wanted.cache_bytes, wanted.limits)


def test_without_a_limit_half_of_the_free_memory_is_for_weights() -> None:
    assert affordable(1000 * MB, 100 * MB, 30) == 5
    assert affordable(MB, 100 * MB, 30) == 1
    assert affordable(MUCH, 100 * MB, 30) == 30


def test_the_process_and_the_machine_are_measured() -> None:
    # In a process of its own, which imports no torch: this one runs other tests, whose memory comes and goes.
    code = f"""
from swarm.hosts.memory_now import taken_bytes
before = taken_bytes()
held = bytearray(b"x") * {64 * MB}  # written to: pages of zeros would take no memory
print(before, taken_bytes())
"""
    before, after = map(int, subprocess.check_output([sys.executable, "-c", code], text=True, timeout=120).split())
    assert before > 10 * MB
    assert after > before + 32 * MB
    assert free_bytes() > MB
