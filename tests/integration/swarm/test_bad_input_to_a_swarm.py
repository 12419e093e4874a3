"""What a person can do wrong with a swarm ends in one line that says what to do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from blocks.errors import BadSpan
from blocks.spans import Span
from peers.errors import NoRoute
from swarm.errors import BadConfig, BadJoinString
from swarm.hosts.loading import HostingConfig
from swarm.join_string import RunDirectory, target_run_id
from swarm.model import Sampling
from swarm.peer import Peer
from tests.errors_page import met
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import BACK, FRONT, NUM_BLOCKS, host_of, random_samples, until


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text, "an error without a word"
    assert "\n" not in text
    return text


def other_model(tiny_model: Path, directory: Path) -> Path:
    """A copy whose config says something else."""
    shutil.copytree(tiny_model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    return directory


def test_blocks_that_nobody_holds_are_named_and_the_peers_live_on(make_swarm: MakeSwarm, tmp_path: Path) -> None:
    swarm = make_swarm()
    swarm.hosts(front=FRONT)
    impatient = swarm.enter("impatient", swarm.config("impatient", route_seconds=1.0))
    data = random_samples(8)
    with pytest.raises(NoRoute, match=r"3:6") as trained:
        impatient.train(data, steps=1)
    one_line(trained.value)
    with pytest.raises(NoRoute, match=r"3:6") as written:
        impatient.model().generate("w3 w4", Sampling(max_new_tokens=2))
    one_line(written.value)
    with pytest.raises(NoRoute, match="block 3") as exported:
        impatient.export(tmp_path / "adapter")
    met("no holder and no keeper", exported.value)
    swarm.hosts(back=BACK)
    until(lambda: len(impatient.status().hosts) == 2, "the second half is told")
    assert len(impatient.train(data, steps=1).losses) == 1
    assert impatient.model().generate("w3 w4", Sampling(max_new_tokens=2))


def test_another_local_model_than_the_runs_is_refused(make_swarm: MakeSwarm, tiny_model: Path, tmp_path: Path) -> None:
    swarm = make_swarm()
    wrong = str(other_model(tiny_model, tmp_path / "other"))
    peer = swarm.enter("wrong", swarm.config("wrong", model=wrong))
    with pytest.raises(BadConfig, match="another model than the run's") as held:
        peer.hold(FRONT, HostingConfig(cache_dir=tmp_path, model=wrong))
    assert wrong in one_line(held.value)
    with pytest.raises(BadConfig, match="another model than the run's"):
        peer.train(random_samples(8), steps=1)
    assert peer.node.hosting is None


def test_blocks_out_of_range_are_refused_and_the_peer_may_hold_others(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    peer = swarm.enter("a")
    with pytest.raises(BadSpan) as refused:
        swarm.hold(peer, Span(4, NUM_BLOCKS + 1))
    one_line(refused.value)
    assert swarm.hold(peer, BACK) == BACK
    with pytest.raises(BadConfig, match="holds blocks 3:6 already"):
        swarm.hold(peer, FRONT)
    second = swarm.enter("b")
    assert not set(swarm.hold(second, None).blocks()) - set(range(NUM_BLOCKS))
    assert host_of(second).span.start == 0


def test_a_join_string_of_another_run_is_refused(make_swarm: MakeSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    swarm, another = make_swarm(), make_swarm()
    first = swarm.enter("first")
    mixed = replace(first.join, run_id=target_run_id(RunDirectory(path=another.run, join=None)))
    with monkeypatch.context() as patch:
        patch.setattr("swarm.node._FIND_RUN_SECONDS", 1.0)
        with pytest.raises(BadJoinString, match="do not know run") as refused:
            Peer.enter(mixed, another.config("lost"))
    assert mixed.run_id in one_line(refused.value)
    assert Peer.enter(first.join, swarm.config("second")).close() is None
