"""Peers of one run in one process: the project's own steps, books, plans and rules, with memory in the network's place.

Only what carries bytes between machines is missing. Nothing of a rule is written here again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from parts.learning_model import Lab
from torch import Tensor

from averaging import merge
from averaging.codecs import make_codec
from averaging.config import AveragingConfig
from averaging.exchange import Brought, ClassWork, Contribution, Group, Reduced, Version, Vote
from averaging.feedback import Feedback
from averaging.parts import Debts, Stretch, combine_part
from averaging.planning import Plan, plan
from averaging.recipe import Recipe
from averaging.rounds import Applied
from averaging.unit_round import UnitInput, UnitRules
from averaging.unit_work import RoundWork
from blocks.adapters import UnitTensors, parameters_by_unit
from blocks.spans import UnitId
from blocks.training.ledger import Counted
from blocks.training.optimizer import OptimizerConfig
from blocks.training.unit_steps import DueStep, UnitSteps
from peers.network import PeerId
from swarm.units.book import RoundResult, UnitBook

_NONE = Counted()


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerRules:
    """What a peer trains by. `seed` is the adapter's, `own_rank` a rank of its own, or 0 for the run's."""

    recipe: Recipe
    optimizer: OptimizerConfig
    seed: int
    own_rank: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReport:
    """How far what was merged is from the mean of the products, relative to it; the bytes that each peer sent; and what
    each has to apply.
    """

    error: float
    bytes_sent: tuple[int, ...]
    results: tuple[RoundResult, ...]


class LearningPeer:
    """One peer's adapter, its optimizer and its books."""

    def __init__(self, lab: Lab, place: int, rules: PeerRules) -> None:
        self.name, self.recipe = PeerId(f"peer-{place}"), rules.recipe
        self._lab = lab
        self._compute = lab.adapted(place, seed=rules.seed, own_rank=rules.own_rank)
        model = self._compute.model
        self._steps = UnitSteps(parameters_by_unit(model), rules.optimizer)
        self.rules = UnitRules(rules.recipe, seed=rules.seed, rank=lab.rank)
        self.book = UnitBook(parameters_by_unit(model), self._compute.settings, self._steps, self.rules)
        self.book.begin()
        self.feedback = Feedback()
        self.read: Mapping[UnitId, UnitInput] = {}
        self._counted = _NONE

    def step(self, rows_BT: Tensor, *, seen: int) -> None:
        """One optimizer step; the run had seen so many samples before it."""
        gradients, tokens = self._lab.gradients(self._compute, rows_BT)
        self._steps.add(gradients)
        self._steps.step([DueStep(unit=unit, tokens=tokens, samples=seen) for unit in sorted(self._steps.units)])
        done = self._counted
        self._counted = Counted(samples=done.samples + len(rows_BT), tokens=done.tokens + tokens, steps=done.steps + 1)

    def live(self) -> dict[UnitId, UnitTensors]:
        """The adapter as it is trained."""
        return {unit: entry.view.live for unit, entry in self.book.inputs().items()}

    def is_finite(self) -> bool:
        """Whether training has not diverged."""
        return all(merge.is_finite(tensor) for named in self.live().values() for tensor in named.values())

    def contribution(self, number: int) -> Contribution:
        """What this peer brings to round `number`."""
        done = self._counted
        units = {
            unit: Brought(
                samples=done.samples,
                tokens=done.tokens,
                steps=done.steps,
                version=Version(number=state.round, weight=state.weight, digest=state.digest[:8]),
            )
            for unit, state in self.book.states.items()
        }
        return Contribution(peer=self.name, number=number, layout="bench", units=units)

    def work(self, agreed: Plan, number: int) -> RoundWork:
        """Its side of the round; what is trained from here on belongs to the next one."""
        self.read, self._counted = self.book.inputs(), _NONE
        return RoundWork(self.rules, agreed, self.read, number)


