"""Families are tried, not believed: what the command that makes the table says of one of each sort."""

from __future__ import annotations

import pytest

from blocks.errors import UnsupportedModel
from blocks.families import FamilyResult, families_page, try_family
from blocks.family_configs import tiny_config
from blocks.source import refuse_unsupported

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

REFUSED = {
    "mamba": "recurrent layers, whose state cannot roll back",
    "jamba": "recurrent layers, whose state cannot roll back",
    "rwkv": "recurrent layers",
    "qwen3_next": "recurrent layers",
    "bart": "encoder-decoder",
    "bert": "is an encoder",
    "gemma3n_text": "passes more than hidden states between layers",
    "blt": "not one list of layers",
    "cpmant": "position bias from token ids",
    "modernbert-decoder": "more in its token embedding than a table",
    "musicgen": "encoder-decoder",
    "musicgen_melody": "encoder-decoder",
    "openai-gpt": "keeps no keys and values",
    "hy_v4": "passes more than hidden states",
    "ctrl": "other values when it is cut",
    "bert-generation": "is an encoder with a head",
}


@pytest.mark.parametrize("family", ["cohere", "granitemoe"])
def test_a_family_that_works_is_found_to_be_exact(family: str) -> None:
    result = try_family(family)
    assert result.outcome == "works"
    assert result.experts == (family == "granitemoe")
    assert result.forward == 0.0
    assert result.decode is not None
    assert result.decode < 1e-5


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_what_cannot_work_is_refused_by_name_with_the_reason(family: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"^'{family}'.*{REFUSED[family]}.*; use "):
        refuse_unsupported(tiny_config(family))


def test_a_wrong_answer_is_told_from_a_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocks.families.MAX_DIFFERENCE", -1.0)
    assert try_family("llama").outcome == "differs"


def test_the_page_has_a_table_for_each_outcome() -> None:
    page = families_page(
        [
            FamilyResult(family="ann", outcome="works", experts=True, forward=0.0, decode=2e-7),
            FamilyResult(family="bob", outcome="refused", detail="for a reason"),
        ]
    )
    assert "| ann | yes | 0.0e+00 | 2.0e-07 |" in page
    assert "| bob | for a reason |" in page
