"""Multi-head latent attention, and a cache of one small vector a position.

Shapes: B batch, L new positions, S all positions, D hidden, H heads, n unrotated and r rotated features of a query or
key, v features of a value, c width of the latent vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.config import ModelConfig
from moekit.models.attention import AttentionInput, attend
from moekit.models.blocks import RMSNorm
from moekit.models.rope import rotate
from moekit.moe import Linear

__all__ = ["LatentAttention"]

_EPS = 1e-6  # of the norms of the latent vectors, whatever the model's own is (DeepSeek's code)


class LatentAttention(nn.Module):
    """Keys and values are products of one latent vector a position; a rotated part of the key is shared by all heads
    (2405.04434 eq 9–19). The cache holds the latent vector and that part, and both grow into keys and values when read.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.mla is not None
        self.layer, self.sizes, self.scale = layer, config.mla, config.attention.scale
        self.window, self.interleaved = config.attention.window_of(layer), config.rope.interleaved
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        sizes, queries = self.sizes, heads * self.sizes.query_head_dim
        if sizes.q_lora_rank is None:
            self.q_proj = Linear(hidden, queries, bias=False)
        else:
            self.q_a_proj = Linear(hidden, sizes.q_lora_rank, bias=bias)
            self.q_a_norm = RMSNorm(sizes.q_lora_rank, _EPS)
            self.q_b_proj = Linear(sizes.q_lora_rank, queries, bias=False)
        self.kv_a_proj = Linear(hidden, sizes.kv_lora_rank + sizes.rope_head_dim, bias=bias)
        self.kv_a_norm = RMSNorm(sizes.kv_lora_rank, _EPS)
        self.kv_b_proj = Linear(sizes.kv_lora_rank, heads * (sizes.nope_head_dim + sizes.value_head_dim), bias=False)
        self.o_proj = Linear(heads * sizes.value_head_dim, hidden, bias=bias)

    def forward(self, x_BLD: Tensor, inputs: AttentionInput) -> Tensor:
        """(B, L, D) → (B, L, D); appends to the cache when there is one."""
        q_BHLn, q_BHLr = _heads(self._queries(x_BLD), self.sizes.query_head_dim).split(
            [self.sizes.nope_head_dim, self.sizes.rope_head_dim], dim=-1
        )
        kept_B1Sc = self._latent(x_BLD, inputs)
        if inputs.cache is not None:
            (kept_B1Sc,) = inputs.cache.append(self.layer, kept_B1Sc)
        k_BHSd, v_BHSv = self._grown(kept_B1Sc.to(x_BLD.dtype))
        q_BHLd = torch.cat([q_BHLn, self._rotated(q_BHLr, inputs)], dim=-1)
        out_BHLv = attend(q_BHLd, k_BHSd, v_BHSv, inputs.allowed[self.window], scale=self.scale)
        y_BLD: Tensor = self.o_proj(out_BHLv.transpose(1, 2).flatten(2))
        return y_BLD

    def _queries(self, x_BLD: Tensor) -> Tensor:
        direct = self.sizes.q_lora_rank is None
        q_BLE: Tensor = self.q_proj(x_BLD) if direct else self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BLD)))
        return q_BLE

    def _latent(self, x_BLD: Tensor, inputs: AttentionInput) -> Tensor:
        """What the cache holds of these positions: (B, 1, L, c + r)."""
        latent_B1Lc, k_B1Lr = (
            self.kv_a_proj(x_BLD).unsqueeze(1).split([self.sizes.kv_lora_rank, self.sizes.rope_head_dim], dim=-1)
        )
        return torch.cat([self.kv_a_norm(latent_B1Lc), self._rotated(k_B1Lr, inputs)], dim=-1)

    def _grown(self, kept_B1Sc: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, H, S, n + r) and values (B, H, S, v)."""
        sizes = self.sizes
        latent_BSc, k_B1Sr = kept_B1Sc[:, 0, :, : sizes.kv_lora_rank], kept_B1Sc[..., sizes.kv_lora_rank :]
        grown = _heads(self.kv_b_proj(latent_BSc), sizes.nope_head_dim + sizes.value_head_dim)
        k_BHSn, v_BHSv = grown.split([sizes.nope_head_dim, sizes.value_head_dim], dim=-1)
        return torch.cat([k_BHSn, k_B1Sr.expand(-1, k_BHSn.shape[1], -1, -1)], dim=-1), v_BHSv

    def _rotated(self, x_BHLr: Tensor, inputs: AttentionInput) -> Tensor:
        assert inputs.rotary is not None
        return rotate(x_BHLr, *inputs.rotary, self.interleaved)


def _heads(x_BLE: Tensor, size: int) -> Tensor:
    return x_BLE.unflatten(-1, (-1, size)).transpose(1, 2)
