"""What the form in which activations and gradients travel does to loss, gradients, training and text, against fp32.

Two halves of SmolLM2-135M-Instruct in this process, in fp32; between them and the client's ends every tensor goes
through the wire's own encoding and back, three times on the way there and three times on the way back. No network. Also
the size and the speed of the encodings, on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from parts.report import Bench, Values, run_parts
from parts.texts import prompts, source
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blocks.adapters import LoraSettings, parameters_by_unit
from blocks.client import ClientModel, RemoteCall
from blocks.compute import SpanCompute, Stash
from blocks.decoding.cache import SessionCaches
from blocks.load import load_client, load_span, load_tokenizer
from blocks.spans import Span
from peers.streams.compression import dequantize, quantize, quantized_bytes
from peers.streams.wire_format import WireFormat
from swarm.data.demo_text import pydoc_samples
from swarm.data.stream import split_microbatches

HALVES = (Span(0, 15), Span(15, 30))
CPU = torch.device("cpu")
TEXT_PROMPT = 32  # tokens
Batch = tuple[Tensor, Tensor, Tensor]


def travel(tensor: Tensor, wire: WireFormat) -> Tensor:
    """What the other side has of a tensor, fp32."""
    match wire:
        case WireFormat.FP32:
            return tensor
        case WireFormat.BF16:
            return tensor.bfloat16().float()
        case WireFormat.EIGHT_BIT:
            return dequantize(quantize(tensor))


class Chain:
    """The client's ends of the model and both halves, with one LoRA whose B matrices are no longer zero."""

    def __init__(self) -> None:
        found = source()
        torch.manual_seed(1)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(found)
        self.client: ClientModel = load_client(found, dtype=torch.float32, device=CPU)
        models = [load_span(found, span, dtype=torch.float32, device=CPU) for span in HALVES]
        self.halves = [SpanCompute(model, LoraSettings(seed=1)) for model in models]
        self.parameters = [p for model in models for unit in parameters_by_unit(model).values() for p in unit.values()]
        for parameter in self.parameters:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.002)
        self.start = [parameter.detach().clone() for parameter in self.parameters]

    def reset(self) -> None:
        """The LoRA as it was at first."""
        for parameter, value in zip(self.parameters, self.start, strict=True):
            parameter.data.copy_(value)

    def loss(self, batch: Batch, wire: WireFormat) -> float:
        """Mean token loss."""
        ids, mask, labels = batch
        hidden = self.client.embed(ids, mask)
        for half in self.halves:
            hidden = half.forward_eval(travel(hidden, wire), span=half.model.span, mask_BT=mask, version="live")
        total, tokens = self.client.evaluate(travel(hidden, wire), ids, mask, labels)
        return float(total) / tokens

    def gradients(self, batch: Batch, wire: WireFormat) -> tuple[list[Tensor], float]:
        """Of the LoRA, of the mean token loss; and that loss."""
        ids, mask, labels = batch
        hidden = self.client.embed(ids, mask)
        stashes: list[Stash] = []
        for half in self.halves:
            sent = travel(hidden, wire)
            hidden, stash = half.forward_train(sent, span=half.model.span, mask_BT=mask, seed=1, keep_graph=True)
            stashes.append(stash)
        total, grad, tokens = self.client.loss(travel(hidden, wire), ids, mask, labels)
        gradients: list[Tensor] = []
        for half, stash in zip(reversed(self.halves), reversed(stashes), strict=True):
            grad, units = half.backward(stash, travel(grad, wire))
            gradients = [gradient / tokens for unit in units.values() for gradient in unit.values()] + gradients
        travel(grad, wire)
        return gradients, float(total) / tokens

    @torch.no_grad()
    def write(self, prompt: str, num_tokens: int, wire: WireFormat) -> list[int]:
        """Greedy, past any end of text."""
        sessions = [SessionCaches(half.model, 1 << 28) for half in self.halves]
        for session, half in zip(sessions, self.halves, strict=True):
            session.open("s", span=half.model.span, batch=1, max_length=TEXT_PROMPT * 2 + num_tokens, version="live")

        def remote(call: RemoteCall) -> Tensor:
            hidden = call.hidden_BTD
            for session in sessions:
                sent = travel(hidden, wire)
                hidden = session.step("s", sent, position=call.start, mask_BT=None, position_ids_BT=None)
            return travel(hidden, wire)

        self.client.remote = remote
        batch = self.tokenizer(prompt, return_tensors="pt")
        output = self.client.generate(**batch, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)
        found: list[int] = output[0, batch["input_ids"].shape[1] :].tolist()
        return found


def batches(chain: Chain, bench: Bench, count: int) -> tuple[list[Batch], list[Batch]]:
    """Of Python's own reference, four rows of 128 tokens each (quick: of 64): to train on, and held out."""
    length = bench.pick(64, 128)
    train, held_out = pydoc_samples(chain.tokenizer, length)

    def take() -> Iterator[list[Batch]]:
        for samples in (train, held_out):
            rows = [samples[index] for index in range(4 * count)]
            found = split_microbatches(rows, 4 * length)
            yield [(each.input_ids_BT, each.mask_BT, each.labels_BT) for each in found]

    first, second = take()
    return first, second


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The norm of the difference by the norm of what is wanted, over all tensors together."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True))
    return float((difference / sum(float(b.square().sum()) for b in wanted)) ** 0.5)


