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

CHUNK_ELEMENTS = 1 << 25
"""Logits held at once: 128 MiB of float32."""


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
    def forward(  # noqa: PLR0917 (autograd passes by position)
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, count: int, dtype: torch.dtype
    ) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden_ND = torch.empty(hidden_ND.shape, dtype=wide, device=hidden_ND.device) if need_hidden else None
        d_weight_VD = torch.zeros(weight_VD.shape, dtype=wide, device=weight_VD.device) if need_weight else None
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            narrow_VD = weight_VD.to(dtype)
            for start, stop in _chunks(hidden_ND.shape[0], weight_VD.shape[0]):
                narrow_CD = hidden_ND[start:stop].to(dtype)
                nll_C, probs_CV = _nll(narrow_CD @ narrow_VD.T, labels_N[start:stop], wide)
                total += nll_C.sum()
                if not (need_hidden or need_weight):
                    continue
                d_logits_CV = _minus_one_hot(probs_CV, labels_N[start:stop]).to(dtype)
                if d_hidden_ND is not None:
                    d_hidden_ND[start:stop] = d_logits_CV @ narrow_VD
                if d_weight_VD is not None:
                    d_weight_VD += d_logits_CV.T @ narrow_CD
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


def _chunks(rows: int, vocabulary: int) -> list[tuple[int, int]]:
    """Equal runs of rows, as few as CHUNK_ELEMENTS allows."""
    count = max(1, -(-rows * vocabulary // CHUNK_ELEMENTS))
    size = max(1, -(-rows // count))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _nll(logits_CV: Tensor, labels_C: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """−log p[label] (C,) and p (C, V). logsumexp is max − log p[argmax]: one pass fewer, and p[argmax] ≥ 1/V."""
    probs_CV = logits_CV.softmax(dim=-1, dtype=wide)
    top = logits_CV.max(dim=-1)
    lse_C = top.values.to(wide) - probs_CV.gather(1, top.indices.unsqueeze(1)).squeeze(1).log()
    return lse_C - logits_CV.gather(1, labels_C.unsqueeze(1)).squeeze(1).to(wide), probs_CV


def _minus_one_hot(probs_CV: Tensor, labels_C: Tensor) -> Tensor:
    """p − one_hot(label), the gradient of −log p[label] by the logits, in place."""
    return probs_CV.scatter_add_(1, labels_C.unsqueeze(1), probs_CV.new_full((labels_C.shape[0], 1), -1.0))
