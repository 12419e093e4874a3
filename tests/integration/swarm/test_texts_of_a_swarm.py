"""A text from the swarm is the local model's text, also when hosts die and rounds end in the middle of it."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel, TextStreamer
from transformers.generation.streamers import BaseStreamer

from blocks.decoding.speculation import PLAIN, Speculation
from blocks.spans import Span
from swarm.model import Sampling, SwarmModel
from swarm.peer import Peer
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.reference_run import local_model
from tests.integration.swarm.small_swarm import (
    BACK,
    CACHE_BYTES,
    FRONT,
    SmallSwarm,
    host_of,
    random_samples,
    until,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROMPT = "w17 w23 w5 w99"
PROMPTS = [PROMPT, "w44 w8 w9 w10 w11 w60 w7 w33"]
LENGTH = 24
GREEDY = Sampling(max_new_tokens=LENGTH)
SETTINGS = {
    "training": {"batch_size": 4, "learning_rate": 3e-2},
    "rounds": {"round_samples": 16},
}


class AtToken(BaseStreamer):
    """A streamer that does something once, when the `number`th new token has come; between two steps of the text."""

    def __init__(self, number: int, what: Callable[[], None]) -> None:
        self._left, self._what = number + 1, what  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            self._what()

    def end(self) -> None:
        assert self._left <= 0, "the text ended too early"


class Local:
    """The whole model in this process, asked as the swarm's is."""

    def __init__(self, model: PreTrainedModel | PeftModel, like: SwarmModel) -> None:
        self.model, self._tokenizer = model, like.tokenizer

    def generate(self, prompt: str | list[str], sampling: Sampling) -> list[str]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        batch = self._tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        output = self.model.generate(**batch, pad_token_id=self._tokenizer.pad_token_id, **sampling.options())
        return self._tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def train_one_round(trainer: Peer, hosts: list[Peer]) -> None:
    wanted = max(host_of(host).round for host in hosts) + 1
    trainer.train(random_samples(16), steps=4)
    until(lambda: all(host_of(host).shelf.newest.round >= wanted for host in hosts), f"round {wanted}")
    assert trainer.wait_for_round(wanted, seconds=120)


def serving(hosts: list[Peer], span: Span) -> list[Peer]:
    """The hosts of a span in whose cache there is a text now."""
    return [host for host in hosts if host_of(host).span == span and host_of(host).caches.free_bytes < CACHE_BYTES]


@pytest.fixture
def trained(make_swarm: MakeSwarm) -> tuple[SmallSwarm, list[Peer], Peer]:
    """Two hosts and one round of training, so that the adapter is not that of the seed."""
    swarm = make_swarm(SETTINGS)
    hosts = swarm.hosts(a=FRONT, b=BACK)
    client = swarm.enter("client")
    train_one_round(client, hosts)
    return swarm, hosts, client


