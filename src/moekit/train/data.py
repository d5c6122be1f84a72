"""Text files become rows of token ids: read, tokenise once into a memory-mapped file, cut, shuffle.

It knows files and tokens, not models. Everything streams, a line, a record or a MiB at a time. A batch is a
pure function of (seed, its number), so that a resumed run sees exactly what it would have seen.
Shapes: B rows, L tokens a row, N tokens in all.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moekit.config import DataConfig
from moekit.errors import DataError, FileError, MissingExtraError
from moekit.files import file_errors, replacing_folder

__all__ = [
    "IGNORED",
    "Batch",
    "Rows",
    "TextTokenizer",
    "TrainingData",
    "find_files",
    "prepare",
    "text_pieces",
    "tokenise",
]

IGNORED = -100
"""The label of a position that teaches nothing: the last token of a document."""

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
PIECE = 1 << 20  # characters a document is encoded in at a time
PROBE = "".join(map(chr, range(9, 0x3100))) + " the quick brown fox; 12345 += def __init__(self):\n\treturn 'don't'"
FORMAT = 1  # raise when the layout of a token file changes


class TextTokenizer(Protocol):
    """What tokenising needs: the ids of a text, the size of the vocabulary, and the ids that end a document."""

    @property
    def eos_ids(self) -> Sequence[int]: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs (B, L), labels (B, L; `IGNORED` where there is none), int64, and documents (B, L) int32.

    `document_ids_BL` is None when no row holds more than one document, which lets attention stay plain causal.
    """

    input_ids_BL: Tensor
    labels_BL: Tensor
    document_ids_BL: Tensor | None

    @property
    def num_labels(self) -> int:
        """How many positions teach something."""
        return int((self.labels_BL != IGNORED).sum())


