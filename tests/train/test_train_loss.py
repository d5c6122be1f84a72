"""Chunked cross-entropy against torch's own on whole logits: value and both gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moekit.train import chunked_cross_entropy
from moekit.train import loss as loss_module
from tolerances import near


def case(dtype: torch.dtype, tokens: int = 37, hidden: int = 16, vocabulary: int = 101) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    h = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    w = torch.randn(vocabulary, hidden, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[[0, 5, tokens - 1]] = -100
    return h, w, labels


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize(("dtype", "what"), [(torch.float64, "fp64 scalar"), (torch.float32, "fp32 scalar")])
def test_value_and_gradients(dtype: torch.dtype, what: str, chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_rows * 101 * dtype.itemsize)
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", 3 * 101 * dtype.itemsize)
    h, w, labels = case(dtype)
    expected = F.cross_entropy(h @ w.T, labels)
    wanted = torch.autograd.grad(3 * expected, (h, w))
    found = chunked_cross_entropy(h, w, labels)
    grads = torch.autograd.grad(3 * found, (h, w))
    for mine, theirs in zip((found, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(mine, theirs, **near(what))


def test_huge_logits_stay_finite() -> None:
    h, w, labels = case(torch.float32)
    found = chunked_cross_entropy(1e4 * h, w, labels)
    torch.testing.assert_close(found, F.cross_entropy(1e4 * h @ w.T, labels))


def test_bfloat16_products_with_fp32_softmax() -> None:
    """Bit-equal logits, so only the fp32 sums may differ; the gradient is rounded to bf16 once more (2⁻⁸)."""
    h, w, labels = case(torch.float32)
    logits = (h.bfloat16() @ w.bfloat16().T).float()
    found = chunked_cross_entropy(h, w, labels, dtype=torch.bfloat16)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels), **near("fp32 scalar"))
    (mine,) = torch.autograd.grad(found, w)
    (theirs,) = torch.autograd.grad(F.cross_entropy(h @ w.T, labels), w)
    assert (mine - theirs).norm() < 2**-6 * theirs.norm()


def test_parts_with_a_common_denominator_add_up() -> None:
    h, w, labels = case(torch.float64)
    parts = sum(chunked_cross_entropy(h[s], w, labels[s], denominator=34) for s in (slice(0, 20), slice(20, 37)))
    torch.testing.assert_close(parts, F.cross_entropy(h @ w.T, labels), **near("fp64 scalar"))


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    h, w, labels = case(torch.float32)
    loss = chunked_cross_entropy(h, w, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert not h.grad.any()
    assert not w.grad.any()


def test_frozen_head_gets_no_gradient() -> None:
    h, w, labels = case(torch.float32)
    chunked_cross_entropy(h, w.detach(), labels).backward()
    assert h.grad.any()
    assert w.grad is None


def test_only_the_compute_dtype_of_one_chunk_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor as large as all logits is ever made: the largest is a chunk, or the head's gradient."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 64 * 500 * 4)
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", 8 * 500 * 4)
    h, w, labels = case(torch.float32, tokens=640, hidden=8, vocabulary=500)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        chunked_cross_entropy(h, w, labels).backward()
    assert max(sizes) == 64 * 500
