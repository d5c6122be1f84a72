"""The key–value cache of one batch of sequences of equal length."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.config import ModelConfig

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of every layer, in buffers that double when full.

    Args:
        config: gives layers, key–value heads and head dimension.
        batch: number of sequences B.
        dtype: of the stored keys and values: float32, bfloat16 or float16.
        capacity: positions to reserve at first.

    `length` counts the positions that every layer has; the decoder advances it once a forward pass.
    """

    def __init__(
        self, config: ModelConfig, batch: int = 1, dtype: torch.dtype = torch.float32, capacity: int = 64
    ) -> None:
        self._shape = (2, batch, config.num_key_value_heads, capacity, config.head_dim)
        self._buffers = [torch.empty(self._shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.length = 0

    def append(self, layer: int, k_BHLd: Tensor, v_BHLd: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions of one layer; returns all its keys and values so far, (B, H, length + L, d)."""
        buffer, end = self.room(layer, k_BHLd.shape[2]), self.length + k_BHLd.shape[2]
        buffer[0, :, :, self.length : end] = k_BHLd
        buffer[1, :, :, self.length : end] = v_BHLd
        return buffer[0, :, :, :end], buffer[1, :, :, :end]

    def room(self, layer: int, count: int) -> Tensor:
        """One layer's keys and values (2, B, H, capacity, d), contiguous, with room for `count` new positions."""
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
