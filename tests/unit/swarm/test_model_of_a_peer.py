"""What a distributed model refuses before any host is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jinja2.exceptions import TemplateError

import swarm
from blocks.errors import BadSession, BadSpan
from peers.errors import NetworkFailed
from swarm.model import SwarmModel
from swarm.peer import Peer


class LetterTokenizer:
    """One token a letter, and a chat template that wants a user."""

    pad_token_id = 0
    chat_template: str | None = "a template"

    def __call__(self, prompts: list[str], **given: object) -> dict[str, torch.Tensor]:
        longest = max(map(len, prompts))
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ids = torch.ones(len(prompts), longest, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.tensor(mask).reshape(len(prompts), longest)}

    def apply_chat_template(self, messages: object, **given: object) -> object:
        raise TemplateError("roles must alternate")


def model(tokenizer: Any = None) -> SwarmModel:
    nobody: Any = SimpleNamespace()  # no host may be asked
    return SwarmModel(nobody, tokenizer or LetterTokenizer(), nobody)


@pytest.mark.parametrize("prompt", ["", ["text", ""]])
def test_an_empty_prompt_is_named(prompt: str | list[str]) -> None:
    with pytest.raises(BadSession, match="a prompt is empty; write some text"):
        model().generate(prompt)


def test_no_prompts_give_no_texts() -> None:
    assert model().generate([]) == []


def test_a_chat_that_the_model_cannot_have_is_one_line() -> None:
    with pytest.raises(BadSession, match=r"refuses these messages \(roles must alternate\); change them"):
        model().chat([{"role": "user", "content": "x"}])
    plain = LetterTokenizer()
    plain.chat_template = None
    with pytest.raises(BadSession, match="no chat template; continue plain text instead"):
        model(plain).chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("blocks", ["0-3", "3", (0, 3)])
def test_blocks_that_are_no_span_are_refused_before_a_run_is_entered(
    monkeypatch: pytest.MonkeyPatch, blocks: Any
) -> None:
    def enter(*given: object) -> Peer:
        raise NetworkFailed("it was entered")

    monkeypatch.setattr("swarm.api.enter", enter)
    with pytest.raises(BadSpan, match="is not a span; use START:END"):
        swarm.join("tales", blocks=blocks)
    with pytest.raises(NetworkFailed):
        swarm.join("tales", blocks="auto")


def test_the_public_names_are_listed_before_they_are_used() -> None:
    assert {"init", "join", "member", "attach", "SwarmCallback", "Peer"} <= set(dir(swarm))
