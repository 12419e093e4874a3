"""A loop of Lightning as a member of a run: one callback among those of its Trainer."""

from __future__ import annotations

from typing import Any

from blocks.checks import check_kind
from swarm.api import Target, resolve
from swarm.errors import BadConfig
from swarm.own_loops.member import Ending, Member, config_of, enter
from swarm.peer_config import PeerConfig

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise BadConfig("Lightning is not installed; pip install 'swarmtune[loops]'") from error


class SwarmCallback(Callback):  # type: ignore[misc]
    """Trains the peft model inside a LightningModule together with a run: `Trainer(callbacks=[SwarmCallback(run)])`.

    The adapter starts from the run's newest state and is averaged by the run's rule at its rounds; all else is the
    module's own. `host`, `config` and `ending` are as in `swarm.member`. It leaves the run when fitting ends. With
    `evaluate_rounds` it validates after every round as well, in epochs that validate at all.

    Raises:
        BadJoinString: `run` names no run.
        BadConfig, BadNetworkConfig: another argument is wrong.
    """

    def __init__(
        self,
        run: Target,
        *,
        host: str = "0.0.0.0",
        config: PeerConfig | None = None,
        ending: Ending | None = None,
        evaluate_rounds: bool = False,
    ) -> None:
        resolve(run)  # what can be known now is not said only after the data were made ready
        check_kind(BadConfig, "config", config, (PeerConfig, type(None)), "swarm.PeerConfig(...), or leave it out")
        check_kind(BadConfig, "ending", ending, (Ending, type(None)), "swarm.Ending(...), or leave it out")
        self._run, self._config, self._ending = run, config or config_of(host), ending
        self._steps, self._evaluate_rounds = 0, evaluate_rounds
        self._val_check_batch: int | float | None = None  # the Trainer's own, while another stands in its place
        self.member: Member | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Enter the run; the optimizer is there, and the weights are those of a checkpoint where there is one."""
        if trainer.world_size > 1:
            raise BadConfig("this Trainer runs in several processes, and a member is one; use devices=1")
        if len(trainer.optimizers) != 1:
            raise BadConfig(f"this module has {len(trainer.optimizers)} optimizers, and a member follows one; use one")
        self.member = enter(pl_module, self._run, config=self._config, ending=self._ending)
        self.member.begin(trainer.optimizers[0])
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Not every batch ends with a step of the optimizer."""
        if self.member is None or trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        before = self.member.round
        self.member.step(loss=None if loss is None else float(loss))
        if self._evaluate_rounds and self.member.round > before and self._val_check_batch is None:
            self._val_check_batch, trainer.val_check_batch = trainer.val_check_batch, 1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """No validation has come of it, as in an epoch without one."""
        self._put_back(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """The adapter stays as it is until validation ends."""
        self._put_back(trainer)
        if self.member is not None:
            self.member.held_out.forget()
            self.member.begin_evaluation()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Training goes on."""
        if self.member is not None:
            held_out = trainer.callback_metrics.get("val_loss")
            self.member.report(held_out=None if held_out is None else float(held_out))
            self.member.held_out.take_set()
            self.member.end_evaluation()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the run; the model keeps its adapter."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the run, without waiting for rounds."""
        if self.member is not None:
            self.member.__exit__(type(exception), exception, None)
            self.member = None

    def _put_back(self, trainer: Any) -> None:
        if self._val_check_batch is not None:
            trainer.val_check_batch, self._val_check_batch = self._val_check_batch, None

    def _close(self) -> None:
        if self.member is not None:
            self.member.close()
            self.member = None
