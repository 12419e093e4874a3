"""Members with loops of their own among hosts: one round for all, equal bits, and a way back for those who left."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import swarm as api
from blocks.adapters import read_parameters
from blocks.errors import BadAdapter
from peers.records import PeerRecord
from swarm.errors import BadConfig
from swarm.own_loops.member import Member, enter
from tests.errors_page import met
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import WHOLE, SmallSwarm, host_of, kill, random_samples, until

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft about transformers

BATCH = 4
SETTINGS = {
    "adapter": {"lora_rank": 4, "lora_alpha": 8.0},
    "training": {"batch_size": BATCH, "learning_rate": 1e-2},
    "rounds": {"round_samples": 4 * BATCH},
}


class Loop:
    """A model of one's own, its optimizer, and steps on random rows."""

    def __init__(self, swarm: SmallSwarm, name: str, **changes: object) -> None:
        given: dict[str, object] = {"r": 4, "lora_alpha": 8} | changes
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(swarm.source.path), LoraConfig(**given))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.swarm, self.name = swarm, name

    def enter(self) -> Member:
        run = next(iter(self.swarm.peers.values())).join if self.swarm.peers else str(self.swarm.run)
        config = replace(self.swarm.config(self.name), nickname=self.name)
        return api.member(self.model, self.optimizer, run, config=config)

    def step(self, member: Member) -> None:
        ids_BT = torch.randint(3, 100, (BATCH, 12))
        self.model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        member.step(loss=2.5)


def live_equals_state(member: Member) -> bool:
    units = member._part.units
    live = read_parameters(units._book._parameters)
    return all(torch.equal(live[unit][n], t) for unit, state in units.units.items() for n, t in state.tensors.items())


def test_a_member_and_a_host_train_one_adapter(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    host = swarm.host("host", WHOLE)
    loop = Loop(swarm, "ann")
    with loop.enter() as member:
        units = member._part.units
        assert units.digests() == host_of(host).digests()
        assert live_equals_state(member), "the run's first values are in the model"
        for _ in range(2):
            loop.step(member)
        until(lambda: {counted.steps for counted in units.counted().values()} == {2}, "both steps count")
        counted = next(iter(units.counted().values()))
        assert (counted.samples, counted.tokens, counted.steps) == (2 * BATCH, 2 * BATCH * 11, 2)
        swarm.enter("trainer").train(random_samples(16), steps=2)
        assert member.wait_for_round(1, seconds=120)
        until(lambda: host_of(host).round == 1, "the host's round 1")
        assert units.digests() == host_of(host).digests()
        assert live_equals_state(member)
        assert all(state.total_samples == 4 * BATCH for state in units.units.values()), "both brought theirs"
        records = {record.peer: record for record in host.node.router.found}
        until(lambda: member.peer.id in {r.peer for r in host.node.router.found}, "the member's record")
        records = {record.peer: record for record in host.node.router.found}
        assert not_routed_through(records[member.peer.id])
        until(
            lambda: [each.trained_tokens for each in host.status().members] == [2 * BATCH * 11], "what ann has trained"
        )
        until(lambda: "ann" in {trainer.nickname for trainer in host.status().trainers}, "the member in the status")
    round_of_one = Loop(swarm, "ann")  # started again: another model, and the state of its directory
    swarm.stop("trainer", "host")
    swarm.peers.clear()
    with round_of_one.enter() as again:
        assert again.round == 1
        assert again._part.units.digests() == units.digests()
        assert live_equals_state(again)
        assert again.peer.export(swarm.run / "exported") == 1, "a member alone has the whole adapter"


def not_routed_through(record: PeerRecord) -> bool:
    return "host" not in record.roles and record.moves_to is None


def test_a_round_reads_during_an_evaluation_and_writes_after_it(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    loops = [Loop(swarm, name) for name in ("ann", "bob")]
    members = [loops[0].enter()]
    run = members[0].peer.join
    config = swarm.config("bob")
    second = enter(loops[1].model, run, config=config)  # as callbacks do, whose optimizer comes later
    second.begin(loops[1].optimizer)
    members.append(second)
    try:
        for loop, member in zip(loops, members, strict=True):
            for _ in range(2):
                loop.step(member)
        with members[0].evaluation():
            before = read_parameters(members[0]._part.units._book._parameters)
            assert members[1].wait_for_round(1, seconds=120), "nobody waits for the evaluation"
            after = read_parameters(members[0]._part.units._book._parameters)
            assert all(torch.equal(before[u][n], after[u][n]) for u in before for n in before[u])
            assert members[0].round == 0
        assert members[0].round == 1
        assert live_equals_state(members[0])
        assert members[0]._part.units.digests() == members[1]._part.units.digests()
    finally:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Member.close, members))


