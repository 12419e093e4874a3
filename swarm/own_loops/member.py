"""A training loop of one's own as a member of a run: its adapter is averaged with the others' at the run's rounds.

The loop keeps its model, data, optimizer and evaluation. `member` is the plain form; hf_trainer.py and
lightning_callback.py put it into loops of libraries.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from blocks.checks import check_kind, check_number, check_whole
from peers.config import NetworkConfig
from swarm.api import CACHE, STATE, Target
from swarm.api import enter as enter_run
from swarm.errors import BadConfig
from swarm.own_loops.counting import Counter
from swarm.own_loops.held_out import HeldOut, ToldRun
from swarm.own_loops.step_gate import Stance, StepGate
from swarm.own_loops.taking_part import LoopState, OwnModel, TakingPart
from swarm.peer import Peer
from swarm.peer_config import PeerConfig

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)

_LONG_STEP_SECONDS = 5.0  # a longer step is not begun while a round's group forms, which would wait for its end
_NOTE_SECONDS = 0.1  # between two lines of metrics
_MOST_LOSS = 1e6
_LAST_SUMS_SECONDS = 10.0  # how long who leaves waits until its last sums are told and the others' have come


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a member ends: it first waits until the run has done round `last_round`, at most `seconds`.

    Raises:
        BadConfig: a value is of the wrong kind or out of range; the message names it.
    """

    last_round: int = 0
    seconds: float = 120.0

    def __post_init__(self) -> None:
        check_whole(BadConfig, "last_round", self.last_round, 0)
        check_number(BadConfig, "seconds", self.seconds, 0)


class Member:
    """One loop in a run, from `member` to `close`; a context manager. All methods belong in the loop's thread."""

    def __init__(self, peer: Peer, part: TakingPart, module: nn.Module, ending: Ending) -> None:
        self.peer = peer
        self._part, self._gate, self._ending = part, part.units.gate, ending
        self._counter = Counter(module)
        self.held_out = HeldOut(module, ToldRun(peer, part))
        """What the loop's evaluations give, for the callbacks of libraries."""
        self._hooks: list[RemovableHandle] = []
        self._steps = self._samples = self._tokens = 0
        self._began_at, self._noted_at = time.monotonic(), -math.inf
        self._loss, self._held_out = math.nan, math.nan
        self._is_alone = self._is_closed = False

    @property
    def round(self) -> int:
        """The newest round whose result is in the model; 0 before the first."""
        return self._part.units.round

    def begin(self, optimizer: Optimizer) -> None:
        """The loop is about to train: put the run's newest state into the model's adapter, in place of what is there,
        and follow `optimizer`.

        Raises:
            BadConfig: this member has left its run, or the run's rounds average what this optimizer does not have.
        """
        if self._is_closed:
            raise BadConfig("this member has left its run, as its training had ended; make a new one to train on")
        self._part.units.steps.check(optimizer)
        self._gate.rest()
        self.held_out.end()
        self.peer.loop.run(self._part.units.restart())
        self._part.units.steps.optimizer = optimizer
        for hook in self._hooks:
            hook.remove()
        self._hooks = [optimizer.register_step_pre_hook(self._before_step)]
        self._counter.take()
        self._began_at = time.monotonic()
        self._gate.train()

    def step(self, samples: int | None = None, tokens: int | None = None, *, loss: float | None = None) -> None:
        """The optimizer has made a step on so many samples and tokens with a label; a round that is due is done now.

        Where nothing is said, they are counted from the model's own forward passes in training. `loss` is the mean per
        token in nats, for those who look at the swarm.
        """
        counted = self._counter.take()
        samples = counted[0] if samples is None else samples
        tokens = counted[1] if tokens is None else tokens
        check_whole(BadConfig, "samples", samples, 0)
        check_whole(BadConfig, "tokens", tokens, 0)
        self.held_out.forget()
        self._steps += 1
        self._tokens += tokens
        if loss is not None:
            self.report(loss=loss)
        self._note_step(samples)
        if self._is_in_run():
            self.peer.loop.loop.call_soon_threadsafe(lambda: self._part.units.count(samples=samples, tokens=tokens))
        self._gate.train(self._should_wait)

    def report(
        self, *, loss: float | None = None, held_out: float | None = None, held_out_tokens: int | None = None
    ) -> None:
        """What the loop has measured: mean losses per token in nats, in training and on held-out text. With the number
        of held-out tokens, said within an evaluation, that is what it tells the run of it, whatever its forward passes
        gave.

        Raises:
            BadConfig: no evaluation is under way, or there is no held-out loss of so many tokens.
        """
        if held_out_tokens is not None:
            self.held_out.give(held_out, held_out_tokens)
        self._loss = self._loss if loss is None else float(loss)
        if held_out is not None:
            self._held_out = float(held_out)
            perplexity = math.exp(min(self._held_out, 50.0))
            self.peer.node.metrics.note(
                "evaluation", {"round": self.round, "loss": self._held_out, "perplexity": perplexity}
            )
        if not 0 <= self._loss <= _MOST_LOSS:
            return
        self._part.state = LoopState(
            loss=self._loss,
            step=self._steps,
            tokens_per_second=self._tokens_per_second(),
            held_out=self._held_out if 0 <= self._held_out <= _MOST_LOSS else None,
        )

    def begin_evaluation(self) -> None:
        """The loop does not train from here on, until `end_evaluation`: rounds may read the adapter, not change it."""
        if self._gate.stance == Stance.TRAINING:
            self._gate.read()
        self.held_out.begin()

    def end_evaluation(self) -> None:
        """The loop goes on to train, once a round that waited for this is done. Where the adapter was exactly that of
        a round, the run is told the loss that was measured, summed over tokens with a label.
        """
        self.held_out.end()
        if self._gate.stance == Stance.READING:
            self._gate.train()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Both in one, around an evaluation between two steps."""
        self.held_out.forget()
        self.begin_evaluation()
        try:
            yield
            self.held_out.take_set()
        finally:
            self.end_evaluation()

    def wait_for_round(self, number: int, *, seconds: float) -> bool:
        """Between two steps: until round `number` or a later one is in the model; False when `seconds` have passed."""
        before = self._gate.stance
        self._gate.rest()
        deadline = time.monotonic() + seconds
        while self.round < number and time.monotonic() < deadline and self._is_in_run():
            time.sleep(0.05)
        if before == Stance.TRAINING:
            self._gate.train()
        return self.round >= number

    def close(self) -> None:
        """Leave the run: wait for the last round, keep its state, end the network. Safe to call twice. The model keeps
        its adapter as it is then.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self.held_out.close()
        try:
            if self._is_in_run():
                self.peer.loop.run(self._part.evaluations.finish(_LAST_SUMS_SECONDS))
            if not self.wait_for_round(self._ending.last_round, seconds=self._ending.seconds):
                logger.warning(
                    "round %d was not done within %.0f s; this member leaves at round %d",
                    self._ending.last_round, self._ending.seconds, self.round,
                )  # fmt: skip
        finally:
            self._gate.rest()
            self._counter.close()
            for hook in self._hooks:
                hook.remove()
            self.peer.close()

    def __enter__(self) -> Member:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._ending = replace(self._ending, last_round=0)
        self.close()

    def _tokens_per_second(self) -> float:
        return self._tokens / max(1e-9, time.monotonic() - self._began_at)

    def _note_step(self, samples: int) -> None:
        self._samples += samples
        if time.monotonic() - self._noted_at < _NOTE_SECONDS:
            return
        self._noted_at = time.monotonic()
        values = {
            "step": self._steps,
            "samples": self._samples,
            "loss": self._loss,
            "tokens_per_second": round(self._tokens_per_second(), 1),
            "round": self.round,
        }
        self.peer.node.metrics.note("step", values)

    def _before_step(self, *_: object) -> None:
        """Of the optimizer, in the loop's thread."""
        if self._gate.stance != Stance.TRAINING:  # an evaluation of which nobody said that it is over
            self._gate.train()
        self._part.units.steps.adjust()

    def _should_wait(self) -> bool:
        return self._gate.step_seconds > _LONG_STEP_SECONDS and self._part.keeper.is_meeting and self._is_in_run()

    def _is_in_run(self) -> bool:
        """Whether the network side works; where it has failed training goes on alone, and the log says so once."""
        failure = self.peer.node.failure()
        if failure is not None and not self._is_alone:
            self._is_alone = True
            logger.error("this member is out of its run, and trains on alone: %s", failure)
        return failure is None


