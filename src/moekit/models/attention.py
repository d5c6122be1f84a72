"""Grouped-query self-attention with positions, windows and a cache.

Shapes: B batch, L new positions, S all positions, D hidden, H heads, d head dimension, r rotated features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.config import ModelConfig
from moekit.models.blocks import norm
from moekit.models.cache import KVCache
from moekit.models.rope import is_plain, rotate
from moekit.moe import Linear

__all__ = ["Attention", "AttentionInput", "attention_mask"]


@dataclass(frozen=True, eq=False)
class AttentionInput:
    """What every layer's attention needs beside the hidden states; made once a forward pass.

    Attributes:
        rotary: cos and sin, each (B or 1, 1, L, r) float32; None where positions are not rotary.
        allowed: by window, bool (B or 1, 1, L, S), True where a query may look; None means plain causal.
        mask_BL: bool, True for real tokens; None when all are.
        cache: keys and values of the past, or None.
        ids_BL: int64, the tokens, for routers that read them.
    """

    rotary: tuple[Tensor, Tensor] | None
    allowed: Mapping[int | None, Tensor | None]
    mask_BL: Tensor | None
    cache: KVCache | None
    ids_BL: Tensor


class Attention(nn.Module):
    """softmax(q kᵀ / √d) v with H query heads sharing fewer key–value heads (2305.13245).

    What a family has beside that is in `AttentionConfig`: norms of queries and keys before rotation, limits, sinks,
    windows. `extras` names what this one has; the native step knows none of them.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.options = options = config.attention
        self.window = options.window_of(layer)
        self.interleaved = config.rope.interleaved
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.attention_bias and options.output_bias)
        sizes = (config.head_dim,) * 2 if options.qk_norm_over == "head" else (q_size, kv_size)
        self.q_norm, self.k_norm = (norm(config, size) if config.qk_norm else nn.Identity() for size in sizes)
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads)) if options.sinks else None
        self.extras = _extras(config, self.window)

    def forward(self, x_BLD: Tensor, inputs: AttentionInput) -> Tensor:
        """(B, L, D) → (B, L, D); appends to the cache when there is one."""
        q_BHLd = self._positioned(self.q_proj(x_BLD), self.q_norm, inputs)
        k_BHSd = self._positioned(self.k_proj(x_BLD), self.k_norm, inputs)
        v_BHSd = self._heads(self._clipped(self.v_proj(x_BLD)))
        if inputs.cache is not None:
            k_BHSd, v_BHSd = inputs.cache.append(self.layer, k_BHSd, v_BHSd)
        out_BHLd = attend(
            q_BHLd,
            k_BHSd.to(q_BHLd.dtype),
            v_BHSd.to(q_BHLd.dtype),
            inputs.allowed[self.window],
            scale=self.options.scale,
            softcap=self.options.softcap,
            sinks_H=self.sinks,
        )
        y_BLD: Tensor = self.o_proj(out_BHLd.transpose(1, 2).flatten(2))
        return y_BLD

    def _positioned(self, x_BLE: Tensor, norm: nn.Module, inputs: AttentionInput) -> Tensor:
        """Queries or keys after norm, limit and rotation, (B, H, L, d)."""
        over_all, last = self.options.qk_norm_over == "all", self.options.qk_norm_after_rope
        x_BLE = norm(x_BLE) if over_all else x_BLE
        x_BHLd = self._heads(self._clipped(x_BLE))
        x_BHLd = x_BHLd if over_all or last else norm(x_BHLd)
        if inputs.rotary is not None:
            x_BHLd = rotate(x_BHLd, *inputs.rotary, self.interleaved)
        return norm(x_BHLd) if last else x_BHLd

    def _clipped(self, x: Tensor) -> Tensor:
        limit = self.options.clip_qkv
        return x if limit is None else x.clamp(-limit, limit)

    def _heads(self, x_BLE: Tensor) -> Tensor:
        return x_BLE.view(*x_BLE.shape[:2], -1, self.head_dim).transpose(1, 2)


def _extras(config: ModelConfig, window: int | None) -> tuple[str, ...]:
    """What this attention has that grouped queries with plain rotary positions have not."""
    options = config.attention
    found = {
        "its own positions": not is_plain(config),
        "a window": window is not None,
        "sinks": options.sinks,
        "limits": options.clip_qkv is not None or options.softcap is not None,
        "its own scale": options.scale is not None,
        "norms over all heads": config.qk_norm and options.qk_norm_over == "all",
        "norms after rotation": config.qk_norm and options.qk_norm_after_rope,
    }
    return tuple(name for name, there in found.items() if there)


def attend(
    q_BHLd: Tensor,
    k_BHSd: Tensor,
    v_BHSd: Tensor,
    allowed_BLS: Tensor | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Each query's weighted sum of values, (B, H, L, width of a value), in q's dtype.

    Args:
        allowed_BLS: True where a query may look; None is causal if there are several queries, else everything.
        scale: of the scores; 1/√d when None.
        softcap: c·tanh(score / c) instead of the score, before the mask.
        sinks_H: a logit a query head that takes part in the softmax and has no value.
    """
    if softcap is None and sinks_H is None:
        causal = allowed_BLS is None and q_BHLd.shape[2] > 1
        return F.scaled_dot_product_attention(
            q_BHLd, k_BHSd, v_BHSd, attn_mask=allowed_BLS, is_causal=causal, scale=scale, enable_gqa=True
        )
    heads, length = q_BHLd.shape[1], q_BHLd.shape[2]
    k_BHSd, v_BHSd = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (k_BHSd, v_BHSd))
    scores_BHLS = (q_BHLd @ k_BHSd.transpose(-1, -2)).float() * (scale or q_BHLd.shape[-1] ** -0.5)
    if softcap is not None:
        scores_BHLS = softcap * torch.tanh(scores_BHLS / softcap)
    if allowed_BLS is None and length > 1:
        allowed_BLS = torch.ones(length, length, dtype=torch.bool, device=q_BHLd.device).tril()
    if allowed_BLS is not None:
        scores_BHLS = scores_BHLS.masked_fill(~allowed_BLS, -torch.inf)
    if sinks_H is not None:
        sinks_BHL1 = sinks_H.float().view(1, -1, 1, 1).expand(*scores_BHLS.shape[:3], 1)
        scores_BHLS = torch.cat([scores_BHLS, sinks_BHL1], dim=-1)
    weights_BHLS = scores_BHLS.softmax(dim=-1)[..., : k_BHSd.shape[2]]
    return weights_BHLS.to(v_BHSd.dtype) @ v_BHSd


def attention_mask(
    length: int, past: int, document_ids_BL: Tensor | None, mask_BL: Tensor | None, window: int | None = None
) -> Tensor | None:
    """Which of the past + length positions each new one may look at: bool (B or 1, 1, L, S), or None for plain causal.

    A position sees itself and what came before it in the same document, with a window the last `window` of these;
    nobody sees padding but padding itself.
    """
    window = None if window is None or window >= past + length else window
    if document_ids_BL is None and mask_BL is None and window is None and (past == 0 or length == 1):
        return None
    positions = torch.arange(past + length)
    allowed = positions <= positions[past:, None]
    if window is not None:
        allowed = allowed & (positions > positions[past:, None] - window)
    if document_ids_BL is not None:
        allowed = allowed & (document_ids_BL[:, None, :] == document_ids_BL[:, :, None])
    if mask_BL is not None:
        allowed = (allowed & mask_BL[:, None, :]) | torch.eye(length, dtype=torch.bool)
    return allowed.unsqueeze(1) if allowed.dim() == 3 else allowed[None, None]
