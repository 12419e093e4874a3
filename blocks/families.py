"""Try the cut on a tiny random model of a decoder family: spans and client against the whole model, in fp32.

The table of families is made by this (`swarm families`), not written by hand. B: batch, T: tokens, D: hidden size.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers import __version__ as transformers_version
from transformers.cache_utils import Cache

from blocks.adapters import LoraSettings
from blocks.client import RemoteCall
from blocks.compute import SpanCompute
from blocks.decoding.cache import SessionCaches
from blocks.errors import BlockError
from blocks.family_configs import VOCAB_SIZE, tiny_config
from blocks.load import load_client, load_span
from blocks.loading import loading
from blocks.part import whole_on_meta
from blocks.rng import forked_rng
from blocks.self_check import check_gradients
from blocks.source import ModelSource, find_model, refuse_unsupported
from blocks.spans import Span
from blocks.targets import has_experts

Outcome = Literal["works", "refused", "differs", "fails", "not tried"]

MAX_DIFFERENCE = 1e-4  # of logits of size one; most families differ by nothing at all
_MAX_WEIGHTS = 30_000_000
_CPU = torch.device("cpu")
_STEPS = ((0, 7), (7, 8), (8, 12), (5, 9), (9, 10))  # tokens of each decoding step; the fourth rolls back


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyResult:
    """What came of one family. `forward` and `decode` are the largest differences of logits from the whole model's."""

    family: str
    outcome: Outcome
    detail: str = ""
    experts: bool = False
    forward: float | None = None
    decode: float | None = None


def try_family(family: str) -> FamilyResult:
    """Build a tiny model of this family in a temporary directory, cut it in three, and compare."""
    reason = ""
    try:
        try:
            config = tiny_config(family)
        except Exception as error:  # a family's own config may raise anything about values that do not suit it
            reason = f"no tiny config: {_first_line(error)}"
            config = AutoConfig.for_model(family)  # as it is, to see whether it would be refused
        refuse_unsupported(config)
    except BlockError as error:
        return FamilyResult(family=family, outcome="refused", detail=str(error))
    except Exception as error:  # as above
        return FamilyResult(family=family, outcome="not tried", detail=f"no config: {_first_line(error)}")
    if reason:
        return FamilyResult(family=family, outcome="not tried", detail=reason)
    try:
        weights = sum(parameter.numel() for parameter in whole_on_meta(config).parameters())
    except Exception as error:  # as above
        return FamilyResult(family=family, outcome="not tried", detail=f"no tiny model: {_first_line(error)}")
    if weights > _MAX_WEIGHTS:
        return FamilyResult(family=family, outcome="not tried", detail=f"no tiny config: it has {weights} weights")
    with tempfile.TemporaryDirectory(prefix="family-") as directory:
        return _compare(family, config, Path(directory))


def _compare(family: str, config: PretrainedConfig, directory: Path) -> FamilyResult:
    experts = has_experts(config)
    try:
        whole = _save(config, directory)
        source = find_model(str(directory), cache_dir=directory)
        chain = _Chain(source)
        forward, decode = chain.forward_difference(whole), chain.decode_difference(whole)
        chain.check_gradients()
    except BlockError as error:
        return FamilyResult(family=family, outcome="refused", detail=str(error), experts=experts)
    except Exception as error:  # this is the question asked: what happens with this family's code
        return FamilyResult(family=family, outcome="fails", detail=_first_line(error), experts=experts)
    good = max(forward, decode) <= MAX_DIFFERENCE
    return FamilyResult(
        family=family, outcome="works" if good else "differs", experts=experts, forward=forward, decode=decode
    )


class _Output(Protocol):
    """What a transformers model gives, as far as it is used here."""

    logits: Tensor
    past_key_values: Cache


