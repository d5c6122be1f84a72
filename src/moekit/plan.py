"""What a model costs, from its configuration alone: parameters, work and memory. Pure functions, no torch.

Formulas count matrices; a multiply and an add are two FLOPs (2001.08361 section 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moekit.config import MLAConfig, ModelConfig, MoEConfig

__all__ = [
    "BITS_PER_WEIGHT",
    "ParameterCount",
    "flops_per_token",
    "kv_cache_bytes",
    "parameters",
    "weight_bytes",
]

BITS_PER_WEIGHT = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.5, "int4": 4.5}
"""Bits a weight takes; int8 and int4 carry one 16-bit scale for every 32 weights."""


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has, and how many of them work on one token.

    Attributes:
        parts: total by part: embedding, attention, mlp (dense layers), router, experts, shared, norms, head.
        active_parts: the same for one token; only `experts` differs: by top_k / num_experts, where experts
            differ on average, where their number does by what `RouterOptions.mean_k` says.
    """

    parts: Mapping[str, int]
    active_parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        """Parameters a token meets, the embedding and the head counted whole, as the published figures do."""
        return sum(self.active_parts.values())


def parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters of a model; router and shared experts once, a tied head not at all.

    >>> config = ModelConfig(arch="mixtral", vocab_size=32_000, hidden_size=4096, intermediate_size=14_336,
    ...     num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    ...     max_position_embeddings=32_768,
    ...     moe=MoEConfig(hidden_size=4096, intermediate_size=14_336, num_experts=8, top_k=2))
    >>> f"{parameters(config).total:,} of which {parameters(config).active:,} work on a token"
    '46,702,792,704 of which 12,879,925,248 work on a token'
    """
    layers, moe_layers, moe = config.num_hidden_layers, len(config.moe_layers), config.moe
    embedding = config.vocab_size * config.hidden_size
    positions = config.max_position_embeddings * config.hidden_size if config.positions == "learned" else 0
    parts = {
        "embedding": embedding + positions,
        "attention": layers * _attention(config),
        "mlp": (layers - moe_layers) * _mlp(config),
        "router": moe_layers * _router(moe) if moe else 0,
        "experts": moe_layers * _experts(moe) if moe else 0,
        "shared": moe_layers * _shared(moe) if moe else 0,
        "norms": _norms(config),
        "head": 0 if config.tie_word_embeddings else embedding + config.head_bias * config.vocab_size,
    }
    active_experts = round(moe_layers * _experts(moe) * moe.options.mean_k(moe.top_k) / moe.num_experts) if moe else 0
    return ParameterCount(parts, {**parts, "experts": active_experts})


def flops_per_token(config: ModelConfig, context: int = 0) -> int:
    """FLOPs of one token's forward pass: 2 a matrix weight it meets, and attention over `context` earlier positions.

    Training costs three times this (2001.08361 table 1); looking an embedding up costs nothing.
    """
    active = parameters(config).active_parts
    head = config.vocab_size * config.hidden_size
    matrices = sum(active[part] for part in ("attention", "mlp", "router", "experts", "shared")) + head
    mla, scored, summed = config.mla, config.head_dim, config.head_dim
    if mla is not None:
        scored, summed = mla.query_head_dim, mla.value_head_dim
    scores_and_sums = 2 * context * config.num_attention_heads * (scored + summed) * config.num_hidden_layers
    return 2 * matrices + scores_and_sums


def weight_bytes(config: ModelConfig) -> dict[str, int]:
    """Bytes of all weights in each format of `BITS_PER_WEIGHT`."""
    total = parameters(config).total
    return {name: round(total * bits / 8) for name, bits in BITS_PER_WEIGHT.items()}


def kv_cache_bytes(config: ModelConfig, tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes of the keys and values of `tokens` positions in every layer."""
    values = config.num_hidden_layers * math.prod(config.cache_shape)
    return tokens * values * bytes_per_value


def _attention(config: ModelConfig) -> int:
    """One layer's projections, with their biases if they have any."""
    if config.mla is not None:
        return _latent_attention(config, config.mla)
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    output_bias = config.hidden_size if config.attention.output_bias else 0
    bias = queries + 2 * keys + output_bias if config.attention_bias else 0
    sinks = config.num_attention_heads if config.attention.sinks else 0
    return config.hidden_size * (2 * queries + 2 * keys) + bias + sinks


def _latent_attention(config: ModelConfig, mla: MLAConfig) -> int:
    """Projections into and out of the latent vectors, their norms, and the output's."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    queries, kept = heads * mla.query_head_dim, mla.kv_lora_rank + mla.rope_head_dim
    rank = mla.q_lora_rank
    count = hidden * queries if rank is None else rank * (hidden + 1 + queries)
    count += hidden * kept + mla.kv_lora_rank
    count += heads * (mla.kv_lora_rank * (mla.nope_head_dim + mla.value_head_dim) + mla.value_head_dim * hidden)
    return count + ((rank or 0) + kept + hidden if config.attention_bias else 0)


def _mlp(config: ModelConfig) -> int:
    """One dense MLP: (gate and) up and down, with their biases if they have any."""
    inputs = 2 if config.mlp_gated else 1
    bias = inputs * config.intermediate_size + config.hidden_size if config.mlp_bias else 0
    return (inputs + 1) * config.hidden_size * config.intermediate_size + bias


def _router(moe: MoEConfig) -> int:
    """The gate's rows and their bias; a selection bias is no parameter."""
    bias = 1 if getattr(moe.options, "gate_bias", False) else 0
    return moe.options.gate_rows(moe.num_experts) * (moe.hidden_size + bias)


def _experts(moe: MoEConfig) -> int:
    """All routed experts of one layer: (gate and) up and down of each, nothing for those without parameters."""
    if moe.expert_groups:
        return sum(_experts(moe.group_config(group)) for group in moe.expert_groups)
    if moe.expert in ("zero", "identity"):
        return 0
    inputs = 1 if moe.expert == "mlp" else 2
    bias = inputs * moe.intermediate_size + moe.hidden_size if moe.bias else 0
    return moe.num_experts * ((inputs + 1) * moe.hidden_size * moe.intermediate_size + bias)


def _shared(moe: MoEConfig) -> int:
    """All shared experts of one layer, as one MLP of the routed ones' kind, and their gate."""
    if not moe.num_shared_experts:
        return 0
    inputs = 1 if moe.expert == "mlp" else 2
    bias = inputs * moe.shared_width + moe.hidden_size if moe.bias else 0
    gate = moe.hidden_size if moe.shared_gate else 0
    return (inputs + 1) * moe.hidden_size * moe.shared_width + bias + gate


def _norms(config: ModelConfig) -> int:
    """Two or four norms a layer and the last one; with qk_norm two more, of one head's width or of all heads'."""
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    heads = 2 if config.attention.qk_norm_over == "head" else queries + keys
    places = 4 if config.norm_place == "both" else 2
    widths = (places * config.num_hidden_layers + 1) * config.hidden_size
    widths += config.num_hidden_layers * heads * config.head_dim if config.qk_norm else 0
    return widths * (2 if config.norm_bias else 1)
