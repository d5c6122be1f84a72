"""Grouped-query self-attention with rotary positions and a cache.

Shapes: B batch, L new positions, S all positions, D hidden, H heads, d head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.config import ModelConfig
from moekit.models.blocks import RMSNorm
from moekit.models.cache import KVCache
from moekit.moe import Linear

__all__ = ["Attention", "AttentionInput", "attention_mask"]


@dataclass(frozen=True, eq=False)
class AttentionInput:
    """What every layer's attention needs beside the hidden states; made once a forward pass.

    Attributes:
        cos_BLd, sin_BLd: rotary factors (B or 1, 1, L, d), float32.
        allowed_BLS: bool (B or 1, 1, L, S), True where a query may look; None means plain causal.
        mask_BL: bool, True for real tokens; None when all are.
        cache: keys and values of the past, or None.
        ids_BL: int64, the tokens, for routers that read them.
    """

    cos_BLd: Tensor
    sin_BLd: Tensor
    allowed_BLS: Tensor | None
    mask_BL: Tensor | None
    cache: KVCache | None
    ids_BL: Tensor


class Attention(nn.Module):
    """softmax(q kᵀ / √d) v with H query heads sharing fewer key–value heads (2305.13245).

    With `qk_norm` each head's query and key pass an RMSNorm before rotation (Qwen3).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BLD: Tensor, inputs: AttentionInput) -> Tensor:
        """(B, L, D) → (B, L, D); appends to the cache when there is one."""
        q_BHLd = rotate(self.q_norm(self._heads(self.q_proj(x_BLD))), inputs)
        k_BHSd = rotate(self.k_norm(self._heads(self.k_proj(x_BLD))), inputs)
        v_BHSd = self._heads(self.v_proj(x_BLD))
        if inputs.cache is not None:
            k_BHSd, v_BHSd = inputs.cache.append(self.layer, k_BHSd, v_BHSd)
        out_BHLd = F.scaled_dot_product_attention(
            q_BHLd,
            k_BHSd.to(q_BHLd.dtype),
            v_BHSd.to(q_BHLd.dtype),
            attn_mask=inputs.allowed_BLS,
            is_causal=inputs.allowed_BLS is None and q_BHLd.shape[2] > 1,
            enable_gqa=True,
        )
        y_BLD: Tensor = self.o_proj(out_BHLd.transpose(1, 2).flatten(2))
        return y_BLD

    def _heads(self, x_BLE: Tensor) -> Tensor:
        return x_BLE.view(*x_BLE.shape[:2], -1, self.head_dim).transpose(1, 2)


def rotate(x_BHLd: Tensor, inputs: AttentionInput) -> Tensor:
    """Rotate each (first half, second half) pair of features by its position's angle; x's dtype comes back."""
    left, right = x_BHLd.chunk(2, dim=-1)
    cos, sin = inputs.cos_BLd.to(x_BHLd.dtype), inputs.sin_BLd.to(x_BHLd.dtype)
    return x_BHLd * cos + torch.cat([-right, left], dim=-1) * sin


def attention_mask(length: int, past: int, document_ids_BL: Tensor | None, mask_BL: Tensor | None) -> Tensor | None:
    """Which of the past + length positions each new one may look at: bool (B or 1, 1, L, S), or None for plain causal.

    A position sees itself and what came before it in the same document; nobody sees padding but padding itself.
    """
    if document_ids_BL is None and mask_BL is None and (past == 0 or length == 1):
        return None
    positions = torch.arange(past + length)
    allowed = positions <= positions[past:, None]
    if document_ids_BL is not None:
        allowed = allowed & (document_ids_BL[:, None, :] == document_ids_BL[:, :, None])
    if mask_BL is not None:
        allowed = (allowed & mask_BL[:, None, :]) | torch.eye(length, dtype=torch.bool)
    return allowed.unsqueeze(1) if allowed.dim() == 3 else allowed[None, None]
