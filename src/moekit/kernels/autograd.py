"""The ops as PyTorch knows them: checked, differentiable, traceable by torch.compile.

The three grouped ops are each other's gradients, so they can be differentiated any number of times.
Nothing here knows how an op is computed; select.py says who does. Shapes as in reference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekit.errors import ConfigError
from moekit.kernels import reference, select

__all__ = ["grouped_mm", "grouped_mm_transposed", "grouped_outer", "moe_decode", "top_k"]

Gradients = tuple[Tensor | None, Tensor | None, None]


def grouped_mm(rows_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """y_r = W_e(r) · x_r for rows sorted by expert.

    Args:
        rows_RI: (R, I), expert 0's rows first; rows past sum(counts_E) are not read and give zeros.
        weight_EOI: (E, O, I) in the same dtype.
        counts_E: (E,) int64, the rows of each expert.
    Returns:
        (R, O) in that dtype; gradients reach rows and weight, of any order.
    Raises:
        ConfigError: shapes, dtypes or counts do not fit together.

    >>> rows, weight = torch.ones(3, 2), torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]]])
    >>> grouped_mm(rows, weight, torch.tensor([1, 2])).flatten().tolist()
    [2.0, 4.0, 4.0]
    """
    _check_weight("grouped_mm", rows_RI, weight_EOI, counts_E, axis=2)
    out: Tensor = _grouped_mm(rows_RI, weight_EOI, counts_E)
    return out


def grouped_mm_transposed(rows_RO: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """x_r = W_e(r)ᵀ · y_r: (R, O) → (R, I), otherwise as `grouped_mm`."""
    _check_weight("grouped_mm_transposed", rows_RO, weight_EOI, counts_E, axis=1)
    out: Tensor = _grouped_mm_transposed(rows_RO, weight_EOI, counts_E)
    return out


def grouped_outer(rows_RO: Tensor, rows_RI: Tensor, counts_E: Tensor) -> Tensor:
    """Σ_r y_r ⊗ x_r over the rows of each expert: (E, O, I); an expert without rows gets zeros.

    Raises:
        ConfigError: shapes, dtypes or counts do not fit together.
    """
    op = "grouped_outer"
    _check_ranks(op, {"rows_RO": (rows_RO, 2), "rows_RI": (rows_RI, 2), "counts_E": (counts_E, 1)})
    _check_counts(op, counts_E)
    _check_dtypes(op, rows_RO, rows_RI)
    _check_sizes(op, "rows of the two inputs", rows_RO.shape[0], rows_RI.shape[0])
    out: Tensor = _grouped_outer(rows_RO, rows_RI, counts_E)
    return out


def moe_decode(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    in_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    activation: str,
) -> Tensor:
    """Σ_k weight_tk · E_id(t,k)(x_t) for few tokens, without sorting them; it has no gradient.

    Args:
        x_TD: (T, D).
        expert_ids_TK: (T, K) int64.
        weights_TK: (T, K), any float dtype.
        in_proj_EGD: (E, G, D) in x's dtype: gate then up (G = 2F), or up alone (G = F).
        down_proj_EDF: (E, D, F) in x's dtype.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
    Returns:
        (T, D) in x's dtype, summed over K in fp32.
    Raises:
        ConfigError: shapes, dtypes, ids or the activation do not fit.
    """
    _check_decode(x_TD, expert_ids_TK, weights_TK, in_proj_EGD, down_proj_EDF, activation)
    out: Tensor = _moe_decode(x_TD, expert_ids_TK, weights_TK, in_proj_EGD, down_proj_EDF, activation)
    return out


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """The numbers of the K largest scores of each row: the K best experts of a token; they have no gradient.

    Args:
        scores_TE: (T, E), any dtype.
        k: 0 to E.
    Returns:
        (T, K) int64, the largest first; of equals the lower number first, and a NaN before everything.
    Raises:
        ConfigError: it is no matrix, or k does not fit.

    >>> top_k(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 3).tolist()
    [[1, 2, 3]]
    """
    _check_ranks("top_k", {"scores_TE": (scores_TE, 2)})
    if not 0 <= k <= scores_TE.shape[1]:
        raise ConfigError(f"top_k: k is {k}, but a row has {scores_TE.shape[1]} scores")
    ids_TK: Tensor = _top_k(scores_TE, k)
    return ids_TK


@torch.library.custom_op("moekit::grouped_mm", mutates_args=())
def _grouped_mm(rows_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    return select.run("grouped_mm", counts_E.shape[0], rows_RI, weight_EOI, counts_E)


@torch.library.custom_op("moekit::grouped_mm_transposed", mutates_args=())
def _grouped_mm_transposed(rows_RO: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    return select.run("grouped_mm_transposed", counts_E.shape[0], rows_RO, weight_EOI, counts_E)


@torch.library.custom_op("moekit::grouped_outer", mutates_args=())
def _grouped_outer(rows_RO: Tensor, rows_RI: Tensor, counts_E: Tensor) -> Tensor:
    return select.run("grouped_outer", counts_E.shape[0], rows_RO, rows_RI, counts_E)


@torch.library.custom_op("moekit::moe_decode", mutates_args=())
def _moe_decode(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    in_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    activation: str,
) -> Tensor:
    args = (x_TD, expert_ids_TK, weights_TK, in_proj_EGD, down_proj_EDF, activation)
    return select.run("moe_decode", down_proj_EDF.shape[0], *args)


@torch.library.custom_op("moekit::top_k", mutates_args=())
def _top_k(scores_TE: Tensor, k: int) -> Tensor:
    return select.run_anywhere("top_k", scores_TE, k)


@_grouped_mm.register_fake
def _(rows_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    return rows_RI.new_empty(rows_RI.shape[0], weight_EOI.shape[1])


@_grouped_mm_transposed.register_fake
def _(rows_RO: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    return rows_RO.new_empty(rows_RO.shape[0], weight_EOI.shape[2])


@_grouped_outer.register_fake
def _(rows_RO: Tensor, rows_RI: Tensor, counts_E: Tensor) -> Tensor:
    return rows_RO.new_empty(counts_E.shape[0], rows_RO.shape[1], rows_RI.shape[1])


@_moe_decode.register_fake
def _(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    in_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    activation: str,
) -> Tensor:
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format)


@_top_k.register_fake
def _(scores_TE: Tensor, k: int) -> Tensor:
    return scores_TE.new_empty((scores_TE.shape[0], k), dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiable(op: Any, left_grad: Callable[..., Tensor], right_grad: Callable[..., Tensor]) -> None:
    """Gradients of op(left, right, counts), each from (grad, left, right, counts) and only when needed."""

    def backward(ctx: Any, grad: Tensor) -> Gradients:
        left, right, counts_E = ctx.saved_tensors
        return (
            left_grad(grad, left, right, counts_E) if ctx.needs_input_grad[0] else None,
            right_grad(grad, left, right, counts_E) if ctx.needs_input_grad[1] else None,
            None,
        )

    op.register_autograd(backward, setup_context=_save)


_differentiable(
    _grouped_mm,
    lambda grad_RO, rows_RI, weight_EOI, counts_E: _grouped_mm_transposed(grad_RO, weight_EOI, counts_E),
    lambda grad_RO, rows_RI, weight_EOI, counts_E: _grouped_outer(grad_RO, rows_RI, counts_E),
)
_differentiable(
    _grouped_mm_transposed,
    lambda grad_RI, rows_RO, weight_EOI, counts_E: _grouped_mm(grad_RI, weight_EOI, counts_E),
    lambda grad_RI, rows_RO, weight_EOI, counts_E: _grouped_outer(rows_RO, grad_RI, counts_E),
)
_differentiable(
    _grouped_outer,
    lambda grad_EOI, rows_RO, rows_RI, counts_E: _grouped_mm(rows_RI, grad_EOI, counts_E),
    lambda grad_EOI, rows_RO, rows_RI, counts_E: _grouped_mm_transposed(rows_RO, grad_EOI, counts_E),
)


def _check_weight(op: str, rows: Tensor, weight_EOI: Tensor, counts_E: Tensor, axis: int) -> None:
    _check_ranks(op, {"rows": (rows, 2), "weight_EOI": (weight_EOI, 3), "counts_E": (counts_E, 1)})
    _check_counts(op, counts_E)
    _check_dtypes(op, rows, weight_EOI)
    _check_sizes(op, f"width of the rows and size {axis} of the weight", rows.shape[1], weight_EOI.shape[axis])
    _check_sizes(op, "number of counts and experts of the weight", counts_E.shape[0], weight_EOI.shape[0])


def _check_decode(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, in_EGD: Tensor, down_EDF: Tensor, act: str) -> None:
    op = "moe_decode"
    _check_ranks(op, {"x_TD": (x_TD, 2), "expert_ids_TK": (ids_TK, 2), "weights_TK": (weights_TK, 2)})
    _check_ranks(op, {"in_proj_EGD": (in_EGD, 3), "down_proj_EDF": (down_EDF, 3)})
    _check_dtypes(op, x_TD, in_EGD)
    _check_dtypes(op, x_TD, down_EDF)
    experts, hidden, inner = down_EDF.shape
    _check_sizes(op, "tokens of x and of the ids", x_TD.shape[0], ids_TK.shape[0])
    _check_sizes(op, "shapes of ids and weights", tuple(ids_TK.shape), tuple(weights_TK.shape))
    _check_sizes(op, "width of x and of down_proj's output", x_TD.shape[1], hidden)
    _check_sizes(op, "experts and width of in_proj", (experts, hidden), (in_EGD.shape[0], in_EGD.shape[2]))
    if in_EGD.shape[1] not in (inner, 2 * inner):
        raise ConfigError(f"{op}: in_proj has {in_EGD.shape[1]} rows, but the inner width is {inner}: F or 2F expected")
    if ids_TK.dtype != torch.int64:
        raise ConfigError(f"{op}: expert_ids_TK must be int64, not {ids_TK.dtype}")
    if act not in reference.ACTIVATIONS:
        raise ConfigError(f"{op}: unknown activation {act!r}; there are {', '.join(reference.ACTIVATIONS)}")


def _check_ranks(op: str, wanted: dict[str, tuple[Tensor, int]]) -> None:
    for name, (tensor, rank) in wanted.items():
        if tensor.ndim != rank:
            raise ConfigError(f"{op}: {name} must have {rank} dimensions, but its shape is {tuple(tensor.shape)}")


def _check_counts(op: str, counts_E: Tensor) -> None:
    if counts_E.dtype != torch.int64:
        raise ConfigError(f"{op}: counts_E must be int64, not {counts_E.dtype}")


def _check_dtypes(op: str, left: Tensor, right: Tensor) -> None:
    if left.dtype != right.dtype:
        raise ConfigError(f"{op}: the inputs must have one dtype, not {left.dtype} and {right.dtype}")
    if left.device != right.device:
        raise ConfigError(f"{op}: the inputs must be on one device, not {left.device} and {right.device}")


def _check_sizes(op: str, what: str, left: Any, right: Any) -> None:
    if left != right:
        raise ConfigError(f"{op}: {what} must be equal, not {left} and {right}")
