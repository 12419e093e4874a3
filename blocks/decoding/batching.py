"""Which waiting steps a host computes next, and together. Pure rules: no torch, no clock, no threads.

Decoding rows go in one pass; prompts go in passes of their own, of rows of similar length, in chunks, and in turn with
decoding, so that neither waits long for the other. Clients take turns, however many sessions each has.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_IDLE_AFTER_PASSES = 3  # without a decoding pass, before a prompt may take longer chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A step that waits: its place in the order of arrival, what it belongs to, and how much of it is left.

    Only steps of an equal `group` can share a pass. `tokens` are those of each of the `rows`.
    """

    ticket: int
    session: str
    client: str
    group: Hashable
    rows: int
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Pick:
    """How many of a step's tokens come into the next pass."""

    ticket: int
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLimits:
    """How large passes may be.

    Steps of up to `decode_tokens` count as decoding, guesses ahead included, and at most `decode_rows` rows of them
    share a pass. A pass of prompts has at most `chunk_tokens` tokens, padding included, or `idle_chunk_tokens` if
    nobody is decoding. `padding` bounds how much larger than its true tokens a pass may be; but a pass costs as much as
    `spare_tokens` whatever is in it (about 20 in SmolLM2-135M), so that fewer wasted ones are cheaper than another.

    Raises:
        ValueError: a number makes no sense.
    """

    decode_tokens: int = 16
    decode_rows: int = 64
    chunk_tokens: int = 256
    idle_chunk_tokens: int = 1024
    padding: float = 1.5
    spare_tokens: int = 16

    def __post_init__(self) -> None:
        smallest = min(self.decode_tokens, self.decode_rows, self.chunk_tokens)
        shorter = self.idle_chunk_tokens < self.chunk_tokens
        if smallest < 1 or shorter or not self.padding >= 1 or self.spare_tokens < 0:
            raise ValueError(f"{self} has a limit below one, or shorter chunks when idle; use larger limits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """Whose turn it is: the number of passes so far, the last that decoded, and the last of each client."""

    passes: int = 0
    last_decoding: int | None = None
    last_of_client: Mapping[str, int] = field(default_factory=dict)


def choose(waiting: Sequence[Waiting], turn: Turn, limits: BatchLimits) -> tuple[tuple[Pick, ...], Turn]:
    """The next pass, empty only if nothing waits, and the turn after it.

    Of a session's steps only the earliest can come. Decoding and prompts alternate if both wait. The first step of a
    pass is always taken; the others, client by client, if they fit.
    """
    ordered = _in_fair_order(_earliest_of_sessions(waiting), turn)
    decoding = [step for step in ordered if step.tokens <= limits.decode_tokens]
    prompts = [step for step in ordered if step.tokens > limits.decode_tokens]
    just_decoded = turn.last_decoding is not None and turn.last_decoding == turn.passes
    if decoding and not (prompts and just_decoded):
        picks = _fill(decoding, limits.decode_rows * limits.decode_tokens, limits.decode_rows, limits)
        return picks, _after(turn, waiting, picks, decoded=True)
    if not prompts:
        return (), turn
    idle = not decoding and (turn.last_decoding is None or turn.passes - turn.last_decoding >= _IDLE_AFTER_PASSES)
    most_tokens = limits.idle_chunk_tokens if idle else limits.chunk_tokens
    longest = min(prompts[0].tokens, most_tokens)
    alike = [step for step in prompts if step.tokens * limits.padding >= longest]
    picks = _fill(alike, most_tokens, most_tokens, limits)
    return picks, _after(turn, waiting, picks, decoded=False)


def seconds_to_gather(
    now: float, since: float, missing_expected_at: Iterable[float], pass_seconds: float, *, share: float = 0.25
) -> float:
    """How long to wait for more steps before the next pass.

    Clients that decode in step with each other answer within moments of each other; the first would else go alone, and
    the others after it, for ever. The wait ends at `since`, when the first step could have been computed, plus `share`
    of a pass. It is 0 unless a session that does not wait yet is expected before that. One that is late by as much is
    not waited for.
    """
    most = share * pass_seconds
    soon = [at for at in missing_expected_at if now - most <= at <= since + most]
    return max(0.0, since + most - now) if soon else 0.0


def _earliest_of_sessions(waiting: Sequence[Waiting]) -> list[Waiting]:
    earliest: dict[str, Waiting] = {}
    for step in sorted(waiting, key=lambda one: one.ticket):
        earliest.setdefault(step.session, step)
    return list(earliest.values())


def _in_fair_order(steps: Sequence[Waiting], turn: Turn) -> list[Waiting]:
    """The first step of each client, those longest without a pass in front, then the second of each, and so on."""
    seen: dict[str, int] = {}
    ranked: list[tuple[int, int, int, Waiting]] = []
    for step in steps:
        rank = seen[step.client] = seen.get(step.client, -1) + 1
        ranked.append((rank, turn.last_of_client.get(step.client, -1), step.ticket, step))
    return [step for _, _, _, step in sorted(ranked, key=lambda one: one[:3])]


def _fill(steps: Sequence[Waiting], most_tokens: int, most_rows: int, limits: BatchLimits) -> tuple[Pick, ...]:
    """The first step, cut to `most_tokens`, and those of its group that can lie beside it."""
    first = steps[0]
    longest = min(first.tokens, max(1, most_tokens // first.rows))
    picks = [Pick(ticket=first.ticket, tokens=longest)]
    rows, true_tokens, width = first.rows, first.rows * longest, longest
    cut = longest < first.tokens
    for step in steps[1:]:
        # A step is cut only where the first one was, so that chunks end with the prompts where they can.
        tokens = min(step.tokens, longest) if cut else step.tokens
        new_rows, new_tokens, new_width = rows + step.rows, true_tokens + step.rows * tokens, max(width, tokens)
        padded = new_rows * new_width
        most_padded = min(most_tokens, max(limits.padding * new_tokens, new_tokens + limits.spare_tokens))
        if step.group == first.group and new_rows <= most_rows and padded <= most_padded:
            picks.append(Pick(ticket=step.ticket, tokens=tokens))
            rows, true_tokens, width = new_rows, new_tokens, new_width
    return tuple(picks)


def _after(turn: Turn, waiting: Sequence[Waiting], picks: Sequence[Pick], *, decoded: bool) -> Turn:
    number = turn.passes + 1
    taken = {pick.ticket for pick in picks}
    # Clients that wait for nothing are forgotten, else the turn would grow for ever.
    clients = {step.client for step in waiting}
    served = {step.client for step in waiting if step.ticket in taken}
    last = {client: turn.last_of_client[client] for client in clients if client in turn.last_of_client}
    return Turn(
        passes=number,
        last_decoding=number if decoded else turn.last_decoding,
        last_of_client=last | dict.fromkeys(served, number),
    )
