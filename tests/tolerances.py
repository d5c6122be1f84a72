"""How far a result may be from its fp64 reference: |error| ≤ tolerance · max|reference|. One entry, one reason."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES = {
    # Sums of up to a few hundred products in fp32, each product and sum rounded to 2⁻²⁴: √n · 2⁻²⁴ · a few.
    ("kernels", torch.float32): 3e-6,
    # The inputs are exact and the sums fp32, so only the output is rounded, to 8 bits: 2⁻⁸, and a bit for a near tie.
    ("kernels", torch.bfloat16): 4e-3,
    # Activations in fp32 through exp, erf and tanh on top of the two sums.
    ("decode", torch.float32): 3e-6,
    # Hidden values are rounded to bf16 once between the matrices (2⁻⁸), the output once more.
    ("decode", torch.bfloat16): 8e-3,
    # PyTorch's fp64 products in another order.
    ("kernels", torch.float64): 1e-13,
    ("decode", torch.float64): 1e-13,
    # The reference in bf16 also rounds gate, up, the activation and their product: four roundings more.
    ("decode reference", torch.bfloat16): 2.4e-2,
    ("decode reference", torch.float32): 3e-6,
}


def assert_close(got: Tensor, want_fp64: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """`got` has the reference's shape, is finite, and is within the tolerance of (what, its dtype)."""
    assert got.shape == want_fp64.shape
    error = (got.double() - want_fp64).abs().max().item() if got.numel() else 0.0
    scale = want_fp64.abs().max().item() if got.numel() else 0.0
    limit = TOLERANCES[what, dtype or got.dtype] * scale
    assert error <= limit, f"{what}: error {error:.3e}, limit {limit:.3e}"
