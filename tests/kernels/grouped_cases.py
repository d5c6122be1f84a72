"""Inputs shared by the kernel tests: odd sizes, empty experts, rows that belong to nobody."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

OPS = ("grouped_mm", "grouped_mm_transposed", "grouped_outer")

# counts, rows past their sum, output width, input width
SHAPES = {
    "no rows": ([0, 0, 0], 0, 5, 3),
    "no rows of anybody": ([0, 0], 4, 5, 3),
    "one row": ([0, 1], 0, 17, 33),
    "one expert": ([9], 0, 40, 72),
    "one by one": ([1, 1, 2], 1, 1, 1),
    "empty experts": ([3, 0, 13, 1, 0, 70], 3, 65, 301),
    "all to one": ([0, 0, 37, 0], 2, 24, 48),
    "past every tile": ([5, 200, 33], 7, 270, 521),
    "few rows of wide": ([8, 1, 7], 1, 9, 1030),
    "deep": ([9, 40], 0, 523, 30),
}


def grouped_inputs(op: str, shape: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(left, right, counts) of an op; rows past the counts are NaN."""
    counts, spare, out_width, in_width = SHAPES[shape]
    generator = torch.Generator().manual_seed(len(shape))
    rows = sum(counts) + spare

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    rows_RO, rows_RI, weight_EOI = (
        normal(rows, out_width),
        normal(rows, in_width),
        normal(len(counts), out_width, in_width),
    )
    rows_RO[sum(counts) :] = float("nan")
    rows_RI[sum(counts) :] = float("nan")
    left, right = {
        "grouped_mm": (rows_RI, weight_EOI),
        "grouped_mm_transposed": (rows_RO, weight_EOI),
        "grouped_outer": (rows_RO, rows_RI),
    }[op]
    return left, right, torch.tensor(counts)


@cache
def expected(op: str, shape: str, dtype: torch.dtype) -> Tensor:
    """`by_einsum` of `grouped_inputs`."""
    return by_einsum(op, *grouped_inputs(op, shape, dtype))


def by_einsum(op: str, left: Tensor, right: Tensor, counts_E: Tensor) -> Tensor:
    """The op from its equation in fp64, one row at a time, without the code under test."""
    left, right = left.double(), right.double()
    used = int(counts_E.sum())
    expert_R = torch.arange(len(counts_E)).repeat_interleave(counts_E)
    if op == "grouped_outer":
        products_REOI = torch.einsum("ro,ri->roi", left[:used], right[:used])
        return left.new_zeros(len(counts_E), left.shape[1], right.shape[1]).index_add(0, expert_R, products_REOI)
    equation = "ri,roi->ro" if op == "grouped_mm" else "ro,roi->ri"
    out = left.new_zeros(left.shape[0], right.shape[1 if op == "grouped_mm" else 2])
    for row in range(used):
        out[row] = torch.einsum(equation, left[row : row + 1], right[expert_R[row]][None])[0]
    return out


def decode_inputs(tokens: int, top_k: int, experts: int, hidden: int, inner: int, gated: bool) -> list[Tensor]:
    """x, ids, weights, in_proj, down_proj in fp64, exactly representable in bf16."""
    generator = torch.Generator().manual_seed(tokens + 10 * top_k)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).bfloat16().double()

    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    weights = torch.rand(tokens, top_k, generator=generator).double()
    widen = (2 if gated else 1) * inner
    in_proj = (normal(experts, widen, hidden) / hidden**0.5).bfloat16().double()
    return [normal(tokens, hidden), ids, weights, in_proj, normal(experts, hidden, inner)]


def decode_by_hand(x: Tensor, ids: Tensor, weights: Tensor, in_proj: Tensor, down: Tensor, activation: str) -> Tensor:
    """Σ_k w_k · down · (act(gate·x) ⊙ up·x) in fp64 from the activations' formulas."""
    act = {
        "silu": lambda v: v / (1 + torch.exp(-v)),
        "gelu": lambda v: v * torch.special.ndtr(v),
        "gelu_tanh": lambda v: v / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))),
        "relu": lambda v: v.clamp(min=0),
    }[activation]
    inner = down.shape[2]
    hidden_TKG = torch.einsum("td,tkgd->tkg", x, in_proj[ids])
    hidden_TKF = act(hidden_TKG[..., :inner])
    if hidden_TKG.shape[-1] == 2 * inner:
        hidden_TKF = hidden_TKF * hidden_TKG[..., inner:]
    return torch.einsum("tk,tkf,tkdf->td", weights, hidden_TKF, down[ids])