class _Chain:
    """Three spans of a model and its client's ends."""

    def __init__(self, source: ModelSource) -> None:
        last = source.num_blocks
        cuts = sorted({0, max(1, last // 3), max(1, last - 1), last})
        self.spans = [Span(start, end) for start, end in itertools.pairwise(cuts)]
        self.models = [load_span(source, span, dtype=torch.float32, device=_CPU) for span in self.spans]
        self.client = load_client(source, dtype=torch.float32, device=_CPU)

    @torch.no_grad()
    def forward_difference(self, whole: nn.Module) -> float:
        """Two rows, one with left padding, longer than sliding windows."""
        ids_BT, mask_BT = _batch()
        want = _run(whole, input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        self.client.remote = self._forward
        got = _run(self.client, input_ids=ids_BT, attention_mask=mask_BT).logits
        return _difference(got[mask_BT == 1], want[mask_BT == 1])

    @torch.no_grad()
    def decode_difference(self, whole: nn.Module) -> float:
        """Prefill, one token, several tokens, and going back over some, against the whole model without a cache."""
        ids_BT, mask_BT = _batch()
        sessions = [SessionCaches(model, 1 << 24) for model in self.models]
        for session, span in zip(sessions, self.spans, strict=True):
            session.open("one", span=span, batch=2, max_length=32, version="live")

        def remote(call: RemoteCall) -> Tensor:
            hidden_BTD = call.hidden_BTD
            for session in sessions:
                hidden_BTD = session.step(
                    "one",
                    hidden_BTD,
                    position=call.start,
                    mask_BT=call.mask_BT,
                    position_ids_BT=call.position_ids_BT,
                )
            return hidden_BTD

        self.client.remote = remote
        cache: Cache | None = None
        worst = 0.0
        for start, end in _STEPS:
            if cache is not None and cache.get_seq_length() > start:
                cache.crop(start - cache.get_seq_length())
            output = _run(
                self.client,
                input_ids=ids_BT[:, start:end],
                attention_mask=mask_BT[:, :end],
                use_cache=True,
                past_key_values=cache,
            )
            cache = output.past_key_values
            want = _run(whole, input_ids=ids_BT[:, :end], attention_mask=mask_BT[:, :end], use_cache=False).logits
            seen_BT = mask_BT[:, start:end] == 1
            worst = max(worst, _difference(output.logits[seen_BT], want[:, start:end][seen_BT]))
        return worst

    def check_gradients(self) -> None:
        """Attach a LoRA to each span, and compare its gradients with finite differences."""
        for model in self.models:
            check_gradients(SpanCompute(model, LoraSettings(rank=4, seed=1)))

    def _forward(self, call: RemoteCall) -> Tensor:
        hidden_BTD = call.hidden_BTD
        for model, span in zip(self.models, self.spans, strict=True):
            hidden_BTD = model.forward(
                hidden_BTD, span=span, mask_BT=call.mask_BT, position_ids_BT=call.position_ids_BT
            )
        return hidden_BTD


def _run(model: object, **given: object) -> _Output:
    return cast(_Output, cast(nn.Module, model)(**given))


def _save(config: PretrainedConfig, directory: Path) -> nn.Module:
    with loading(), forked_rng(7):
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        whole.save_pretrained(directory)
    return cast(nn.Module, whole)


def _batch() -> tuple[Tensor, Tensor]:
    ids_BT = torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0
    return ids_BT, mask_BT


def _difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def families_page(results: list[FamilyResult]) -> str:
    """The table as Markdown, docs/families.md."""
    lines = [
        "# Families",
        "",
        "Made by `swarm families --output docs/families.md`; not written by hand.",
        "",
        f"Each family of causal language models in transformers {transformers_version} was built tiny, with random",
        "weights, and cut in three spans and a client, in fp32 on the CPU. Compared with the whole model: logits of a",
        "padded batch (`forward`), and of a decoding session with a prefill, single and several tokens and a rollback",
        "(`decode`), of which the largest difference is given. Gradients by the input and by a LoRA were compared with",
        "finite differences.",
        "",
    ]
    for outcome in ("works", "refused", "differs", "fails", "not tried"):
        found = [result for result in results if result.outcome == outcome]
        if not found:
            continue
        lines += [f"## {outcome.capitalize()}: {len(found)}", ""]
        if outcome in ("works", "differs"):
            lines += ["| family | experts | forward | decode |", "| --- | --- | --- | --- |"]
            lines += [
                f"| {r.family} | {'yes' if r.experts else ''} | {r.forward:.1e} | {r.decode:.1e} |" for r in found
            ]
        else:
            lines += ["| family | why |", "| --- | --- |", *(f"| {r.family} | {r.detail} |" for r in found)]
        lines.append("")
    return "\n".join(lines)
