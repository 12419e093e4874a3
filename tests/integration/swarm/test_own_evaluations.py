"""Held-out rows of loops of one's own: told as sums of a round's adapter, and added up with those of trainers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import swarm as api
from peers.records import EvaluationRecord
from swarm.errors import BadConfig
from swarm.own_loops.member import Member
from swarm.peer import Peer
from swarm.reports.metrics import read_metrics
from tests.errors_page import met
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import WHOLE, SmallSwarm, random_samples, until

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries about themselves and each other

BATCH = 4
SETTINGS = {
    "adapter": {"lora_rank": 4, "lora_alpha": 8.0},
    "training": {"batch_size": BATCH, "learning_rate": 1e-2},
    "rounds": {"round_samples": 4 * BATCH},
}


def lora_model(swarm: SmallSwarm) -> PeftModel:
    return get_peft_model(AutoModelForCausalLM.from_pretrained(swarm.source.path), LoraConfig(r=4, lora_alpha=8))


def rows(count: int, *, first: int = 0) -> list[dict[str, torch.Tensor]]:
    """Of unlike lengths of prompts, which have no label."""
    made = []
    for row in range(first, first + count):
        ids_T = 3 + (torch.arange(12) * (1 + row % 5) + 7 * row) % 97
        labels_T = torch.where(torch.arange(12) < row % 4, -100, ids_T)
        made.append({"input_ids": ids_T, "labels": labels_T})
    return made


def batch_of(found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in found]) for name in ("input_ids", "labels")}


def true_sums(model: nn.Module, found: list[dict[str, torch.Tensor]]) -> tuple[float, int]:
    """Of the adapter as it is, row by row by the model's own loss."""
    loss, tokens = 0.0, 0
    with torch.no_grad():
        for row in found:
            batch = batch_of([row])
            count = int((batch["labels"][:, 1:] != -100).sum())
            loss, tokens = loss + float(model(**batch).loss) * count, tokens + count
    return loss, tokens


def records(peer: Peer, number: int) -> list[EvaluationRecord]:
    node = peer.node
    return peer.loop.run(node.directory.find_evaluations(node.config.run, number))


def told(peer: Peer, number: int, seconds: float = 30.0) -> EvaluationRecord:
    """The one record of a round, as another peer reads it."""
    until(lambda: bool(records(peer, number)), f"sums of round {number}", seconds=seconds)
    (record,) = records(peer, number)
    return record


def wait_while_a_round_forms(member: Member, steps: int) -> None:
    """As its steps are shorter than that: the round is then done at the end of the step that begins."""
    if steps >= 4 and member.round == 0:
        until(lambda: bool(member._gate._visits), "the round comes to read the adapter")


class Loop:
    """A plain loop, and its evaluation."""

    def __init__(self, swarm: SmallSwarm) -> None:
        self.model = lora_model(swarm)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.held_out = rows(10)

    def step(self, member: Member) -> None:
        self.model(**batch_of(rows(BATCH, first=100))).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        member.step(loss=2.5)

    def evaluate(self, member: Member) -> None:
        self.model.eval()
        with member.evaluation(), torch.no_grad():
            for start in range(0, len(self.held_out), 4):
                self.model(**batch_of(self.held_out[start : start + 4]))
        self.model.train()


