"""Data files become samples with the loss in the right places; bad ones are named by file and line."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data import rows as data_rows
from swarm.data.demo_text import demo_text, pydoc_samples
from swarm.data.encoding import Encoded, encode_row
from swarm.data.stream import (
    NO_LOSS,
    DataPosition,
    DataStream,
    Sample,
    SampleSet,
    load_samples,
    parse_position,
    samples_from_text,
    split_microbatches,
)
from swarm.errors import BadCheckpoint, BadData

EOS = 3


class LetterTokenizer:
    """One token a character, `|` ends a turn; its template writes `role:content|` and a line break."""

    eos_token: str | None = "|"
    eos_token_id: int | None = EOS
    chat_template: object = "python"
    is_fast = True

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, return_offsets_mapping: bool = False
    ) -> Mapping[str, object]:
        ids = [EOS if letter == "|" else ord(letter) % 30000 + 10 for letter in text]
        return {"input_ids": ids, "offset_mapping": [(at, at + 1) for at in range(len(ids))]}

    def apply_chat_template(
        self,
        conversation: list[Mapping[str, object]],
        *,
        tokenize: bool,
        add_generation_prompt: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
    ) -> object:
        turns = "".join(f"{one['role']}:{one['content']}|\n" for one in conversation)
        return turns + ("assistant:" if add_generation_prompt else "")


class ForgetfulTokenizer(LetterTokenizer):
    """Its template shortens earlier answers, so that a prefix rendered alone is no prefix of the whole."""

    def apply_chat_template(self, conversation: list[Mapping[str, object]], **kwargs: object) -> object:  # type: ignore[override]
        last = len(conversation) - 1
        return "".join(
            f"{one['role']}:{str(one['content']).split('#')[-1] if at < last else one['content']}|\n"
            for at, one in enumerate(conversation)
        )


class EndingTokenizer(LetterTokenizer):
    """Ends every text by itself, as some models' tokenizers do."""

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, return_offsets_mapping: bool = False
    ) -> Mapping[str, object]:
        ids = super().__call__(text)["input_ids"]
        assert isinstance(ids, list)
        return {"input_ids": [*ids, EOS] if add_special_tokens else ids}


def learnt_text(encoded: Encoded) -> str:
    return "".join(
        "|" if token == EOS else chr(token - 10)
        for token, learn in zip(encoded.ids, encoded.learn, strict=True)
        if learn
    )


def row_of(tmp_path: Path, value: object) -> data_rows.Row:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(value))
    (row,) = data_rows.read_rows(path)
    return row


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def three_samples(tmp_path: Path) -> SampleSet:
    return load_samples([write(tmp_path / "a.jsonl", *[{"text": "ab" * n} for n in (1, 2, 3)])], LetterTokenizer(), 64)


CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "yo?"},
    {"role": "assistant", "content": "yes"},
]


@pytest.mark.parametrize(
    ("row", "learnt"),
    [
        ({"text": "abc"}, "abc|"),
        ({"prompt": "q ", "completion": "a"}, "a|"),
        ({"messages": CHAT}, "yo|yes|"),
        ({"instruction": "add", "input": "1 1", "output": "two"}, "two|"),
        ({"instruction": "add", "output": "two"}, "two|"),
    ],
)
def test_the_loss_is_on_the_answer_only(tmp_path: Path, row: object, learnt: str) -> None:
    assert learnt_text(encode_row(row_of(tmp_path, row), LetterTokenizer())) == learnt


@pytest.mark.parametrize("row", [{"text": "abc"}, {"prompt": "q ", "completion": "a"}])
def test_a_text_ends_once(tmp_path: Path, row: object) -> None:
    parsed = row_of(tmp_path, row)
    assert encode_row(parsed, EndingTokenizer()).ids.tolist() == encode_row(parsed, LetterTokenizer()).ids.tolist()


def test_answers_are_found_without_offsets_too(tmp_path: Path) -> None:
    tokenizer = LetterTokenizer()
    tokenizer.is_fast = False
    row = row_of(tmp_path, {"messages": CHAT})
    encoded = encode_row(row, tokenizer)
    assert learnt_text(encoded) == "yo|yes|"
    assert np.array_equal(encoded.ids, encode_row(row, LetterTokenizer()).ids)


