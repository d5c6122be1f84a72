"""`SafetensorsFile` reads one safetensors file tensor by tensor; `SafetensorsWriter` writes one the same way.

The header is checked in full before a byte of data is believed, and tensors go between file and memory one at a
time, so that neither direction ever holds a second copy of a model.

Layout: header length (8 bytes, little-endian), header (JSON: name to dtype, shape and [start, end) in the data), data.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from moekit.errors import FormatError, shown
from moekit.files import file_errors, open_regular, parse_json, replacing

__all__ = ["SafetensorsFile", "SafetensorsWriter", "StoredTensor", "write_safetensors"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000
_MAX_DIMENSIONS = 8
_MADV_POPULATE_READ = 22  # of linux/mman.h; Python has no name for it


@dataclass(frozen=True)
class StoredTensor:
    """dtype, shape, and [start, end) in bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """A safetensors file whose header has been read and checked.

    Args:
        path: the file.
    Raises:
        FileError: it cannot be read.
        FormatError: it contradicts itself; the message names the tensor.

    Attributes:
        tensors: names to `StoredTensor`, in the order of the data.
        metadata: the header's text-to-text notes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open_regular(path) as (file, size):
            header, data_start = _header(file.read(8), file, size, str(path))
        self.metadata: dict[str, str] = _metadata(header.pop("__metadata__", {}), str(path))
        found = {name: _tensor(name, entry, data_start, str(path)) for name, entry in header.items()}
        self.tensors = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].end)))
        _check_extents(self.tensors, data_start, size, str(path))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor `name`, in memory of its own, in its stored dtype and shape; of its first axis only `rows`,
        [first, last), where they are given."""
        if name not in self.tensors:
            raise FormatError(f"{self.path} has no tensor {name!r}")
        info = self.tensors[name]
        first, last = rows or (0, info.shape[0] if info.shape else 1)
        tensor = torch.empty((last - first, *info.shape[1:]) if info.shape else (), dtype=info.dtype)
        if tensor.numel() == 0:
            return tensor
        with file_errors(self.path, "read"), self.path.open("rb", buffering=0) as file:
            file.seek(info.start + first * (tensor.nbytes // (last - first)))
            _fill(file, memoryview(_bytes(tensor)), f"{self.path} ends inside tensor {name!r}")
        return tensor

    def map_all(self) -> dict[str, Tensor]:
        """Every tensor, as slices of the mapped file: nothing is copied until it is written to, and then privately.

        All pages are asked for at once, so that a file that is not in memory yet is read in order and here, not fault
        by fault when the tensors are used; later the system may take pages back and read them again.
        """
        mapped = self._mapped(0, max((info.end for info in self.tensors.values()), default=0))
        with contextlib.suppress(OSError):  # Linux before 5.14: they come when they are touched
            mapped.madvise(_MADV_POPULATE_READ)
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        return {
            name: whole[info.start : info.end].view(info.dtype).view(info.shape) for name, info in self.tensors.items()
        }

    def map(self, name: str) -> tuple[Tensor, mmap.mmap]:
        """The tensor `name`, whose pages come from the file when they are touched, and the mapping: MADV_DONTNEED lets
        go of them."""
        info = self.tensors[name]
        first = info.start - info.start % mmap.ALLOCATIONGRANULARITY
        mapped = self._mapped(first, info.end)
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        return whole[info.start - first :].view(info.dtype).view(info.shape), mapped

    def _mapped(self, first: int, last: int) -> mmap.mmap:
        """The bytes [first, last) of the file, private."""
        with file_errors(self.path, "map"), self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < last:
                raise FormatError(f"{self.path} became shorter since its header was read")
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(file.fileno(), last - first, flags=mmap.MAP_PRIVATE, prot=protection, offset=first)


class SafetensorsWriter:
    """One safetensors file that is filled at its places, in any order, from any thread; the header comes last.

    Until then a new file begins with zeros, which no reader takes for a header. The file is opened by a with statement.

    Args:
        path: the file; what it holds already stays until it is written over.
        tensors: names to (dtype, shape), in the order of the data.
        metadata: notes for the header.
        align: the data starts at a multiple of it, for which the header is filled up with spaces.

    Attributes:
        places: names to `StoredTensor`.
        size: bytes of the whole file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
        align: int = 8,
    ) -> None:
        self.path, self._tensors, self._align = Path(path), tensors, align
        start = len(self._head(metadata))
        self.places = {}
        for name, (dtype, shape) in tensors.items():
            end = start + math.prod(shape) * dtype.itemsize
            self.places[name] = StoredTensor(dtype, tuple(shape), start, end)
            start = end
        self.size = start
        self._reserved = len(self._head(metadata))

    def __enter__(self) -> Self:
        with file_errors(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            os.ftruncate(self._file, self.size)
        return self

    def __exit__(self, *ending: object) -> None:
        os.close(self._file)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put the tensor `name`, of any device, in its place. Raises `FileError` when the disk does."""
        place = self.places[name]
        data = _bytes(tensor.detach().to("cpu", place.dtype).contiguous())
        assert data.nbytes == place.end - place.start, name
        self._put(data, place.start)

    def read(self, name: str) -> Tensor:
        """What is in the place of `name` now."""
        place = self.places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        with file_errors(self.path, "read"), os.fdopen(os.dup(self._file), "rb", buffering=0) as file:
            file.seek(place.start)
            _fill(file, memoryview(_bytes(tensor)), f"{self.path} ends inside tensor {name!r}")
        return tensor

    def finish(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write the header, with notes as long as the first ones."""
        head = self._head(metadata)
        assert len(head) == self._reserved
        self._put(memoryview(head), 0)

    def _put(self, data: Any, start: int) -> None:
        view = memoryview(data)
        with file_errors(self.path):
            while view:
                count = os.pwrite(self._file, view, start)
                view, start = view[count:], start + count

    def _head(self, metadata: Mapping[str, str] | None) -> bytes:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, (dtype, shape) in self._tensors.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % self._align)
        return struct.pack("<Q", len(text)) + text


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors` to `path`, whole or not at all; at most one of them is copied at a time.

    Args:
        path: the file.
        tensors: names to tensors of any device; views may be given, shared memory is written once a name.
        dtype: convert each to it on the way; None keeps each one's own.
        metadata: notes for the header.
    Raises:
        FileError: it could not be written; nothing is left under `path` that was not there before.
    """
    # The widest dtype first keeps every tensor aligned to its own item size.
    order = sorted(tensors, key=lambda name: -(dtype or tensors[name].dtype).itemsize)
    shapes = {name: (dtype or tensors[name].dtype, tensors[name].shape) for name in order}
    with replacing(path) as temporary, SafetensorsWriter(temporary, shapes, metadata) as writer:
        for name in order:
            writer.write(name, tensors[name])
        writer.finish(metadata)


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor as a numpy array of bytes."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _fill(file: Any, view: memoryview, problem: str) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise FormatError(problem)
        view = view[count:]


def _header(length_bytes: bytes, file: Any, size: int, source: str) -> tuple[dict[str, Any], int]:
    if len(length_bytes) < 8:
        raise FormatError(f"{source} is too short to be a safetensors file")
    (length,) = struct.unpack("<Q", length_bytes)
    if length > min(size - 8, _MAX_HEADER):
        raise FormatError(
            f"{source} claims a header of {length} bytes; it has {size}, and a header at most {_MAX_HEADER}"
        )
    return parse_json(file.read(length), f"{source}: the header"), 8 + length


def _metadata(value: Any, source: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(f"{source}: __metadata__ must map text to text")
    return value


def _tensor(name: str, entry: Any, data_start: int, source: str) -> StoredTensor:
    def check(ok: bool, problem: str, value: Any = None) -> None:
        if not ok:
            raise FormatError(f"{source}: tensor {shown(name)} {problem}" + (f" {shown(value)}" if value else ""))

    check(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}, "has a malformed entry")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    check(isinstance(kind, str) and kind in _DTYPES, "has the unknown dtype", kind)
    check(_sizes(shape) and len(shape) <= _MAX_DIMENSIONS, "has the malformed shape", shape)
    check(_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1], "has malformed offsets", offsets)
    needed, given = math.prod(shape) * _DTYPES[kind].itemsize, offsets[1] - offsets[0]
    check(needed == given, f"of shape {shape} in {kind} needs {needed} bytes, but its offsets span {given}")
    return StoredTensor(_DTYPES[kind], tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _sizes(values: Any) -> bool:
    """Whether it is a list of whole numbers that fit 64 bits."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_extents(tensors: Mapping[str, StoredTensor], start: int, size: int, source: str) -> None:
    """The tensors, in order, must cover the data exactly."""
    at = start
    for name, tensor in tensors.items():
        if tensor.end > size:
            raise FormatError(
                f"{source}: tensor {shown(name)} ends at byte {tensor.end}, but the file has {size}: truncated?"
            )
        if tensor.start != at:
            problem = "overlaps the one before it" if tensor.start < at else "leaves a hole before it"
            raise FormatError(f"{source}: tensor {shown(name)} {problem}")
        at = tensor.end
    if at != size:
        raise FormatError(f"{source}: {size - at} bytes follow the last tensor")