def test_sums_of_a_trainer_and_of_a_member_are_added_up(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    host = swarm.host("host", WHOLE)
    loop = Loop(swarm)
    held_out = random_samples(6, seed=9)
    with api.member(loop.model, loop.optimizer, host.join, config=replace(swarm.config("ann"), nickname="ann")) as ann:
        member_id = ann.peer.id
        ann.report(loss=2.5)
        loop.evaluate(ann)
        assert told(host, 0).peer == member_id
        until(lambda: [each.evaluated for each in host.status().trainers] == [0], "ann says that she measures")
        for _ in range(2):
            loop.step(ann)
        loop.evaluate(ann)  # with an adapter that is nobody's but hers
        trainer = swarm.enter("bob")
        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(trainer.train, random_samples(16), steps=2, held_out=held_out, last_round=1)
            assert ann.wait_for_round(1, seconds=60)
            loop.evaluate(ann)
            result = training.result()
        loop.model.eval()
        loss, tokens = true_sums(loop.model, loop.held_out)
    of_round = {record.peer: record for record in records(host, 1)}
    assert (of_round[member_id].tokens, len(of_round)) == (tokens, 2)
    assert of_round[member_id].loss == pytest.approx(loss, rel=1e-5)
    (summed,) = [found for found in result.swarm_evaluations if found.round == 1]
    own = result.evaluations[-1]
    assert own.round == 1
    assert (summed.peers, summed.tokens) == (2, own.tokens + tokens)
    assert summed.loss == pytest.approx((own.loss * own.tokens + loss) / (own.tokens + tokens), rel=1e-5)
    notes = [entry for entry in read_metrics(swarm.run / "states" / "ann") if entry.kind == "swarm_evaluation"]
    assert (notes[-1].number("round"), notes[-1].number("peers")) == (1, 2)
    assert notes[-1].number("loss") == summed.loss, "equal to the bit"
    assert len(records(host, 0)) == 2


def test_a_loop_says_itself_over_how_many_tokens_its_mean_is(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    loop = Loop(swarm)
    with api.member(loop.model, loop.optimizer, str(swarm.run), config=swarm.config("ann")) as ann:
        with pytest.raises(BadConfig, match="held_out_tokens goes with held_out") as refused:
            ann.report(held_out=2.0, held_out_tokens=50)
        met("held_out_tokens goes with held_out", refused.value)
        loop.step(ann)
        with ann.evaluation():
            ann.report(held_out=2.0, held_out_tokens=50)
        for _ in range(3):
            loop.step(ann)
        assert ann.wait_for_round(1, seconds=60)
        with ann.evaluation():
            ann.report(held_out=2.0, held_out_tokens=50)
        record = told(ann.peer, 1)
        assert (record.loss, record.tokens) == (100.0, 50)
        assert not records(ann.peer, 0), "with a step on top it is no round's adapter"


def test_a_trainer_of_hugging_face_tells_what_each_round_gives(make_swarm: MakeSwarm, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs the package accelerate")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    swarm = make_swarm(SETTINGS)
    held_out = {"one": rows(6), "two": rows(5, first=6)}
    given = {"use_cpu": True, "report_to": [], "save_strategy": "no", "max_steps": 8, "logging_steps": 1}
    arguments = TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=BATCH, per_device_eval_batch_size=4, **given
    )
    model = lora_model(swarm)
    trainer = Trainer(model, arguments, train_dataset=rows(32, first=100))
    watcher = swarm.enter("watcher")
    config = swarm.config("ann")
    with pytest.raises(BadConfig, match="needs held-out rows") as refused:
        api.attach(trainer, watcher.join, config=config, evaluate_rounds=True)
    met("evaluate_rounds needs held-out rows", refused.value)
    trainer.eval_dataset = held_out
    member = api.attach(trainer, watcher.join, config=config, ending=api.Ending(last_round=1), evaluate_rounds=True)

    class Wait(TrainerCallback):
        def on_step_begin(self, args: object, state: object, control: object, **given: object) -> None:
            wait_while_a_round_forms(member, trainer.state.global_step)

    truth: dict[int, tuple[float, int]] = {}

    class Compare(TrainerCallback):
        def on_evaluate(self, args: object, state: object, control: object, **given: object) -> None:
            assert not model.training
            truth[member.round] = true_sums(model.base_model.model, held_out["one"] + held_out["two"])

    trainer.add_callback(Wait())
    trainer.add_callback(Compare())
    trainer.train()
    assert set(truth) == {1}
    record = told(watcher, 1)
    loss, tokens = truth[1]
    assert record.peer == member.peer.id
    assert record.tokens == tokens
    assert record.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.usefixtures("sigchld")
def test_a_loop_of_lightning_tells_what_each_round_gives(make_swarm: MakeSwarm) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="needs the package lightning: pip install 'swarmtune[loops]'")
    swarm = make_swarm(SETTINGS)
    held_out = rows(10)

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = lora_model(swarm)

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.model(**batch).loss

        def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
            self.model(**batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    truth: dict[int, tuple[float, int]] = {}
    found: list[EvaluationRecord] = []
    ours = api.SwarmCallback(str(swarm.run), config=swarm.config("ann"), evaluate_rounds=True)

    class Compare(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_start(self, trainer: object, module: Module, batch: object, batch_idx: int) -> None:
            assert ours.member is not None
            wait_while_a_round_forms(ours.member, batch_idx)

        def on_validation_start(self, trainer: object, module: Module) -> None:
            if ours.member is not None and ours.member.round not in truth:
                truth[ours.member.round] = true_sums(module.model.base_model.model, held_out)

        def on_train_end(self, trainer: object, module: Module) -> None:
            assert ours.member is not None
            found.append(told(ours.member.peer, 1))

    module = Module()
    loaders = [torch.utils.data.DataLoader(each, batch_size=BATCH) for each in (rows(32, first=100), held_out)]
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[Compare(), ours], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, num_sanity_val_steps=1,
    )  # fmt: skip
    trainer.fit(module, *loaders)
    assert trainer.val_check_batch == 8, "as Lightning had set it"
    (record,) = found
    loss, tokens = truth[1]
    assert record.tokens == tokens
    assert record.loss == pytest.approx(loss, rel=1e-5)
