"""Settings of rounds: when one begins, how long each phase may take, how large its messages are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from averaging.recipe import Recipe

MAX_GROUP_PEERS = 64  # contributions of up to 4 kB each in one leader's message; larger runs form several groups


@dataclass(frozen=True, kw_only=True, slots=True)
class AveragingConfig:
    """When rounds begin and how long each phase may take; all times in seconds.

    `round_samples` samples of the whole run start a round, and so does a single one after `round_seconds` (0: never);
    `lead_seconds` lie between a proposal and its moment, so that the records can spread. `matchmaking_seconds` is how
    long the group waits for those that were expected, before anything has been learnt (arrivals.py).
    `request_seconds` is the wait for one peer's answer in matchmaking. A class that is not reduced within
    `reduce_seconds`, or a sender that is silent for `stall_seconds`, fails. Weights above `max_weight` are refused, and
    so is an update with a value beyond `max_update`. Runs of more than `group_peers` average in several groups
    (grouping.py).

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    round_samples: int = 512
    min_peers: int = 2
    lead_seconds: float = 2.0
    matchmaking_seconds: float = 1.0
    request_seconds: float = 0.4
    read_seconds: float = 30.0
    reduce_seconds: float = 30.0
    stall_seconds: float = 10.0
    vote_seconds: float = 5.0
    part_bytes: int = 2**21
    max_weight: float = 1e9
    max_rounds_ahead: int = 64
    max_update: float = 1e3
    round_seconds: float = 0.0
    group_peers: int = 16
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        if self.round_samples < 1:
            raise ValueError(f"averaging.round_samples is {self.round_samples}; use 1 or more")
        if not 2 <= self.min_peers <= MAX_GROUP_PEERS:
            raise ValueError(f"averaging.min_peers is {self.min_peers}; use 2 to {MAX_GROUP_PEERS}")
        for name in ("lead", "matchmaking", "request", "read", "reduce", "stall", "vote"):
            seconds = getattr(self, f"{name}_seconds")
            if not 0 < seconds <= 3600:
                raise ValueError(f"averaging.{name}_seconds is {seconds}; use more than 0 and at most 3600")
        if 2 * self.request_seconds >= self.matchmaking_seconds:
            raise ValueError(
                f"averaging.request_seconds is {self.request_seconds}; "
                f"use less than half of matchmaking_seconds ({self.matchmaking_seconds})"
            )
        if not 2**10 <= self.part_bytes <= 2**22:
            raise ValueError(f"averaging.part_bytes is {self.part_bytes}; use 1024 to 4194304")
        if not 0 < self.max_weight < math.inf:
            raise ValueError(f"averaging.max_weight is {self.max_weight}; use a positive number")
        if not 0 < self.max_update < math.inf:
            raise ValueError(f"averaging.max_update is {self.max_update}; use a positive number")
        if not 0 <= self.round_seconds <= 30 * 86400:
            raise ValueError(f"averaging.round_seconds is {self.round_seconds}; use 0 (off) to 2592000")
        if not 2 <= self.group_peers <= MAX_GROUP_PEERS:
            raise ValueError(f"averaging.group_peers is {self.group_peers}; use 2 to {MAX_GROUP_PEERS}")
        if self.max_rounds_ahead < 1:
            raise ValueError(f"averaging.max_rounds_ahead is {self.max_rounds_ahead}; use 1 or more")
