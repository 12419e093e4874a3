"""Steps of sessions through the decoder: computed together, in chunks, and one failing or leaving alone."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from blocks.decoding import batched
from blocks.decoding.batched import BatchedDecoder
from blocks.decoding.batching import BatchLimits
from blocks.decoding.cache import SessionCaches
from blocks.decoding.sessions import StepRequest
from blocks.errors import BadSession, Busy
from blocks.load import SpanModel
from blocks.spans import Span
from blocks.worker import ComputeThread, Priority

SPAN = Span(2, 5)
SOON = 60.0
LIMITS = BatchLimits(decode_tokens=4, chunk_tokens=16, idle_chunk_tokens=32)


class Held:
    """Keeps the compute thread busy until it is let go."""

    def __init__(self, thread: ComputeThread) -> None:
        self._begun, self._go = threading.Event(), threading.Event()
        self._job = thread.submit(Priority.DECODE, self._wait)
        assert self._begun.wait(SOON)

    def _wait(self) -> None:
        self._begun.set()
        assert self._go.wait(SOON)

    def let_go(self) -> None:
        self._go.set()
        self._job.result(SOON)


@pytest.fixture
def thread() -> Iterator[ComputeThread]:
    thread = ComputeThread(num_threads=1)
    yield thread
    thread.close()


@pytest.fixture
def caches(llama_span: SpanModel) -> SessionCaches:
    caches = SessionCaches(llama_span, 1 << 24)
    for name in "abcd":
        caches.open(name, span=SPAN, batch=1, max_length=100, version="live")
    return caches


@pytest.fixture
def decoder(thread: ComputeThread, caches: SessionCaches) -> BatchedDecoder:
    return BatchedDecoder(thread, caches, limits=LIMITS)


def text(seed: int, tokens: int) -> Tensor:
    return torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(seed))


def whole(model: SpanModel, hidden_BTD: Tensor) -> Tensor:
    with torch.no_grad():
        return model.forward(hidden_BTD, span=SPAN)


def ask(decoder: BatchedDecoder, name: str, hidden_BTD: Tensor, position: int = 0) -> asyncio.Task[Tensor]:
    request = StepRequest(session=name, hidden_BTD=hidden_BTD, position=position)
    return asyncio.create_task(decoder.step(request, client=name, deadline_seconds=SOON))


async def queued(decoder: BatchedDecoder, count: int) -> None:
    async with asyncio.timeout(SOON):
        while len(decoder._waiting) < count:  # noqa: ASYNC110  # they are on their way on this very loop
            await asyncio.sleep(0)


async def test_what_waits_while_the_thread_is_busy_is_computed_in_one_pass(
    decoder: BatchedDecoder, thread: ComputeThread, llama_span: SpanModel
) -> None:
    held = Held(thread)
    texts = {name: text(seed, 3) for seed, name in enumerate("abcd")}
    tasks = {name: ask(decoder, name, hidden) for name, hidden in texts.items()}
    await queued(decoder, 4)
    held.let_go()
    for name, task in tasks.items():
        torch.testing.assert_close(await task, whole(llama_span, texts[name]), rtol=0, atol=1e-5)
    assert (decoder.passes, decoder.steps) == (1, 4)
    assert not decoder._waiting


async def test_a_long_prompt_comes_in_chunks_with_decoding_between_them(
    decoder: BatchedDecoder, thread: ComputeThread, llama_span: SpanModel
) -> None:
    await ask(decoder, "a", text(1, 4))
    held = Held(thread)
    prompt = text(2, 60)
    order: list[str] = []
    tasks = [ask(decoder, "b", prompt), ask(decoder, "a", text(3, 1), 4)]
    for name, task in zip("ba", tasks, strict=True):
        task.add_done_callback(lambda _, name=name: order.append(name))
    await queued(decoder, 2)
    before = decoder.passes
    held.let_go()
    got = await tasks[0]
    await tasks[1]
    assert order == ["a", "b"]
    assert decoder.passes - before >= 3
    torch.testing.assert_close(got, whole(llama_span, prompt), rtol=0, atol=1e-5)


async def test_one_who_leaves_or_asks_nonsense_does_not_disturb_the_others(
    decoder: BatchedDecoder, thread: ComputeThread, llama_span: SpanModel, caches: SessionCaches
) -> None:
    held = Held(thread)
    good, gone = ask(decoder, "a", text(1, 3)), ask(decoder, "b", text(2, 3))
    wrong, unknown = ask(decoder, "c", text(3, 3), 7), ask(decoder, "nobody", text(4, 1))
    too_long = ask(decoder, "d", text(5, 101))
    await queued(decoder, 5)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    held.let_go()
    torch.testing.assert_close(await good, whole(llama_span, text(1, 3)), rtol=0, atol=1e-5)
    for task in (wrong, unknown, too_long):
        with pytest.raises(BadSession):
            await task
    assert [caches.state(name).length for name in "abcd"] == [3, 0, 0, 0]
    assert not decoder._waiting
    assert (await ask(decoder, "b", text(2, 3))).shape == (1, 3, 64)


async def test_a_step_whose_deadline_passes_is_refused_and_never_computed(
    decoder: BatchedDecoder, thread: ComputeThread, caches: SessionCaches
) -> None:
    held = Held(thread)
    request = StepRequest(session="a", hidden_BTD=text(1, 3), position=0)
    with pytest.raises(Busy, match="another host"):
        await decoder.step(request, client="a", deadline_seconds=0.01)
    held.let_go()
    await ask(decoder, "b", text(1, 3))
    assert caches.state("a").length == 0


async def test_a_session_that_is_closed_waits_no_longer(decoder: BatchedDecoder, thread: ComputeThread) -> None:
    held = Held(thread)
    task = ask(decoder, "a", text(1, 3))
    await queued(decoder, 1)
    decoder.forget("a")
    with pytest.raises(BadSession, match="closed"):
        await task
    held.let_go()


async def test_decoding_goes_before_training_work(decoder: BatchedDecoder, thread: ComputeThread) -> None:
    held = Held(thread)
    order: list[str] = []
    forward = thread.submit(Priority.FORWARD, lambda: order.append("forward"))
    task = ask(decoder, "a", text(1, 3))
    task.add_done_callback(lambda _: order.append("decode"))
    await queued(decoder, 1)
    passed = decoder._caches.step_many
    decoder._caches.step_many = lambda requests: (order.append("pass"), passed(requests))[1]  # type: ignore[method-assign]
    held.let_go()
    await task
    await asyncio.wrap_future(forward)
    assert order.index("pass") < order.index("forward")


async def test_a_thread_that_breaks_is_told_to_all_who_wait(
    decoder: BatchedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(requests: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(decoder._caches, "step_many", fail)
    tasks = [ask(decoder, name, text(1, 2)) for name in "ab"]
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, RuntimeError)


@pytest.mark.parametrize("shape", [(3, 64), (1, 0, 64), (0, 1, 64), (1, 3, 63)])
async def test_inputs_of_any_shape_are_refused(decoder: BatchedDecoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadSession):
        await ask(decoder, "a", torch.zeros(shape))


async def test_clients_that_answer_at_once_stay_in_step(
    thread: ComputeThread, caches: SessionCaches, llama_span: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for each other for a moment, the first of them would have passes of its own."""
    chosen, really_choose, really_submit = threading.Event(), batched.choose, thread.submit

    def choose(*given: Any) -> Any:
        picks = really_choose(*given)
        chosen.set()
        return picks

    def submit(*given: Any) -> Any:
        """Begins at once, so that nobody gets into a pass by coming while the thread wakes up."""
        chosen.clear()
        future = really_submit(*given)
        assert chosen.wait(SOON)
        return future

    monkeypatch.setattr(batched, "choose", choose)
    monkeypatch.setattr(thread, "submit", submit)
    here, ends = threading.current_thread(), itertools.cycle((0.0, 1.0))

    def clock() -> float:
        """A pass takes a second and an answer nothing, however long this machine lets either wait."""
        return 0.0 if threading.current_thread() is here else next(ends)

    decoder = BatchedDecoder(thread, caches, limits=LIMITS, clock=clock)
    texts = {name: text(seed, 24) for seed, name in enumerate("abcd")}

    async def client(name: str) -> Tensor:
        got = []
        for at in range(24):
            request = StepRequest(session=name, hidden_BTD=texts[name][:, at : at + 1], position=at)
            got.append(await decoder.step(request, client=name, deadline_seconds=SOON))
        return torch.cat(got, 1)

    for name, got in zip(texts, await asyncio.gather(*(client(name) for name in texts)), strict=True):
        torch.testing.assert_close(got, whole(llama_span, texts[name]), rtol=0, atol=1e-5)
    assert decoder.steps == 96
    assert decoder.passes <= 32
