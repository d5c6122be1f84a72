"""Parameters and work of a model, from its configuration alone. Pure functions, no torch.

Formulas count matrices; a multiply and an add are two FLOPs (2001.08361 section 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moekit.config import ModelConfig
from moekit.plan.tensors import PARTS, AnyConfig, weights

__all__ = [
    "ParameterCount",
    "flops_per_token",
    "kv_cache_bytes",
    "kv_cache_bytes_read",
    "parameters",
    "training_flops",
]


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has, and how many of them work on one token.

    Attributes:
        parts: total by part: embedding, attention, mlp (dense layers), router, experts, shared, norms, head.
        active_parts: the same for one token; only `experts` differs: by top_k / num_experts, where experts
            differ on average, where their number does by what `RouterOptions.mean_k` says.
        only_input: those of `embedding` that are looked up and nothing else: all, but a tied head works on each token.
    """

    parts: Mapping[str, int]
    active_parts: Mapping[str, int]
    only_input: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        """Parameters a token meets, the embedding and the head counted whole, as most published figures do."""
        return sum(self.active_parts.values())

    @property
    def total_without_embeddings(self) -> int:
        return self.total - self.only_input

    @property
    def active_without_embeddings(self) -> int:
        """What a token is multiplied with: gpt-oss counts so, and N of the 6·N·D of training."""
        return self.active - self.only_input


def parameters(config: AnyConfig) -> ParameterCount:
    """Count the parameters of a model; router and shared experts once, a tied head not at all.

    >>> from moekit.config import MoEConfig
    >>> config = ModelConfig(arch="mixtral", vocab_size=32_000, hidden_size=4096, intermediate_size=14_336,
    ...     num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    ...     max_position_embeddings=32_768,
    ...     moe=MoEConfig(hidden_size=4096, intermediate_size=14_336, num_experts=8, top_k=2))
    >>> f"{parameters(config).total:,} of which {parameters(config).active:,} work on a token"
    '46,702,792,704 of which 12,879,925,248 work on a token'
    """
    parts, active = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0.0)
    for each in weights(config):
        parts[each.part] += each.copies * each.numel
        active[each.part] += each.active * each.numel
    hidden = config.hidden_size if isinstance(config, ModelConfig) else config.d_model
    head = config.vocab_size * hidden if config.tie_word_embeddings else 0
    return ParameterCount(parts, {part: round(number) for part, number in active.items()}, parts["embedding"] - head)


def flops_per_token(config: ModelConfig, context: int = 0) -> int:
    """FLOPs of one token's forward pass: 2 a matrix weight it meets, and attention over `context` earlier positions.

    Looking an embedding up costs nothing; a layer with a window attends to no more than that.
    """
    head = config.vocab_size * config.hidden_size
    matrices = head + sum(
        each.active * each.numel
        for each in weights(config)
        if len(each.shape) == 2 and each.part not in ("embedding", "head")
    )
    mla, scored, summed = config.mla, config.head_dim, config.head_dim
    if mla is not None:
        scored, summed = mla.query_head_dim, mla.value_head_dim
    return round(2 * matrices) + 2 * _seen(config, context) * config.num_attention_heads * (scored + summed)


def training_flops(config: AnyConfig, tokens: float) -> float:
    """6·N·D, N the parameters a token is multiplied with (2001.08361 table 1): attention's scores are left out."""
    return 6.0 * parameters(config).active_without_embeddings * tokens


def kv_cache_bytes(config: ModelConfig, tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes of the keys and values (of MLA, the latent vectors) of `tokens` positions in every layer.

    moekit's cache keeps all positions, those that a window has left behind too.
    """
    return tokens * config.num_hidden_layers * math.prod(config.cache_shape) * bytes_per_value


def kv_cache_bytes_read(config: ModelConfig, tokens: int, bytes_per_value: int = 2) -> int:
    """The bytes of it that the next token has to read: in a layer with a window, the window's."""
    return _seen(config, tokens) * math.prod(config.cache_shape) * bytes_per_value


def _seen(config: ModelConfig, context: int) -> int:
    """Earlier positions that a token attends to, over all layers."""
    windows = (config.attention.window_of(layer) for layer in range(config.num_hidden_layers))
    return sum(context if window is None else min(context, window) for window in windows)
