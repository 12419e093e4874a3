"""`swarm` as a process that kills itself in the middle of an all-reduce: when it has to encode its n-th part.

Run as `python dying_host.py N join …`: the first argument is n, the others are those of `swarm`.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from averaging.hivemind_allreduce import ClassRunner
from averaging.hivemind_exchange import HivemindExchange
from swarm.cli.main import main


def die_after(parts: int) -> None:
    """Let this process end without a word (kill -9) instead of encoding one more part after `parts`."""
    left = parts
    make_runner = HivemindExchange._runner

    def dying_runner(self: HivemindExchange, *args: Any) -> ClassRunner:
        runner = make_runner(self, *args)
        encode = runner._codec.encode

        def encode_or_die(tensor: torch.Tensor) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(tensor)

        # What it sends as a holder, and the sums that it sends as a reducer.
        runner._codec.encode = encode_or_die  # type: ignore[method-assign]
        return runner

    HivemindExchange._runner = dying_runner  # type: ignore[method-assign]


if __name__ == "__main__":
    die_after(int(sys.argv.pop(1)))
    main()
