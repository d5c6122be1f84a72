"""The key–value cache of one batch of sequences of equal length."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from moekit.config import ModelConfig

__all__ = ["PREFILL_CHUNK", "KVCache", "Room"]

PREFILL_CHUNK = 512
"""Prompt tokens computed at once: enough to keep the cores busy, few enough that activations stay small."""


class Room(Protocol):
    """Who allots memory to conversations."""

    def take(self, nbytes: int) -> None:
        """Asked before so many bytes are allocated. Raises `BudgetError` when there is no room."""
        ...

    def give(self, nbytes: int) -> None:
        """Told after so many were freed."""
        ...

    def rehearse(self, work: Callable[[], object]) -> None:
        """Do work of another kind once for trial, to leave it the memory it needs; its numbers mean nothing. Raises
        `BudgetError` when there is no room for it."""
        ...

    def settle(self) -> None:
        """Told after a prompt: time to see what the process takes. Raises `BudgetError` when that is too much."""
        ...


class _Held:
    """Bytes that a cache has of its room, and gives back when it is gone."""

    def __init__(self, room: Room) -> None:
        self.room, self.nbytes = room, 0

    def take(self, nbytes: int) -> None:
        self.room.take(nbytes)
        self.nbytes += nbytes

    def give(self, nbytes: int) -> None:
        self.nbytes -= nbytes
        self.room.give(nbytes)


class KVCache:
    """Keys and values of every layer, in buffers that double when full.

    Args:
        config: gives layers and what a position takes, `ModelConfig.cache_shape`.
        batch: number of sequences B.
        dtype: of the stored keys and values: float32, bfloat16 or float16.
        capacity: positions to reserve at first.
        room: who allots the memory; None: nobody.
    Raises:
        BudgetError: there is no room, here or when a layer grows.

    `length` counts the positions that every layer has; the decoder advances it once a forward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        capacity: int = 64,
        room: Room | None = None,
    ) -> None:
        parts, heads, width = config.cache_shape
        self._shape = (parts, batch, heads, capacity, width)
        self._held = None if room is None else _Held(room)
        if self._held is not None:
            weakref.finalize(self, _give_all, self._held)
            self._held.take(config.num_hidden_layers * math.prod(self._shape) * dtype.itemsize)
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
        if self._held is not None:
            self._held.take(old.nbytes // old.shape[3] * capacity)
        new = old.new_empty(*old.shape[:3], capacity, old.shape[4])
        new[:, :, :, : self.length] = old[:, :, :, : self.length]
        self._buffers[layer] = new
        if self._held is not None:
            self._held.give(old.nbytes)
        return new


def _give_all(held: _Held) -> None:
    held.give(held.nbytes)
