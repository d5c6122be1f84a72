"""What this machine can do at best, measured the same way everywhere it is quoted."""

from __future__ import annotations

import torch

from moekit.bench.timing import interleaved

__all__ = ["gemm_rate", "read_bandwidth"]


def read_bandwidth(size: int = 256 << 20, repeats: int = 5) -> float:
    """Bytes a second at which `size` bytes of memory, more than most caches hold, can be read."""
    data = torch.ones(size // 4)
    return size / interleaved({"read": data.sum}, repeats)["read"]


def gemm_rate(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """FLOP a second of PyTorch's product of two square matrices."""
    square = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / interleaved({"gemm": lambda: square @ square}, repeats)["gemm"]
