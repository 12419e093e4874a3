"""What `swarm train` says of held-out rows: its own each round, everybody's where there are others, each once."""

from __future__ import annotations

from swarm.training.evaluation_sums import Evaluation, Scores
from swarm.training.trainer import Progress
from swarm.training.view import TrainingView, evaluation_line, progress_line

SCORES = Scores(rows=40, accuracy=0.875, macro_f1=0.8666, auc=0.9512, auc_error=0.0041)
OWN = Evaluation(round=2, loss=2.0, tokens=10)
SUM = Evaluation(round=2, loss=2.5, tokens=30, peers=3, scores=SCORES)


class Lines:
    """A screen that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.last = ""

    def say(self, line: str) -> None:
        self.said.append(line)

    def now(self, line: str) -> None:
        self.last = line


def after(own: Evaluation | None, summed: Evaluation | None) -> Progress:
    return Progress(
        step=7, samples=28, loss=2.25, tokens_per_second=99.6, round=2, peers=4, evaluation=own, swarm_evaluation=summed
    )


def test_lines() -> None:
    assert evaluation_line(OWN) == "round 2: held-out loss 2.0000, perplexity 7.39"
    assert evaluation_line(SUM) == (
        "round 2 over 3 trainers: held-out loss 2.5000, perplexity 12.18, accuracy 87.5% of 40, F1 0.867, "
        "AUC 0.951 (within 0.004)"
    )
    one_sided = Evaluation(round=2, loss=2.0, tokens=10, scores=Scores(rows=1, accuracy=1.0, macro_f1=1.0, auc=None))
    assert evaluation_line(one_sided).endswith("accuracy 100.0% of 1, F1 1.000")
    assert progress_line(after(None, None)) == "step 7, loss 2.2500, 100 tokens/s, round 2, 4 hosts"
    assert progress_line(after(OWN, SUM)) == (
        "step 7, loss 2.2500, held out 2.0000 (2.5000 over 3 trainers), 100 tokens/s, round 2, 4 hosts"
    )
    assert "over" not in progress_line(after(OWN, OWN))


def test_each_evaluation_is_said_once() -> None:
    screen = Lines()
    view = TrainingView(screen)  # type: ignore[arg-type]
    for _ in range(2):
        view.show(after(OWN, None))
    view.show(after(OWN, OWN))  # of one trainer alone: it says the same
    view.show(after(OWN, SUM))
    view.finish([OWN], [OWN, SUM])
    assert screen.said == [evaluation_line(OWN), evaluation_line(SUM)]
    assert screen.last == progress_line(after(OWN, SUM))
    view.finish([], [])
    assert len(screen.said) == 2
