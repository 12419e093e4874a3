"""What each place of a chain took: told from host to host on the way back, and read by whoever sent the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from peers.routes.paces import Paces
from peers.routes.routing import Hop
from peers.streams.calls import Answer
from peers.streams.messages import MAX_HOPS, Done
from peers.streams.values import MAX_SECONDS, Timing


def arrived(answer: Answer, elapsed_seconds: float) -> tuple[Timing, ...]:
    """The timings of the rest of a chain, as its first place told them, with what the way to that place took."""
    told = answer.message.timings if isinstance(answer.message, Done) else ()
    if not told:
        return ()
    link_seconds = elapsed_seconds - sum(timing.seconds + timing.link_seconds for timing in told)
    return replace(told[0], link_seconds=min(MAX_SECONDS, max(0.0, link_seconds))), *told[1:]


def told(answer: Answer, name: str, seconds: float) -> Answer:
    """The answer with what this place took in front, where work was done."""
    if not isinstance(answer.message, Done):
        return answer
    own = Timing(name, min(MAX_SECONDS, max(0.0, seconds)), 0.0)
    return replace(answer, message=Done(timings=(own, *answer.message.timings)[:MAX_HOPS]))


def note(paces: Paces, timings: tuple[Timing, ...], hops: Mapping[str, Hop], num_tokens: int) -> None:
    """Keep what was told of the hops of a chain, by the names of their places; other names mean nothing here."""
    for timing in timings:
        hop = hops.get(timing.name)
        if hop is not None:
            paces.measured(hop, num_tokens, timing.seconds, timing.link_seconds)
