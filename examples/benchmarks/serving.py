"""How fast swarms write, against the local model in the same run with the same threads; ends with one JSON object.

SmolLM2-135M (`pip install 'swarmtune[demo]'`) on host processes of this machine, one compute thread in every process.
Greedy; ratios are medians of values measured in turn.

fp32, bf16: two hosts. `one_session_ratio` is their tokens/s over the local model's, `first_token_ratio` the seconds to
the first token of a 256-token prompt over the local model's, `clients_N_speedup` the sum of tokens/s of N sessions of
one client process over one session's. `online_seconds` is from starting a host to its serving, `peer_megabytes` what a
host and its p2pd have resident. far: three hosts in a chain, each behind a link of 50 ms each way. `link_ratio` is the
seconds of a token over the four one-way hops and the local model's time, `speculation_speedup` what prompt lookup gains
on repetitive text. Then, without the delay, hosts are killed: `failover_seconds` is the longest gap between two tokens,
`failover_over_prefill` what of it goes beyond 0.2 s over one prefill of the session through the lost blocks, the worst
of the last, the middle and the first host.
"""

from __future__ import annotations

from parts.far import measure_far
from parts.report import run_parts
from parts.speed import measure_bf16, measure_fp32

if __name__ == "__main__":
    run_parts(__doc__, {"fp32": measure_fp32, "bf16": measure_bf16, "far": measure_far})
