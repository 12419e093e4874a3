"""A training job in words: each step, and each evaluation once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from swarm.options import Screen

if TYPE_CHECKING:
    from swarm.training.evaluation_sums import Evaluation
    from swarm.training.trainer import Progress


def progress_line(progress: Progress) -> str:
    """A trainer's progress in one line."""
    held_out = ""
    if progress.evaluation is not None:
        held_out = f", held out {progress.evaluation.loss:.4f}"
    if progress.swarm_evaluation is not None and progress.swarm_evaluation.peers > 1:
        held_out += f" ({progress.swarm_evaluation.loss:.4f} over {progress.swarm_evaluation.peers} trainers)"
    return (
        f"step {progress.step}, loss {progress.loss:.4f}{held_out}, {progress.tokens_per_second:.0f} tokens/s, "
        f"round {progress.round}, {progress.peers} hosts"
    )


def evaluation_line(evaluation: Evaluation) -> str:
    """What held-out rows gave, in one line."""
    over = f" over {evaluation.peers} trainers" if evaluation.peers > 1 else ""
    line = (
        f"round {evaluation.round}{over}: held-out loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.2f}"
    )
    scores = evaluation.scores
    if scores is None:
        return line
    line += f", accuracy {scores.accuracy:.1%} of {scores.rows}, F1 {scores.macro_f1:.3f}"
    return line if scores.auc is None else f"{line}, AUC {scores.auc:.3f} (within {scores.auc_error:.3f})"


class TrainingView:
    """Shows a training job: the step as it goes, and each evaluation once."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._shown: Evaluation | None = None
        self._shown_sum: Evaluation | None = None

    def show(self, progress: Progress) -> None:
        """Called after each step."""
        self._evaluated(progress.evaluation, progress.swarm_evaluation)
        self._screen.now(progress_line(progress))

    def finish(self, own: Sequence[Evaluation], summed: Sequence[Evaluation]) -> None:
        """The last evaluation comes after the last step."""
        self._evaluated(own[-1] if own else None, summed[-1] if summed else None)

    def _evaluated(self, own: Evaluation | None, summed: Evaluation | None) -> None:
        if own is not None and own != self._shown:
            self._shown = own
            self._screen.say(evaluation_line(own))
        if summed is not None and summed != self._shown_sum:
            self._shown_sum = summed
            if summed.peers > 1:  # of one alone it says the same
                self._screen.say(evaluation_line(summed))