def test_answers_are_found_where_the_template_rewrites_earlier_turns(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "long#short"},
        {"role": "assistant", "content": "two"},
    ]
    row = row_of(tmp_path, {"messages": messages})
    assert learnt_text(encode_row(row, ForgetfulTokenizer())) == "one|two|"


def test_without_a_chat_template_instructions_still_work_and_messages_say_why_not(tmp_path: Path) -> None:
    tokenizer = LetterTokenizer()
    tokenizer.chat_template = None
    assert learnt_text(encode_row(row_of(tmp_path, {"instruction": "i", "output": "o"}), tokenizer)) == "o|"
    with pytest.raises(BadData, match="no chat template"):
        encode_row(row_of(tmp_path, {"messages": CHAT}), tokenizer)


def test_labels_are_the_ids_where_there_is_loss(tmp_path: Path) -> None:
    samples = load_samples([write(tmp_path / "a.jsonl", {"prompt": "q", "completion": "ab"})], LetterTokenizer(), 64)
    sample = samples[0]
    assert sample.labels.tolist() == [NO_LOSS, *sample.input_ids[1:].tolist()]
    assert sample.num_label_tokens == 3
    assert sample.input_ids.dtype == np.int32


def test_a_long_row_is_cut_and_one_without_an_answer_left_is_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "x" * 99}, {"prompt": "x" * 99, "completion": "y"}, {"text": ""})
    samples = load_samples([path], LetterTokenizer(), 10)
    assert [len(samples), samples.num_cut, samples.num_skipped] == [1, 2, 2]
    assert len(samples[0].input_ids) == 10


def test_text_files_are_packed_into_full_sequences(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\ufeffone\ntwo\n\n\n\nthree\n" * 5, "utf-8")
    samples = load_samples([path], LetterTokenizer(), 16)
    lengths = [len(samples[index].input_ids) for index in range(len(samples))]
    assert set(lengths[:-1]) == {16}
    assert sum(lengths) == len("one\ntwo\n\n" + "three\n\ufeffone\ntwo\n\n" * 4 + "three\n\n")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.txt", b"  \n", "no rows"),
        ("a.csv", b"a,b", r"none of \.jsonl, \.parquet and \.txt"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": 1, "b": 2}\n', r"a\.jsonl:2: has the fields 'b, txt', expected text;"),
        ("a.jsonl", b"{}\n", "'none'"),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b"[1]\n", "not a JSON object; write one on each line, with text;"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b'{"text": 3}\n', "field 'text' is a int"),
        ("a.jsonl", b'{"prompt": "q", "completion": null}\n', "completion"),
        ("a.jsonl", b'{"messages": []}\n', "list of 1 to"),
        ("a.jsonl", b'{"messages": [{"content": "x"}]}\n', "no 'role'"),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "content": [1]}]}\n', "no 'content' in text"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', "'assistant'"),
        ("a.jsonl", b'{"text": "a"}\n\xff\xfe\n', r"a\.jsonl:2: not UTF-8"),
        ("a.txt", b"\xff", r"a\.txt:1: not UTF-8"),
        ("a.jsonl", b'{"text": ""}\n', "token to learn from"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadData, match=words) as caught:
        load_samples([path], LetterTokenizer(), 64)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_huge_line_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_rows, "MAX_ROW_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * (1 << 20) + b'"}\n')
    with pytest.raises(BadData, match="longer than 1 MB"):
        load_samples([path], LetterTokenizer(), 64)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="--data"):
        load_samples([], LetterTokenizer(), 64)
    with pytest.raises(BadData, match="cannot be read"):
        load_samples([tmp_path / "no.jsonl"], LetterTokenizer(), 64)


def stream_ids(stream: DataStream, num_batches: int) -> list[list[int]]:
    return [[len(sample.input_ids) for sample in next(stream).samples] for _ in range(num_batches)]


def test_every_sample_comes_once_an_epoch(tmp_path: Path) -> None:
    samples = three_samples(tmp_path)
    lengths = [one for batch in stream_ids(DataStream(samples, 2, seed=5), 6) for one in batch]
    for epoch in range(4):
        assert sorted(lengths[3 * epoch : 3 * epoch + 3]) == [3, 5, 7]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(0, 9), st.integers(0, 2**31))
