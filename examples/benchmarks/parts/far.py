"""Three hosts in a chain behind links of 100 ms round trip, speculation over them, and what a killed host costs."""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch
from parts.report import Bench, Values, median
from parts.swarms import BLOCKS, HIDDEN, NO_LINK, Host, LinkRules, Swarm, new_run
from parts.texts import Local, TokenClock, load_local, load_models, prompts, source

from blocks.decoding.solo_cache import solo_cache
from blocks.decoding.speculation import LOOKUP_TOKENS, Speculation
from blocks.load import load_span
from blocks.spans import Span
from swarm.model import Sampling, SwarmModel
from swarm.peer import Peer

SPANS = (Span(0, 10), Span(10, 20), Span(20, 30))
ONE_WAY_SECONDS = 0.05
SLOW = LinkRules(one_way_seconds=ONE_WAY_SECONDS)
FREE_SECONDS = 0.2  # of a failover's gap are not for the prefill
PROMPT_TOKENS, LOST_PROMPT_TOKENS = 32, 256
KILL_AT = 12  # tokens of a text
REPETITIVE = "Monday is red. Tuesday is green. Wednesday is blue. Thursday is white. " * 6


def measure_far(bench: Bench) -> Values:
    """All of it on one swarm, in fp32."""
    torch.set_num_threads(1)
    run = new_run(bench.directory / "run-far", "fp32")
    with Swarm.of(bench.directory / "far", run, SPANS, linked=True) as swarm:
        bench.say("three hosts behind links are up")
        with swarm.client("far-client", pins=swarm.hosts) as peer:
            (model,) = load_models(peer, 1)
            local = load_local(model.tokenizer, "fp32")
            swarm.set_links(SLOW)
            found = _link(bench, swarm, model, local)
            found |= _speculation(bench, model)
            found |= _narrow(bench, swarm, model)
            swarm.set_links(NO_LINK)
        return found | _failover(bench, swarm)


def _link(bench: Bench, swarm: Swarm, model: SwarmModel, local: Local) -> Values:
    """Seconds of a token over slow links, against the one-way hops of the chain and what the local model takes."""
    tokens, far, near = bench.pick(12, 32), list[float](), list[float]()
    (prompt,) = prompts(model.tokenizer, 1, PROMPT_TOKENS)
    before = swarm.link_bytes()
    for _ in range(bench.pick(2, 5)):
        clock = TokenClock()
        local.generate(prompt, tokens, clock)
        near.append(statistics.fmean(clock.gaps))
        clock = TokenClock()
        model.generate(prompt, Sampling(max_new_tokens=tokens), streamer=clock)
        far.append(statistics.fmean(clock.gaps))
        bench.say(f"a token over three links takes {far[-1]:.3f} s, local {near[-1]:.3f} s")
    sent = [after - already for already, after in zip(before, swarm.link_bytes(), strict=True)]
    bench.say(f"KB through each link: {', '.join(str(size >> 10) for size in sent)}")
    # Whoever dialled, a pair of peers talks through one link; so only the sum is known.
    if sum(sent) < (activations := tokens * len(far) * HIDDEN * 4 * (len(SPANS) + 1)):
        raise SystemExit(f"{activations} bytes of activations, but {sum(sent)} through links: some went around them")
    hops = (len(SPANS) + 1) * ONE_WAY_SECONDS
    return {
        "link_ratio": median([ours / (hops + theirs) for ours, theirs in zip(far, near, strict=True)]),
        "link_seconds_per_token": median(far),
    }


def _speculation(bench: Bench, model: SwarmModel) -> Values:
    """Tokens/s on repetitive text over the same links, with prompt lookup against without."""
    sampling = Sampling(max_new_tokens=bench.pick(32, 64))
    lookup = partial(model.generate, speculation=Speculation(lookup=LOOKUP_TOKENS))
    seconds: dict[str, list[float]] = {"plain": [], "lookup": []}
    texts: dict[str, list[str]] = {}
    for _ in range(bench.pick(1, 3)):
        for name, generate in (("plain", model.generate), ("lookup", lookup)):
            began = time.perf_counter()
            texts[name] = generate(REPETITIVE, sampling)
            seconds[name].append(time.perf_counter() - began)
        shown = ", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items())
        bench.say(f"{sampling.max_new_tokens} repetitive tokens: {shown}")
    speedups = [plain / fast for plain, fast in zip(seconds["plain"], seconds["lookup"], strict=True)]
    return {"speculation_speedup": median(speedups), "speculation_same_text": texts["plain"] == texts["lookup"]}


