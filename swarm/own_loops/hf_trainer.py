"""A Hugging Face `Trainer`, or a class made from it such as TRL's `SFTTrainer`, as a member of a run: one callback."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from blocks.checks import refuse
from swarm.api import Target
from swarm.errors import BadConfig
from swarm.own_loops.member import Ending, Member, enter
from swarm.peer_config import PeerConfig

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class MemberCallback(TrainerCallback):  # type: ignore[misc]
    """Tells a member what its Trainer does. The member leaves the run at the end of training."""

    def __init__(self, member: Member, *, evaluate_rounds: bool = False) -> None:
        self._member, self._evaluate_rounds = member, evaluate_rounds
        self._passes = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        """The optimizer is there, and so are the weights of a checkpoint from which training goes on."""
        optimizer = inner_optimizer(given.get("optimizer"))
        if optimizer is None:
            raise BadConfig("this Trainer keeps its optimizer to itself; a member needs one of torch.optim")
        self._member.begin(optimizer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        """An evaluation before this step is over."""
        self._member.end_evaluation()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        """The optimizer has made a step, and a round that was due is done."""
        before = self._member.round
        self._member.step()
        self._passes = 0
        if self._evaluate_rounds and self._member.round > before:
            control.should_evaluate = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        """An evaluation is under way; this comes after each batch."""
        self._passes += 1
        self._member.begin_evaluation()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        """A set of held-out rows is through; there may be more of them."""
        passes, self._passes = self._passes, 0
        self._member.held_out.take_set(passes)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        """These rows were not for an evaluation."""
        self._member.held_out.forget()
        self._passes = 0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object) -> None:
        """What the Trainer has measured."""
        logs = given.get("logs")
        if isinstance(logs, dict):
            self._member.report(loss=_number(logs.get("loss")), held_out=_number(logs.get("eval_loss")))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        """Training is over; the model keeps its adapter."""
        self._member.close()


def attach(
    trainer: Trainer,
    run: Target,
    *,
    host: str = "0.0.0.0",
    config: PeerConfig | None = None,
    ending: Ending | None = None,
    evaluate_rounds: bool = False,
) -> Member:
    """Make a Trainer with a peft model a member of a run: `trainer.train()` then trains together with the others.

    The adapter starts from the run's newest state and is averaged by the run's rule at its rounds; all else is the
    Trainer's own. `host` and `config` are as in `swarm.member`. The member leaves the run when training ends.
    With `evaluate_rounds` the Trainer also evaluates after every round, so that the run is told of each round's adapter
    what these held-out rows give.

    Example: `swarm.attach(trainer, "swarm1:…"); trainer.train()`

    Raises:
        BlockError: the model has not the run's LoRA, or is another model than the run's.
        SwarmError, PeerError: one line that says what is wrong and what to do.
    """
    if not hasattr(trainer, "args"):
        refuse(BadConfig, "trainer", trainer, "a Trainer of transformers, or of a class made from it")
    if trainer.args.world_size > 1 or trainer.args.n_gpu > 1:
        raise BadConfig("this Trainer uses several processes or GPUs, and a member is one; show it one GPU only")
    model = trainer.model
    if not isinstance(model, nn.Module):
        raise BadConfig("this Trainer has no model yet; give it one, not model_init")
    if evaluate_rounds and trainer.eval_dataset is None:
        raise BadConfig("evaluate_rounds needs held-out rows, and this Trainer has none; give it eval_dataset")
    member = enter(model, run, host=host, config=config, ending=ending)
    trainer.add_callback(MemberCallback(member, evaluate_rounds=evaluate_rounds))
    return member


def inner_optimizer(found: object) -> Optimizer | None:
    """torch's own optimizer inside what accelerate makes of it."""
    while not type(found).__module__.startswith("torch") and isinstance(getattr(found, "optimizer", None), Optimizer):
        found = found.optimizer  # type: ignore[attr-defined]
    return found if isinstance(found, Optimizer) else None


def _number(found: object) -> float | None:
    return float(found) if isinstance(found, (int, float)) else None
