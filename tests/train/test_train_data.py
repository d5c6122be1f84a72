"""Files to rows: what is read, where documents end, which labels count, and what is refused in one line."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_training import ByteTokenizer, tiny_data, write_corpus

from moekit.config import DataConfig
from moekit.errors import DataError, FileError, MissingExtraError
from moekit.train import Rows, TrainingData, prepare
from moekit.train import data as data_module
from moekit.train.data import IGNORED, find_files, tokenise

TOKENIZER = ByteTokenizer()


def rows_of(tmp_path: Path, documents: list[str], length: int = 8, seed: int = 0) -> Rows:
    source = tmp_path / "source"
    source.mkdir()
    for number, text in enumerate(documents):
        (source / f"{number:03}.txt").write_text(text)
    return Rows(tokenise(find_files([str(source)]), TOKENIZER, tmp_path / "cache"), length, seed)


def expected_pairs(documents: list[str]) -> Counter[tuple[int, int, int]]:
    """(document, place in it, label) of every token but each document's first."""
    pairs: Counter[tuple[int, int, int]] = Counter()
    for number, text in enumerate(documents):
        ids = [*text.encode(), 256]
        pairs.update((number, place, ids[place]) for place in range(1, len(ids)))
    return pairs


@pytest.mark.parametrize("length", [1, 3, 8, 29, 500])
def test_every_token_but_a_first_is_a_label_once(tmp_path: Path, length: int) -> None:
    documents = ["hello", "a", "the longer one of them", "end"]
    rows = rows_of(tmp_path, documents, length)
    flat = [(d, p, t) for d, text in enumerate(documents) for p, t in enumerate([*text.encode(), 256])]
    found: Counter[tuple[int, int, int]] = Counter()
    for row in range(len(rows)):
        batch = rows.take([row])
        start = min(row * rows.sequence_length, len(flat) - 1 - rows.sequence_length)
        for place, (token, label) in enumerate(zip(batch.input_ids_BL[0], batch.labels_BL[0], strict=True)):
            assert token == flat[start + place][2]
            if label != IGNORED:
                assert label == flat[start + place + 1][2]
                found[flat[start + place + 1]] += 1
    assert found == expected_pairs(documents)


def test_document_ids_change_exactly_after_eos(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, ["ab", "cde", "f" * 40], length=12)
    first = rows.take([0])
    assert first.document_ids_BL is not None
    assert first.document_ids_BL[0].tolist() == [0] * 3 + [1] * 4 + [2] * 5
    assert first.labels_BL[0, 2] == first.labels_BL[0, 6] == IGNORED
    assert rows.take([2]).document_ids_BL is None


def test_eos_inside_a_text_does_not_cut_it(tmp_path: Path) -> None:
    class Confused(ByteTokenizer):
        eos_ids = (ord("e"),)

    (tmp_path / "a.txt").write_text("seen here")
    rows = Rows(tokenise([tmp_path / "a.txt"], Confused(), tmp_path / "cache"), 6)
    assert rows.num_documents == 1
    assert rows.take([0]).document_ids_BL is None


def test_batches_are_a_function_of_seed_and_number(tmp_path: Path) -> None:
    data, again = tiny_data(tmp_path).train, tiny_data(tmp_path).train
    late = data.batch(31, 4).input_ids_BL
    for number in range(31):
        again.batch(number, 4)
    assert torch.equal(again.batch(31, 4).input_ids_BL, late)
    assert not torch.equal(tiny_data(tmp_path, seed=1).train.batch(31, 4).input_ids_BL, late)


