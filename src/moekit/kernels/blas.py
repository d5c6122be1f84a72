"""The grouped products by PyTorch's own matrix product, one call an expert, for experts with many rows on a CPU.

oneDNN compiles a bf16 product for each new shape (1 to 3 ms, ten times the product itself), and routing gives
every expert another number of rows every time. So each call takes a number of rows from a short list, the
multiples of GRAIN. The rows it takes too many are its neighbours', and what they give is overwritten, or zeros.
Shapes as in reference.py; in float32 every number of rows is as good as another.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.kernels.reference import groups

__all__ = ["GRAIN", "grouped_mm", "grouped_mm_transposed", "grouped_outer"]

GRAIN = {torch.bfloat16: 32, torch.float32: 1}


def grouped_mm(rows_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """As `reference.grouped_mm`, for float32 and bfloat16."""
    return _product(rows_RI, weight_EOI.transpose(1, 2), counts_E)


def grouped_mm_transposed(rows_RO: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """As `reference.grouped_mm_transposed`, for float32 and bfloat16."""
    return _product(rows_RO, weight_EOI, counts_E)


def grouped_outer(rows_RO: Tensor, rows_RI: Tensor, counts_E: Tensor) -> Tensor:
    """As `reference.grouped_outer`, for float32 and bfloat16; zero rows fill the groups up and add nothing."""
    out_EOI = rows_RO.new_empty(counts_E.shape[0], rows_RO.shape[1], rows_RI.shape[1])
    for expert in (counts_E == 0).nonzero().flatten().tolist():
        out_EOI[expert].zero_()
    rows_RO, rows_RI = rows_RO.contiguous(), rows_RI.contiguous()
    for expert, start, stop in groups(counts_E, rows_RO.shape[0]):
        torch.mm(_filled_up(rows_RO[start:stop]).T, _filled_up(rows_RI[start:stop]), out=out_EOI[expert])
    return out_EOI


def _product(rows_RN: Tensor, weight_ENM: Tensor, counts_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix. From the last expert to the first, so that the rows of earlier ones
    that a call takes along are overwritten by their own."""
    work = groups(counts_E, rows_RN.shape[0])
    used = work[-1][2] if work else 0
    rows_RN = rows_RN.contiguous()
    out_RM = rows_RN.new_empty(rows_RN.shape[0], weight_ENM.shape[2])
    out_RM[used:] = 0
    for expert, start, stop in reversed(work):
        first = stop - _round_up(stop - start, rows_RN.dtype)
        if first >= 0:
            torch.mm(rows_RN[first:stop], weight_ENM[expert], out=out_RM[first:stop])
        else:  # too near the beginning
            out_RM[start:stop] = (_filled_up(rows_RN[start:stop]) @ weight_ENM[expert])[: stop - start]
    return out_RM


def _filled_up(rows_CN: Tensor) -> Tensor:
    """The rows, and zeros to the next multiple of GRAIN."""
    count = rows_CN.shape[0]
    return F.pad(rows_CN, (0, 0, 0, _round_up(count, rows_CN.dtype) - count))


def _round_up(rows: int, dtype: torch.dtype) -> int:
    return -(-rows // GRAIN[dtype]) * GRAIN[dtype]
