"""Tokens that are guessed ahead: the same text in fewer round trips, and the chain rolled back behind wrong guesses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from blocks.decoding.lookup import AdaptiveLookup
from blocks.decoding.speculation import PLAIN, Speculation, load_draft
from blocks.errors import BadSpeculation
from tests.errors_page import met
from tests.families import FAMILIES
from tests.unit.blocks.conftest import Cluster, make_cluster, save_tiny
from tests.unit.blocks.test_client import Sessions

PROMPT = torch.randint(3, 99, (1, 6), generator=torch.Generator().manual_seed(4)).repeat(1, 3)
NEW = 16
END = PROMPT.shape[1] + NEW


@pytest.fixture(scope="module", params=["llama"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    made = make_cluster(request.param, tmp_path_factory.mktemp(request.param))
    made.whole.generation_config.assistant_confidence_threshold = 0.0  # random weights are sure of nothing
    return made


def save_words(directory: Path, *, count: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(count)}, unk_token="w3"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w3")
    fast.save_pretrained(directory)
    return fast


def generate(cluster: Cluster, speculation: Speculation, **options: object) -> tuple[torch.Tensor, Sessions]:
    cluster.client.remote = sessions = Sessions(cluster)
    given = {"input_ids": PROMPT, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    return cluster.client.generate(**given, **speculation.options(texts=1, num_beams=1)), sessions


def test_a_draft_that_is_always_right_gives_the_same_text_in_a_few_round_trips(cluster: Cluster) -> None:
    plain, one_by_one = generate(cluster, PLAIN)
    text, sessions = generate(cluster, Speculation(draft=cluster.whole))
    assert torch.equal(text, plain)
    assert len(one_by_one.calls) == NEW
    assert len(sessions.calls) <= NEW // 4, "all guesses of a step are verified in one round trip"
    assert max(call.start + call.hidden_BTD.shape[1] for call in sessions.calls) < END


def test_a_draft_that_is_mostly_wrong_changes_nothing_but_the_work(cluster: Cluster) -> None:
    torch.manual_seed(99)
    other = type(cluster.whole)(cluster.whole.config).eval()
    other.generation_config.assistant_confidence_threshold = 0.0
    plain, _ = generate(cluster, PLAIN)
    text, sessions = generate(cluster, Speculation(draft=other))
    assert torch.equal(text, plain)
    ends = [call.start + call.hidden_BTD.shape[1] for call in sessions.calls]
    assert any(call.start < end for call, end in zip(sessions.calls[1:], ends, strict=False)), "nothing was rolled back"


def test_lookup_never_asks_for_more_than_the_text_has(cluster: Cluster) -> None:
    plain, one_by_one = generate(cluster, PLAIN)
    text, sessions = generate(cluster, Speculation(lookup=10))
    assert torch.equal(text, plain)
    assert len(sessions.calls) <= len(one_by_one.calls)
    assert any(call.hidden_BTD.shape[1] > 1 for call in sessions.calls[1:])
    assert max(call.start + call.hidden_BTD.shape[1] for call in sessions.calls) < END


@pytest.mark.parametrize("drafted", [True, False], ids=["draft", "lookup"])
def test_sampling_goes_the_same_way(cluster: Cluster, drafted: bool) -> None:
    speculation = Speculation(draft=cluster.whole) if drafted else Speculation(lookup=4)
    greedy, _ = generate(cluster, PLAIN)
    certain, _ = generate(cluster, speculation, do_sample=True, top_k=1)
    assert torch.equal(certain, greedy), "of one likeliest token there is only one choice"
    texts = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        texts.append(generate(cluster, speculation, do_sample=True)[0])
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_right_guesses_lengthen_the_next_and_wrong_ones_shorten_them() -> None:
    config = GenerationConfig(prompt_lookup_num_tokens=10, max_length=100)
    config._eos_token_tensor = None
    lookup = AdaptiveLookup(config)
    ids = torch.arange(5).repeat(8)[None]
    lengths = []
    for right in (False, True):
        for _ in range(12):
            guessed = lookup.get_candidates(ids)[0].shape[1] - ids.shape[1]
            lookup.update_candidate_strategy(ids, torch.zeros(1, guessed + 1, 2), guessed if right else 0)
            lengths.append(guessed)
    assert lengths[0] == 10
    assert lengths[11] == 1
    assert lengths[-1] == 10
    assert lookup.get_candidates(ids[:, :99].repeat(1, 3)[:, :98])[0].shape[1] == 99
    before = lookup.num_output_tokens
    lookup.update_candidate_strategy(ids, torch.zeros(1, 1, 2), 0)
    assert lookup.num_output_tokens == before, "a step without guesses teaches nothing"


def test_what_cannot_be_guessed_is_said() -> None:
    with pytest.raises(BadSpeculation, match="not by both"):
        Speculation(lookup=2, draft=torch.nn.Identity())
    with pytest.raises(BadSpeculation, match="0 to 64"):
        Speculation(lookup=65)
    with pytest.raises(BadSpeculation, match="3 beams"):
        Speculation(lookup=2).options(texts=1, num_beams=3)
    with pytest.raises(BadSpeculation, match="2 texts"):
        Speculation(draft=torch.nn.Identity()).options(texts=2, num_beams=1)
    assert PLAIN.options(texts=2, num_beams=3) == {}


def test_a_draft_is_loaded_whole_and_must_have_the_same_tokens(tmp_path: Path) -> None:
    whole = save_tiny("llama", tmp_path)
    size = int(FAMILIES["llama"]["vocab_size"])  # type: ignore[call-overload]
    words = save_words(tmp_path, count=size)
    draft = load_draft(str(tmp_path), words, vocab_size=size, cache_dir=tmp_path / "cache")
    with torch.no_grad():
        assert torch.equal(draft(input_ids=PROMPT).logits, whole(input_ids=PROMPT).logits)
    with pytest.raises(BadSpeculation) as caught:
        load_draft(str(tmp_path), words, vocab_size=size + 1, cache_dir=tmp_path / "cache")
    met("cannot draft for this run's", caught.value)
    other = save_words(tmp_path / "other", count=size - 1)
    with pytest.raises(BadSpeculation, match="same family"):
        load_draft(str(tmp_path), other, vocab_size=size, cache_dir=tmp_path / "cache")