def test_an_epoch_has_every_row_once_and_each_has_its_own_order(tmp_path: Path) -> None:
    rows = tiny_data(tmp_path).train
    epochs = [
        [tuple(rows.batch(e * len(rows) + i, 1).input_ids_BL[0].tolist()) for i in range(len(rows))] for e in (0, 1)
    ]
    in_order = [tuple(batch.input_ids_BL[0].tolist()) for batch in rows.in_order(1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(in_order)
    assert epochs[0] != epochs[1]
    assert epochs[0] != in_order


def test_a_file_in_pieces_is_one_document_with_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"line {n} – ünïcode\n" for n in range(50))
    (tmp_path / "a.md").write_text(text)
    monkeypatch.setattr(data_module, "PIECE", 40)
    rows = Rows(tokenise([tmp_path / "a.md"], TOKENIZER, tmp_path / "cache"), 10_000)
    assert rows.num_documents == 1
    assert rows.take([0]).input_ids_BL[0].tolist() == list(text.encode())


def test_jsonl_and_parquet_and_text_say_the_same(tmp_path: Path) -> None:
    texts = ["first", "second, longer", "ünï"]
    pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t, "n": 1}) + "\n\n" for t in texts))
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "a.parquet")
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    kinds = [["a.jsonl"], ["a.parquet"], ["0.txt", "1.txt", "2.txt"]]
    prints = {
        Rows(tokenise([tmp_path / name for name in names], TOKENIZER, tmp_path / "cache", "body"), 4).fingerprint
        for names in kinds
    }
    assert len(prints) == 1


def test_tokens_are_cached_until_a_file_or_the_tokenizer_changes(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some text")
    calls = []

    class Counting(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            calls.append(text)
            return super().encode(text)

    def times_read() -> int:
        calls.clear()
        tokenise([file], Counting(), tmp_path / "cache")
        return calls.count("some text") + calls.count("more text")

    assert [times_read(), times_read()] == [1, 0]
    file.write_text("more text")
    assert times_read() == 1

    class Shifted(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return [(byte + 1) % 256 for byte in text.encode()]

    rows = Rows(tokenise([file], Shifted(), tmp_path / "cache"), 100)
    assert rows.take([0]).input_ids_BL[0, 0] == ord("m") + 1


def test_an_interrupted_tokenising_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 50)
    (tmp_path / "b.txt").write_bytes(b"fine\nbad \xff\xfe\n")
    with pytest.raises(FileError, match=r"b\.txt, line 2: not UTF-8"):
        tokenise([tmp_path / "a.txt", tmp_path / "b.txt"], TOKENIZER, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", "", DataError, r"a\.txt: no text"),
        ("a.txt", "  \n\n", DataError, "no text"),
        ("a.jsonl", '{"text": "ok"}\n{"text": \n', FileError, r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"body": "ok"}\n', DataError, r"line 1: no text under 'text' \(it has body\)"),
        ("a.jsonl", '["ok"]\n', DataError, "line 1: no text under 'text'"),
        ("a.jsonl", '{"text": 3}\n', DataError, "line 1: no text under 'text'"),
        ("a.csv", "text\nok\n", FileError, "not a kind of file"),
        ("a.parquet", "PAR1 but not really", FileError, r"cannot read .*a\.parquet"),
    ],
)
def test_bad_files_in_one_line(tmp_path: Path, name: str, content: str, error: type[Exception], message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message) as caught:
        prepare(DataConfig(train=(str(tmp_path / name),)), TOKENIZER, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_nothing_named_and_nothing_matched(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape("--data.train")):
        prepare(DataConfig(), TOKENIZER, tmp_path)
    for pattern in (str(tmp_path), str(tmp_path / "*.txt"), str(tmp_path / "gone.txt")):
        with pytest.raises(FileError, match="no such file"):
            find_files([pattern])


def test_held_out_files_never_overlap(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", 3)
    (tmp_path / "link.txt").symlink_to(corpus / "01.txt")
    config = DataConfig(train=(str(corpus / "*.txt"),), valid=(str(tmp_path / "link.txt"),))
    with pytest.raises(DataError, match=r"01\.txt is both"):
        prepare(config, TOKENIZER, tmp_path / "cache")


def test_globs_folders_and_files_are_each_read_once(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus" / "deep", 3)
    (corpus / "ignored.csv").write_text("x")
    patterns = [str(tmp_path / "corpus"), str(tmp_path / "**" / "*.txt"), str(corpus / "00.txt")]
    assert [path.name for path in find_files(patterns)] == ["00.txt", "01.txt", "02.txt"]


def test_parquet_without_datasets_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"moekit\[train\]"):
        tokenise([tmp_path / "a.parquet"], TOKENIZER, tmp_path / "cache")


def test_one_token_is_not_enough(tmp_path: Path) -> None:
    class Silent(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return []

    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="no text"):
        tokenise([tmp_path / "a.txt"], Silent(), tmp_path / "cache")


def test_data_fixture_is_training_data(data: TrainingData) -> None:
    assert data.valid is None
    assert data.train.num_documents == 24