def run_round(peers: Sequence[LearningPeer], number: int) -> RoundReport:
    """Everything that a round is, at all peers, save that its results are applied.

    Raises:
        RuntimeError: some peer kept a unit, which must not happen where no message is lost.
    """
    recipe = peers[0].recipe
    contributions = tuple(sorted((peer.contribution(number) for peer in peers), key=lambda entry: entry.peer))
    group = Group(group_id=number.to_bytes(8, "big"), contributions=contributions)
    plans = [plan(group, peer.name, AveragingConfig(recipe=recipe)) for peer in peers]
    works = [peer.work(agreed, number) for peer, agreed in zip(peers, plans, strict=True)]
    (unit_class,) = plans[0].classes
    key = unit_class.class_id
    sent = [0] * len(peers)
    reduced: list[Reduced] = []
    for _ in range(peers[0].rules.merging.passes):
        entries = [work.entries(peer.feedback)[0] for work, peer in zip(works, peers, strict=True)]
        reduced = all_reduce(entries, recipe)
        for place, (work, result) in enumerate(zip(works, reduced, strict=True)):
            work.take_means({key: result})
            sent[place] += result.bytes_sent
    votes = {
        key: {
            peer.name: Vote(class_id=key, complete=True, digest=result.digest, probes=work.probes(unit_class))
            for peer, work, result in zip(peers, works, reduced, strict=True)
        }
    }
    errors, results = [], []
    for peer, agreed, work, result in zip(peers, plans, works, reduced, strict=True):
        decisions = {key: Applied(result.digest)}
        applied, kept, error = work.finish({key: result}, decisions, votes, peer.feedback)
        if kept or error is None:
            raise RuntimeError(f"round {number} kept {len(kept)} units at {peer.name}: {list(kept.values())[:1]}")
        counted = dict.fromkeys(applied, _NONE)
        read = peer.read if recipe.overlap else None
        results.append(RoundResult(number=number, applied=applied, samples=agreed.samples, counted=counted, read=read))
        errors.append(error)
    return RoundReport(error=sum(errors) / len(errors), bytes_sent=tuple(sent), results=tuple(results))


def apply(peers: Sequence[LearningPeer], results: Sequence[RoundResult]) -> None:
    """All go on from a round's results, with what they have trained since on top where rounds overlap."""
    for peer, result in zip(peers, results, strict=True):
        peer.book.apply(result)


def all_reduce(entries: Sequence[ClassWork], recipe: Recipe) -> list[Reduced]:
    """What hivemind_allreduce.py does over streams: each peer reduces one even part of the vector.

    A peer sends each other one its part, encoded, and each of the others what it reduced, encoded once.
    """
    codec = make_codec(recipe.codec, top_share=recipe.top_share, lossless=recipe.lossless)
    debts = [Debts(codec, _vector(entry), entry.owed_sent, entry.owed_sum) for entry in entries]
    size, num = debts[0].vector.numel(), len(debts)
    mean, sent = torch.empty(size), [0] * num
    for reducer, own in enumerate(debts):
        stretch = Stretch(size * reducer // num, size * (reducer + 1) // num)
        num_values = stretch.stop - stretch.start
        pieces = []
        for sender, debt in enumerate(debts):
            if sender == reducer:
                pieces.append(stretch.of(debt.vector))
                continue
            data = codec.encode(stretch.of(debt.vector))
            debt.note_sent(stretch, data)
            sent[sender] += len(data)
            pieces.append(codec.decode(data, num_values))
        combined = combine_part(recipe.robust, pieces, entries[reducer].segments, stretch)
        exact = own.with_owed(stretch, combined)
        data = codec.encode(exact)
        decoded = codec.decode(data, num_values)
        own.note_summed(stretch, exact, decoded)
        sent[reducer] += len(data) * (num - 1)
        stretch.of(mean).copy_(decoded)
    digest = merge.digest([mean])
    return [
        Reduced(mean=mean.clone(), digest=digest, bytes_sent=num_bytes, owed_sent=debt.sent, owed_sum=debt.summed)
        for debt, num_bytes in zip(debts, sent, strict=True)
    ]


def final_units(peers: Sequence[LearningPeer]) -> Mapping[UnitId, UnitTensors]:
    """The run's adapter after its last round, which all peers have."""
    return {unit: state.tensors for unit, state in peers[0].book.states.items()}


def _vector(entry: ClassWork) -> Tensor:
    if entry.vector is None:
        raise RuntimeError("a peer could not bring its units; its training has diverged")
    return entry.vector