def figures(name: str, values: dict[WireFormat, float]) -> Values:
    """Under keys of their own."""
    return {f"{name}_{wire}": float(f"{value:.3g}") for wire, value in values.items()}


def measure_loss(chain: Chain, bench: Bench) -> Values:
    """Relative errors of the held-out loss of each batch, and of the LoRA's gradients."""
    train, held_out = batches(chain, bench, bench.pick(4, 8))
    losses: dict[WireFormat, float] = {}
    worst: dict[WireFormat, float] = {}
    gradients: dict[WireFormat, float] = {}
    exact = [chain.loss(batch, WireFormat.FP32) for batch in held_out]
    wanted = [chain.gradients(batch, WireFormat.FP32)[0] for batch in train[: bench.pick(2, 6)]]
    for wire in (WireFormat.BF16, WireFormat.EIGHT_BIT):
        found = [chain.loss(batch, wire) for batch in held_out]
        errors = [abs(one / other - 1) for one, other in zip(found, exact, strict=True)]
        losses[wire], worst[wire] = abs(sum(found) / sum(exact) - 1), max(errors)
        pairs = zip(train, wanted, strict=False)
        gradients[wire] = statistics.median(apart(chain.gradients(batch, wire)[0], want) for batch, want in pairs)
        bench.say(f"{wire}: loss off by {losses[wire]:.2e}, gradients by {gradients[wire]:.4f}")
    return {
        "held_out_loss": round(statistics.mean(exact), 4),
        **figures("loss_error", losses),
        **figures("worst_batch_loss_error", worst),
        **figures("gradient_error", gradients),
    }


def measure_training(chain: Chain, bench: Bench) -> Values:
    """The held-out loss after the same steps of AdamW from the same start."""
    train, held_out = batches(chain, bench, bench.pick(8, 24))
    after: dict[WireFormat, float] = {}
    for wire in WireFormat:
        chain.reset()
        optimizer = torch.optim.AdamW(chain.parameters, lr=1e-3)
        for batch in train:
            for parameter, gradient in zip(chain.parameters, chain.gradients(batch, wire)[0], strict=True):
                parameter.grad = gradient
            optimizer.step()
        after[wire] = statistics.mean(chain.loss(batch, wire) for batch in held_out[: bench.pick(2, 8)])
        bench.say(f"{wire}: held-out loss {after[wire]:.4f} after {len(train)} steps")
    chain.reset()
    return {"steps": len(train), **{f"trained_loss_{wire}": round(value, 4) for wire, value in after.items()}}


def measure_text(chain: Chain, bench: Bench) -> Values:
    """How many greedy tokens come before the first that differs, over several texts."""
    num_tokens = bench.pick(24, 64)
    texts = prompts(chain.tokenizer, bench.pick(3, 6), TEXT_PROMPT)
    exact = [chain.write(text, num_tokens, WireFormat.FP32) for text in texts]
    found: Values = {"texts": len(texts), "text_tokens": num_tokens}
    for wire in (WireFormat.BF16, WireFormat.EIGHT_BIT):
        equal = []
        for text, want in zip(texts, exact, strict=True):
            pairs = zip(chain.write(text, num_tokens, wire), want, strict=True)
            equal.append(next((at for at, (one, other) in enumerate(pairs) if one != other), num_tokens))
        bench.say(f"{wire}: equal for {equal} of {num_tokens} tokens")
        found |= {
            f"first_difference_{wire}": statistics.median(equal),
            f"texts_unchanged_{wire}": sum(each == num_tokens for each in equal),
        }
    return found


def measure_codec(bench: Bench) -> Values:
    """Bytes by value, and GB of fp32 a second."""
    values = torch.randn(4, 256, 576)
    values[..., 507] *= 1000  # as in the hidden states of this model
    packed = quantize(values)
    token = values[:1, :1].clone()
    ways: dict[str, tuple[Tensor, Callable[[], object]]] = {
        "encode": (values, partial(quantize, values)),
        "decode": (values, partial(dequantize, packed)),
        "encode_token": (token, partial(quantize, token)),
        "decode_token": (token, partial(dequantize, quantize(token))),
        "to_bf16": (values, values.bfloat16),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(bench.pick(20, 100)):
        for name, (_, work) in ways.items():
            began = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began)
    best = {name: min(taken) for name, taken in times.items()}  # of a machine that others use as well
    large = ("encode", "decode", "to_bf16")
    return {
        "bytes_per_value_8bit": round(quantized_bytes(tuple(values.shape)) / values.numel(), 4),
        **{f"{name}_gigabytes_per_second": round(values.nbytes / best[name] / 1e9, 2) for name in large},
        **{f"{name}_microseconds": round(1e6 * best[name], 1) for name in ("encode_token", "decode_token")},
    }


def main() -> None:
    torch.set_num_threads(1)
    kept: list[Chain] = []

    def with_chain(part: Callable[[Chain, Bench], Values], bench: Bench) -> Values:
        if not kept:
            kept.append(Chain())
        return part(kept[0], bench)

    parts = {"loss": measure_loss, "training": measure_training, "text": measure_text}
    run_parts(__doc__, {"codec": measure_codec, **{name: partial(with_chain, part) for name, part in parts.items()}})


if __name__ == "__main__":
    main()
