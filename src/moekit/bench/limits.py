"""What this machine can do at best, measured the same way everywhere it is quoted."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moekit.bench.timing import interleaved
from moekit.kernels import cpu

__all__ = ["gemm_rate", "int8_gemm_rate", "read_bandwidth"]

TOO_SHORT = 0.02
"""Seconds below which a product of twice the size is measured instead."""


def read_bandwidth(size: int = 1 << 29, repeats: int = 5) -> float:
    """Bytes a second at which `size` bytes, more than caches hold, can be read: by the best reader there is.

    The contenders are PyTorch's sum, and where they were built the native kernels' reader, with several streams a
    thread and prefetches, each on large pages if the system gives them.
    """
    data = _large_pages(size)
    readers: dict[str, Callable[[], object]] = {"torch": data.view(torch.float32).sum}
    if cpu.unavailable() is None:
        for threads in {1, torch.get_num_threads()}:
            part = size // (512 * threads) * 512 * threads  # eight streams of whole cache lines a thread
            readers[f"native, {threads}"] = partial(cpu.native().read_memory, data.data_ptr(), part, threads)
    return size / min(interleaved(readers, repeats).values())


def gemm_rate(dtype: torch.dtype, largest: int = 2048, repeats: int = 5) -> float:
    """FLOP a second of PyTorch's product of two square matrices.

    Their size doubles up to `largest` while a product takes under 20 ms: where a CPU has no instruction for the
    dtype, a large product would take seconds and say nothing more.
    """
    return _rate(torch.mm, dtype, largest, repeats)


def int8_gemm_rate(largest: int = 2048, repeats: int = 5) -> float:
    """The same of its product of int8 matrices, which adds up in int32."""
    return _rate(torch._int_mm, torch.int8, largest, repeats)


def _rate(multiply: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, largest: int, repeats: int) -> float:
    size, rate = 128, 0.0
    while size < largest and (not rate or 2 * size**3 / rate < TOO_SHORT):
        size *= 2
        square = torch.ones(size, size, dtype=dtype)
        rate = 2 * size**3 / interleaved({"gemm": partial(multiply, square, square)}, repeats)["gemm"]
    return rate


def _large_pages(size: int) -> Tensor:
    """Zeros, uint8 (size,), each page of its own: untouched memory is one page of zeros that stays in the cache."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).zero_()
