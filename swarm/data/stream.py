"""Training data as token ids: load files once, shuffle by seed and epoch, cut into microbatches, remember where.

Start at `load_samples`. Reading is in rows.py and tables.py, tokens and loss masks in encoding.py.
Legend: B rows of a microbatch, T tokens of its longest row.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from swarm.data.encoding import Encoded, Tokenizer, answer_end, encode_row, label_ids
from swarm.data.hub_names import HUB_PREFIX, parse_hub
from swarm.data.labelled import Labelled, labelled_of
from swarm.data.rows import Digest, LabelRow, Row, TextRow, read_rows
from swarm.data.tables import read_dataset, read_hub
from swarm.errors import BadCheckpoint, BadData

logger = logging.getLogger(__name__)

NO_LOSS = -100
_MAX_POSITION = 2**53


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One row: `input_ids` and `labels`, int32 [T]; labels are the same ids, or -100 where there is no loss.

    Labels stand at their own token; the loss shifts them by one, so the first token is never learnt.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]

    @property
    def num_label_tokens(self) -> int:
        """Tokens that the loss counts, after the shift."""
        return int(np.count_nonzero(self.labels[1:] != NO_LOSS))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SampleSet:
    """All samples of some files, in flat arrays. `fingerprint` names the files' bytes and how they were cut.

    `num_skipped` rows had no token to learn from; `num_cut` were longer than the sequence length. `labelled` says which
    have a label; None where none has.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    fingerprint: str
    num_skipped: int = 0
    num_cut: int = 0
    labelled: Labelled | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sample:
        start, end = self.offsets[index], self.offsets[index + 1]
        return Sample(self.ids[start:end], self.labels[start:end])

    def head(self, count: int) -> SampleSet:
        """The first `count` samples, or all where there are fewer; a set of its own, by its fingerprint."""
        count = min(count, len(self))
        end = self.offsets[count]
        return SampleSet(
            ids=self.ids[:end],
            labels=self.labels[:end],
            offsets=self.offsets[: count + 1],
            fingerprint=f"{self.fingerprint[:40]}-{count}",
            labelled=None if self.labelled is None else self.labelled.head(count),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPosition:
    """Where a trainer stands: `index` samples of `epoch` are done, in data named by `fingerprint`."""

    epoch: int = 0
    index: int = 0
    fingerprint: str = ""

    def to_plain(self) -> dict[str, int | str]:
        """For JSON or msgpack; `parse_position` reverses it."""
        return {"epoch": self.epoch, "index": self.index, "fingerprint": self.fingerprint}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Microbatch:
    """Rows padded on the right: ids and labels int64 [B, T], mask int64 [B, T] with 1 for real tokens."""

    input_ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    labels_BT: torch.Tensor
    num_label_tokens: int

    @property
    def num_samples(self) -> int:
        """Rows."""
        return self.input_ids_BT.shape[0]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch:
    """The samples of one optimizer step, and where the data stands once they are trained."""

    samples: tuple[Sample, ...]
    after: DataPosition


class DataStream:
    """Endless batches, shuffled anew each epoch by `seed`: the same seed and position give the same batches.

    A batch may reach into the next epoch, so every batch has `batch_size` samples.

    Raises:
        BadData: batch_size is not positive.
    """

    def __init__(self, samples: SampleSet, batch_size: int, seed: int, position: DataPosition | None = None) -> None:
        if batch_size < 1:
            raise BadData(f"batch_size is {batch_size}; use 1 or more")
        self._samples = samples
        self._batch_size = batch_size
        self._seed = seed
        self._position = resume_position(position or DataPosition(), samples)
        self._order = _order(len(samples), seed, self._position.epoch)

    @property
    def position(self) -> DataPosition:
        """Where the next batch begins."""
        return self._position

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        epoch, index = self._position.epoch, self._position.index
        chosen: list[Sample] = []
        while len(chosen) < self._batch_size:
            if index == len(self._samples):
                epoch, index = epoch + 1, 0
                self._order = _order(len(self._samples), self._seed, epoch)
            chosen.append(self._samples[int(self._order[index])])
            index += 1
        self._position = DataPosition(epoch=epoch, index=index, fingerprint=self._samples.fingerprint)
        return Batch(samples=tuple(chosen), after=self._position)


def load_samples(
    sources: Sequence[object], tokenizer: Tokenizer, sequence_length: int, labels: Iterable[str] = ()
) -> SampleSet:
    """Read, tokenize and cut all rows of `sources`; only token ids stay in memory. `labels` may be chosen besides those
    that rows have.

    A source is the path of a .jsonl, .parquet or .txt file, `hf:OWNER/NAME` with `:SPLIT` or without, or an object of
    the package datasets.

    Raises:
        BadData: no sources, a bad one or a bad row, or nothing to learn from in any of them.
    """
    if not sources:
        raise BadData("no data files were given; use --data FILE")
    for source in sources:
        if _is_of_hub(source):  # said before the first one is read, which may take long
            parse_hub(str(source))
    digest = hashlib.sha256(f"{sequence_length}".encode())
    rows = (row for source in sources for row in _rows(source, digest))
    names = ", ".join(str(each) if isinstance(each, (str, Path)) else type(each).__name__ for each in sources[:3])
    # The digest is complete only once all rows have been read.
    samples = _collect(rows, tokenizer, sequence_length, labels)
    if samples.labelled is None and set(labels):
        raise BadData(f"{names}: labels are named, and no row has one; give rows the field 'label'")
    return _checked(replace(samples, fingerprint=digest.hexdigest()[:32]), names)


def _rows(source: object, digest: Digest) -> Iterator[Row]:
    if not isinstance(source, (str, Path)):
        return read_dataset(source, digest)
    if _is_of_hub(source):
        return read_hub(str(source), digest)
    return read_rows(Path(source), digest)


def _is_of_hub(source: object) -> bool:
    return isinstance(source, (str, Path)) and str(source).startswith(HUB_PREFIX)


def samples_from_text(texts: Iterable[str], tokenizer: Tokenizer, sequence_length: int) -> SampleSet:
    """The samples of some running text, packed into full sequences; for demos and tests.

    Raises:
        BadData: there is nothing in it.
    """
    digest = hashlib.sha256(f"{sequence_length}".encode())
    rows: list[Row] = []
    for number, text in enumerate(texts, start=1):
        digest.update(text.encode())
        rows.append(TextRow(where=f"text {number}", text=text, packed=True))
    samples = _collect(rows, tokenizer, sequence_length)
    return _checked(replace(samples, fingerprint=digest.hexdigest()[:32]), "the text")


def split_microbatches(
    samples: Sequence[Sample], token_budget: int, *, first_budget: int | None = None
) -> list[Microbatch]:
    """Cut a batch into microbatches of at most `token_budget` padded tokens (or one row) of similar length.

    The same samples give the same cut. Long rows come first, so that a lack of memory shows at once. `first_budget`
    is for the first one (None: as the others).
    """
    groups = group_by_length([len(sample.input_ids) for sample in samples], token_budget, first_budget)
    return [pad_right([samples[index] for index in group]) for group in groups]


def group_by_length(lengths: Sequence[int], token_budget: int, first_budget: int | None = None) -> list[list[int]]:
    """Which rows of these lengths go into which microbatch; see split_microbatches."""
    by_length = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    groups: list[list[int]] = []
    for index in by_length:
        longest = lengths[groups[-1][0]] if groups else 0
        budget = first_budget if len(groups) == 1 and first_budget is not None else token_budget
        if groups and (len(groups[-1]) + 1) * longest <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def pad_right(samples: Sequence[Sample]) -> Microbatch:
    """Samples as one microbatch, padded to the longest; padding has mask 0 and no loss."""
    num_rows, longest = len(samples), max(len(sample.input_ids) for sample in samples)
    input_ids_BT = np.zeros((num_rows, longest), dtype=np.int64)
    mask_BT = np.zeros((num_rows, longest), dtype=np.int64)
    labels_BT = np.full((num_rows, longest), NO_LOSS, dtype=np.int64)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids_BT[row, :length] = sample.input_ids
        mask_BT[row, :length] = 1
        labels_BT[row, :length] = sample.labels
    return Microbatch(
        input_ids_BT=torch.from_numpy(input_ids_BT),
        mask_BT=torch.from_numpy(mask_BT),
        labels_BT=torch.from_numpy(labels_BT),
        num_label_tokens=sum(sample.num_label_tokens for sample in samples),
    )


def parse_position(value: object) -> DataPosition:
    """A position as it was saved.

    Raises:
        BadCheckpoint: it is not one.
    """
    match value:
        case {"epoch": int(epoch), "index": int(index), "fingerprint": str(fingerprint)} if (
            0 <= epoch < _MAX_POSITION and 0 <= index < _MAX_POSITION and len(fingerprint) <= 64
        ):
            return DataPosition(epoch=epoch, index=index, fingerprint=fingerprint)
    raise BadCheckpoint("the saved data position is malformed; remove it to start the data from its beginning")


def resume_position(position: DataPosition, samples: SampleSet) -> DataPosition:
    """`position` if it was taken in this data; the beginning, with a warning, if the data has changed since."""
    start = DataPosition(fingerprint=samples.fingerprint)
    if not position.fingerprint:
        return start
    if position.fingerprint != samples.fingerprint or position.index > len(samples):
        logger.warning("the data files have changed since the last start; training begins at their first sample again")
        return start
    return position


def _order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # Raw bits of a bit generator are stable between numpy versions; its `permutation` is not promised to be.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    return np.argsort(bits, kind="stable")


class _Collector:
    """Gathers encoded rows into flat arrays, cutting, packing and counting."""

    def __init__(self, sequence_length: int) -> None:
        self._sequence_length = sequence_length
        self._ids: list[NDArray[np.int32]] = []
        self._labels: list[NDArray[np.int32]] = []
        self._lengths: list[int] = [0]
        self._pending: list[NDArray[np.int32]] = []
        self._num_pending = 0
        self.names: list[str | None] = []
        """The label of each sample."""
        self.num_skipped = 0
        self.num_cut = 0

    def add(self, encoded: Encoded) -> None:
        """One row, cut to the sequence length; skipped and counted if nothing is left to learn."""
        self.num_cut += len(encoded.ids) > self._sequence_length
        ids, learn = encoded.ids[: self._sequence_length], encoded.learn[: self._sequence_length]
        if not learn[1:].any():
            self.num_skipped += 1
            return
        self._ids.append(ids)
        self._labels.append(np.where(learn, ids, np.int32(NO_LOSS)))
        self._lengths.append(len(ids))
        self.names.append(None)

    def add_labelled(self, encoded: Encoded, name: str) -> None:
        """A row whose label stands at its end, so that it is cut at its beginning."""
        length, num_before = self._sequence_length, len(self.names)
        self.num_cut += len(encoded.ids) > length
        self.add(Encoded(encoded.ids[-length:], encoded.learn[-length:]))
        self.names[num_before:] = [name] * (len(self.names) - num_before)

    def pack(self, ids: NDArray[np.int32]) -> None:
        """Running text: joined with what came before into full sequences."""
        self._pending.append(ids)
        self._num_pending += len(ids)
        if self._num_pending >= self._sequence_length:
            self._flush(keep_rest=True)

    def finish(self) -> SampleSet:
        """All of it, without a name."""
        self._flush(keep_rest=False)
        return SampleSet(
            ids=np.concatenate([np.zeros(0, np.int32), *self._ids]),
            labels=np.concatenate([np.zeros(0, np.int32), *self._labels]),
            offsets=np.cumsum(self._lengths, dtype=np.int64),
            fingerprint="",
            num_skipped=self.num_skipped,
            num_cut=self.num_cut,
        )

    def _flush(self, *, keep_rest: bool) -> None:
        if not self._pending:
            return
        ids, length = np.concatenate(self._pending), self._sequence_length
        num_full = len(ids) // length if keep_rest else -(-len(ids) // length)
        for number in range(num_full):
            piece = ids[number * length : (number + 1) * length]
            self.add(Encoded(piece, np.ones(len(piece), dtype=np.bool_)))
        rest = ids[num_full * length :]
        self._pending, self._num_pending = [rest], len(rest)


def _collect(rows: Iterable[Row], tokenizer: Tokenizer, sequence_length: int, labels: Iterable[str] = ()) -> SampleSet:
    collector = _Collector(sequence_length)
    names = {label.strip() for label in labels}
    for row in rows:
        encoded = encode_row(row, tokenizer)
        if isinstance(row, TextRow) and row.packed:
            collector.pack(encoded.ids)
        elif isinstance(row, LabelRow):
            names.add(row.label)
            collector.add_labelled(encoded, row.label)
        else:
            collector.add(encoded)
    ids = {name: label_ids(name, tokenizer) for name in names}
    samples = collector.finish()
    return replace(samples, labelled=labelled_of(collector.names, ids, answer_end(tokenizer), sequence_length))


def _checked(samples: SampleSet, names: str) -> SampleSet:
    if not len(samples):
        raise BadData(f"{names}: none of {samples.num_skipped} rows has a token to learn from; check the answers' text")
    if samples.num_skipped:
        logger.warning("rows without a token to learn from were skipped: num=%d files=%s", samples.num_skipped, names)
    return samples
