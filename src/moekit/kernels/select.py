"""Which backend runs each op, decided in one place and told on request.

The order: a forced backend (the `forced` context, or `MOEKIT_BACKEND`) or an error, never another one; then
for fp32 and bf16 on a CPU the native kernels or the BLAS, by rows an expert as measured below; the reference
for everything else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moekit.errors import BackendError
from moekit.kernels import blas, cpu, reference

__all__ = [
    "BACKENDS",
    "MOE_DECODE_MAX_TOKENS",
    "OPS",
    "Choice",
    "Explanation",
    "choose",
    "choose_quantised",
    "explain",
    "fast_bf16",
    "forced",
    "fuses_mlp",
    "native_obstacle",
    "run",
    "run_anywhere",
]

BACKENDS: dict[str, Any] = {"reference": reference, "blas": blas, "cpu": cpu}
OPS = ("grouped_mm", "grouped_mm_transposed", "grouped_outer", "moe_decode", "moe_mlp")

# Up to how many rows an expert, on average, the native op beats one BLAS call an expert.
# Measured with 16 experts of 1024×1024 on 2 cores of a Xeon with AMX, in ms, native : BLAS (fp32 | bf16):
#   grouped_mm             8 rows 1.9 : 3.0 | 1.9 : 1.7    32 rows 5.0 : 6.5 |  7.3 : 2.1    256 rows 35 : 32 | 52 : 5.4
#   grouped_mm_transposed  8 rows 2.6 : 2.9 | 1.9 : 1.9    32 rows  10 : 6.4 |  8.6 : 2.1    256 rows 55 : 31 | 46 : 5.4
#   grouped_outer          8 rows  24 : 25  |  11 : 11     64 rows  33 : 28  |   20 : 12     256 rows 95 : 57 | 59 : 16
# Without AMX (ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16) PyTorch's bf16 product needs 8.0 ms for 32 rows, and 5.6 for 16.
# Without AVX-512 (…=AVX2) it has no fast one: 8 experts of 512×1024 with 128 rows each took 129 ms, ours 30.
_FEW_ROWS = {
    ("grouped_mm", torch.float32): 32,
    ("grouped_mm", torch.bfloat16): 6,
    ("grouped_mm_transposed", torch.float32): 8,
    ("grouped_mm_transposed", torch.bfloat16): 8,
    ("grouped_outer", torch.float32): 16,
    ("grouped_outer", torch.bfloat16): 6,
}
_FEW_ROWS_WITHOUT_AMX = 24  # for bf16

# Beyond, experts have enough rows for PyTorch's product, and sorting pays. Same machine, 64 experts of F = 704,
# D = 1024, K = 8, bf16, ms, moe_decode : sorted (two grouped_mm): 1 token 0.74 : 1.00, 8 tokens 9.7 : 11.2,
# 16 tokens 16.9 : 18.4, 64 tokens 31 : 27 (the last three beside other work, taken in turns).
MOE_DECODE_MAX_TOKENS = 16

_forced: str | None = os.environ.get("MOEKIT_BACKEND") or None


@dataclass(frozen=True)
class Choice:
    """One line of `explain()`: who runs an op on the CPU, and why."""

    op: str
    dtype: str
    rows_an_expert: int
    backend: str
    reason: str


class Explanation(list[Choice]):
    """The choices; `str()` is a table under one line about the machine."""

    def __str__(self) -> str:
        header = ("op", "dtype", "rows/expert", "backend", "why")
        lines = [header, *((c.op, c.dtype, str(c.rows_an_expert), c.backend, c.reason) for c in self)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([_machine(), *(line.rstrip() for line in table)])


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Run every op of this process on one backend; an op that it cannot do raises BackendError.

    >>> with forced("reference"):
    ...     choose("grouped_mm", torch.device("cpu"), torch.float32, rows=1, experts=8)
    'reference'
    """
    global _forced  # noqa: PLW0603 — one process, one choice: autograd's threads must see it too
    _check_name(backend)
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def choose(op: str, device: torch.device, dtype: torch.dtype, rows: int, experts: int) -> str:
    """The name of the backend that runs `op` for this many rows (tokens, for moe_decode) and experts.

    Raises:
        BackendError: a backend is forced and cannot do this.
    """
    return _decide(op, device, dtype, rows, experts)[0]


def choose_quantised(device: torch.device) -> str:
    """The same for every op of quant.py: the native kernels, or the reference where it is forced.

    Raises:
        BackendError: neither can run here.
    """
    return _decide_quantised(device)[0]


def run(op: str, experts: int, *args: Any) -> Tensor:
    """Call `op` on the chosen backend; the first argument holds the rows."""
    rows: Tensor = args[0]
    backend = choose(op, rows.device, rows.dtype, rows.shape[0], experts)
    result: Tensor = getattr(BACKENDS[backend], op)(*args)
    return result


def run_anywhere(op: str, *args: Any) -> Tensor:
    """The same for an op whose result is one and the same on every backend, so that none is refused: on the native
    kernels where they can run and no other is forced, else the reference."""
    backend = cpu if native_obstacle(args[0].device, args[0].dtype) is None else reference
    result: Tensor = getattr(backend, op)(*args)
    return result


