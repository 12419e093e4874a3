"""Parquet files, objects of the package datasets and names of data sets give rows like any file; bad ones say why."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.data import tables as data_tables
from swarm.data.hub_names import parse_hub
from swarm.data.rows import ChatRow, PairRow, Row, TextRow, check_files
from swarm.data.stream import load_samples
from swarm.data.tables import read_dataset, read_hub
from swarm.errors import BadData
from tests.unit.swarm.test_data import LetterTokenizer

ROWS = [{"text": "one"}, {"text": "two words"}]


def digest() -> object:
    return hashlib.sha256()


def texts(rows: Iterator[Row]) -> list[str]:
    return [row.text for row in rows if isinstance(row, TextRow)]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    pa = pytest.importorskip("pyarrow", reason="needs the package pyarrow: pip install 'swarmtune[data]'")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_a_parquet_file_and_a_jsonl_file_of_the_same_rows_give_the_same_samples(parquet: Path, tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    one, other = (load_samples([path], LetterTokenizer(), 64) for path in (parquet, lines))
    assert len(one) == 2
    assert (one.ids == other.ids).all()
    assert (one.labels == other.labels).all()
    assert one.fingerprint != other.fingerprint, "other bytes"
    assert load_samples([str(parquet)], LetterTokenizer(), 64).fingerprint == one.fingerprint


@pytest.mark.parametrize("keep", [0, 3, -9])
def test_a_torn_parquet_file_is_named(parquet: Path, keep: int) -> None:
    parquet.write_bytes(parquet.read_bytes()[:keep])
    with pytest.raises(BadData, match=r"rows.parquet is no whole parquet file") as refused:
        load_samples([parquet], LetterTokenizer(), 64)
    assert "\n" not in str(refused.value)


def test_a_parquet_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(BadData, match=r"none.parquet cannot be read"):
        load_samples([tmp_path / "none.parquet"], LetterTokenizer(), 64)


def test_a_parquet_row_with_other_fields_is_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"words": "one"}]), tmp_path / "odd.parquet")
    with pytest.raises(BadData, match=r"odd.parquet row 1: has the fields 'words', expected text"):
        load_samples([tmp_path / "odd.parquet"], LetterTokenizer(), 64)


def test_objects_of_datasets_are_data() -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets: pip install 'swarmtune[data]'")
    whole = datasets.Dataset.from_list(ROWS)
    assert texts(read_dataset(whole, digest())) == ["one", "two words"]
    assert texts(read_dataset(whole.to_iterable_dataset(), digest())) == ["one", "two words"]
    chat = datasets.Dataset.from_list([{"messages": [{"role": "assistant", "content": "yes"}]}])
    assert isinstance(next(read_dataset(chat, digest())), ChatRow)
    with pytest.raises(BadData, match=r"has the splits test, train; choose one"):
        list(read_dataset(datasets.DatasetDict({"train": whole, "test": whole}), digest()))


def test_any_rows_are_data_and_their_words_are_their_fingerprint() -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    assert [type(row) for row in read_dataset(rows, digest())] == [PairRow]
    found = [load_samples([given], LetterTokenizer(), 64).fingerprint for given in (ROWS, list(ROWS), ROWS[:1])]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("given", "words"),
    [([], "has no rows"), (17, "a int is no data"), ([{"words": 1}], "row 1: has the fields"), ([3], "row 1: not a")],
)
def test_what_is_no_data_is_refused(given: object, words: str) -> None:
    with pytest.raises(BadData, match=words):
        list(read_dataset(given, digest()))


def test_a_stream_without_end_and_a_huge_row_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_tables, "_MAX_ROWS", 3)
    with pytest.raises(BadData, match="no end"):
        list(read_dataset(({"text": "again"} for _ in iter(int, 1)), digest()))
    monkeypatch.setattr(data_tables, "MAX_ROW_BYTES", 8)
    with pytest.raises(BadData, match="row 2: longer than"):
        list(read_dataset(ROWS, digest()))


def test_a_name_is_loaded_by_the_package_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "tales").mkdir()
    (tmp_path / "tales" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert texts(read_hub(f"hf:{tmp_path / 'tales'}", digest())) == ["one", "two words"]
    assert texts(read_hub(f"hf:{tmp_path / 'tales'}:train[:1]", digest())) == ["one"]
    with pytest.raises(BadData, match="check its split") as refused:
        list(read_hub(f"hf:{tmp_path / 'tales'}:nowhere", digest()))
    assert "\n" not in str(refused.value)


MALFORMED = (
    "hf:", "hf: x", "hf:a:b:c d", "hf::train", "hf:a/b/c", "hf:/a/b", "hf:a--b", "hf:a/..b", "hf:a/b-", "hf:.a",
    "hf:a/b.git", "hf:ä/b", "hf:../x", "hf:a b/c", f"hf:{'a' * 97}",
)  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_name_is_refused_before_anything_is_read_or_entered(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadData, match="names no data set; use hf:OWNER/NAME"):
        list(read_hub(text, digest()))
    with pytest.raises(BadData, match="names no data set; use hf:OWNER/NAME"):
        check_files([Path(text)])
    with pytest.raises(BadData, match="names no data set; use hf:OWNER/NAME"):
        load_samples([tmp_path / "missing.jsonl", text], LetterTokenizer(), 64)


def test_names_of_the_hub_are_taken_apart(tmp_path: Path) -> None:
    assert parse_hub("hf:imdb") == ("imdb", "train")
    assert parse_hub("hf:roneneldan/TinyStories:validation[:5%]") == ("roneneldan/TinyStories", "validation[:5%]")
    assert parse_hub("hf:a_b/c-d.e_1") == ("a_b/c-d.e_1", "train")
    assert parse_hub(f"hf:{tmp_path}") == (str(tmp_path), "train")
    check_files([Path("hf:owner/name:test")])


def test_a_name_that_the_hub_does_not_have_is_refused_in_one_line() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(BadData, match="nobody-here/nothing") as refused:
        load_samples(["hf:nobody-here/nothing"], LetterTokenizer(), 64)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("source", "package"), [("a.parquet", "pyarrow"), ("hf:owner/name", "datasets")])
def test_a_package_that_is_not_installed_is_named(
    source: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadData, match=rf"{package} is not installed; pip install 'swarmtune\[data\]'"):
        load_samples([source], LetterTokenizer(), 64)
