"""How fast a swarm trains, against peft in one process on the same two cores; ends with one JSON object.

SmolLM2-135M (`pip install 'swarmtune[demo]'`) in fp32, LoRA of rank 8 on queries and values, batches of 8 texts of 128
tokens. The swarm is two host processes of half the model and this one as the trainer, one compute thread each,
activations in bf16; peft has one thread for every core. Measured in turn: `train_ratio` is tokens/s of whole steps
(forward, backward, optimizer) over peft's, `forward_ratio` tokens/s of held-out loss over peft's. `bytes_per_token` is
what a trained token moves over all links of the swarm, both ways, as TCP carries it.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass

import torch
from parts.report import Bench, Values, median, ratios, run_parts
from parts.swarms import HALVES, Swarm, new_run
from parts.texts import load_whole
from peft import LoraConfig, PeftModel, get_peft_model

from swarm.data.demo_text import pydoc_samples
from swarm.data.stream import SampleSet, pad_right
from swarm.peer import Peer
from swarm.training.trainer import Progress

ROWS, LENGTH, RANK = 8, 128, 8
TARGETS = ("q_proj", "v_proj")
LEARNING_RATE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """Tokens/s of whole steps and of forward passes with loss; bytes that a trained token moved over links."""

    train: float
    forward: float
    bytes_per_token: float = 0.0


class Peft:
    """The whole model in this process."""

    def __init__(self, samples: SampleSet) -> None:
        settings = LoraConfig(r=RANK, lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        self.model: PeftModel = get_peft_model(load_whole("fp32"), settings)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=LEARNING_RATE)
        self.samples = samples

    def measure(self, steps: int, batches: int) -> Speeds:
        """Some steps, and some batches forward."""
        torch.set_num_threads(os.cpu_count() or 1)
        self._step(0)  # warms up
        began = time.perf_counter()
        for number in range(steps):
            self._step(number)
        trained = time.perf_counter()
        with torch.no_grad():
            for number in range(batches):
                self._loss(number)
        seconds = trained - began, time.perf_counter() - trained
        return Speeds(train=steps * ROWS * LENGTH / seconds[0], forward=batches * ROWS * LENGTH / seconds[1])

    def _step(self, number: int) -> None:
        torch.autograd.backward(self._loss(number))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, number: int) -> torch.Tensor:
        batch = pad_right([self.samples[number * ROWS + row] for row in range(ROWS)])
        output = self.model(input_ids=batch.input_ids_BT, attention_mask=batch.mask_BT, labels=batch.labels_BT)
        loss: torch.Tensor = output.loss
        return loss


def measure_swarm(swarm: Swarm, peer: Peer, samples: SampleSet, steps: int, held_out: SampleSet) -> Speeds:
    """One more training of this peer: the first step is not counted, and after the last it evaluates `held_out`."""
    torch.set_num_threads(1)
    moments: list[float] = []
    marks: list[int] = []

    def note(progress: Progress) -> None:
        moments.append(time.perf_counter())
        marks.append(sum(swarm.link_bytes()))

    peer.train(samples, steps=steps + 1, held_out=held_out, on_progress=note)
    ended = time.perf_counter()
    tokens = steps * ROWS * LENGTH
    return Speeds(
        train=tokens / (moments[-1] - moments[0]),
        forward=len(held_out.ids) / (ended - moments[-1]),
        bytes_per_token=(marks[-1] - marks[0]) / tokens,
    )


def measure_training(bench: Bench) -> Values:
    """All of it, on one swarm."""
    training: dict[str, object] = {"batch_size": ROWS, "sequence_length": LENGTH, "learning_rate": LEARNING_RATE}
    adapter: dict[str, object] = {"lora_rank": RANK, "lora_targets": TARGETS}
    wire: dict[str, object] = {"dtype": "bf16"}
    run = new_run(bench.directory / "run", "fp32", training=training, adapter=adapter, wire=wire)
    found: dict[str, list[Speeds]] = {"peft": [], "swarm": []}
    # Links without delay or limit: they count.
    with Swarm.of(bench.directory / "swarm", run, HALVES, linked=True) as swarm:
        bench.say("both hosts are up")
        with swarm.client("trainer") as peer:
            samples, _ = pydoc_samples(peer.tokenizer(), LENGTH)
            batches, steps = bench.pick(2, 6), bench.pick(2, 8)
            peft, held_out = Peft(samples), samples.head(batches * ROWS)
            for _ in range(bench.pick(2, 5)):
                found["peft"].append(peft.measure(steps, batches))
                found["swarm"].append(measure_swarm(swarm, peer, samples, steps, held_out))
                shown = (f"{name} {each[-1].train:.0f} and {each[-1].forward:.0f}" for name, each in found.items())
                bench.say(f"tokens/s of steps and forward: {', '.join(shown)}")
    ours, theirs = found["swarm"], found["peft"]
    return {
        "train_ratio": ratios([each.train for each in ours], [each.train for each in theirs]),
        "forward_ratio": ratios([each.forward for each in ours], [each.forward for each in theirs]),
        "bytes_per_token": round(statistics.median(each.bytes_per_token for each in ours)),
        "train_tokens_per_second": median([each.train for each in ours]),
        "forward_tokens_per_second": median([each.forward for each in ours]),
        "peft_train_tokens_per_second": median([each.train for each in theirs]),
        "peft_forward_tokens_per_second": median([each.forward for each in theirs]),
    }


if __name__ == "__main__":
    run_parts(__doc__, {"training": measure_training})
