"""The file of a packed model while it is written: every tensor at its place, and a checksum of each in the header.

What is packed comes first, in whole pages, then the rest in float32; both in the order of the decoder's state_dict. The
header's notes: `VERSION_NOTE`, for every packed tensor its format, and for every tensor its name + `CHECKSUM`: 16 hex
digits of XXH3 over its bytes (github.com/Cyan4973/xxHash), which is faster than memory and finds a flipped bit.
"""

from __future__ import annotations

import os
from typing import Self

import torch
import xxhash
from torch import Tensor

from moekit.adapt.quant_modules import PAGE, QuantExperts, QuantMatrix
from moekit.errors import UnsupportedError
from moekit.models.decoder import Decoder
from moekit.models.safetensors_file import SafetensorsWriter

__all__ = ["CHECKSUM", "VERSION", "VERSION_NOTE", "PackedWriter", "checksum", "packed_formats", "packed_state"]

VERSION = "2"
VERSION_NOTE = "moekit.packed"
CHECKSUM = ".xxh3"


def checksum(tensor: Tensor) -> str:
    """XXH3 of a tensor's bytes, 64 bits as 16 hex digits.

    >>> checksum(torch.zeros(3, dtype=torch.uint8))
    'eb5d658bb22f286b'
    """
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return str(xxhash.xxh3_64_hexdigest(data.data))


def packed_formats(decoder: Decoder) -> dict[str, str]:
    """The buffers that hold packed bytes, and the format of each."""
    found = {}
    for name, module in decoder.named_modules():
        if isinstance(module, QuantMatrix):
            found[f"{name}.data"] = str(module.format)
        elif isinstance(module, QuantExperts):
            found |= {f"{name}.expert_{number}": str(format) for number, format in enumerate(module.formats)}
    return found


def packed_state(decoder: Decoder) -> dict[str, Tensor]:
    """The tensors of a quantised decoder's state_dict in the order of the file: packed ones first."""
    formats = packed_formats(decoder)
    state = {name: value for name, value in decoder.state_dict().items() if isinstance(value, Tensor)}
    return {name: state[name] for name in sorted(state, key=lambda name: name not in formats)}


class PackedWriter:
    """Fills the file of a packed model, tensor by tensor, in any order, from any thread; a with statement opens it.

    Args:
        path: the file; what it holds already stays until it is written over.
        decoder: a quantised one; it may be without memory.
    Raises:
        UnsupportedError: nothing in it is packed.

    Attributes:
        path: the file.
        places: names to `StoredTensor`, in the file's order.
        formats: of those that are packed.
        sums: checksums of those that were written; `finish` needs them all.
        size: bytes of the file.
    """

    def __init__(self, path: str | os.PathLike[str], decoder: Decoder) -> None:
        self.formats = packed_formats(decoder)
        if not self.formats:
            raise UnsupportedError("this decoder is not quantised: save_decoder writes it")
        shapes = {name: (_stored_as(value.dtype), value.shape) for name, value in packed_state(decoder).items()}
        self.sums: dict[str, str] = dict.fromkeys(shapes, "0" * 16)
        self._file = SafetensorsWriter(path, shapes, self._notes(), align=PAGE)
        self.path, self.places, self.size = self._file.path, self._file.places, self._file.size
        self.sums = {}

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, *ending: object) -> None:
        self._file.__exit__(*ending)

    def write(self, name: str, value: Tensor) -> None:
        """Put the tensor `name` in its place. Raises `FileError`."""
        value = value.to(self.places[name].dtype)
        self._file.write(name, value)
        self.sums[name] = checksum(value)

    def finish(self) -> None:
        """Write the header, once every tensor is there."""
        assert self.sums.keys() == self.places.keys()
        self._file.finish(self._notes())

    def keep(self, name: str, sum: str) -> bool:
        """Whether the file has the tensor `name` with this checksum already; then it need not be written."""
        if checksum(self._file.read(name)) != sum:
            return False
        self.sums[name] = sum
        return True

    def _notes(self) -> dict[str, str]:
        sums = {f"{name}{CHECKSUM}": self.sums[name] for name in sorted(self.sums)}
        return {VERSION_NOTE: VERSION, **self.formats, **sums}


def _stored_as(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype
