"""A swarm of hosts that come, go and move, simulated second by second; who holds what follows the rules of `peers`.

Each host decides by itself, from records as it sees them: as they were up to a minute ago, another age at every look,
and the dead still among them for a while. Nothing else is simulated: no bytes, no tokens.
"""

from __future__ import annotations

import bisect
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from blocks.spans import Span
from peers.network import PeerId
from peers.placing.moving import Move, MovingRules, next_move, still_right
from peers.placing.placement import pick_among
from peers.placing.standing import Standing
from peers.placing.throughput import best_throughput, even_levels, spans_of, throughput

_ELECTED_SECONDS = 30  # so long views of the same age are known to elect the same: it saves time
View = tuple[Standing, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What is simulated. Speeds and capacities are drawn evenly on a logarithmic scale, each by itself.

    `leaving_per_hour` of the hosts leave in an hour, all without a word, and `joining_per_hour` (of `num_peers`) come.
    A death shows in the records after `dead_seconds`, and each look at records shows them as they were `stale_seconds`
    ago at most; a look at records anew, before a move, `fresh_seconds` at most. Loading takes `loading_seconds` and
    `block_seconds` for each block that was not there; until then the host serves nothing. When a quarter of the time is
    over, all hosts of `hole` die at once, if there is one. Without `placed`, newcomers hold as much as they can of the
    model from anywhere on, and nobody moves.
    """

    num_peers: int
    hours: float
    seed: int
    num_blocks: int = 60
    speeds: tuple[float, float] = (1.0, 50.0)
    capacities: tuple[int, int] = (2, 30)
    leaving_per_hour: float = 0.2
    joining_per_hour: float = 0.2
    dead_seconds: tuple[float, float] = (5.0, 30.0)
    stale_seconds: float = 60.0
    fresh_seconds: float = 2.0
    loading_seconds: float = 20.0
    block_seconds: float = 2.0
    poll_seconds: int = 10
    warmup_hours: float = 0.5
    hole: Span | None = None
    placed: bool = True
    rules: MovingRules = field(default_factory=MovingRules)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of it. Throughputs are means over time, as shares of the best possible at each moment.

    `uncovered_seconds` counts those in which some block had no host though there was room for all blocks somewhere;
    `recovery_seconds`, from the hole on until throughput was 90% of the best of those who were left, is 0 without one.
    """

    throughput_of_best: float
    even_of_best: float
    moves_per_peer_hour: float
    uncovered_seconds: float
    recovery_seconds: float
    given_up: int
    gap_moves: int
    balance_moves: int
    least_of_best: float


class Swarm:
    """The simulation. `run()` once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = random.Random(world.seed)
        self._alive: dict[PeerId, Standing] = {}
        self._records: dict[PeerId, Standing] = {}
        self._log: list[tuple[float, View]] = []  # what the records said from when on
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._now = 0.0
        self._turns: list[list[PeerId]] = [[] for _ in range(world.poll_seconds)]  # who looks in which second
        self._elected: dict[tuple[int, int], Move | None] = {}
        self._moves: list[Move] = []
        self._given_up = 0
        self._sums = {"seconds": 0.0, "flow": 0.0, "even": 0.0, "uncovered": 0.0}
        self._least = 1.0
        self._holed = self._recovered = 0.0

    def run(self) -> Outcome:
        """Let the swarm assemble, let half an hour of churn pass, then measure."""
        for _ in range(self._world.num_peers):
            newcomer = self._newcomer()
            span = self._pick(newcomer, tuple(self._records.values()))
            self._alive[newcomer.peer] = self._records[newcomer.peer] = replace(newcomer, span=span)
            self._plan_end(newcomer.peer)
        self._note()
        self._after(self._joining_seconds(), self._join)
        self._play(self._world.warmup_hours * 3600)
        self._moves.clear()
        self._given_up = 0
        self._sums = dict.fromkeys(self._sums, 0.0)
        self._least = 1.0
        if self._world.hole is not None:
            self._after(self._world.hours * 900, self._open_hole)
        self._play((self._world.warmup_hours + self._world.hours) * 3600)
        seconds = self._sums["seconds"]
        return Outcome(
            throughput_of_best=self._sums["flow"] / seconds,
            even_of_best=self._sums["even"] / seconds,
            moves_per_peer_hour=len(self._moves) / self._world.num_peers / self._world.hours,
            uncovered_seconds=self._sums["uncovered"],
            recovery_seconds=self._recovered - self._holed if self._holed else 0.0,
            given_up=self._given_up,
            gap_moves=sum(move.reason == "gap" for move in self._moves),
            balance_moves=sum(move.reason == "balance" for move in self._moves),
            least_of_best=self._least,
        )

    # what happens

    def _play(self, until: float) -> None:
        """Until that second: what is due, then everybody whose turn it is looks at the records."""
        state: tuple[float, float] | None = None
        while self._now < until:
            changed = False
            while self._agenda and self._agenda[0][0] <= self._now:
                heapq.heappop(self._agenda)[2]()
                changed = True
            if changed or state is None:
                state = self._measure()
            self._poll()
            flow, even = state
            self._sums["seconds"] += 1
            self._sums["flow"] += flow
            self._sums["even"] += even
            self._sums["uncovered"] += flow == 0
            self._least = min(self._least, flow)
            if self._holed and self._recovered <= self._holed and flow >= 0.9:
                self._recovered = self._now
            self._now += 1

    def _measure(self) -> tuple[float, float]:
        """Throughput and the least even level now, as shares of the best that all who are here could do."""
        blocks = self._world.num_blocks
        serving = [one for one in self._alive.values() if one.serving]
        serving = [one if one.moves_to is None else replace(one, moves_to=None) for one in serving]
        best = best_throughput(list(self._alive.values()), blocks)
        if best == 0:
            return 1.0, 1.0  # no room for all blocks: nothing is the best there is
        return throughput(serving, blocks) / best, float(even_levels(spans_of(serving), blocks).min()) / best

    def _join(self) -> None:
        newcomer = self._newcomer()
        span = self._pick(newcomer, self._look(self._world.stale_seconds))
        self._alive[newcomer.peer] = replace(newcomer, span=span, moves_to=span, serving=False)
        self._publish(newcomer.peer)
        self._plan_end(newcomer.peer)
        self._after(self._load_seconds(len(span)), lambda: self._serve(newcomer.peer))
        self._after(self._joining_seconds(), self._join)

    def _pick(self, newcomer: Standing, view: View) -> Span:
        blocks, capacity = self._world.num_blocks, newcomer.capacity
        if self._world.placed:
            return pick_among(view, blocks, capacity, me=newcomer.peer, block_rate=newcomer.block_rate)
        start = self._rng.randint(0, blocks - min(blocks, capacity))
        return Span(start, min(blocks, start + capacity))

    def _die(self, peer: PeerId) -> None:
        if self._alive.pop(peer, None) is None:
            return
        self._after(self._rng.uniform(*self._world.dead_seconds), lambda: self._forget(peer))

    def _open_hole(self) -> None:
        assert self._world.hole is not None
        self._holed = self._recovered = self._now
        for peer, one in list(self._alive.items()):
            if any(block in one.span for block in self._world.hole.blocks()):
                self._die(peer)

    def _forget(self, peer: PeerId) -> None:
        self._records.pop(peer, None)
        self._note()

    def _serve(self, peer: PeerId) -> None:
        if (one := self._alive.get(peer)) is not None:
            self._alive[peer] = replace(one, span=one.goal, moves_to=None, serving=True)
            self._publish(peer)

    def _promise(self, move: Move) -> None:
        old = self._alive[move.peer]
        self._alive[move.peer] = replace(old, moves_to=move.span, since=self._now, moved=True)
        self._publish(move.peer)
        self._after(self._world.rules.settle_seconds, lambda: self._settle(move, old))

    def _settle(self, move: Move, old: Standing) -> None:
        if (one := self._alive.get(move.peer)) is None:
            return
        view = (*(other for other in self._look(self._world.fresh_seconds) if other.peer != move.peer), one)
        if not still_right(move, view, self._world.num_blocks, self._now, rules=self._world.rules):
            self._given_up += 1
            self._alive[move.peer] = old
            self._publish(move.peer)
            return
        self._moves.append(move)
        self._alive[move.peer] = replace(one, serving=False)
        self._publish(move.peer)
        missing = sum(block not in move.leaves for block in move.span.blocks())
        self._after(self._load_seconds(missing), lambda: self._serve(move.peer))

    def _poll(self) -> None:
        """Everybody whose second it is asks whether to move. Views of the same age elect the same peer."""
        if not self._world.placed:
            return
        for peer in self._turns[int(self._now) % self._world.poll_seconds]:
            one = self._alive.get(peer)
            if one is None or not one.serving or one.moves_to is not None:
                continue
            seen = self._seen_at(self._now - self._rng.uniform(0, self._world.stale_seconds))
            move = self._elect(seen)
            if move is not None and move.peer == peer and move.leaves == one.span and self._stood(one, move):
                self._promise(move)

    def _stood(self, one: Standing, move: Move) -> bool:
        """A peer knows of itself what its record may not say yet."""
        return move.reason == "gap" or one.since <= self._now - self._world.rules.stand_seconds

    def _elect(self, seen: int) -> Move | None:
        key = (seen, int(self._now) // _ELECTED_SECONDS)
        if key not in self._elected:
            if len(self._elected) > 256:
                self._elected.clear()
            view = self._log[seen][1]
            self._elected[key] = next_move(view, self._world.num_blocks, self._now, rules=self._world.rules)
        return self._elected[key]

    # records

    def _look(self, most_seconds: float) -> View:
        return self._log[self._seen_at(self._now - self._rng.uniform(0, most_seconds))][1]

    def _seen_at(self, moment: float) -> int:
        return max(0, bisect.bisect_right(self._log, moment, key=lambda entry: entry[0]) - 1)

    def _publish(self, peer: PeerId) -> None:
        self._records[peer] = self._alive[peer]
        self._note()

    def _note(self) -> None:
        view = tuple(self._records.values())
        if self._log and self._log[-1][0] == self._now:
            self._log[-1] = (self._now, view)
        else:
            self._log.append((self._now, view))

    # chance

    def _newcomer(self) -> Standing:
        self._count += 1
        low, high = self._world.speeds
        few, many = self._world.capacities
        peer = PeerId(f"Qm{self._world.seed}-{self._count}")
        self._turns[self._rng.randrange(self._world.poll_seconds)].append(peer)
        return Standing(
            peer=peer,
            span=Span(0, 1),
            block_rate=low * (high / low) ** self._rng.random(),
            capacity=int(few * ((many + 1) / few) ** self._rng.random()),
            since=self._now,
        )

    def _plan_end(self, peer: PeerId) -> None:
        if self._world.leaving_per_hour:
            self._after(self._rng.expovariate(self._world.leaving_per_hour / 3600), lambda: self._die(peer))

    def _joining_seconds(self) -> float:
        rate = self._world.joining_per_hour * self._world.num_peers / 3600
        return self._rng.expovariate(rate) if rate else float("inf")

    def _load_seconds(self, num_blocks: int) -> float:
        return self._world.loading_seconds + self._world.block_seconds * num_blocks

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._agenda, (self._now + seconds, self._count, act))
