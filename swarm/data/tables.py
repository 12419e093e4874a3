"""Rows from tables: parquet files, objects of the package datasets, and data sets of the Hugging Face hub.

What a row may be is for data_rows.py. pyarrow and datasets are imported when they are needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from swarm.data.hub_names import parse_hub
from swarm.data.rows import MAX_ROW_BYTES, Digest, Row, row_of
from swarm.errors import BadData

_MAX_ROWS = 50_000_000  # a stream may have no end
_BATCH_ROWS = 256
_CHUNK_BYTES = 1 << 20
_INSTALL = "pip install 'swarmtune[data]'"


def read_parquet(path: Path, digest: Digest) -> Iterator[Row]:
    """The rows of a .parquet file, some hundred in memory at a time.

    Raises:
        BadData: it cannot be read, is no parquet, or a row lacks the expected fields.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise BadData(f"{path} is parquet, and pyarrow is not installed; {_INSTALL}") from None
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        with pq.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield _checked(f"{path} row {number}", value)
    except OSError as error:
        raise BadData(f"{path} cannot be read ({error.strerror or _line(error)}); check the path") from None
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise BadData(f"{path} is no whole parquet file ({_line(error)}); write it again") from None


def read_dataset(dataset: object, digest: Digest, name: str = "the data set") -> Iterator[Row]:
    """The rows of a `datasets.Dataset`, an `IterableDataset`, or anything that gives mappings of fields.

    Raises:
        BadData: it gives no rows, has several splits, never ends, or a row lacks the expected fields.
    """
    if isinstance(dataset, Mapping):  # a DatasetDict is one
        splits = ", ".join(sorted(str(key)[:40] for key in dataset)[:8])
        raise BadData(f"{name} has the splits {splits}; choose one, such as data['train']")
    if not isinstance(dataset, Iterable):
        raise BadData(f"a {type(dataset).__name__} is no data; use files, a datasets.Dataset or hf:OWNER/NAME")
    number = 0
    for number, value in enumerate(dataset, start=1):
        if number > _MAX_ROWS:
            raise BadData(f"{name} has more than {_MAX_ROWS} rows, or no end; take a part of it, take(N)")
        row = _checked(f"{name} row {number}", value)
        digest.update(json.dumps(value, sort_keys=True, default=str).encode())
        yield row
    if not number:
        raise BadData(f"{name} has no rows; give one with text in it")


def read_hub(text: str, digest: Digest) -> Iterator[Row]:
    """The rows of `hf:OWNER/NAME` or `hf:OWNER/NAME:SPLIT` (train), through the package datasets and its cache.

    Raises:
        BadData: there is no such data set or split, the hub is out of reach, or a row lacks the expected fields.
    """
    name, split = parse_hub(text)
    try:
        import datasets
    except ImportError:
        raise BadData(f"{text} is on the hub, and the package datasets is not installed; {_INSTALL}") from None
    try:
        loaded = datasets.load_dataset(name, split=split)
    except datasets.exceptions.DatasetNotFoundError:
        raise BadData(f"the hub has no data set '{name}' for you; check the name, or log in") from None
    except (ConnectionError, OSError) as error:
        raise BadData(f"{text} cannot be fetched ({_line(error)}); check the network") from None
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise BadData(f"{text} cannot be read ({_line(error)}); check its split and its configuration") from None
    yield from read_dataset(loaded, digest, text)


def _checked(where: str, value: object) -> Row:
    size = sum(len(field) for field in value.values() if isinstance(field, str)) if isinstance(value, Mapping) else 0
    if size > MAX_ROW_BYTES:
        raise BadData(f"{where}: longer than {MAX_ROW_BYTES >> 20} MB; split it")
    return row_of(where, value)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
