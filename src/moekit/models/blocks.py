"""The small pieces of a decoder block: norm, rotary positions, dense MLP.

Shapes: B batch, L length, D hidden, F inner width, H heads, d head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.config import ModelConfig
from moekit.kernels import activate
from moekit.moe import Linear

__all__ = ["DenseMLP", "RMSNorm", "rotary_angles"]


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


def rotary_angles(positions_BL: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(−2i/d), each (B, 1, L, d) float32 (2104.09864 eq 15, half-split layout)."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions_BL.device, dtype=torch.float32) / config.head_dim
    angles_BLh = positions_BL.float().unsqueeze(-1) / config.rope_theta**exponents
    angles_BLd = torch.cat([angles_BLh, angles_BLh], dim=-1).unsqueeze(1)
    return angles_BLd.cos(), angles_BLd.sin()


class DenseMLP(nn.Module):
    """down · (silu(gate · x) ⊙ up · x), the MLP of Llama."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        y: Tensor = self.down_proj(activate(self.gate_proj(x), "silu") * self.up_proj(x))
        return y
