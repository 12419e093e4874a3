"""`swarm` as a process that kills itself in the middle of an all-reduce: when it has to encode its n-th part.

Run as `python dying_host.py N join …`: the first argument is n, the others are those of `swarm`.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from hivemind.compression import NoCompression

from averaging.hivemind_allreduce import ClassRunner
from averaging.hivemind_exchange import HivemindExchange
from swarm.cli.main import main


def die_after(parts: int) -> None:
    """Let this process end without a word (kill -9) instead of encoding one more part after `parts`."""
    left = parts
    make_runner = HivemindExchange._runner

    class Dying(NoCompression):
        def compress(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().compress(*args, **kwargs)

    def dying_runner(self: HivemindExchange, *args: Any) -> ClassRunner:
        runner = make_runner(self, *args)
        # What it sends as a holder, and the sums that it sends as a reducer.
        runner.tensor_part_container.compression = runner._codec.compression = Dying()
        return runner

    HivemindExchange._runner = dying_runner  # type: ignore[method-assign]


if __name__ == "__main__":
    die_after(int(sys.argv.pop(1)))
    main()
