"""Rows with a label: how they are read, what is learnt of them, and how each looks with every label."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from swarm.data.labelled import MAX_LABELS, NO_LABEL, check_labels, with_label
from swarm.data.rows import ChatRow, LabelRow, PairRow, TextRow, row_of
from swarm.data.stream import NO_LOSS, SampleSet, load_samples
from swarm.errors import BadData
from tests.errors_page import met
from tests.unit.swarm.test_data import EOS, LetterTokenizer


def text_of(ids: object) -> str:
    return "".join("|" if token == EOS else chr(token - 10) for token in np.asarray(ids))


def load(path: Path, *rows: object, length: int = 64, labels: tuple[str, ...] = ()) -> SampleSet:
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_samples([file], LetterTokenizer(), length, labels)


@pytest.mark.parametrize(
    ("value", "row"),
    [
        ({"text": "good film \n", "label": " yes "}, LabelRow(where="x", text="good film", label="yes")),
        ({"prompt": "good?", "label": 3}, LabelRow(where="x", text="good?", label="3")),
        ({"text": "good", "label": None}, TextRow(where="x", text="good")),
        ({"prompt": "a", "completion": "b", "label": "c"}, PairRow(where="x", prompt="a", completion="b")),
    ],
)
def test_a_label_makes_a_text_a_row_to_classify(value: object, row: object) -> None:
    assert row_of("x", value) == row


def test_a_label_beside_a_conversation_is_none() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert isinstance(row_of("x", {"messages": messages, "label": "c"}), ChatRow)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"text": "a", "label": 0.5}, "x: field 'label' is a float; use a string, or a whole number"),
        ({"text": "a", "label": True}, "field 'label' is a bool"),
        ({"text": "a", "label": ["b"]}, "field 'label' is a list"),
        ({"text": " ", "label": "b"}, "x: the label, or the text before it, is empty"),
        ({"text": "a", "label": ""}, "x: the label, or the text before it, is empty"),
        ({"text": 5, "label": "b"}, "field 'text' is a int"),
    ],
)
def test_what_is_no_label_is_refused(value: object, reason: str) -> None:
    with pytest.raises(BadData, match=reason):
        row_of("x", value)


def test_the_loss_is_on_the_label_and_its_end(tmp_path: Path) -> None:
    samples = load(tmp_path, {"text": "is it?", "label": "yes"})
    assert text_of(samples[0].input_ids) == "is it? yes|"
    assert text_of(samples[0].labels[samples[0].labels != NO_LOSS]) == " yes|"


def test_a_long_text_loses_its_beginning(tmp_path: Path) -> None:
    samples = load(tmp_path, {"text": "abcdefgh", "label": "no"}, {"text": "abcdefgh"}, length=8)
    assert text_of(samples[0].input_ids) == "efgh no|"
    assert text_of(samples[1].input_ids) == "abcdefgh"
    assert samples.num_cut == 2
    assert samples.labelled is not None
    assert samples.labelled.classes.tolist() == [0, NO_LABEL]


def test_every_label_stands_behind_the_same_text(tmp_path: Path) -> None:
    rows = ({"text": "abcdefgh", "label": "no"}, {"text": "k", "label": "yes"}, {"text": "plain"})
    samples = load(tmp_path, *rows, length=10, labels=("perhaps", "no"))
    labelled = samples.labelled
    assert labelled is not None
    check_labels(labelled)
    assert labelled.names == ("no", "perhaps", "yes")
    assert labelled.classes.tolist() == [0, 2, NO_LABEL]
    choices = [with_label(samples[0], label, labelled) for label in range(3)]
    assert [text_of(choice.input_ids) for choice in choices] == ["h no|", "h perhaps|", "h yes|"]
    assert [choice.num_label_tokens for choice in choices] == [4, 9, 5]
    assert text_of(with_label(samples[1], 2, labelled).input_ids) == "k yes|"
    assert samples.head(1).labelled is not None
    assert samples.head(1).labelled.classes.tolist() == [0]  # type: ignore[union-attr]


def test_labels_are_named_to_others_by_all_of_them_and_the_run(tmp_path: Path) -> None:
    one = load(tmp_path, {"text": "a", "label": "no"}, {"text": "b", "label": "yes"}).labelled
    other = load(tmp_path, {"text": "c", "label": "yes"}, labels=("no",)).labelled
    more = load(tmp_path, {"text": "c", "label": "yes"}, labels=("no", "perhaps")).labelled
    assert one is not None
    assert other is not None
    assert more is not None
    assert one.digest("run") == other.digest("run") != one.digest("another run")
    assert one.digest("run") != more.digest("run")


class DeafTokenizer(LetterTokenizer):
    """Knows no letter from another."""

    def __call__(self, text: str, **kwargs: object) -> dict[str, object]:  # type: ignore[override]
        return {"input_ids": [11] * len(text)}


def test_labels_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    def refusal(*rows: object, length: int = 64) -> BadData:
        labelled = load(tmp_path, *rows, length=length).labelled
        assert labelled is not None
        with pytest.raises(BadData) as caught:
            check_labels(labelled)
        return caught.value

    yes, no = {"text": "a", "label": "yes"}, {"text": "a", "label": "no"}
    met("all rows have the label", refusal(yes, yes))
    met("leaves no room for text", refusal(yes, no, length=5))
    many = [{"text": "a", "label": number} for number in range(MAX_LABELS + 1)]
    met("can be told apart; group them", refusal(*many))
    alike = load_samples([tmp_path / "rows.jsonl"], DeafTokenizer(), 64).labelled
    assert alike is not None
    few = type(alike)(names=("1", "2"), ids=alike.ids[:2], end=alike.end, classes=alike.classes, longest=64)
    with pytest.raises(BadData, match="the labels '1' and '2'") as caught:
        check_labels(few)
    met("are the same tokens to this model", caught.value)


def test_labels_without_rows_that_have_one_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"rows.jsonl: labels are named, and no row has one; give rows the field 'label'"):
        load(tmp_path, {"text": "a"}, labels=("yes",))
    assert load(tmp_path, {"text": "a"}).labelled is None