def test_greedy_texts_equal_the_local_models_with_and_without_the_adapter(
    trained: tuple[SmallSwarm, list[Peer], Peer], tmp_path: Path
) -> None:
    swarm, hosts, client = trained
    model = client.model()
    assert client.export(tmp_path / "adapter") == 1
    plain = Local(local_model(swarm.source), model)
    adapted = Local(PeftModel.from_pretrained(local_model(swarm.source), tmp_path / "adapter").eval(), model)
    for prompt in (PROMPT, PROMPTS):
        without = model.generate(prompt, GREEDY, adapter=False)
        assert without == plain.generate(prompt, GREEDY)
        texts = model.generate(prompt, GREEDY)
        assert texts == adapted.generate(prompt, GREEDY)
        assert texts != without, "the adapter changes nothing, so nothing was shown"
        assert all(len(text.split()) > LENGTH // 2 for text in texts)

    by_lookup, by_draft = Speculation(lookup=4), model.speculation(str(swarm.source.path), False, tmp_path / "cache")
    for speculation in (by_lookup, by_draft):
        assert model.generate(PROMPT, GREEDY, speculation=speculation) == adapted.generate(PROMPT, GREEDY)

    beams = Sampling(max_new_tokens=12, num_beams=3)
    assert model.generate(PROMPTS, beams) == adapted.generate(PROMPTS, beams)

    dice = Sampling(max_new_tokens=LENGTH, temperature=0.9, top_p=0.95, seed=3)
    sampled = model.generate(PROMPT, dice)
    assert sampled == model.generate(PROMPT, dice)
    assert sampled == adapted.generate(PROMPT, dice)
    assert sampled != model.generate(PROMPT, Sampling(max_new_tokens=LENGTH, temperature=0.9, top_p=0.95, seed=4))

    screen = StringIO()
    streamer = ScreenStreamer(model.tokenizer, screen)
    assert screen.getvalue() == ""
    streamed = model.generate(PROMPT, GREEDY, streamer=streamer)
    assert screen.getvalue().split() == streamed[0].split()
    assert streamer.pieces > 3
    assert not serving(hosts, FRONT), "an ended text still holds its cache"


class ScreenStreamer(TextStreamer):
    """transformers' own streamer, writing where a test can read it."""

    def __init__(self, tokenizer: object, screen: StringIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces = 0
        self._screen = screen

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces += bool(text)
        self._screen.write(text)


def test_a_text_goes_on_unchanged_when_hosts_die_and_a_round_ends_in_it(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    hosts = swarm.hosts(a=FRONT, b=BACK, c=FRONT, d=BACK)
    client = swarm.enter("client")
    train_one_round(client, hosts)
    model = client.model()
    before = model.generate(PROMPT, GREEDY)
    found: list[tuple[frozenset[int], int]] = []

    def end_a_round() -> None:
        train_one_round(client, hosts)

    def kill_one_that_serves(span: Span) -> None:
        (victim,) = serving(hosts, span)
        swarm.kill(next(name for name, peer in swarm.peers.items() if peer is victim))

    def look() -> None:
        found.append((model.blocks.rounds, model.blocks.replaced))

    def text(*events: tuple[int, Callable[[], None]], speculation: Speculation = PLAIN) -> list[str]:
        streamer = Several(*(AtToken(*event) for event in (*events, (12, look))))
        return model.generate(PROMPT, GREEDY, streamer=streamer, speculation=speculation)

    assert text((4, end_a_round), (8, lambda: kill_one_that_serves(FRONT))) == before
    after = model.generate(PROMPT, GREEDY)
    assert after != before, "the round changes nothing, so nothing was shown"
    assert text((6, lambda: kill_one_that_serves(BACK)), speculation=Speculation(lookup=4)) == after
    # Pinned to the round that it began with, and one host replaced, each time.
    assert found == [(frozenset({1}), 1), (frozenset({2}), 1)]


class Several(BaseStreamer):
    """Streamers side by side."""

    def __init__(self, *streamers: BaseStreamer) -> None:
        self._streamers = streamers

    def put(self, value: torch.Tensor) -> None:
        for streamer in self._streamers:
            streamer.put(value)

    def end(self) -> None:
        for streamer in self._streamers:
            streamer.end()


def first_divergence(first: str, second: str) -> int | None:
    """The number of words that two texts share from their beginning; None where they are the same text."""
    ours, theirs = first.split(), second.split()
    shared = next(
        (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    return None if ours == theirs else shared


def test_in_bf16_a_text_diverges_only_where_the_local_model_hesitates(
    make_swarm: MakeSwarm, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)  # whatever this machine has
    swarm = make_swarm({"wire": {"dtype": "bf16"}, "model": {"compute_dtype": "bf16"}})
    swarm.hosts(a=FRONT, b=BACK)
    model = swarm.enter("client").model()
    assert model.client.dtype == torch.bfloat16  # the head too computes as the hosts do
    whole = local_model(swarm.source)
    local = Local(whole, model)
    for prompt in PROMPTS:
        text, exact = model.generate(prompt, GREEDY)[0], local.generate(prompt, GREEDY)[0]
        found = first_divergence(text, exact)
        record_property(f"first divergence after '{prompt}'", found)
        if found is None:
            continue
        shared = " ".join([prompt, *exact.split()[:found]])
        with torch.no_grad():
            logits_V = whole(**model.tokenizer(shared, return_tensors="pt")).logits[0, -1]
        chosen = model.tokenizer(text.split()[found])["input_ids"][0] if found < len(text.split()) else 2
        margin = float(logits_V.max() - logits_V[chosen])
        assert margin < 0.05 * float(logits_V.max() - logits_V.min()), "this is no rounding error"
