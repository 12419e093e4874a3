"""Rows with a label: which labels there are, and each row as it would be with any of them. Pure.

A label is scored by the log-likelihood of its tokens after the row's text, as lm-evaluation-harness does for multiple
choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from peers.records import DIGEST_BYTES
from swarm.errors import BadData

if TYPE_CHECKING:
    from swarm.data.stream import Sample

MAX_LABELS = 64
NO_LABEL = -1
_NO_LOSS = -100


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Labelled:
    """The labels of a set of samples, ordered by name: `ids` has the tokens of each, int32, and `end` those that end an
    answer. `classes` int32 [N] says which label each sample has, -1 for samples without one. Samples have at most
    `longest` tokens.
    """

    names: tuple[str, ...]
    ids: tuple[NDArray[np.int32], ...]
    end: NDArray[np.int32]
    classes: NDArray[np.int32]
    longest: int

    @property
    def room(self) -> int:
        """Tokens of a row's text that fit before any label."""
        return self.longest - max(len(each) for each in self.ids) - len(self.end)

    def head(self, count: int) -> Labelled:
        """Of the first `count` samples."""
        return replace(self, classes=self.classes[:count])

    def digest(self, run: str) -> bytes:
        """Names these labels to other trainers of the run, in DIGEST_BYTES bytes."""
        digest = hashlib.sha256(run.encode())
        for name in self.names:
            digest.update(b"\0" + name.encode())
        return digest.digest()[:DIGEST_BYTES]


def labelled_of(
    labels: Sequence[str | None], ids_by_name: Mapping[str, NDArray[np.int32]], end: Sequence[int], longest: int
) -> Labelled | None:
    """What is known of samples with these labels (None: without), of all labels in `ids_by_name`; None where no sample
    has one.
    """
    if not any(label is not None for label in labels):
        return None
    names = tuple(sorted(ids_by_name))
    places = {name: place for place, name in enumerate(names)}
    return Labelled(
        names=names,
        ids=tuple(ids_by_name[name] for name in names),
        end=np.asarray(end, dtype=np.int32),
        classes=np.asarray([NO_LABEL if label is None else places[label] for label in labels], dtype=np.int32),
        longest=longest,
    )


def check_labels(labelled: Labelled) -> None:
    """Refuse labels among which nothing can be chosen.

    Raises:
        BadData: there is one or too many, they are too long, or two of them are the same to the model.
    """
    names = labelled.names
    if len(names) < 2:
        raise BadData(f"all rows have the label '{names[0][:40]}'; name the others with --label")
    if len(names) > MAX_LABELS:
        raise BadData(f"the rows have {len(names)} labels, at most {MAX_LABELS} can be told apart; group them")
    if labelled.room < 1:
        raise BadData(f"a label leaves no room for text in {labelled.longest} tokens; use shorter ones")
    for one, other in combinations(range(len(names)), 2):
        if np.array_equal(labelled.ids[one], labelled.ids[other]):
            pair = f"'{names[one][:40]}' and '{names[other][:40]}'"
            raise BadData(f"the labels {pair} are the same tokens to this model; rename one")


def with_label(sample: Sample, label: int, labelled: Labelled) -> Sample:
    """A labelled sample's text with this label behind it; its loss is on the label and its end."""
    num_text = int(np.argmax(sample.labels != _NO_LOSS))
    text = sample.input_ids[max(0, num_text - labelled.room) : num_text]
    answer = np.concatenate([labelled.ids[label], labelled.end])
    no_loss = np.full(len(text), _NO_LOSS, dtype=np.int32)
    return type(sample)(np.concatenate([text, answer]), np.concatenate([no_loss, answer]))
