"""The definition of every op: plain PyTorch, any device, any dtype, differentiable.

Other backends are tested against these functions; when they disagree, these are right.
Rows are sorted by expert: the first counts_E[0] rows belong to expert 0, and so on. Rows past
sum(counts_E) belong to nobody, are never read, and come out as zeros.

Shapes: R rows, E experts, I input width, O output width, T tokens, K experts a token, D hidden, F inner width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.errors import ConfigError

__all__ = [
    "ACTIVATIONS",
    "activate",
    "grouped_mm",
    "grouped_mm_transposed",
    "grouped_outer",
    "groups",
    "moe_decode",
    "moe_mlp",
    "top_k",
]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply silu, gelu (erf), gelu_tanh or relu elementwise; same shape and dtype."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def grouped_mm(rows_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """y_r = W_e(r) · x_r for each row r of expert e(r). Returns (R, O) in the rows' dtype."""
    out = rows_RI.new_zeros(rows_RI.shape[0], weight_EOI.shape[1])
    rows_RI = rows_RI.contiguous()  # else oneDNN's bf16 product reads past a group's last row
    for expert, start, stop in groups(counts_E, rows_RI.shape[0]):
        out[start:stop] = rows_RI[start:stop] @ weight_EOI[expert].T
    return out


def grouped_mm_transposed(rows_RO: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """x_r = W_e(r)ᵀ · y_r: the gradient of `grouped_mm` with respect to its rows. Returns (R, I)."""
    out = rows_RO.new_zeros(rows_RO.shape[0], weight_EOI.shape[2])
    rows_RO = rows_RO.contiguous()
    for expert, start, stop in groups(counts_E, rows_RO.shape[0]):
        out[start:stop] = rows_RO[start:stop] @ weight_EOI[expert]
    return out


def grouped_outer(rows_RO: Tensor, rows_RI: Tensor, counts_E: Tensor) -> Tensor:
    """Σ_r y_r ⊗ x_r over the rows of each expert: the gradient of `grouped_mm` with respect to the weight.

    Returns (E, O, I); an expert without rows gets exact zeros.
    """
    out = rows_RO.new_zeros(counts_E.shape[0], rows_RO.shape[1], rows_RI.shape[1])
    rows_RO, rows_RI = rows_RO.contiguous(), rows_RI.contiguous()
    for expert, start, stop in groups(counts_E, rows_RO.shape[0]):
        out[expert] = rows_RO[start:stop].T @ rows_RI[start:stop]
    return out


def moe_decode(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    in_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    activation: str,
) -> Tensor:
    """The whole of dispatch, experts and combine for few tokens, without sorting: (T, D) → (T, D).

    `in_proj_EGD` holds gate and up one after the other (G = 2F, SwiGLU) or up alone (G = F); the
    selected experts' outputs are summed in fp32 (fp64 for fp64) with `weights_TK` and returned in x's dtype.
    """
    experts = in_proj_EGD.shape[0]
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    gated = in_proj_EGD.shape[1] == 2 * down_proj_EDF.shape[2]
    out_TD = x_TD.new_zeros(x_TD.shape, dtype=wide)
    for token, ids in enumerate(expert_ids_TK.tolist()):
        for slot, expert in enumerate(ids):
            if not 0 <= expert < experts:
                raise ConfigError(f"moe_decode: expert id {expert} is not one of 0 to {experts - 1}")
            hidden_G = in_proj_EGD[expert] @ x_TD[token]
            if gated:
                gate_F, up_F = hidden_G.chunk(2)
                hidden_F = activate(gate_F, activation) * up_F
            else:
                hidden_F = activate(hidden_G, activation)
            out_TD[token] += weights_TK[token, slot].to(wide) * (down_proj_EDF[expert] @ hidden_F).to(wide)
    return out_TD.to(x_TD.dtype)


def moe_mlp(
    x_TD: Tensor,
    token_ids_A: Tensor,
    expert_ids_A: Tensor,
    weights_A: Tensor,
    in_proj_EGD: Tensor,
    in_bias_EG: Tensor | None,
    down_proj_EDF: Tensor,
    down_bias_ED: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Dispatch, experts and combine for any routing: y_t = Σ weight_a · E_e(a)(x_t) over the token's assignments.

    E(x) = down · (act(gate) ⊙ up) + its bias, where in_proj · x + its bias is gate, then up (G = 2F), or up alone
    without ⊙ (G = F). An expert id of E is nobody's and adds nothing. Summed in fp32 (fp64 for fp64).
    """
    experts, _, inner = down_proj_EDF.shape
    ids = expert_ids_A.tolist()
    if ids and not 0 <= min(ids) <= max(ids) <= experts:
        raise ConfigError(f"moe_mlp: expert ids go from {min(ids)} to {max(ids)}, not from 0 to at most {experts}")
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    out_TD = x_TD.new_zeros(x_TD.shape, dtype=wide)
    for expert in range(experts):
        here_N = (expert_ids_A == expert).nonzero().flatten()
        tokens_N = token_ids_A[here_N]
        hidden_NG = F.linear(x_TD[tokens_N], in_proj_EGD[expert], None if in_bias_EG is None else in_bias_EG[expert])
        if in_proj_EGD.shape[1] == 2 * inner:
            gate_NF, up_NF = hidden_NG.chunk(2, dim=-1)
            hidden_NF = activate(gate_NF, activation) * up_NF
        else:
            hidden_NF = activate(hidden_NG, activation)
        rows_ND = F.linear(hidden_NF, down_proj_EDF[expert], None if down_bias_ED is None else down_bias_ED[expert])
        out_TD = out_TD.index_add(0, tokens_N, rows_ND.to(wide) * weights_A[here_N].to(wide).unsqueeze(-1))
    return out_TD.to(out_dtype)


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """(T, K) int64: the numbers of each row's K largest scores, the largest first; of equals the lower number first.

    A NaN comes before everything.
    """
    # A stable sort, because torch.topk leaves the order of equal values unspecified.
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


def groups(counts_E: Tensor, rows: int) -> list[tuple[int, int, int]]:
    """(expert, first row, one past its last row) of each expert that has rows; ConfigError if they do not fit."""
    groups, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if not 0 <= count <= rows - start:
            raise ConfigError(f"counts_E[{expert}] is {count}, but {rows - start} of the {rows} rows are left")
        if count:
            groups.append((expert, start, start + count))
        start += count
    return groups