class Rows:
    """A token file cut into rows of L + 1 tokens, each sharing its last token with the next row's first.

    Every token but a document's first is the label of exactly one position. The last row reaches back to
    be whole and ignores the labels it repeats; a corpus shorter than a row makes one row as long as itself.

    Args:
        folder: as written by `tokenise`.
        sequence_length: L.
        seed: of the order in which `batch` takes the rows.
    Raises:
        DataError: fewer than two tokens, so nothing can be predicted.
    """

    def __init__(self, folder: Path, sequence_length: int, seed: int = 0) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.fingerprint: str = meta["sha256"]
        self.num_tokens: int = meta["tokens"]
        if self.num_tokens < 2:
            raise DataError(f"the text has {self.num_tokens} token(s): nothing can be predicted from it")
        self._tokens_N = np.memmap(folder / "tokens.bin", dtype="<u4", mode="r", shape=(self.num_tokens,))
        self._starts = np.memmap(folder / "starts.bin", dtype="<u8", mode="r")
        self.sequence_length = min(sequence_length, self.num_tokens - 1)
        self.seed = seed

    def __len__(self) -> int:
        """Number of rows: ceil((N − 1) / L)."""
        return (self.num_tokens - 2) // self.sequence_length + 1

    @property
    def num_documents(self) -> int:
        return len(self._starts)

    def batch(self, index: int, batch_size: int) -> Batch:
        """Batch number `index` of an endless shuffled stream: every row once an epoch, in a new order each epoch."""
        places = range(index * batch_size, (index + 1) * batch_size)
        return self.take([self._shuffled(place) for place in places])

    def in_order(self, batch_size: int, max_rows: int | None = None) -> Iterator[Batch]:
        """All rows once, first to last, or `max_rows` of them at even distances."""
        count = min(len(self), max_rows or len(self))
        rows = [place * len(self) // count for place in range(count)]
        for first in range(0, count, batch_size):
            yield self.take(rows[first : first + batch_size])

    def take(self, rows: Iterable[int]) -> Batch:
        """The rows of these numbers, as one batch."""
        inputs, labels, documents = zip(*map(self._row, rows), strict=True)
        documents_BL = np.stack(documents)
        single = bool((documents_BL[:, :1] == documents_BL).all())
        return Batch(
            torch.from_numpy(np.stack(inputs)),
            torch.from_numpy(np.stack(labels)),
            None if single else torch.from_numpy(documents_BL),
        )

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        length = self.sequence_length
        wanted = row * length
        start = min(wanted, self.num_tokens - 1 - length)
        ids = self._tokens_N[start : start + length + 1].astype(np.int64)
        documents = np.searchsorted(self._starts, np.arange(start, start + length + 1, dtype=np.uint64), side="right")
        labels = np.where(documents[1:] == documents[:-1], ids[1:], IGNORED)
        labels[: wanted - start] = IGNORED
        return ids[:-1], labels, (documents[:-1] - documents[0]).astype(np.int32)

    def _shuffled(self, place: int) -> int:
        epoch, within = divmod(place, len(self))
        return int(_order(len(self), self.seed, epoch)[within])


@lru_cache(maxsize=4)
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    # Raw Philox words, because numpy promises their stream for ever and that of `permutation` it does not.
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(rows), kind="stable")


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Rows to learn from and, maybe, held-out rows to measure on."""

    train: Rows
    valid: Rows | None = None


def prepare(config: DataConfig, tokenizer: TextTokenizer, cache: Path) -> TrainingData:
    """Find, tokenise (or take from `cache`) and cut the training and the held-out text.

    Raises:
        DataError: no training file, no text in one, a file in both sets.
        FileError: a file that cannot be read, is not UTF-8, or holds a bad JSON line.
        MissingExtraError: a Parquet file without the `datasets` package.
    """
    if not config.train:
        raise DataError("no training text: name files, folders or globs with --data.train")
    train, valid = find_files(config.train), find_files(config.valid)
    both = set(train) & set(valid)
    if both:
        raise DataError(f"{min(both)} is both in data.train and in data.valid: held-out text must not be trained on")
    rows = Rows(tokenise(train, tokenizer, cache, config.text_field), config.sequence_length, config.seed)
    if not valid:
        return TrainingData(rows)
    return TrainingData(rows, Rows(tokenise(valid, tokenizer, cache, config.text_field), config.sequence_length))


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Real paths of all text files that the patterns (files, folders, globs with **) name, each once, sorted.

    Raises:
        FileError: a pattern that matches nothing, or a file of a kind that is not read.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = _matches(pattern)
        if not matches:
            raise FileError(f"{pattern}: no such file, or nothing in it that ends in {', '.join(SUFFIXES)}")
        found.update(path.resolve() for path in matches)
    return sorted(found)


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise FileError(f"{pattern}: not a kind of file that is read; choose from {', '.join(SUFFIXES)}")
        return [path]
    inside = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    return [one for one in inside if one.is_file() and one.suffix.lower() in SUFFIXES]


def tokenise(files: Sequence[Path], tokenizer: TextTokenizer, cache: Path, text_field: str = "text") -> Path:
    """Write the tokens of all documents, each followed by eos, to a folder of `cache`; returns that folder.

    The folder holds `tokens.bin` (little-endian uint32), `starts.bin` (uint64, where each document begins) and
    `meta.json`. It is named by the files' paths, sizes and times and by the tokenizer, and used again
    when all of those are the same.

    Raises:
        DataError: a file, or all of them, without text; a record without `text_field`.
        FileError: as `prepare` says.
    """
    key = _key(files, tokenizer, text_field)
    folder = cache / key
    if not (folder / "meta.json").is_file():
        with replacing_folder(folder, last="meta.json") as temporary:
            _write_tokens(files, tokenizer, temporary, text_field)
    return folder


def _key(files: Sequence[Path], tokenizer: TextTokenizer, text_field: str) -> str:
    # Tokenizers that agree on every character of many scripts, and on their sizes, are taken for the same.
    probed = (tokenizer.vocab_size, tuple(tokenizer.eos_ids), tokenizer.encode(PROBE))
    digest = hashlib.sha256(f"{FORMAT} {probed} {text_field}".encode())
    for path in files:
        with file_errors(path, "read"):
            stat = path.stat()
        digest.update(f"\0{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _write_tokens(files: Sequence[Path], tokenizer: TextTokenizer, folder: Path, text_field: str) -> None:
    if not tokenizer.eos_ids:
        raise DataError("the tokenizer has no end-of-text token, so documents cannot be kept apart")
    eos, digest, total = tokenizer.eos_ids[0], hashlib.sha256(), 0
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "starts.bin").open("wb") as starts:
        for path in files:
            for document in _documents(path, text_field):
                start = total
                for ids in _encoded(document, tokenizer):
                    total += len(ids)
                    _put(tokens, digest, ids)
                if total > start:
                    _put(tokens, digest, [eos])
                    total += 1
                    starts.write(np.uint64(start).astype("<u8").tobytes())
    if total == 0:
        raise DataError(f"{files[0] if len(files) == 1 else f'all {len(files)} files'}: no text to learn from")
    digest.update((folder / "starts.bin").read_bytes())
    (folder / "meta.json").write_text(json.dumps({"tokens": total, "sha256": digest.hexdigest()}))


def _encoded(document: Iterable[str], tokenizer: TextTokenizer) -> Iterator[list[int]]:
    for piece in document:
        if piece and not piece.isspace():
            yield tokenizer.encode(piece)


def _put(file: Any, digest: Any, ids: list[int]) -> None:
    raw = np.asarray(ids, dtype="<u4").tobytes()
    digest.update(raw)
    file.write(raw)


def _documents(path: Path, text_field: str) -> Iterator[Iterable[str]]:
    """The documents of one file, each in pieces that are encoded by themselves."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return ([text] for text in _parquet(path, text_field))
    if suffix == ".jsonl":
        return ([text] for text in _json_lines(path, text_field))
    return iter([text_pieces(path)])


def text_pieces(path: Path) -> Iterator[str]:
    """A text file in pieces of about a MiB, cut after a line, so that a file of any size fits."""
    lines: list[str] = []
    size = 0
    for line in _lines(path):
        lines.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)


def _lines(path: Path) -> Iterator[str]:
    with file_errors(path, "read"), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise FileError(f"{path}, line {number}: not UTF-8 text ({error.reason})") from None


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise FileError(f"{where}: not JSON ({error.msg})") from None
        yield _text(record, text_field, where)


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", extra="train") from None
    try:
        records = datasets.load_dataset("parquet", data_files=os.fspath(path), split="train", streaming=True)
        for number, record in enumerate(records, start=1):
            yield _text(record, text_field, f"{path}, row {number}")
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise FileError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _text(record: Any, text_field: str, where: str) -> str:
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        known = f"it has {', '.join(map(str, record))}" if isinstance(record, dict) else "it is no object"
        raise DataError(f"{where}: no text under {text_field!r} ({known}); choose another with --data.text-field")
    return text
