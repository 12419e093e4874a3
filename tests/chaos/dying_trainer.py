"""`swarm` as a process that kills itself once the n-th message of a kind is on its way: a trainer that dies at work.

Run as `python dying_trainer.py KIND N train …`: the arguments after N are those of `swarm`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from peers.streams.calls import Answer
from peers.streams.pool import Pool
from swarm.cli.main import main


def die_at(kind: str, number: int) -> None:
    """Let this process end without a word (kill -9) in the middle of its `number`-th call of `kind`."""
    left = number
    call = Pool.call

    async def dying_call(self: Pool, peer: Any, stream: str, message: Any, *args: Any, **kwargs: Any) -> Answer:
        nonlocal left
        left -= message.kind == kind
        if left > 0 or message.kind != kind:
            return await call(self, peer, stream, message, *args, **kwargs)
        asked = asyncio.create_task(call(self, peer, stream, message, *args, **kwargs))
        await asyncio.wait([asked], timeout=0.05)  # the host has it, and perhaps has answered already
        os.kill(os.getpid(), signal.SIGKILL)
        return await asked

    Pool.call = dying_call  # type: ignore[method-assign]


if __name__ == "__main__":
    die_at(sys.argv.pop(1), int(sys.argv.pop(1)))
    main()