def member(
    model: nn.Module,
    optimizer: Optimizer,
    run: Target,
    *,
    host: str = "0.0.0.0",
    config: PeerConfig | None = None,
    ending: Ending | None = None,
) -> Member:
    """Take part in a run with a loop of one's own over `model`, the run's base model with its LoRA from peft.

    The adapter's values are replaced by the run's newest; after each step of `optimizer` call `step` of what this
    returns. `host` is the address to listen on: 127.0.0.1 for a swarm of this machine alone. `config` replaces it.

    Example: `with swarm.member(model, optimizer, "swarm1:…") as m: ...; optimizer.step(); m.step(samples, tokens)`

    Raises:
        BlockError: the model has not the run's LoRA, or is another model than the run's.
        SwarmError, PeerError: one line that says what is wrong and what to do.
    """
    check_kind(BadConfig, "optimizer", optimizer, Optimizer, "the torch.optim.Optimizer of this loop")
    joined = enter(model, run, host=host, config=config, ending=ending)
    try:
        joined.begin(optimizer)
    except BaseException:
        joined.peer.close()
        raise
    return joined


def enter(
    model: nn.Module,
    run: Target,
    *,
    host: str = "0.0.0.0",
    config: PeerConfig | None = None,
    ending: Ending | None = None,
) -> Member:
    """As `member`, for a loop whose optimizer is not made yet: call `begin` before the first step."""
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise BadConfig("this loop runs in several processes, and a member is one; start it without torchrun")
    check_kind(BadConfig, "model", model, nn.Module, "the run's base model with its LoRA from peft, a torch.nn.Module")
    check_kind(BadConfig, "ending", ending, (Ending, type(None)), "swarm.Ending(...), or leave it out")
    config = config or config_of(host)
    gate = StepGate()
    module = counted_module(model)
    peer = enter_run(run, config)
    try:
        own = OwnModel(
            module=model, gate=gate, cache_dir=config.cache_dir, local=config.model, nickname=config.nickname
        )
        return Member(peer, peer.loop.run(peer.node.take_part(own)), module, ending or Ending())
    except BaseException:
        peer.close()
        raise


def config_of(host: str) -> PeerConfig:
    """Of a member about which nothing more is said.

    Raises:
        BadNetworkConfig: `host` is no address.
    """
    return PeerConfig(state_root=STATE.expanduser(), cache_dir=CACHE.expanduser(), network=NetworkConfig(host=host))


def counted_module(model: nn.Module) -> nn.Module:
    """The outermost module that is given ids and labels: the model itself, or the one inside somebody's own."""
    from peft import PeftModel
    from transformers import PreTrainedModel

    found = (each for each in model.modules() if isinstance(each, (PeftModel, PreTrainedModel)))
    return next(found, model)
