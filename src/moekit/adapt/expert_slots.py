"""`Slots`: one reservation of page-aligned memory, cut into slots of equal size whose addresses stay."""

from __future__ import annotations

import contextlib
import mmap
import sys

import torch
from torch import Tensor

from moekit.errors import ConfigError

__all__ = ["Slots"]

_MADV_POPULATE_WRITE = 23  # of linux/mman.h; Python has no name for it
_MOST_TOUCHED = 2 << 30
# Without it the system may refuse more than its memory. Python names it from 3.13 on; Linux's value on x86 and ARM.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Slots:
    """Private memory that takes no room until it is written to; in huge pages where the system has them.

    Args:
        count: slots.
        stride: bytes of one, whole pages.
        touched: slots that get their memory now, 2 GiB at most: else the first read into each waits for that too.
    Raises:
        ConfigError: there is no address space.
    """

    def __init__(self, count: int, stride: int, touched: int = 0) -> None:
        self.count, self.stride = count, stride
        # mmap's default is shared memory, which gets no huge pages and which forked processes would write to together.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self._map = mmap.mmap(-1, count * stride, flags=flags)
        except OSError as error:
            raise ConfigError(f"no address space for {count} slots of {stride} bytes: {error.strerror}") from None
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        if nbytes := min(touched * stride, _MOST_TOUCHED) // mmap.PAGESIZE * mmap.PAGESIZE:
            with contextlib.suppress(OSError):  # Linux before 5.14
                self._map.madvise(_MADV_POPULATE_WRITE, 0, nbytes)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._base = self._bytes.data_ptr()

    def address(self, slot: int) -> int:
        """Of its first byte."""
        return self._base + slot * self.stride

    def view(self, slot: int) -> Tensor:
        """uint8 (stride,), without a copy."""
        return self._bytes[slot * self.stride : (slot + 1) * self.stride]

    def give_back(self, first: int, last: int) -> None:
        """Return the memory of the slots [first, last) to the system; they read as zeros."""
        self._map.madvise(mmap.MADV_DONTNEED, first * self.stride, (last - first) * self.stride)

    def close(self) -> None:
        """Let go of it all; what a view is left of lives until the view is gone."""
        self._bytes = torch.empty(0, dtype=torch.uint8)
        del self._map
