"""What was learnt outlives those who learnt it: keepers have copies, and directories are enough to go on from."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file

from blocks.adapters import read_units
from blocks.spans import Span, UnitId, parse_unit
from blocks.unit_state import UnitState
from swarm.errors import BadCheckpoint
from swarm.exporting import LeftBehind, export_left
from swarm.hosts.loading import HostingConfig
from swarm.join_string import RunDirectory, resolve_join
from swarm.peer import Peer
from tests.errors_page import met
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import (
    BACK,
    CACHE_BYTES,
    FRONT,
    WHOLE,
    SmallSwarm,
    host_of,
    random_samples,
    until,
)

T = TypeVar("T")
SETTINGS = {
    "training": {"batch_size": 4, "learning_rate": 1e-2},
    "rounds": {"round_samples": 16},
}
STEPS_A_ROUND = 4


def train_one_round(swarm: SmallSwarm, *hosts: Peer) -> None:
    trainer = swarm.peers.get("trainer") or swarm.enter("trainer")
    trainer.train(random_samples(32), steps=STEPS_A_ROUND)
    until(lambda: all(host_of(host).round == 1 for host in hosts), "round 1")


def wait_until_kept(keeper: Peer, holder: Peer) -> None:
    """Until `keeper` has the state in which every unit of `holder` stands now, and says so in its record."""

    def kept() -> bool:
        node = holder.node
        records = run_in(holder, node.directory.find_progress(node.config.run, WHOLE))
        said = {block: each.kept(block) for each in records if each.peer == keeper.id for block in WHOLE.blocks()}
        units = host_of(holder).units.items()
        return all(said.get(parse_unit(unit)[1]) == (state.round, state.digest[:8]) for unit, state in units)

    until(kept, "the units are kept")


def states_of(host: Peer) -> dict[UnitId, UnitState]:
    """The units of a host with their moments, as of its last round."""
    moments = host_of(host).trainer.unit_steps.read_moments()
    return {unit: replace(state, moments=moments[unit]) for unit, state in host_of(host).units.items()}


def assert_equal(found: UnitState, wanted: UnitState) -> None:
    assert (found.version, found.total_samples) == (wanted.version, wanted.total_samples)
    for ours, theirs in ((found.tensors, wanted.tensors), (found.moments, wanted.moments), (found.outer, wanted.outer)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def run_in(peer: Peer, work: Coroutine[object, object, T]) -> T:
    """Run a coroutine on a peer's own loop."""
    return peer.loop.run(work)


def resuming(swarm: SmallSwarm, name: str, span: Span, *resume: Path) -> Peer:
    peer = swarm.enter(name)
    config = HostingConfig(cache_dir=swarm.cache_dir, num_threads=1, cache_bytes=CACHE_BYTES, resume=resume)
    peer.hold(span, config)
    return peer


def test_what_the_last_holder_of_a_span_had_learnt_comes_back_from_a_keeper(
    make_swarm: MakeSwarm, tmp_path: Path
) -> None:
    swarm = make_swarm({**SETTINGS, "rounds": {"round_samples": 16, "outer": "nesterov"}})
    front, back = swarm.hosts(front=FRONT, back=BACK)
    train_one_round(swarm, front, back)
    wait_until_kept(front, back)
    before = states_of(back)
    trainer = swarm.peers["trainer"]
    keeps = {host["peer"]: host["keeps"] for host in trainer.status().to_plain()["hosts"]}
    assert keeps[front.id] == [{"blocks": [3, 6], "round": 1}]
    number = trainer.export(tmp_path / "with-holder")
    swarm.kill("back")
    assert trainer.export(tmp_path / "with-keeper") == number == 1
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("with-keeper", "with-holder"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = swarm.host("again", BACK)
    assert host_of(again).round == 1
    for unit, state in states_of(again).items():
        assert_equal(state, before[unit])
        assert state.moments
        assert state.outer


def test_the_directories_of_a_dead_swarm_are_enough(make_swarm: MakeSwarm, tmp_path: Path) -> None:
    swarm = make_swarm(SETTINGS)
    front, back = swarm.hosts(front=FRONT, back=BACK)
    train_one_round(swarm, front, back)
    wait_until_kept(front, back)
    wait_until_kept(back, front)
    before = states_of(front) | states_of(back)
    swarm.peers["trainer"].export(tmp_path / "live")
    join = front.join
    for name in ("front", "back"):
        swarm.kill(name)
    states = swarm.run / "states"
    # One directory has it all, of one peer as checkpoint and of the other as keeper; it alone names the run, too.
    alone = resolve_join(str(states / "front"))
    for number, (target, sources) in enumerate(
        [
            (alone, [states / "front"]),
            (RunDirectory(path=swarm.run, join=None), [states]),
            (join, [states / "back", states / "front"]),
        ]
    ):
        left = LeftBehind(target=target, directories=tuple(sources), cache_dir=tmp_path / "cache")
        assert export_left(left, tmp_path / f"left-{number}") == 1
        ours = load_file(tmp_path / f"left-{number}" / "adapter_model.safetensors")
        theirs = load_file(tmp_path / "live" / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    swarm.close()
    whole = resuming(swarm, "new", WHOLE, states / "front", states / "back")
    assert host_of(whole).round == 1
    after = states_of(whole)
    assert after.keys() == before.keys()
    for unit, state in after.items():
        assert_equal(state, before[unit])


def test_what_cannot_be_resumed_or_exported_is_one_line(make_swarm: MakeSwarm, tmp_path: Path) -> None:
    swarm, another = make_swarm(SETTINGS), make_swarm(SETTINGS)
    front, back = swarm.hosts(front=FRONT, back=BACK)
    train_one_round(swarm, front, back)
    swarm.close()
    states = swarm.run / "states"
    target = RunDirectory(path=swarm.run, join=None)
    for kept in (states / "front" / "kept").glob("*"):
        kept.unlink()
    left = LeftBehind(target=target, directories=(states / "front",), cache_dir=tmp_path / "cache")
    with pytest.raises(BadCheckpoint, match=r"blocks 3, 4, 5 are in none of .*front") as caught:
        export_left(left, tmp_path / "adapter")
    met("are in none of", caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadCheckpoint, match="holds no state of a peer"):
        export_left(replace(left, directories=(tmp_path / "empty",)), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    before = sorted((path, path.read_bytes()) for path in states.rglob("*.safetensors"))
    with pytest.raises(BadCheckpoint, match=r"belongs to run .*; leave it out"):
        resuming(another, "new", FRONT, states / "front")
    assert before == sorted((path, path.read_bytes()) for path in states.rglob("*.safetensors"))


def test_a_last_holder_that_leaves_in_peace_loses_nothing(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    front, back = swarm.hosts(front=FRONT, back=BACK)
    train_one_round(swarm, front, back)
    swarm.peers["trainer"].train(random_samples(32, seed=6), steps=2)  # half of a round
    live = host_of(back)
    until(lambda: live.trainer.steps == STEPS_A_ROUND + 2, "every step is made")
    trained = read_units(live.model)
    assert any(
        not torch.equal(trained[unit][n], live.units[unit].tensors[n]) for unit in trained for n in trained[unit]
    )
    before = dict(live.units)
    swarm.stop("back")
    assert host_of(front).kept.units.keys() == trained.keys()
    again = swarm.host("elsewhere", BACK)  # with a state of its own: all comes from the keeper
    for unit, state in states_of(again).items():
        assert state.round == 1
        assert state.total_samples == before[unit].total_samples + 8
        assert state.weight == before[unit].weight + 8
        assert all(torch.equal(state.tensors[name], trained[unit][name]) for name in trained[unit])


def test_a_host_whose_span_changes_keeps_what_it_had(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm({**SETTINGS, "rounds": {"round_samples": 16, "checkpoint_rounds": 2}})
    whole = swarm.host("a", WHOLE)
    checkpoints = swarm.run / "states" / "a" / "checkpoints"
    train_one_round(swarm, whole)
    before = states_of(whole)
    assert not checkpoints.exists(), "round 1 is not one of every second"
    swarm.stop("trainer", "a")
    assert [path.name for path in checkpoints.iterdir()] == ["round-0000000001.safetensors"]
    moved = swarm.host("a", FRONT)
    assert {unit: kept.version for unit, kept in host_of(moved).kept.units.items()} == {
        unit: state.version for unit, state in before.items() if unit not in host_of(moved).units
    }
    again = swarm.host("b", BACK)
    for unit, state in states_of(again).items():
        assert_equal(state, before[unit])
    swarm.stop("b", "a")
    whole = swarm.host("a", WHOLE)
    assert {unit: state.version for unit, state in states_of(whole).items()} == {
        unit: state.version for unit, state in before.items()
    }
    swarm.stop("a")
    kept = swarm.run / "states" / "a" / "kept"
    assert list(kept.iterdir()) == [], "what is held and in the checkpoint is kept a second time"
