"""How much this peer sends in a second at most: a token bucket that lets messages through whole, and in debt.

A message goes when what went before it is paid for, however large it is itself; so a stream is never blocked in the
middle of one, and small messages, which keep a swarm together, go at once. In any time of T seconds leave at most
rate x (T + BURST_SECONDS) bytes, one large message, and the small ones. What a peer receives is not paced: a host gets
about what it sends, and whoever waits for its answers sends it no more meanwhile.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from peers.errors import OverLimit

SMALL_BYTES = 4096  # messages up to this size are counted, but wait for nothing
BURST_SECONDS = 0.5  # of quiet that may be made up for at once


@dataclass(frozen=True, slots=True)
class Pace:
    """A rate in bytes per second, and until when (seconds of the caller's clock) what was sent has used it up."""

    bytes_per_second: float
    paid_until: float = -math.inf

    def seconds_behind(self, now: float) -> float:
        """How long a message that is given now waits."""
        return max(0.0, self.paid_until - now)

    def after(self, num_bytes: int, now: float) -> Pace:
        """The pace once a message was let through or put in the queue: it is paid for from its turn on."""
        turn = max(self.paid_until, now - BURST_SECONDS)
        return replace(self, paid_until=turn + num_bytes / self.bytes_per_second)

    def without(self, num_bytes: int) -> Pace:
        """The pace when a message that waited is not sent after all."""
        return replace(self, paid_until=self.paid_until - num_bytes / self.bytes_per_second)


class SendLimit:
    """One peer's limit over all of its streams. Belongs to the event loop; first come, first sent."""

    def __init__(
        self, bytes_per_second: float = math.inf, clock: Callable[[], float] = time.monotonic, name: str = "this peer"
    ) -> None:
        """`name` is whose limit it is, for what others are told.

        Raises:
            ValueError: the rate is not positive.
        """
        if not bytes_per_second > 0:
            raise ValueError(f"a send limit of {bytes_per_second} bytes per second lets nothing through; use more")
        self.bytes_per_second, self._clock, self._name = bytes_per_second, clock, name
        self._pace = Pace(bytes_per_second)

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit at all."""
        return math.isfinite(self.bytes_per_second)

    @property
    def megabits_per_second(self) -> float:
        """The limit as averaging weighs links by it; 0 where there is none."""
        return self.bytes_per_second * 8e-6 if self.is_limited else 0.0

    def seconds_behind(self) -> float:
        """How long a message that is given now waits."""
        return self._pace.seconds_behind(self._clock())

    async def take(self, num_bytes: int, *, seconds: float = math.inf) -> None:
        """Wait until `num_bytes` may be sent, and count them.

        Raises:
            OverLimit: that would take longer than `seconds`. Said at once, and nothing is counted.
        """
        if not self.is_limited:
            return
        now = self._clock()
        wait_seconds = self._pace.seconds_behind(now) if num_bytes > SMALL_BYTES else 0.0
        if wait_seconds > seconds:
            raise OverLimit(
                f"the bandwidth limit of {self._name} ({self.megabits_per_second:.3g} Mbit/s) is "
                f"{wait_seconds:.0f} s behind; it must send less, or be allowed more (--max-bandwidth)"
            )
        self._pace = self._pace.after(num_bytes, now)
        if not wait_seconds:
            return
        try:
            await asyncio.sleep(wait_seconds)
        except asyncio.CancelledError:
            self._pace = self._pace.without(num_bytes)
            raise
