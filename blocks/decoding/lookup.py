"""Guess the next tokens from where the text said the same before; how many, is learnt from how many were right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

if TYPE_CHECKING:
    from transformers import GenerationConfig

_SMOOTHING = 0.3  # of the newest number of right guesses


class AdaptiveLookup(PromptLookupCandidateGenerator):  # type: ignore[misc]
    """transformers' prompt lookup (https://github.com/apoorvumang/prompt-lookup-decoding) that learns how far to guess.

    A wrong guess costs hosts and the wire as much as a right one: a step of 11 tokens took twice as long as one of 1
    (SmolLM2-135M, fp32, one thread). So up to twice as many are guessed as were right lately.
    """

    def __init__(self, config: GenerationConfig) -> None:
        super().__init__(
            eos_token_id=config._eos_token_tensor,
            num_output_tokens=config.prompt_lookup_num_tokens,
            max_matching_ngram_size=config.max_matching_ngram_size or 2,
            max_length=config.max_length,
            # Without the processors, which the library tries on each guess: what they forbid is never chosen anyway.
            logits_processor=None,
        )
        self._most = int(config.prompt_lookup_num_tokens)
        self._right = self._most / 2

    def get_candidates(self, input_ids: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """See CandidateGenerator; never past the end of the text, for which the hosts have no room."""
        candidate_ids, _ = super().get_candidates(input_ids, **kwargs)
        return candidate_ids[:, : max(input_ids.shape[1], self.max_length - 1)], None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Called after each step, with the logits of the guesses and of the token after them."""
        guessed = scores.shape[1] - 1
        if guessed < 1:
            return
        right = self._most if num_matches == guessed else int(num_matches)
        self._right += _SMOOTHING * (right - self._right)
        self.num_output_tokens = max(1, min(self._most, round(2 * self._right) + 1))
