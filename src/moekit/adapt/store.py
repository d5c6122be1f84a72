"""`Store`: a packed file whose experts are read one by one, where each of them lies and what its bytes must sum up to.

It is the file of a packed folder, in which an expert is one extent of whole pages, already in the kernels' layout.
The store knows where experts are; how they are read (`expert_reader`) and which are kept (`expert_cache`) it does not.
"""

from __future__ import annotations

import os
import re
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from moekit.adapt.packed_file import CHECKSUM, VERSION, VERSION_NOTE, checksum
from moekit.adapt.quant_modules import PAGE
from moekit.errors import ConfigError, FormatError
from moekit.files import file_errors
from moekit.kernels.formats import Format
from moekit.models.safetensors_file import SafetensorsFile, StoredTensor
from moekit.models.weights import PACKED_WEIGHTS

__all__ = ["Extent", "Key", "Store"]

Key = tuple[int, int]  # (layer, expert)

_EXPERT = re.compile(r"layers\.(\d+)\.mlp\.experts\.expert_(\d+)")


@dataclass(frozen=True)
class Extent:
    """Where an expert's bytes are: `nbytes`, whole pages, from byte `start` of the file; XXH3 (64 bits) of them all."""

    start: int
    nbytes: int
    format: Format
    checksum: int


class Store:
    """The experts of a packed folder, and its other tensors.

    The file stays open. Should another take its place, or it change, every later read says so.

    Args:
        folder: of `save_packed`, or the file itself.
        verify: whether readers compare an expert's checksum each time they read it.
    Raises:
        FileError: the file is missing or unreadable.
        FormatError: it contradicts itself, or an expert lacks its format or checksum; the message names it.

    Attributes:
        path: the file.
        file: its header.
        extents: (layer, expert) to where it is.
        largest: bytes of the largest expert.
        identity: 16 hex digits that two stores share if their experts are the same.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = True) -> None:
        folder = Path(folder)
        self.path = folder if folder.is_file() else folder / PACKED_WEIGHTS
        self.verify = verify
        # Opened before the header is read: what `check` compares with is then no older than what the header describes.
        with file_errors(self.path, "read"):
            self.descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        self._close = weakref.finalize(self, os.close, self.descriptor)
        self._state = _state(os.fstat(self.descriptor))
        self.file = SafetensorsFile(self.path)
        version = self.file.metadata.get(VERSION_NOTE)
        if version != VERSION:
            raise FormatError(
                f"{self.path} is packed as version {version}, and this moekit reads {VERSION}: "
                "pack the model again (moekit pack MODEL OUT)"
            )
        self.extents: dict[Key, Extent] = {}
        for name, stored in self.file.tensors.items():
            if found := _EXPERT.fullmatch(name):
                self.extents[int(found[1]), int(found[2])] = self._extent(name, stored)
        if not self.extents:
            raise FormatError(f"{self.path} holds no experts")
        self.largest = max(extent.nbytes for extent in self.extents.values())
        sums = b"".join(extent.checksum.to_bytes(8, "big") for _, extent in sorted(self.extents.items()))
        self.identity = xxhash.xxh3_64_hexdigest(sums)
        self.check()

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own; checked against its checksum if the header has one."""
        self.check()
        tensor = self.file.read(name)
        if self.verify and name + CHECKSUM in self.file.metadata and int(checksum(tensor), 16) != self._checksum(name):
            self.check()
            raise FormatError(f"{self.path}: {name!r} does not have the checksum the header gives: it is damaged")
        return tensor

    def extent(self, key: Key) -> Extent:
        """Raises `ConfigError` if there is no such expert."""
        if key not in self.extents:
            raise ConfigError(f"{self.path} has no layer {key[0]}, expert {key[1]}")
        return self.extents[key]

    def check(self) -> None:
        """Raise `FormatError` if the file is not what was opened any more, `FileError` if it is gone."""
        with file_errors(self.path, "read"):
            opened, named = os.fstat(self.descriptor), os.stat(self.path)
        if opened.st_size < self._state[2]:
            raise FormatError(f"{self.path} was cut to {opened.st_size} bytes while in use; pack it again")
        if _state(named) != self._state or _state(opened) != self._state:
            raise FormatError(f"{self.path} was replaced or changed while in use; load it again")

    def open_direct(self) -> int:
        """A descriptor of the same file that reads past the page cache.

        Raises:
            FileError: the system or the file's disk does not do that.
            FormatError: the file is not what was opened any more.
        """
        with file_errors(self.path, "read past the page cache (O_DIRECT)"):
            if not hasattr(os, "O_DIRECT"):
                raise OSError("this system has no O_DIRECT")
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        if _state(os.fstat(descriptor)) != self._state:
            os.close(descriptor)
            self.check()
        return descriptor

    def close(self) -> None:
        """Close the file. Readers of it must be closed first."""
        self._close()

    def _extent(self, name: str, stored: StoredTensor) -> Extent:
        size = stored.end - stored.start
        if stored.dtype != torch.uint8 or stored.start % PAGE or size % PAGE or not size:
            raise FormatError(f"{self.path}: {name!r} is not whole pages of {PAGE} bytes, aligned to them")
        if name not in self.file.metadata:
            raise FormatError(f"{self.path}: the header gives no format for {name!r}")
        try:
            format = Format.parse(self.file.metadata[name])
        except ConfigError as error:
            raise FormatError(f"{self.path}: the format of {name!r}: {error}") from None
        return Extent(stored.start, size, format, self._checksum(name))

    def _checksum(self, name: str) -> int:
        noted = self.file.metadata.get(name + CHECKSUM, "")
        if not re.fullmatch("[0-9a-f]{16}", noted):
            raise FormatError(f"{self.path}: the header gives no checksum for {name!r}")
        return int(noted, 16)


def _state(info: os.stat_result) -> tuple[int, int, int, int]:
    """What tells one state of one file from any other."""
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns
