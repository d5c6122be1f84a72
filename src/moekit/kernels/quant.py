"""Products with matrices in any format, by the native kernels on a CPU; with `forced("reference")` by their twins here.

In the kernels activations are rounded to int8 once a row, in blocks of 32 columns with a scale each, and multiplied
with the codes in whole numbers. Nothing but this rounding, the NF4 levels' (to n/127) and fp32 sums lies between them
and the twins, which multiply `formats.unpack` in fp32. Their numbers depend neither on how many rows come together, nor
on the number of threads. A row with NaN or infinity gives NaN.

Shapes as in reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moekit.errors import ConfigError
from moekit.kernels import cpu, select
from moekit.kernels.formats import Packed, unpack
from moekit.kernels.reference import ACTIVATIONS, activate, groups

__all__ = ["Matrices", "quant_grouped_mm", "quant_linear", "quant_moe"]

KINDS = {"int8": 2, "int4": 3, "nf4": 4, "mxfp4": 5}  # matrix.h's
Weights = Tensor | Packed


class Matrices:
    """Matrices of one shape, each in a format of its own, as the native kernels take them.

    Args:
        weights: a Packed or a plain tensor (fp32 or bf16) of one (O, I) or several (E, O, I) matrices, or a
            sequence of single ones. Their memory is referred to, not copied.
    Raises:
        ConfigError: shapes or parts differ, or a weight is neither packed nor fp32 or bf16 on the CPU.
    """

    def __init__(self, weights: Weights | Sequence[Weights]) -> None:
        self.weights = [weights] if isinstance(weights, Tensor | Packed) else list(weights)
        self.fields_E7 = _table(self.weights)
        self.count = self.fields_E7.shape[0]
        self.rows, self.cols = self.weights[0].shape[-2:] if self.weights else (0, 0)

    @classmethod
    def of(cls, weights: Matrices | Weights | Sequence[Weights]) -> Matrices:
        """`weights` themselves when they are Matrices."""
        return weights if isinstance(weights, Matrices) else cls(weights)

    @property
    def halves(self) -> bool:
        """Whether every packed one has two parts."""
        return all(weight.parts == 2 for weight in self.weights if isinstance(weight, Packed))

    def dense(self, index: int) -> Tensor:
        """One matrix in fp32, (O, I)."""
        for weight in self.weights:
            single = len(weight.shape) == 2
            count = 1 if single else weight.shape[0]
            if index < count:
                one = weight if single else weight[index]
                return unpack(one) if isinstance(one, Packed) else one.float()
            index -= count
        raise IndexError(index)


def quant_linear(x: Tensor, weight: Matrices | Weights, bias_O: Tensor | None = None) -> Tensor:
    """x · Wᵀ + b, (..., I) → (..., O), in x's dtype; the gradient reaches x alone.

    Raises:
        ConfigError: shapes or dtypes do not fit.
    """
    matrices = Matrices.of(weight)
    rows_RI = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_zeros(x.shape[:-1].numel(), x.shape[-1])
    counts = torch.tensor([rows_RI.shape[0]])
    y: Tensor = quant_grouped_mm(rows_RI, matrices, counts)
    y = y if bias_O is None else y + bias_O
    return y.view(*x.shape[:-1], matrices.rows)


def quant_grouped_mm(rows_RI: Tensor, weight_E: Matrices | Weights | Sequence[Weights], counts_E: Tensor) -> Tensor:
    """`kernels.grouped_mm` over formats: (R, I) → (R, O) in the rows' dtype; the gradient reaches the rows alone.

    Raises:
        ConfigError: shapes, dtypes or counts do not fit together.
    """
    matrices = Matrices.of(weight_E)
    if rows_RI.ndim != 2 or rows_RI.shape[1] != matrices.cols:
        raise ConfigError(f"quant_grouped_mm: rows {tuple(rows_RI.shape)} for matrices of {matrices.cols} columns")
    if counts_E.shape != (matrices.count,) or counts_E.dtype != torch.int64:
        raise ConfigError(f"quant_grouped_mm: counts_E must be {matrices.count} int64, not {counts_E}")
    out: Tensor = _Grouped.apply(rows_RI, matrices, counts_E)
    return out


def quant_moe(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up: Matrices | Weights | Sequence[Weights],
    down: Matrices | Weights | Sequence[Weights],
    activation: str,
    gated: bool,
    add_to: Tensor | None = None,
) -> Tensor:
    """Σ_k weight_tk · down_e(act(gate_e(x)) · up_e(x)) with e = id(t, k): (T, D) → (T, D) in x's dtype, no gradient.

    Experts in several calls, in the order of their numbers, give the same numbers as in one.

    Args:
        x_TD: fp32, bf16 or fp16.
        expert_ids_TK: int64; −1 is an expert that is not among these, and adds nothing.
        weights_TK: any float dtype.
        gate_up: E matrices (2F, D), gate then up as two parts, or (F, D) when not gated.
        down: E matrices (D, F).
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated: whether there is a gate.
        add_to: fp32 (T, D), contiguous: the result is added to it, and returned in it.
    Raises:
        ConfigError: shapes, dtypes, ids or the activation do not fit.
    """
    first, second = Matrices.of(gate_up), Matrices.of(down)
    _check_moe(x_TD, expert_ids_TK, weights_TK, first, second, activation, gated)
    x, ids, weights = x_TD.float().contiguous(), expert_ids_TK.contiguous(), weights_TK.float().contiguous()
    out_TD = torch.empty_like(x) if add_to is None else add_to
    if select.choose_quantised(x.device) == "reference":
        if add_to is None:
            out_TD.zero_()
        _twin_moe(x, ids, weights, first, second, activation, gated, out_TD)
    else:
        sizes = (*ids.shape, first.count, second.rows, second.cols, gated, ACTIVATIONS.index(activation))
        cpu.call(
            "quant_moe", [x, ids, weights, first.fields_E7, second.fields_E7, out_TD], (*sizes, add_to is not None)
        )
    return out_TD if add_to is not None else out_TD.to(x_TD.dtype)


class _Grouped(torch.autograd.Function):
    """The product; backward multiplies with unpacked matrices, one expert at a time."""

    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, matrices: Matrices, counts_E: Tensor) -> Tensor:
        ctx.matrices, ctx.counts = matrices, counts_E
        rows, counts = rows_RI.detach().float().contiguous(), counts_E.contiguous()
        if select.choose_quantised(rows.device) == "reference":
            return _twin_grouped_mm(rows, matrices, counts).to(rows_RI.dtype)
        out_RO = rows.new_empty(rows.shape[0], matrices.rows)
        sizes = (rows.shape[0], matrices.count, matrices.rows, matrices.cols)
        cpu.call("quant_grouped_mm", [rows, matrices.fields_E7, counts, out_RO], sizes)
        return out_RO.to(rows_RI.dtype)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, None, None]:
        matrices = ctx.matrices
        grad_RI = grad_RO.new_zeros(grad_RO.shape[0], matrices.cols)
        for expert, start, stop in groups(ctx.counts, grad_RO.shape[0]):
            grad_RI[start:stop] = grad_RO[start:stop].float() @ matrices.dense(expert)
        return grad_RI, None, None


def _twin_grouped_mm(rows_RI: Tensor, matrices: Matrices, counts_E: Tensor) -> Tensor:
    out_RO = rows_RI.new_zeros(rows_RI.shape[0], matrices.rows)
    for expert, start, stop in groups(counts_E, rows_RI.shape[0]):
        out_RO[start:stop] = rows_RI[start:stop] @ matrices.dense(expert).T
    return out_RO


def _twin_moe(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    up: Matrices,
    down: Matrices,
    act: str,
    gated: bool,
    out_TD: Tensor,
) -> None:
    for expert in ids_TK.unique().tolist():
        if expert == -1:
            continue
        if not 0 <= expert < up.count:
            raise ConfigError(f"quant_moe: expert id {expert} is not one of 0 to {up.count - 1}")
        token, slot = (ids_TK == expert).nonzero(as_tuple=True)
        hidden = x_TD[token] @ up.dense(expert).T
        if gated:
            gate, hidden = hidden.chunk(2, dim=1)
            hidden = activate(gate, act) * hidden
        else:
            hidden = activate(hidden, act)
        out_TD.index_add_(0, token, weights_TK[token, slot, None] * (hidden @ down.dense(expert).T))


def _table(weights: list[Weights]) -> Tensor:
    """(E, 7) int64, a row for each matrix. That of a single Packed is kept with it, for as long as its bytes stay where
    they are: those of a copy of it do not."""
    if len(weights) == 1 and isinstance(weights[0], Packed):
        packed, address = weights[0], weights[0].data.data_ptr()
        if packed.__dict__.get("_table", (None,))[0] != address:
            packed.__dict__["_table"] = (address, torch.tensor(_fields(packed), dtype=torch.int64).view(-1, 7))
        table: Tensor = packed.__dict__["_table"][1]
        return table
    rows = [row for weight in weights for row in _fields(weight)]
    if len({row[1:3] for row in rows}) > 1 or len({w.parts for w in weights if isinstance(w, Packed)}) > 1:
        raise ConfigError("the matrices of one op must have one shape and one number of parts")
    parts = max((row[5] for row in rows), default=1)  # a plain matrix is cut where the packed ones are
    return torch.tensor([(*row[:5], parts, row[6]) for row in rows], dtype=torch.int64).view(-1, 7)


def _fields(weight: Weights) -> list[tuple[int, ...]]:
    """address, rows, cols, kind, group, parts, symmetric of every matrix."""
    if isinstance(weight, Packed):
        data, format = weight.data, weight.format
        size = data.shape[-1]
        rest = (weight.rows, weight.cols, KINDS[format.kind], format.group, weight.parts, int(format.symmetric))
    else:
        if weight.dtype not in cpu.DTYPES or not weight.is_contiguous():
            raise ConfigError(f"a plain matrix must be contiguous fp32 or bf16, not {weight.dtype}")
        data, size = weight, weight.shape[-2:].numel() * weight.element_size()
        rest = (weight.shape[-2], weight.shape[-1], cpu.DTYPES[weight.dtype], 0, 1, 1)
    if data.device.type != "cpu" or len(weight.shape) not in (2, 3):
        raise ConfigError(f"matrices are (O, I) or (E, O, I) on the CPU, not {tuple(weight.shape)} on {data.device}")
    count = 1 if len(weight.shape) == 2 else weight.shape[0]
    return [(data.data_ptr() + index * size, *rest) for index in range(count)]


def _check_moe(x: Tensor, ids: Tensor, weights: Tensor, up: Matrices, down: Matrices, act: str, gated: bool) -> None:
    op = "quant_moe"
    if ids.dtype != torch.int64 or ids.ndim != 2 or ids.shape != weights.shape or x.shape[:1] != ids.shape[:1]:
        raise ConfigError(f"{op}: x {tuple(x.shape)}, int64 ids {tuple(ids.shape)}, weights {tuple(weights.shape)}")
    if up.count != down.count or (up.rows, up.cols) != ((1 + gated) * down.cols, down.rows):
        sizes = f"{up.count} of {up.rows}×{up.cols} and {down.count} of {down.rows}×{down.cols}"
        raise ConfigError(f"{op}: the matrices do not fit together: {sizes}")
    if x.ndim != 2 or x.shape[1] != up.cols:
        raise ConfigError(f"{op}: x is {tuple(x.shape)}, but the width is {up.cols}")
    if gated and not up.halves:
        raise ConfigError(f"{op}: gate and up must be packed as two parts")
    if act not in ACTIVATIONS:
        raise ConfigError(f"{op}: unknown activation {act!r}; there are {', '.join(ACTIVATIONS)}")
