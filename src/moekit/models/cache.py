"""The key–value cache of one batch of sequences of equal length."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.config import ModelConfig

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of every layer, in buffers that double when full.

    Args:
        config: gives layers and what a position takes, `ModelConfig.cache_shape`.
        batch: number of sequences B.
        dtype: of the stored keys and values: float32, bfloat16 or float16.
        capacity: positions to reserve at first.

    `length` counts the positions that every layer has; the decoder advances it once a forward pass.
    """

    def __init__(
        self, config: ModelConfig, batch: int = 1, dtype: torch.dtype = torch.float32, capacity: int = 64
    ) -> None:
        parts, heads, width = config.cache_shape
        self._shape = (parts, batch, heads, capacity, width)
        self._buffers = [torch.empty(self._shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.length = 0

    def append(self, layer: int, *new_BHLd: Tensor) -> tuple[Tensor, ...]:
        """Store new positions of one layer, keys and values (or MLA's one tensor); returns all so far, each
        (B, H, length + L, d)."""
        count = new_BHLd[0].shape[2]
        buffer, end = self.room(layer, count), self.length + count
        for number, new in enumerate(new_BHLd):  # an index each: views of one call may not be changed under a gradient
            buffer[number, :, :, self.length : end] = new
        return tuple(buffer[number, :, :, :end] for number in range(len(new_BHLd)))

    def room(self, layer: int, count: int) -> Tensor:
        """One layer's keys and values (2, B, H, capacity, d; of MLA 1, B, 1, capacity, r), contiguous, with room for
        `count` new positions."""
        buffer, end = self._buffers[layer], self.length + count
        return buffer if end <= buffer.shape[3] else self._grow(layer, end)

    def advance(self, count: int) -> None:
        """Make the `count` positions just appended part of the past."""
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on, to go on from a common prefix."""
        assert 0 <= length <= self.length
        self.length = length

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored keys and values."""
        return self._buffers[0].dtype

    @property
    def batch(self) -> int:
        """Sequences."""
        return self._shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def _grow(self, layer: int, needed: int) -> Tensor:
        old = self._buffers[layer]
        capacity = max(needed, 2 * old.shape[3])
        new = old.new_empty(*old.shape[:3], capacity, old.shape[4])
        new[:, :, :, : self.length] = old[:, :, :, : self.length]
        self._buffers[layer] = new
        return new