def test_nobody_waits_for_a_loop_that_stands_still(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    loops = [Loop(swarm, name) for name in ("ann", "bob")]
    with loops[0].enter() as ann:
        swarm.peers["ann"] = ann.peer
        with loops[1].enter() as bob:
            swarm.peers.clear()
            loops[0].step(ann)
            ann._gate.patience_seconds = 0.2
            until(lambda: ann._part.keeper.is_away, "ann is out of rounds")
            until(lambda: not bob._part.keeper.company.others(), "bob has read so")
            for _ in range(4):
                loops[1].step(bob)
            assert bob.wait_for_round(1, seconds=120)
            assert ann.round == 0
            ann._gate.patience_seconds = 1e9
            assert ann.wait_for_round(1, seconds=120), "she comes back, and has what bob has"
            assert ann._part.units.digests() == bob._part.units.digests()
            until(lambda: not ann._part.keeper.is_away, "ann is in rounds again")
            assert {counted.samples for counted in ann._part.units.counted().values()} == {BATCH}
            assert not live_equals_state(ann), "her step goes on top of the round that she missed"


def test_a_loop_whose_network_has_died_trains_on_alone(make_swarm: MakeSwarm, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(make_swarm(SETTINGS), "ann")
    with loop.enter() as member:
        kill(member.peer)
        until(lambda: member.peer.node.failure() is not None, "the node has noticed")
        for _ in range(8):
            loop.step(member)
        assert not member.wait_for_round(2, seconds=60), "at once"
    assert sum("trains on alone" in record.message for record in caplog.records) == 1
    with pytest.raises(BadConfig, match="has left its run") as refused:
        member.begin(loop.optimizer)
    met("this member has left its run", refused.value)


def test_another_adapter_is_refused_and_nothing_is_left_running(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    loop = Loop(swarm, "ann", r=8)
    with pytest.raises(BadAdapter, match="rank 8, the run's has 4"):
        loop.enter()
    fitting = Loop(swarm, "ann")
    fitting.enter().close()  # the state directory is free again


def test_a_trainer_of_trl_is_a_trainer(make_swarm: MakeSwarm, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the package trl: pip install 'swarmtune[loops]'")
    pytest.importorskip("datasets", reason="needs the package datasets: pip install 'swarmtune[data]'")
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    swarm = make_swarm(SETTINGS)
    tokenizer = AutoTokenizer.from_pretrained(swarm.source.path)
    rows = Dataset.from_dict({"text": [" ".join(f"w{3 + row + word}" for word in range(12)) for row in range(16)]})
    given = {"use_cpu": True, "report_to": [], "save_strategy": "no", "max_steps": 4, "logging_steps": 1, "bf16": False}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(swarm.source.path),
        SFTConfig(str(tmp_path / "out"), per_device_train_batch_size=BATCH, max_length=32, **given),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )
    config = swarm.config("ann")
    member = api.attach(trainer, str(swarm.run), config=config, ending=api.Ending(last_round=1, seconds=60))
    trainer.train()
    assert member.round == 1
    assert isinstance(trainer.model, nn.Module)
    assert all(state.total_samples == 4 * BATCH for state in member._part.units.units.values())
