"""A routing trace: which experts each token of some texts took, in a safetensors file of rows.

Written row by row, so that memory does not grow with the text, and checked in full when it is read: the file may come
from anywhere. It knows nothing of what is counted. Shapes: T tokens of a row, M MoE layers, K experts a token.

The file has `{row}.tokens` int32 (T,) and `{row}.experts` int16 (T, M, K) for rows 0, 1, …, and notes in JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moekit.errors import ConfigError, FormatError, UnsupportedError
from moekit.files import file_errors, parse_json
from moekit.models.safetensors_file import SafetensorsFile, write_safetensors
from moekit.moe import Routing

__all__ = ["MAX_ROW", "RoutingTrace", "TraceHead", "TraceRow", "TraceWriter", "row_of"]

MAX_ROW = 1024
"""Tokens of a row at most."""
_NOTES = "moekit_trace"
_MAX_TEXTS = 256
_MAX_PAIRS = 1 << 27  # M · E², what counting the pairs of experts takes


@dataclass(frozen=True)
class TraceHead:
    """What holds for all rows.

    Attributes:
        layers: the numbers of the MoE layers.
        num_experts: E.
        texts: their names.
        facts: what is to be said of the model; text and whole numbers.
    Raises:
        ConfigError: two texts of one name, no text or more than 256, a name or fact that cannot be printed.
        UnsupportedError: too many experts to count every pair of.
    """

    layers: tuple[int, ...]
    num_experts: int
    texts: tuple[str, ...]
    facts: Mapping[str, str | int]

    def __post_init__(self) -> None:
        said = [*self.texts, *self.facts, *(value for value in self.facts.values() if isinstance(value, str))]
        if not all(word.isprintable() and 0 < len(word) <= 200 for word in said):
            raise ConfigError("names of texts and facts must have 1 to 200 characters that can be printed")
        if len(set(self.texts)) < len(self.texts) or not 1 <= len(self.texts) <= _MAX_TEXTS:
            raise ConfigError(f"the texts must have different names, and be 1 to {_MAX_TEXTS}")
        if len(self.layers) * self.num_experts**2 > _MAX_PAIRS:
            raise UnsupportedError(
                f"{self.num_experts} experts in {len(self.layers)} layers have too many pairs to count"
            )


@dataclass(frozen=True, eq=False)
class TraceRow:
    """Tokens that went through the model together.

    Attributes:
        text: the number of the text they are of.
        tokens_T: int32.
        experts_TMK: int16, the experts of each token, the router's first choice first; −1 where there were fewer.
    """

    text: int
    tokens_T: Tensor
    experts_TMK: Tensor


def row_of(text: int, tokens: Sequence[int], routings: Sequence[Routing]) -> TraceRow:
    """The row of one pass over `tokens`: one routing an MoE layer, of any router."""
    found = [_per_token(routing) for routing in routings]
    width = max(ids_TK.shape[1] for ids_TK in found)
    padded = [torch.nn.functional.pad(ids_TK, (0, width - ids_TK.shape[1]), value=-1) for ids_TK in found]
    return TraceRow(text, torch.tensor(tokens, dtype=torch.int32), torch.stack(padded, dim=1).to("cpu", torch.int16))


def _per_token(routing: Routing) -> Tensor:
    """(T, K) ids, filled up with −1."""
    if routing.top_k is not None:
        return routing.expert_ids_TK
    counts_T = torch.bincount(routing.token_ids_A, minlength=routing.num_tokens)
    return pad_sequence(routing.expert_ids_A.split(counts_T.tolist()), batch_first=True, padding_value=-1)


class TraceWriter:
    """Writes a trace; the file is there when `finish` has returned, and not before.

    Rows wait in a nameless file beside it, because a safetensors file begins with the list of all that follows.

    Args:
        path: the file.
    Raises:
        FileError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._texts: list[int] = []
        self._places: dict[str, tuple[int, Tensor]] = {}  # where each tensor lies, and an empty one of its kind
        with file_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._rows = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115, __exit__ closes it

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._rows.close()

    def add(self, row: TraceRow) -> None:
        """Append a row."""
        number = len(self._texts)
        self._texts.append(row.text)
        for name, tensor in ((f"{number}.tokens", row.tokens_T), (f"{number}.experts", row.experts_TMK)):
            with file_errors(self.path):
                self._places[name] = self._rows.tell(), torch.empty_like(tensor, device="meta")
                self._rows.write(tensor.contiguous().numpy().tobytes())
                self._rows.write(bytes(-self._rows.tell() % 8))

    def finish(self, head: TraceHead, pieces: Mapping[int, str]) -> None:
        """Write the file, whole or not at all; `pieces` has the text of every token id."""
        notes = {
            "layers": head.layers,
            "num_experts": head.num_experts,
            "texts": head.texts,
            "facts": dict(head.facts),
            "rows": self._texts,
            "pieces": {str(token): piece for token, piece in pieces.items()},
        }
        with file_errors(self.path):
            self._rows.flush()
            mapped = mmap.mmap(self._rows.fileno(), 0, access=mmap.ACCESS_COPY)
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        tensors = {
            name: whole[start : start + kind.nbytes].view(kind.dtype).view(kind.shape)
            for name, (start, kind) in self._places.items()
        }
        write_safetensors(self.path, tensors, metadata={_NOTES: json.dumps(notes)})