def _narrow(bench: Bench, swarm: Swarm, model: SwarmModel) -> Values:
    """The first token and those after it where links are throttled too; left out of a quick run."""
    found: Values = {}
    (prompt,) = prompts(model.tokenizer, 1, LOST_PROMPT_TOKENS)
    for megabits in () if bench.quick else (100, 10):
        swarm.set_links(LinkRules(one_way_seconds=ONE_WAY_SECONDS, bits_per_second=megabits * 1e6))
        first, later = [], []
        for _ in range(3):
            clock = TokenClock()
            model.generate(prompt, Sampling(max_new_tokens=12), streamer=clock)
            first.append(clock.moments[0])
            later.append(statistics.fmean(clock.gaps))
        bench.say(f"{megabits} Mbit/s: first token {first[-1]:.2f} s, then {later[-1]:.3f} s each")
        name = f"link_{megabits}_mbit"
        found |= {f"{name}_first_token_seconds": median(first), f"{name}_seconds_per_token": median(later)}
    return found


def _failover(bench: Bench, swarm: Swarm) -> Values:
    """Kill the last, the middle and the first host of a chain within a text each; a replica of all is there."""
    chain = list(swarm.hosts)
    (replica,) = swarm.start([Span(0, BLOCKS)])
    bench.say("a replica of all blocks is up")
    worst: dict[str, list[float]] = {"failover_seconds": [], "failover_over_prefill": []}
    same = True
    with swarm.client("kill-client", pins=chain) as peer:
        model = _settled(peer, replica)
        (prompt,) = prompts(model.tokenizer, 1, LOST_PROMPT_TOKENS)
        sampling = Sampling(max_new_tokens=24)
        text = model.generate(prompt, sampling)
        for host in reversed(chain):
            replaced: list[int] = []
            note = partial(_note_replaced, model, replaced)
            clock = TokenClock({KILL_AT: host.process.process.kill, sampling.max_new_tokens: note})
            same = model.generate(prompt, sampling, streamer=clock) == text and same
            if not any(replaced):
                raise SystemExit(f"the host of blocks {host.process.host.span} was killed and nobody noticed")
            gap = max(clock.gaps[KILL_AT - 1 :])
            prefill = _prefill_seconds(host.process.host.span, LOST_PROMPT_TOKENS + KILL_AT)
            worst["failover_seconds"].append(gap)
            worst["failover_over_prefill"].append(max(0.0, gap - FREE_SECONDS) / prefill)
            bench.say(f"blocks {host.process.host.span} lost: gap {gap:.3f} s, their prefill {prefill:.3f} s")
    return {**{name: round(max(values), 3) for name, values in worst.items()}, "failover_same_text": same}


def _note_replaced(model: SwarmModel, replaced: list[int]) -> None:
    """While the text is not at its end: how many of its hosts were replaced."""
    replaced.append(model.blocks.replaced)


def _settled(peer: Peer, replica: Host) -> SwarmModel:
    """The peer's model, once it knows the replica."""
    deadline = time.monotonic() + 60
    while replica.peer not in {str(row.peer) for row in peer.status().hosts}:
        if time.monotonic() > deadline:
            raise SystemExit("the replica did not appear in the swarm's status within 60 s")
        time.sleep(0.2)
    (model,) = load_models(peer, 1)
    return model


def _prefill_seconds(span: Span, num_tokens: int) -> float:
    """What the lost span's blocks take for a session so far, on one thread; the median of five."""
    model = load_span(source(), span, dtype=torch.float32, device=torch.device("cpu"))
    hidden_BTD = torch.randn(1, num_tokens, HIDDEN)
    seconds: list[float] = []
    for _ in range(6):
        began = time.perf_counter()
        with torch.no_grad():
            model.forward(hidden_BTD, span=span, cache=solo_cache(model, span))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
