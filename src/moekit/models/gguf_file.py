"""`GGUFFile`: the metadata and tensors of a GGUF file, every length in it checked before it is believed.

The header walk is ours because the `gguf` package's reader trusts the file: an array that claims 2⁶⁰ elements
keeps it busy for ever, and a small model's vocabulary takes it two seconds. The block formats are theirs
(`gguf.quants`). It knows nothing of models: names and numbers come out as they are stored.

Layout (version 2 and 3, little-endian): magic, version, tensor count, metadata count; metadata as
(key, type, value); tensor infos as (name, dimensions, type, offset); padding; data.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moekit.errors import FormatError, UnsupportedError, shown
from moekit.files import file_errors, open_regular

__all__ = ["GGUFFile", "GGUFTensor"]

_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_DTYPES = {kind: np.dtype(code) for kind, code in _SCALARS.items()}
_STRING, _ARRAY = 8, 9
_MAX_NESTING = 4
_MAX_HEADER = 1 << 26
_MAX_NAME = 64  # of a tensor, as ggml has it
_MAX_DIMENSIONS = 4
_CHUNK = 1 << 20
"""Elements that are dequantised at once: numpy's temporaries for them are ten times as large."""
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies and what it is.

    Attributes:
        name: as stored.
        shape: outermost dimension first, the order of numpy and torch (GGUF stores the reverse).
        kind: the block format's name, for example Q4_1 or F32.
        offset: first byte, from the start of the file.
        nbytes: bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


