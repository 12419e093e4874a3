"""The official client over a real swarm: what it asks for is what it gets."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion

from swarm.gateway.catalog import Words, read_words
from swarm.model import Sampling
from tests.integration.gateway.conftest import Served

USER = [{"role": "user", "content": "What is 漢字?"}]
LENGTH = 24


@pytest.fixture
def client(served: Served) -> OpenAI:
    return served.gateway.client()


@pytest.fixture(scope="module")
def words(served: Served) -> Words:
    return read_words(served.clients[0])


def ask(client: OpenAI, model: str = "tales", **options: object) -> ChatCompletion:
    given = {"messages": USER, "max_tokens": LENGTH, "temperature": 0, **options}
    answer = client.chat.completions.create(model=model, **given)  # type: ignore[call-overload]
    assert isinstance(answer, ChatCompletion)
    return answer


def text_of(answer: ChatCompletion, number: int = 0) -> str:
    return answer.choices[number].message.content or ""


def test_adapters_and_the_base_model_are_listed_and_chosen_by_name(served: Served, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tales", "news", "tiny-chat"]
    assert client.models.retrieve("tales").id == "tales"
    texts = {model: text_of(ask(client, model)) for model in ("tales", "news", "tiny-chat")}
    model = served.clients[0].model()
    greedy = Sampling(max_new_tokens=LENGTH)
    assert texts["tales"] == model.chat(USER, greedy)
    assert texts["tiny-chat"] == model.chat(USER, greedy, adapter=False)
    assert texts["tales"] != texts["tiny-chat"], "the adapter changes nothing, so nothing was shown"
    assert texts["news"] == texts["tiny-chat"], "an untouched adapter adds nothing"


def test_an_answer_has_the_shape_and_the_counts_that_clients_read(client: OpenAI, words: Words) -> None:
    answer = ask(client)
    assert answer.object == "chat.completion"
    assert answer.model == "tales"
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(words.of_chat(USER))
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (LENGTH, LENGTH + answer.usage.prompt_tokens)


def test_a_stream_is_the_same_text_in_pieces_and_ends_with_the_counts(client: OpenAI) -> None:
    whole = ask(client, max_tokens=60)
    stream = client.chat.completions.create(
        model="tales",
        messages=USER,
        max_tokens=60,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == text_of(whole)
    assert sum(map(bool, pieces)) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert last.choices == []
    assert last.usage == whole.usage
    without = list(client.chat.completions.create(model="tales", messages=USER, max_tokens=3, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in without)


def test_a_seed_gives_the_same_text_whatever_else_is_written(client: OpenAI) -> None:
    def dice(seed: int) -> str:
        return text_of(ask(client, temperature=0.9, top_p=0.95, seed=seed))

    alone = dice(3)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(dice, [3, 4, 3, 5, 3, 6, 3, 7]))
    assert together[::2] == [alone] * 4
    assert len({alone, *together[1::2]}) == 5
    unseeded = {text_of(ask(client, temperature=0.9)) for _ in range(2)}
    assert len(unseeded) == 2


def test_several_choices_and_prompts_are_answered_in_order(client: OpenAI, words: Words) -> None:
    answer = ask(client, n=3, temperature=0.9, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({text_of(answer, number) for number in range(3)}) == 3
    assert text_of(answer, 1) == text_of(ask(client, temperature=0.9, seed=6))
    prompts = ["one two", "three"]
    both = client.completions.create(model="tales", prompt=prompts, max_tokens=6, temperature=0)
    alone = [client.completions.create(model="tales", prompt=each, max_tokens=6, temperature=0) for each in prompts]
    as_ids = client.completions.create(
        model="tales", prompt=[words.of_text(each) for each in prompts], max_tokens=6, temperature=0
    )
    wanted = [each.choices[0].text for each in alone]
    assert [choice.text for choice in both.choices] == wanted
    assert [choice.text for choice in as_ids.choices] == wanted
    assert both.usage is not None
    assert both.usage.prompt_tokens == sum(len(words.of_text(each)) for each in prompts)
    streamed = ["", ""]
    for chunk in client.completions.create(model="tales", prompt=prompts, max_tokens=6, temperature=0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == wanted


def test_a_text_ends_before_a_stop_string(client: OpenAI) -> None:
    whole = text_of(ask(client, max_tokens=60))
    stop = whole[10:12]
    expected = whole[: whole.index(stop)]
    for options in ({"stop": stop}, {"stop": ["never there", stop]}, {"stop": stop, "max_completion_tokens": 60}):
        more = {"max_tokens": None} if "max_completion_tokens" in options else {"max_tokens": 60}
        answer = ask(client, **options, **more)
        assert (text_of(answer), answer.choices[0].finish_reason) == (expected, "stop")
        assert answer.usage is not None
        assert answer.usage.completion_tokens < 60, "the rest was written all the same"


def test_probabilities_are_told_of_each_token(client: OpenAI, words: Words) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3, seed=1, temperature=0.5)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == LENGTH
    for told in logprobs.content:
        assert len(told.top_logprobs) == 3
        assert told.logprob <= told.top_logprobs[0].logprob <= 0
        assert sum(math.exp(best.logprob) for best in told.top_logprobs) <= 1.0001
        assert told.bytes is None or bytes(told.bytes).decode() == told.token
    streamed = [
        told
        for chunk in client.chat.completions.create(
            model="tales",
            messages=USER,
            max_tokens=LENGTH,
            seed=1,
            temperature=0.5,
            logprobs=True,
            top_logprobs=3,
            stream=True,
        )
        if chunk.choices[0].logprobs is not None
        for told in chunk.choices[0].logprobs.content or []
    ]
    assert [told.token for told in streamed] == [told.token for told in logprobs.content]
    plain = client.completions.create(model="tales", prompt="abc", max_tokens=8, temperature=0, logprobs=2)
    told = plain.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.text_offset is not None
    assert len(told.tokens) == len(told.token_logprobs or []) == len(told.top_logprobs or []) == 8
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        assert "\ufffd" in token or token in plain.choices[0].text[offset:]
    assert told.text_offset == sorted(told.text_offset)
