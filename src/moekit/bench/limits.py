"""What this machine can do at best, measured the same way everywhere it is quoted."""

from __future__ import annotations

from functools import partial

import torch

from moekit.bench.timing import interleaved

__all__ = ["gemm_rate", "read_bandwidth"]

TOO_SHORT = 0.02
"""Seconds below which a product of twice the size is measured instead."""


def read_bandwidth(size: int = 256 << 20, repeats: int = 5) -> float:
    """Bytes a second at which `size` bytes of memory, more than most caches hold, can be read."""
    data = torch.ones(size // 4)
    return size / interleaved({"read": data.sum}, repeats)["read"]


def gemm_rate(dtype: torch.dtype, largest: int = 2048, repeats: int = 5) -> float:
    """FLOP a second of PyTorch's product of two square matrices.

    Their size doubles up to `largest` while a product takes under 20 ms: where a CPU has no instruction for the
    dtype, a large product would take seconds and say nothing more.
    """
    size, rate = 128, 0.0
    while size < largest and (not rate or 2 * size**3 / rate < TOO_SHORT):
        size *= 2
        square = torch.ones(size, size, dtype=dtype)
        rate = 2 * size**3 / interleaved({"gemm": partial(torch.mm, square, square)}, repeats)["gemm"]
    return rate
