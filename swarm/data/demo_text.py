"""Real text that ships with Python, for demos and tests without a download: the language reference in pydoc_data."""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics

from swarm.data.encoding import Tokenizer
from swarm.data.stream import SampleSet, samples_from_text

_HELD_OUT_EVERY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoText:
    """Topics of the reference: every eighth, by name, is held out, so that no topic is in both parts."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def demo_text() -> DemoText:
    """The text of all topics, split."""
    names = sorted(topics)
    return DemoText(
        train=tuple(topics[name] for number, name in enumerate(names) if number % _HELD_OUT_EVERY),
        held_out=tuple(topics[name] for name in names[::_HELD_OUT_EVERY]),
    )


def pydoc_samples(tokenizer: Tokenizer, sequence_length: int) -> tuple[SampleSet, SampleSet]:
    """Training and held-out samples of `demo_text`, packed into sequences of `sequence_length` tokens."""
    text = demo_text()
    return (
        samples_from_text(text.train, tokenizer, sequence_length),
        samples_from_text(text.held_out, tokenizer, sequence_length),
    )
