"""Guess tokens ahead, so that one round trip through the chain settles several: from the text itself, or by a draft.

transformers verifies the guesses (`generate` with `prompt_lookup_num_tokens` or `assistant_model`), so a greedy text
stays the same and a sampled one follows the same distribution. How far lookup guesses is in lookup.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from blocks.errors import BadSpeculation
from blocks.load import load_tokenizer
from blocks.part import load_part
from blocks.source import find_model, read_config, text_config

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

LOOKUP_TOKENS = 10  # transformers' own number; more of them pay only in texts that repeat whole sentences
DRAFT_TOKENS = 8
MAX_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Speculation:
    """How tokens are guessed: `lookup` up to so many from earlier in the text, or by `draft`, a small model held here.

    Neither is plain decoding. Only a single text without beams can be guessed ahead.

    Raises:
        BadSpeculation: both are asked for, or a number makes no sense.
    """

    lookup: int = 0
    draft: nn.Module | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.lookup <= MAX_TOKENS:
            raise BadSpeculation(f"{self.lookup} tokens cannot be looked up at once; use 0 to {MAX_TOKENS}")
        if self.lookup and self.draft is not None:
            raise BadSpeculation("tokens are guessed from the text or by a draft model, not by both; choose one")

    def options(self, *, texts: int, num_beams: int) -> dict[str, object]:
        """As transformers' generate takes it.

        Raises:
            BadSpeculation: there are several texts or beams.
        """
        if not self.lookup and self.draft is None:
            return {}
        if texts != 1 or num_beams != 1:
            raise BadSpeculation(
                f"{texts} texts with {num_beams} beams cannot be guessed ahead; generate one text without beams, or "
                "leave speculation off"
            )
        return {"prompt_lookup_num_tokens": self.lookup} if self.lookup else {"assistant_model": self.draft}


PLAIN = Speculation()


def load_draft(name: str, target: PreTrainedTokenizerBase, *, vocab_size: int, cache_dir: Path) -> nn.Module:
    """A whole model as a draft for another with tokenizer `target`, in fp32 on the CPU. `name` is as for `find_model`.

    Raises:
        UnknownModel, UnsupportedModel, MissingTensors: it cannot be loaded.
        BadSpeculation: it has other tokens than the model that it would draft for.
    """
    source = find_model(name, cache_dir=cache_dir)
    config = read_config(source)
    drafted = int(text_config(config).vocab_size)
    if drafted != vocab_size or load_tokenizer(source).get_vocab() != target.get_vocab():
        raise BadSpeculation(
            f"'{name}' cannot draft for this run's model, as its {drafted} tokens are not the same {vocab_size}; use a "
            "smaller model of the same family"
        )
    placement = (torch.float32, torch.device("cpu"))
    draft, _ = load_part(source, config, lambda _: None, lambda _: True, placement)
    generation = cast("GenerationConfig", draft.generation_config)
    generation.num_assistant_tokens, generation.num_assistant_tokens_schedule = DRAFT_TOKENS, "constant"
    return draft