class GGUFFile:
    """A GGUF file whose header has been read and checked; tensors are read when asked for.

    Args:
        path: the file.
    Raises:
        FileError: it cannot be read.
        FormatError: it is no GGUF file, or contradicts itself.

    Attributes:
        metadata: keys to numbers, strings and lists; an array of numbers is a numpy array.
        tensors: names to `GGUFTensor`, in the order of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open_regular(path) as (file, size):
            if size < 24 or file.read(4) != b"GGUF":
                raise FormatError(f"{path} is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _Header(data, min(size, _MAX_HEADER), str(path))
                self.metadata, infos = header.read()
        self.tensors = _place(infos, _data_start(header.at, self.metadata, str(path)), size, str(path))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The tensor `name`, dequantised: float32 in its shape; beside it, some megabytes are in use. Of its first
        axis only `rows`, [first, last), where they are given.

        Raises:
            FormatError: there is no such tensor.
            UnsupportedError: nobody knows how to dequantise its kind.
        """
        from gguf import GGMLQuantizationType, quants

        if name not in self.tensors:
            raise FormatError(f"{self.path} has no tensor {shown(name)}")
        info = self.tensors[name]
        if len(info.shape) == 1 and rows is not None:
            return self.read(name)[slice(*rows)]  # its elements lie in blocks
        columns, kind = info.shape[-1], GGMLQuantizationType[info.kind]
        row_bytes = info.nbytes // math.prod(info.shape[:-1])
        first, last = rows or (0, info.shape[0])
        shape = (last - first, *info.shape[1:])
        count, skipped = math.prod(shape[:-1]), first * math.prod(info.shape[1:-1])
        at_once = max(1, _CHUNK // columns)
        whole = np.empty((count, columns), np.float32)
        try:
            with file_errors(self.path, "read"), self.path.open("rb") as file:
                file.seek(info.offset + skipped * row_bytes)
                for start in range(0, count, at_once):
                    part = whole[start : start + at_once]
                    data = np.frombuffer(file.read(len(part) * row_bytes), np.uint8)
                    if data.size != len(part) * row_bytes:
                        raise FormatError(f"{self.path} ends inside tensor {shown(name)}")
                    part[:] = quants.dequantize(data.reshape(len(part), row_bytes), kind)
        except NotImplementedError:
            raise UnsupportedError(
                f"{self.path}: tensor {shown(name)} is {info.kind}, which cannot be dequantised"
            ) from None
        return whole.reshape(shape)


class _Header:
    """A cursor over the header; no read passes `end`."""

    def __init__(self, data: mmap.mmap, end: int, source: str) -> None:
        self.data, self.end, self.source = data, end, source
        self.at = 4

    def read(self) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]]]:
        """(metadata, [(name, shape, type number, offset in the data)])."""
        version, tensors, pairs = self.u32(), self.u64(), self.u64()
        if version not in (2, 3):
            raise FormatError(f"{self.source}: GGUF version {version} is not known; versions 2 and 3 are")
        self.need(pairs * 13 + tensors * 24, "its metadata and tensors")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string("a metadata key")
            if key in metadata:
                raise FormatError(f"{self.source}: metadata key {shown(key)} occurs twice")
            metadata[key] = self.value(self.u32(), key, 0)
        return metadata, [self.tensor() for _ in range(tensors)]

    def need(self, count: int, what: str) -> None:
        if count > self.end - self.at:
            raise self.past_the_end(what)

    def past_the_end(self, what: str) -> FormatError:
        limit = "the file" if self.end < _MAX_HEADER else f"the {_MAX_HEADER >> 20} MiB that a header may have"
        return FormatError(f"{self.source}: {what} would end past the end of {limit}")

    def u32(self) -> int:
        self.need(4, "a number")
        self.at += 4
        return int(_U32.unpack_from(self.data, self.at - 4)[0])

    def u64(self) -> int:
        self.need(8, "a number")
        self.at += 8
        return int(_U64.unpack_from(self.data, self.at - 8)[0])

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        self.need(8 * count, what)
        texts, data, at, end, length_of = [], self.data, self.at, self.end - 8, _U64.unpack_from
        try:
            for _ in range(count):  # a vocabulary comes through here, so the loop is tight
                start = at + 8
                at = start + length_of(data, at)[0] if at <= end else end + 9
                if at > end + 8:
                    raise self.past_the_end(what)
                texts.append(data[start:at].decode())
        except UnicodeDecodeError:
            raise FormatError(f"{self.source}: {what} is not UTF-8 text") from None
        self.at = at
        return texts

    def numbers(self, kind: int, count: int, what: str) -> np.ndarray[Any, Any]:
        dtype = _DTYPES[kind]
        self.need(dtype.itemsize * count, what)
        start, self.at = self.at, self.at + dtype.itemsize * count
        return np.frombuffer(self.data[start : self.at], dtype)

    def value(self, kind: int, key: str, depth: int) -> Any:
        if kind in _DTYPES:
            return self.numbers(kind, 1, f"the value of {shown(key)}")[0].item()
        if kind == _STRING:
            return self.string(f"the value of {shown(key)}")
        if kind == _ARRAY:
            return self.array(self.u32(), self.u64(), key, depth + 1)
        raise FormatError(f"{self.source}: metadata key {shown(key)} has the unknown type {kind}")

    def array(self, kind: int, count: int, key: str, depth: int) -> Any:
        what = f"the array {shown(key)}"
        if kind in _DTYPES:
            return self.numbers(kind, count, what)
        if kind == _STRING:
            return self.strings(count, what)
        if depth > _MAX_NESTING or kind != _ARRAY:
            problem = f"arrays nested deeper than {_MAX_NESTING}" if kind == _ARRAY else f"the unknown type {kind}"
            raise FormatError(f"{self.source}: metadata key {shown(key)} has {problem}")
        self.need(12 * count, what)
        return [self.value(kind, key, depth) for _ in range(count)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("a tensor name")
        if len(name.encode()) > _MAX_NAME:
            raise FormatError(f"{self.source}: tensor {shown(name)} has a name of more than {_MAX_NAME} bytes")
        dimensions = self.u32()
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            problem = f"has {dimensions} dimensions, not 1 to {_MAX_DIMENSIONS}"
            raise FormatError(f"{self.source}: tensor {shown(name)} {problem}")
        shape = tuple(self.u64() for _ in range(dimensions))[::-1]
        return name, shape, self.u32(), self.u64()


def _data_start(header_end: int, metadata: dict[str, Any], source: str) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise FormatError(f"{source}: general.alignment must be a power of two of at least 8, not {shown(alignment)}")
    return -(-header_end // alignment) * alignment


def _place(
    infos: list[tuple[str, tuple[int, ...], int, int]], start: int, size: int, source: str
) -> dict[str, GGUFTensor]:
    """Check kinds and extents: inside the file, no name twice, no byte in two tensors."""
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise FormatError(f"{source}: tensor {shown(name)} occurs twice")
        tensors[name] = _tensor(name, shape, kind, start + offset, source)
        if tensors[name].offset + tensors[name].nbytes > size:
            raise FormatError(f"{source}: tensor {shown(name)} ends past the end of the file")
    ordered = sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes))
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise FormatError(f"{source}: tensors {shown(before.name)} and {shown(after.name)} overlap")
    return tensors


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int, source: str) -> GGUFTensor:
    if kind not in _block_formats():
        raise FormatError(f"{source}: tensor {shown(name)} has the unknown type {kind}")
    label, block, nbytes = _block_formats()[kind]
    if math.prod(shape) == 0 or shape[-1] % block:
        raise FormatError(
            f"{source}: tensor {shown(name)} of shape {list(shape)} does not divide into {label} blocks of {block}"
        )
    return GGUFTensor(name, shape, label, offset, math.prod(shape) // block * nbytes)


@cache
def _block_formats() -> dict[int, tuple[str, int, int]]:
    """Type numbers to (name, elements in a block, bytes of a block)."""
    from gguf import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *size) for kind, size in GGML_QUANT_SIZES.items()}