def native_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why what only the native kernels do cannot run here, such as a block in steps (kernels/steps.py), or None."""
    if _forced not in (None, "cpu"):
        return f"the {_forced} backend is forced"
    return _cpu_obstacle(device, dtype)


def fast_bf16(device: torch.device) -> bool:
    """Whether PyTorch multiplies bf16 matrices faster than fp32 ones here.

    A CPU needs instructions for it, AMX or AVX-512 BF16 on x86-64. Without AVX-512 it is 100 times slower: a core of
    Zen 3 (AVX2) gave 1.2 GFLOP/s in bf16.
    """
    if device.type != "cpu":
        return True
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def fuses_mlp(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `moe_mlp` is one native call here. If not, sorting and grouped ops do the same in steps, on whatever
    backend is chosen or forced for each."""
    return _forced in (None, "cpu") and _decide("moe_mlp", device, dtype, 1, 1)[0] == "cpu"


def explain() -> Explanation:
    """Which backend runs each op on this machine, for few and for many rows an expert, and why.

    >>> sorted({choice.op for choice in explain()})
    ['decode step', 'grouped_mm', 'grouped_mm_transposed', 'grouped_outer', 'moe_decode', 'moe_mlp', 'quantised']
    """
    choices = Explanation()
    for op in OPS:
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, 256) if op.startswith("grouped") else (1,):
                backend, reason = _decide(op, torch.device("cpu"), dtype, rows, 1)
                choices.append(Choice(op, str(dtype).removeprefix("torch."), rows, backend, reason))
    for dtype in (torch.float32, torch.bfloat16):
        obstacle = native_obstacle(torch.device("cpu"), dtype)
        reason = "forced" if _forced else obstacle or "one new token: a block in two native calls (models/steps.py)"
        backend = "reference" if obstacle else "cpu"
        choices.append(Choice("decode step", str(dtype).removeprefix("torch."), 1, backend, reason))
    choices.append(Choice("quantised", "any", 1, *_explain_quantised()))
    return choices


def _decide_quantised(device: torch.device) -> tuple[str, str]:
    """(backend, reason)."""
    obstacle = f"the tensors are on {device.type}" if device.type != "cpu" else cpu.unavailable()
    if _forced == "reference":
        return "reference", "forced"
    if _forced == "blas" or obstacle:
        raise BackendError(f"no {_forced or 'cpu'} backend for quantised matrices: {obstacle or 'it has no such op'}")
    return "cpu", f"int8 activations by {cpu.quant_products()}"


def _explain_quantised() -> tuple[str, str]:
    try:
        return _decide_quantised(torch.device("cpu"))
    except BackendError as error:
        return "none", str(error)


def _decide(op: str, device: torch.device, dtype: torch.dtype, rows: int, experts: int) -> tuple[str, str]:
    """(backend, reason)."""
    obstacles = {"reference": None, "blas": _blas_obstacle(op, device, dtype), "cpu": _cpu_obstacle(device, dtype)}
    if _forced is not None:
        _check_name(_forced)
        if obstacles[_forced]:
            raise BackendError(f"the {_forced} backend was asked for, but cannot run {op}: {obstacles[_forced]}")
        return _forced, "forced"
    reason = obstacles["cpu"]
    if reason is None:
        if op == "moe_decode":
            return "cpu", "each weight is read once, in one call"
        if op == "moe_mlp":
            return "cpu", "gathers, activations and sums happen inside the products"
        limit = _few_rows(op, dtype)
        if rows <= limit * experts:
            return "cpu", f"up to {limit} rows an expert the native kernel is faster"
        reason = f"beyond {limit} rows an expert PyTorch's matrix product is faster"
    return ("reference" if obstacles["blas"] else "blas"), reason


def _cpu_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native kernels cannot run here, or None."""
    if device.type != "cpu":
        return f"the tensors are on {device.type}"
    if dtype not in cpu.DTYPES:
        return f"it has no {str(dtype).removeprefix('torch.')}"
    return cpu.unavailable()


def _blas_obstacle(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why one BLAS call an expert cannot do it, or None."""
    if op in ("moe_decode", "moe_mlp"):
        return "it has no such op"
    if device.type != "cpu" or dtype not in blas.GRAIN:
        return "it is for float32 and bfloat16 on the CPU"
    return None


@cache
def _few_rows(op: str, dtype: torch.dtype) -> float:
    has = torch.cpu.get_capabilities()
    if dtype == torch.float32 or has.get("amx_bf16"):
        return _FEW_ROWS[op, dtype]
    if has.get("architecture") == "x86_64" and not has.get("avx512_f"):
        return math.inf
    return _FEW_ROWS_WITHOUT_AMX


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")


def _machine() -> str:
    if reason := cpu.unavailable():
        return reason
    return f"native CPU kernels: {cpu.isa()}, threads: {cpu.num_threads()}"