def test_a_restarted_stream_goes_on_where_it_stood(batch_size: int, num_before: int, seed: int) -> None:
    samples = samples_from_text(["abcdefghij" * 5], LetterTokenizer(), 5)
    whole = DataStream(samples, batch_size, seed)
    for _ in range(num_before):
        next(whole)
    saved = json.loads(json.dumps(whole.position.to_plain()))
    again = DataStream(samples, batch_size, seed, parse_position(saved))
    for _ in range(3):
        first, second = next(whole), next(again)
        assert [one.input_ids.tolist() for one in first.samples] == [one.input_ids.tolist() for one in second.samples]
        assert first.after == second.after


def test_seeds_and_epochs_shuffle_differently() -> None:
    samples = samples_from_text(["".join(chr(65 + n % 60) for n in range(400))], LetterTokenizer(), 8)
    orders = [
        [next(stream).samples[0].input_ids[0] for _ in range(100)]
        for stream in (DataStream(samples, 1, 1), DataStream(samples, 1, 1), DataStream(samples, 1, 2))
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:50] != orders[0][50:]


def test_changed_data_is_noticed_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = three_samples(tmp_path)
    position = DataPosition(epoch=1, index=2, fingerprint=before.fingerprint)
    assert DataStream(before, 1, 0, position).position == position
    after = load_samples([write(tmp_path / "a.jsonl", {"text": "other"})], LetterTokenizer(), 64)
    assert after.fingerprint != before.fingerprint
    assert DataStream(after, 1, 0, position).position == DataPosition(fingerprint=after.fingerprint)
    assert "changed" in caplog.text


@pytest.mark.parametrize(
    "value", [None, 3, {}, {"epoch": -1, "index": 0, "fingerprint": ""}, {"epoch": "0", "index": 0}]
)
def test_a_malformed_position_is_refused(value: object) -> None:
    with pytest.raises(BadCheckpoint):
        parse_position(value)


def make_sample(length: int, token: int) -> Sample:
    ids = np.full(length, token, dtype=np.int32)
    return Sample(ids, ids.copy())


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(1, 200))
def test_microbatches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    samples = [make_sample(length, token) for token, length in enumerate(lengths, start=1)]
    cut = split_microbatches(samples, budget)
    seen = sorted(int(row[0]) for one in cut for row in one.input_ids_BT)
    assert seen == list(range(1, len(lengths) + 1))
    for one in cut:
        assert one.input_ids_BT.numel() <= budget or one.num_samples == 1
        assert one.mask_BT.sum() == sum(lengths[int(row[0]) - 1] for row in one.input_ids_BT)
        assert one.num_label_tokens == int((one.labels_BT[:, 1:] != NO_LOSS).sum())
        assert bool(((one.mask_BT == 1) | (one.labels_BT == NO_LOSS)).all())
    assert sum(one.num_label_tokens for one in cut) == sum(lengths) - len(lengths)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(1, 200), st.integers(1, 200))
def test_the_first_microbatch_has_a_budget_of_its_own(lengths: list[int], budget: int, first: int) -> None:
    samples = [make_sample(length, token) for token, length in enumerate(lengths, start=1)]
    cut = split_microbatches(samples, budget, first_budget=first)
    seen = sorted(int(row[0]) for one in cut for row in one.input_ids_BT)
    assert seen == list(range(1, len(lengths) + 1))
    for one, most in zip(cut, [first, *[budget] * len(cut)], strict=False):
        assert one.input_ids_BT.numel() <= most or one.num_samples == 1


def test_rows_are_padded_on_the_right() -> None:
    (one,) = split_microbatches([make_sample(2, 7), make_sample(3, 8)], 100)
    assert one.input_ids_BT.tolist() == [[8, 8, 8], [7, 7, 0]]
    assert one.mask_BT.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert one.labels_BT.tolist() == [[8, 8, 8], [7, 7, NO_LOSS]]


def test_the_demo_text_is_split_by_topic() -> None:
    text = demo_text()
    assert not set(text.train) & set(text.held_out)
    assert sum(map(len, text.train)) > 4 * sum(map(len, text.held_out)) > 20_000
    train, held_out = pydoc_samples(LetterTokenizer(), 256)
    assert len(train) > len(held_out) > 10