class RoutingTrace:
    """A trace that was saved.

    Args:
        path: the file.
    Raises:
        FileError: it cannot be read.
        FormatError: it is no trace, or contradicts itself.

    Attributes:
        head: what holds for all rows.
        pieces: the text of every token id.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = SafetensorsFile(path)
        if _NOTES not in self._file.metadata:
            raise FormatError(
                f"{path} is not a routing trace: moekit inspect MODEL --text FILE --save-trace writes one"
            )
        notes = parse_json(self._file.metadata[_NOTES].encode(errors="replace"), f"{path}: the notes")
        try:
            self.head = _head(notes)
            self._texts = _numbers(notes["rows"], len(self.head.texts))
            self.pieces = {int(token): _text(piece) for token, piece in notes["pieces"].items()}
        except (AttributeError, KeyError, TypeError, ValueError, UnsupportedError) as error:
            raise FormatError(
                f"{path}: the notes of a routing trace are wrong ({type(error).__name__}: {error})"
            ) from None
        if set(self._texts) != set(range(len(self.head.texts))):
            raise FormatError(f"{path}: a text of the trace has no rows")
        self._check_tensors()

    def rows(self) -> Iterator[TraceRow]:
        """The rows, one in memory at a time, in the order written.

        Raises:
            FileError, FormatError: what is read now is not as it should be.
        """
        for number, text in enumerate(self._texts):
            tokens_T, experts_TMK = self._file.read(f"{number}.tokens"), self._file.read(f"{number}.experts")
            if not set(tokens_T.tolist()) <= self.pieces.keys():
                raise FormatError(f"{self._file.path}: row {number} has tokens without a text")
            if not _makes_sense(experts_TMK, self.head.num_experts):
                raise FormatError(f"{self._file.path}: row {number} has experts that cannot be")
            yield TraceRow(text, tokens_T, experts_TMK)

    def _check_tensors(self) -> None:
        stored, names = self._file.tensors, [f"{row}.{part}" for row in range(len(self._texts)) for part in _PARTS]
        if set(stored) != set(names):
            raise FormatError(
                f"{self._file.path}: it has {len(stored)} tensors, and {len(self._texts)} rows need other ones"
            )
        for row in range(len(self._texts)):
            tokens, experts = stored[f"{row}.tokens"], stored[f"{row}.experts"]
            kinds = tokens.dtype == torch.int32 and experts.dtype == torch.int16
            if not kinds or len(tokens.shape) != 1 or len(experts.shape) != 3 or not 1 <= tokens.shape[0] <= MAX_ROW:
                raise FormatError(f"{self._file.path}: row {row} has other dtypes or shapes than a trace")
            if experts.shape[:2] != (*tokens.shape, len(self.head.layers)) or experts.shape[2] > self.head.num_experts:
                raise FormatError(
                    f"{self._file.path}: row {row} has experts of shape {experts.shape}, not of its tokens"
                )


_PARTS = ("tokens", "experts")


def _head(notes: Mapping[str, Any]) -> TraceHead:
    """The head in the notes: KeyError, TypeError, ValueError or UnsupportedError where there is none."""
    layers = _numbers(notes["layers"], 1 << 31)
    if not layers or any(later <= earlier for earlier, later in pairwise(layers)):
        raise ValueError("layers must ascend")
    (num_experts,) = _numbers([notes["num_experts"]], 1 << 15)
    if num_experts == 0:
        raise ValueError("there must be experts")
    facts = {_text(name): _fact(value) for name, value in notes["facts"].items()}
    return TraceHead(tuple(layers), num_experts, tuple(map(_text, notes["texts"])), facts)


def _numbers(values: Any, limit: int) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < limit for value in values):
        raise ValueError(f"these must be whole numbers below {limit}")
    return values


def _fact(value: Any) -> str | int:
    return _numbers([value], 1 << 63)[0] if type(value) is int else _text(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where text should be")
    return value


def _makes_sense(experts_TMK: Tensor, num_experts: int) -> bool:
    """Ids from −1 to E − 1, none twice for one token in one layer."""
    ordered_TMK = experts_TMK.sort(dim=-1).values
    twice = (ordered_TMK[..., 1:] == ordered_TMK[..., :-1]) & (ordered_TMK[..., 1:] >= 0)
    return bool((experts_TMK >= -1).all() and (experts_TMK < num_experts).all() and not twice.any())
