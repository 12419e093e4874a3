"""Two hosts of half a model each: one session and the first token against the local model, many against one.

Also what a host costs in memory, processes and seconds to start.
"""

from __future__ import annotations

import statistics
import time

import torch
from parts.report import Bench, Values, median, ratios
from parts.swarms import HALVES, Swarm, find_megabytes, new_run
from parts.texts import Local, TokenClock, first_difference, load_local, load_models, prompts, rate

from swarm.model import Sampling, SwarmModel

CLIENTS = (4, 16)
PROMPT_TOKENS = 32


def measure_fp32(bench: Bench) -> Values:
    """In fp32, hosts and local model alike; and what a host costs."""
    return _measure(bench, "fp32", "")


def measure_bf16(bench: Bench) -> Values:
    """In bf16, hosts and local model alike."""
    return _measure(bench, "bf16", "_bf16")


def _measure(bench: Bench, dtype: str, suffix: str) -> Values:
    torch.set_num_threads(1)
    run = new_run(bench.directory / f"run-{dtype}", dtype)
    with Swarm.of(bench.directory / dtype, run, HALVES) as swarm:
        bench.say("both hosts are up")
        with swarm.client("client") as peer:
            models = load_models(peer, max(CLIENTS))
            local = load_local(models[0].tokenizer, dtype)
            bench.say(f"{len(models)} sessions' models and the local one are loaded")
            found = _one_session(bench, models[0], local)
            found |= _first_token(bench, models[0], local)
            found |= _clients(bench, models)
        found = {f"{key}{suffix}": value for key, value in found.items()}
        if dtype == "fp32":
            found |= _costs(bench, swarm)
    return found


def _one_session(bench: Bench, model: SwarmModel, local: Local) -> Values:
    """Tokens/s of one text, by the swarm and by the local model in turn."""
    tokens = bench.pick(24, 64)
    (prompt,) = prompts(model.tokenizer, 1, PROMPT_TOKENS)
    texts: dict[str, str] = {}

    def by_local() -> str:
        return local.generate(prompt, tokens)

    def by_swarm() -> str:
        return model.generate(prompt, Sampling(max_new_tokens=tokens))[0]

    speeds: dict[str, list[float]] = {"local": [], "swarm": []}
    for turn in range(bench.pick(3, 7) + 1):
        for name, generate in (("local", by_local), ("swarm", by_swarm)):
            began = time.perf_counter()
            texts[name] = generate()
            speeds[name].append(tokens / (time.perf_counter() - began))
        if turn:
            bench.say(f"local {speeds['local'][-1]:.1f}, swarm {speeds['swarm'][-1]:.1f} tokens/s")
    ours, theirs = speeds["swarm"][1:], speeds["local"][1:]  # the first turn warms up
    return {
        "one_session_ratio": ratios(ours, theirs),
        "local_tokens_per_second": median(theirs),
        "swarm_tokens_per_second": median(ours),
        "same_text": texts["local"] == texts["swarm"],
        "first_difference": first_difference(model.tokenizer, texts["local"], texts["swarm"]),
    }


def _first_token(bench: Bench, model: SwarmModel, local: Local) -> Values:
    """Seconds until the first token, by the swarm and by the local model in turn."""
    found: Values = {}
    for length in (256,) if bench.quick else (256, 1024):
        seconds: dict[str, list[float]] = {"local": [], "swarm": []}
        texts = prompts(model.tokenizer, bench.pick(4, 6), length)  # others each time, so that nothing is at hand
        for prompt in texts:
            clock = TokenClock()
            local.generate(prompt, 1, clock)
            seconds["local"].append(clock.moments[0])
            clock = TokenClock()
            model.generate(prompt, Sampling(max_new_tokens=1), streamer=clock)
            seconds["swarm"].append(clock.moments[0])
        ours, theirs = seconds["swarm"][1:], seconds["local"][1:]
        name = "first_token" if length == 256 else f"first_token_{length}"
        found |= {f"{name}_ratio": ratios(ours, theirs), f"{name}_seconds": median(ours)}
        bench.say(f"first token of {length}: local {theirs[-1]:.3f} s, swarm {ours[-1]:.3f} s")
    return found


def _clients(bench: Bench, models: list[SwarmModel]) -> Values:
    """The sum of tokens/s of several sessions of this process, against one session in the same turn."""
    tokens = bench.pick(24, 48)
    speeds: dict[int, list[float]] = {count: [] for count in (1, *CLIENTS)}
    texts = prompts(models[0].tokenizer, max(CLIENTS), PROMPT_TOKENS)
    for turn in range(bench.pick(2, 5) + 1):
        for count, found in speeds.items():
            found.append(rate(models[:count], texts[:count], tokens))
        if turn:
            shown = ", ".join(f"{count}: {found[-1]:.1f}" for count, found in speeds.items())
            bench.say(f"tokens/s by sessions at a time: {shown}")
    one = speeds[1][1:]  # the first turn warms up
    speedups: Values = {f"clients_{count}_speedup": ratios(speeds[count][1:], one) for count in CLIENTS}
    return {**speedups, **{f"clients_{count}_tokens_per_second": median(speeds[count][1:]) for count in CLIENTS}}


def _costs(bench: Bench, swarm: Swarm) -> Values:
    """What a host that has served costs in memory and processes, and how long another takes to come online."""
    megabytes = [find_megabytes(host) for host in swarm.hosts]
    seconds: list[float] = []
    for _ in range(bench.pick(1, 3)):
        began = time.perf_counter()
        (host,) = swarm.start(HALVES[:1])
        seconds.append(time.perf_counter() - began)
        host.process.stop()
        bench.say(f"a host came online in {seconds[-1]:.2f} s")
    return {
        "online_seconds": round(statistics.median(seconds), 2),
        "peer_megabytes": round(max(size for size, _ in megabytes), 1),
        "peer_processes": max(count for _, count in megabytes),
    }
