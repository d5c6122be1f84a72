"""Cross-entropy of the head without its logits: the head's product, softmax and both gradients, chunk by chunk.

Plain PyTorch keeps (N, V) logits, their log-softmax and their gradient at once; here one chunk of rows lives at
a time, and since the gradients are taken while it does, nothing is computed twice.
Shapes: N tokens, D hidden, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["chunked_cross_entropy"]

CHUNK_BYTES = 128 << 20
"""Logits held at once, in the dtype of the matrix products."""
BLOCK_BYTES = 1 << 20
"""Logits that are widened at once."""


def chunked_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    denominator: int | None = None,
    dtype: torch.dtype | None = None,
    ignored: int = -100,
) -> Tensor:
    """Σ −log softmax(W·h)[label] over the labels that are not `ignored`, divided by `denominator`.

    Args:
        hidden_ND, weight_VD: the head's input and matrix; gradients reach both.
        labels_N: int64.
        denominator: the number of labels it is a mean over; by default those of `labels_N`. A micro-batch
            gives that of its whole step, so that the parts add up to the mean of the whole.
        dtype: of the matrix products; the hidden states' own by default. Softmax is fp32 (fp64 for fp64).
    Returns:
        float32 scalar (float64 for float64); 0 when every label is ignored.

    >>> h, w = torch.randn(5, 8), torch.randn(11, 8)
    >>> labels = torch.tensor([3, 1, -100, 0, 10])
    >>> torch.allclose(chunked_cross_entropy(h, w, labels), torch.nn.functional.cross_entropy(h @ w.T, labels))
    True
    """
    kept = (labels_N != ignored).nonzero().squeeze(1)
    count = denominator if denominator is not None else kept.shape[0]
    if kept.shape[0] < labels_N.shape[0]:
        hidden_ND, labels_N = hidden_ND[kept], labels_N[kept]
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, labels_N, max(count, 1), dtype or hidden_ND.dtype)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, count: int, dtype: torch.dtype
    ) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden_ND = torch.empty(hidden_ND.shape, dtype=wide, device=hidden_ND.device) if need_hidden else None
        d_weight_VD = torch.zeros(weight_VD.shape, dtype=wide, device=weight_VD.device) if need_weight else None
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            narrow_VD = weight_VD.to(dtype)
            for rows in _runs(hidden_ND.shape[0], CHUNK_BYTES // (dtype.itemsize * weight_VD.shape[0])):
                narrow_CD = hidden_ND[rows].to(dtype)
                logits_CV = narrow_CD @ narrow_VD.T
                total += _softmax_minus_one_hot_(logits_CV, labels_N[rows], wide)
                if d_hidden_ND is not None:
                    d_hidden_ND[rows] = logits_CV @ narrow_VD
                if d_weight_VD is not None:
                    d_weight_VD += logits_CV.T @ narrow_CD
        ctx.save_for_backward(d_hidden_ND, d_weight_VD)
        ctx.count, ctx.dtypes = count, (hidden_ND.dtype, weight_VD.dtype)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        d_hidden, d_weight = (
            None if grad is None else (grad * (d_loss / ctx.count)).to(dtype) for grad, dtype in grads
        )
        return d_hidden, d_weight, None, None, None


def _runs(rows: int, limit: int) -> list[slice]:
    """Equal runs of at most `limit` rows (at least one), as few as possible."""
    count = max(1, -(-rows // max(1, limit)))
    size = max(1, -(-rows // count))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _softmax_minus_one_hot_(logits_CV: Tensor, labels_C: Tensor, wide: torch.dtype) -> Tensor:
    """Replace logits by softmax − one_hot(label), the gradient of −log p[label]; returns Σ −log p[label].

    A few rows at a time, so that the wide copy and all passes over it stay in the cache.
    """
    total = torch.zeros((), dtype=wide, device=logits_CV.device)
    for rows in _runs(logits_CV.shape[0], BLOCK_BYTES // (wide.itemsize * logits_CV.shape[1])):
        logits_bV, labels_b1 = logits_CV[rows].to(wide, copy=True), labels_C[rows].unsqueeze(1)
        wanted_b1, top_b1 = logits_bV.gather(1, labels_b1), logits_bV.amax(dim=1, keepdim=True)
        exp_bV = logits_bV.sub_(top_b1).exp_()
        sum_b1 = exp_bV.sum(dim=1, keepdim=True)
        total += (sum_b1.log() + top_b1 - wanted_b1).sum()
        exp_bV.div_(sum_b1).scatter_add_(1, labels_b1, -torch.ones_like(sum_b1))
        logits_CV[rows] = exp_bV
    return total
