"""The small pieces of a decoder block: norms and dense MLP.

Shapes: D hidden, F inner width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.config import Activation, ModelConfig
from moekit.kernels import activate
from moekit.moe import Linear

__all__ = ["DenseMLP", "LayerNorm", "RMSNorm", "norm"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, computed in fp32, returned in x's dtype (1910.07467 eq 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) → the same shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class LayerNorm(nn.Module):
    """(x − mean) / sqrt(variance + eps) · weight + bias, computed in fp32, returned in x's dtype (1607.06450 eq 4)."""

    def __init__(self, size: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) → the same shape and dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.weight.shape, self.weight.to(wide), bias, self.eps).to(x.dtype)


def norm(config: ModelConfig, size: int | None = None) -> RMSNorm | LayerNorm:
    """The family's norm, of the hidden size unless told otherwise."""
    size = size or config.hidden_size
    if config.norm == "rms":
        return RMSNorm(size, config.rms_norm_eps)
    return LayerNorm(size, config.rms_norm_eps, config.norm_bias)


class DenseMLP(nn.Module):
    """down · (act(gate · x) ⊙ up · x), the MLP of Llama; not `gated`, down · act(up · x), that of GPT-2."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: Activation = "silu",
        *,
        gated: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias) if gated else None
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        if self.gate_proj is None:
            hidden = activate(self.up_proj(x), self.activation)
        else:
            hidden = activate(self.gate_proj(x), self.activation) * self.up_proj(x)
        y: Tensor = self.down_proj(hidden)
        return y
