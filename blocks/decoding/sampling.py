"""How the tokens of a text are chosen: each place of a text has dice of its own, from the text's seed.

So a seed gives the same text whatever else this process writes, and guesses ahead settle on the same tokens as plain
decoding. transformers' own sampling draws from one generator for the whole process.

B: texts, V: vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Likely:
    """A token and the natural logarithm of its probability before temperature and `top_p`."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen at one place, and the likeliest tokens there, best first."""

    chosen: Likely
    best: tuple[Likely, ...]


class Chooser(LogitsProcessor):  # type: ignore[misc]
    """Chooses in the place of `generate`, which runs without sampling: only the chosen token keeps a finite score.

    `temperature` 0 takes the likeliest. `top_logprobs` not None notes, for the first text of the batch, what was chosen
    at each place and as many of the likeliest tokens.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, *, temperature: float, top_p: float, seed: int, top_logprobs: int | None = None) -> None:
        if not 0 <= temperature < float("inf") or not 0 <= top_p <= 1:
            raise ValueError(f"temperature {temperature} and top_p {top_p} do not make a choice; use 0 or more, 0 to 1")
        if top_logprobs is not None and not 0 <= top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"{top_logprobs} likely tokens cannot be noted; use 0 to {MAX_TOP_LOGPROBS}")
        self._temperature, self._top_p, self._seed, self._top = temperature, top_p, seed, top_logprobs
        self._noted: dict[int, Choice] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] of the token after `input_ids` -> the same with all but the chosen token at minus infinity."""
        place = input_ids.shape[1]
        chosen_B1 = self._choose(scores.float(), place)
        if self._top is not None:
            self._noted[place] = _noted(scores[0].float(), int(chosen_B1[0]), self._top)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen_B1, 0.0)

    def noted(self, place: int) -> Choice | None:
        """What was chosen as token number `place` of prompt and text; forgotten when asked."""
        return self._noted.pop(place, None)

    def _choose(self, scores_BV: Tensor, place: int) -> Tensor:
        """[B, 1]: the token at which the cumulated probability passes this place's dice."""
        if self._temperature <= 0 or self._top_p <= 0:
            return scores_BV.argmax(dim=-1, keepdim=True)
        # The largest score is taken away first: a tiny temperature would make infinities of large scores.
        scaled_BV = (scores_BV - scores_BV.amax(dim=-1, keepdim=True)) / self._temperature
        probabilities_BV, order_BV = scaled_BV.double().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
        kept_BV = probabilities_BV.masked_fill(before_BV >= self._top_p, 0.0)
        sums_BV = kept_BV.cumsum(dim=-1)
        dice = random.Random(f"{self._seed}/{place}")
        thrown_B1 = torch.tensor([[dice.random()] for _ in range(len(scores_BV))], dtype=torch.float64)
        found_B1 = torch.searchsorted(sums_BV, thrown_B1.to(sums_BV.device) * sums_BV[:, -1:], right=True)
        last_B1 = (kept_BV > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not lead behind what was kept
        return order_BV.gather(1, torch.minimum(found_B1, last_B1.clamp(min=0)))


def _noted(scores_V: Tensor, chosen: int, top: int) -> Choice:
    logprobs_V = scores_V.log_softmax(dim=-1)
    best = logprobs_V.topk(min(top, len(logprobs_V)))
    likely = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Choice(Likely(chosen, float(logprobs_V[chosen])), tuple(Likely(*each) for each in likely))
