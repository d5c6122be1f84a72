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
    # Two sums with an activation between; a gradient adds a third, and hidden values that nearly cancel.
    ("moe_mlp", torch.float32): 1e-5,
    # Pre-activations are kept in bf16 for the gradient (2⁻⁸), which gate and up then multiply; the output is rounded.
    ("moe_mlp", torch.bfloat16): 2e-2,
    # Blocks of 32 columns are summed in whole numbers, and these sums in fp32 in the order of the columns.
    ("quant", torch.float32): 3e-6,
    # The hidden row is rounded to int8: one that differs in its last fp32 bit may fall on the other side of a tie,
    # one step of 1/127 of its block's largest, in one of F terms.
    ("quant layer", torch.float32): 5e-3,
    # What int8 activations cost, in the norm: a step is 1/127 of the largest of 32, some 2.1 σ of a normal row, and
    # rounding is uniform over it: 2.1 / 127 / √12 = 0.5 %. NF4's levels to n/127 add 1/254/√3 of a group's largest,
    # some 2.4 σ of a weight: 0.5 % more. Rows of few columns deviate from these means.
    ("quant rounding", torch.float32): 1.5e-2,
    # PyTorch's fp64 products in another order.
    ("kernels", torch.float64): 1e-13,
    ("decode", torch.float64): 1e-13,
    # The reference in bf16 also rounds gate, up, the activation and their product: four roundings more.
    ("decode reference", torch.bfloat16): 2.4e-2,
    ("decode reference", torch.float32): 3e-6,
}

# Elsewhere: (relative, absolute), by what is compared.
NEAR = {
    # The same sums in fp64, in another order; a few hundred terms.
    "fp64": (1e-9, 1e-11),
    # One scalar, or one short sum, in fp64.
    "fp64 scalar": (1e-12, 1e-12),
    # A whole tiny model in fp32 beside another implementation: sums in another order, layer after layer.
    "fp32 model": (1e-4, 1e-5),
    # The same of a model that amplifies rounding: transformers' own fp32 gradients are 4.8e-5 from its fp64 ones there.
    "steep fp32 model": (1e-4, 5e-5),
    # The same, where both sides run the same products: only their order differs.
    "fp32 twin": (1e-5, 1e-5),
    # Gradients of a tiny model in fp32, which reach down to 1e-6 themselves.
    "fp32 gradients": (1e-4, 1e-6),
    # A mean or a loss in fp32.
    "fp32 scalar": (1e-6, 1e-6),
    # exp of such a mean, or a loss through a whole model.
    "fp32 loss": (1e-5, 0.0),
    # 20 optimizer steps in fp32 on another CPU or PyTorch: each step's rounding feeds the next.
    "golden curve": (2e-5, 0.0),
    # 30 layers of a real model in fp32; logits reach 32.
    "fp32 SmolLM2": (1e-3, 1e-3),
    # exp of a mean of such differences over thousands of tokens.
    "SmolLM2 perplexity": (1e-3, 0.0),
    # llama.cpp's own sums on the same fp32 weights, with an fp32 cache; logits reach 30.
    "llama.cpp F32": (0.0, 1e-3),
    # GELU is read from a table of fp16 there, for an input that is rounded to fp16: 2⁻¹¹ of each hidden value.
    "llama.cpp's table of GELU": (0.0, 5e-3),
    # exp of the mean of such differences, which have either sign.
    "llama.cpp perplexity": (1e-4, 0.0),
    # One MoE layer in bf16 along two paths: the hidden row is rounded to 2⁻⁸ in one of them.
    "bf16 layer": (2e-2, 2e-2),
    # Weights rounded to bf16 once (2⁻⁸), through a tiny model.
    "bf16 weights": (5e-2, 1e-1),
    # Keys and values rounded to 11 bits (fp16) or 8 (bf16) beside the same: a sum near a tie rounds the other way, by
    # 2⁻⁸ of one value among many.
    "rounded cache": (2e-3, 2e-3),
    # A loss computed with bf16 products: independent roundings of 2⁻⁸, averaged over tokens.
    "bf16 loss": (1e-2, 0.0),
    # ‖error‖ / ‖result‖ where rows are rounded to int8 in blocks of 32 before each product: a step of max/127 is about
    # 1/50 of a row's deviation, its rounding 1/√12 of that, 0.6 %; a dozen products of a tiny model add up as √12.
    "int8 activations": (2.5e-2, 0.0),
    # The same with NF4's levels rounded to n/127 by the kernels, 1/440 of a group's largest on average:
    # 0.6 % of a deviation.
    "int8 activations, nf4": (5e-2, 0.0),
    # int8 activations with weights that are rounded to int8 too.
    "int8 weights": (2e-2, 0.0),
    # How much SmolLM2's perplexity may rise when it is quantised to int8: the promise of docs/pack.md.
    "perplexity at eight bits": (5e-3, 0.0),
    # Perplexity of a model and its exact upcycling, as the quickstart promises.
    "upcycled perplexity": (1e-3, 0.0),
    # A published figure given to one decimal.
    "published": (5e-3, 0.0),
    # A quantised weight quantised again: the same codes; fp16 scales and minima that were rounded twice (2⁻¹¹).
    "requantised": (1e-3, 1e-6),
    # The share of 20,000 draws that came true: σ is at most 0.0035, and this is four of them.
    "chance of many": (0.0, 1.5e-2),
    # The standard deviation of 100,000 draws: 1/√(2n) is 0.002, and some room.
    "standard deviation of many": (2e-2, 0.0),
    # The same of 864 draws.
    "standard deviation of few": (1e-1, 0.0),
}


def near(what: str) -> dict[str, float]:
    """`rtol` and `atol` for torch's and numpy's comparisons."""
    rtol, atol = NEAR[what]
    return {"rtol": rtol, "atol": atol}


# A whole result: |error| ≤ limit · max|reference|.
WHOLE = {
    # A tiny decoder in bf16 along two paths that round at different places, each by 2⁻⁸, layer after layer.
    "bf16 decoder": 6e-2,
    # Both ways round activations to int8 in blocks; sums in another order before that move a value near a tie by one
    # step, 2⁻⁷ of its block's largest.
    "packed decoder": 3e-2,
}


def assert_near(got: Tensor, want: Tensor, what: str) -> None:
    """`got` is within the limit of `what` everywhere, measured by the largest wanted value."""
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= WHOLE[what] * scale, f"{what}: error {error:.3e} of {scale:.3e}"


def rel(what: str) -> float:
    """The relative one, for pytest.approx."""
    return NEAR[what][0]


def assert_close(got: Tensor, want_fp64: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """`got` has the reference's shape, is finite, and is within the tolerance of (what, its dtype)."""
    assert got.shape == want_fp64.shape
    error = (got.double() - want_fp64).abs().max().item() if got.numel() else 0.0
    scale = want_fp64.abs().max().item() if got.numel() else 0.0
    limit = TOLERANCES[what, dtype or got.dtype] * scale
    assert error <= limit, f"{what}: error {error:.3e}, limit {limit:.3e}"
