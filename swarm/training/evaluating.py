"""What a trainer's held-out rows give with the adapter of one round: forward passes through the chain, as sums."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from peers.chains.train_chain import TrainChain
from swarm.data.labelled import NO_LABEL, Labelled, check_labels, with_label
from swarm.data.stream import Microbatch, Sample, SampleSet, group_by_length, pad_right
from swarm.training.evaluation_sums import Sums, label_sums
from swarm.training.trainer import Head, TrainerConfig, pipelined, together

_AT_ONCE = 64  # rows with a label whose texts are made at a time: each comes once with every label


class HeldOut:
    """The rows of `samples`, ready to be measured through a chain again and again.

    Raises:
        BadData: nothing can be chosen among their labels.
    """

    def __init__(self, chain: TrainChain, head: Head, samples: SampleSet, config: TrainerConfig, run: str) -> None:
        self._chain, self._head, self._samples, self._config = chain, head, samples, config
        labelled = samples.labelled
        self._labelled = labelled
        self.label_set = b""
        classes = np.full(len(samples), NO_LABEL) if labelled is None else labelled.classes
        if labelled is not None:
            check_labels(labelled)
            self.label_set = labelled.digest(run)
        text = [samples[int(index)] for index in np.flatnonzero(classes == NO_LABEL)]
        self._rows = np.flatnonzero(classes != NO_LABEL)
        self._text = pipelined(text, config.token_budget, config.in_flight) if text else []

    async def measure(self, number: int) -> Sums:
        """With the adapter of round `number`.

        Raises:
            NoRoute: some blocks have no live holder, for longer than the router waits.
            Refused: a host refuses this work for a reason that another host would share.
        """
        slots = asyncio.Semaphore(self._config.in_flight)

        async def one(microbatch: Microbatch) -> tuple[float, int]:
            async with slots:
                return await self._head.evaluate(microbatch, await self._through(microbatch, number))

        found = await together(one(microbatch) for microbatch in self._text)
        loss, tokens = sum(each for each, _ in found), sum(count for _, count in found)
        if self._labelled is None:
            return Sums(loss=loss, tokens=tokens)
        scores, label_loss, label_tokens = await self._choose(self._labelled, number)
        return Sums(
            loss=loss + label_loss,
            tokens=tokens + label_tokens,
            labels=label_sums(scores, self._labelled.classes[self._rows].astype(np.int64)),
            label_set=self.label_set,
        )

    async def _choose(self, labelled: Labelled, number: int) -> tuple[NDArray[np.float64], float, int]:
        """The log-likelihood of each label in each row with one [R, C]; and the loss on the right ones with what ends
        them, summed over so many tokens, as in training.
        """
        num_labels, num_end = len(labelled.names), len(labelled.end)
        scores, loss, tokens = np.zeros((len(self._rows), num_labels)), 0.0, 0
        for start in range(0, len(self._rows), _AT_ONCE):
            rows = self._rows[start : start + _AT_ONCE]
            choices = [
                with_label(self._samples[int(row)], label, labelled) for row in rows for label in range(num_labels)
            ]
            for place, (label_part, end_part) in enumerate(await self._likelihoods(choices, num_end, number)):
                row, label = start + place // num_labels, place % num_labels
                scores[row, label] = label_part
                if label == labelled.classes[self._rows[row]]:
                    loss -= label_part + end_part
                    tokens += choices[place].num_label_tokens
        return scores, loss, tokens

    async def _likelihoods(self, choices: Sequence[Sample], num_end: int, number: int) -> list[tuple[float, float]]:
        """Of each choice: the log-likelihood of its label, and of what ends it."""
        slots = asyncio.Semaphore(self._config.in_flight)
        groups = group_by_length([len(choice.input_ids) for choice in choices], self._config.token_budget)

        async def one(group: Sequence[int]) -> torch.Tensor:
            async with slots:
                microbatch = pad_right([choices[index] for index in group])
                return await self._head.log_likelihoods(microbatch, await self._through(microbatch, number))

        parts: dict[int, tuple[float, float]] = {}
        for group, found_BT in zip(groups, await together(one(group) for group in groups), strict=True):
            for index, row_T in zip(group, found_BT, strict=True):
                parts[index] = _split(row_T, len(choices[index].input_ids), num_end)
        return [parts[index] for index in range(len(choices))]

    async def _through(self, microbatch: Microbatch, number: int) -> torch.Tensor:
        return await self._chain.evaluate(await self._head.embed(microbatch), microbatch.mask_BT, number=number)


def _split(row_T: torch.Tensor, length: int, num_end: int) -> tuple[float, float]:
    """Summed over the label's tokens, and over those of its end, of a row of `length` tokens."""
    values = row_T[:length].double()
    return float(values[: length - num_end].sum()), float(values[length - num_end :].sum())
