"""Every weight of a model as a shape, from its configuration alone; counts, bytes and work are sums of it. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moekit.config import MLAConfig, ModelConfig, MoEConfig
from moekit.plan.switch import SwitchConfig

__all__ = ["PARTS", "AnyConfig", "Weights", "weights"]

PARTS = ("embedding", "attention", "mlp", "router", "experts", "shared", "norms", "head")
AnyConfig = ModelConfig | SwitchConfig


@dataclass(frozen=True)
class Weights:
    """Some tensors of one shape.

    Attributes:
        part: one of `PARTS`; mlp is that of layers without experts.
        shape: of each.
        copies: how many there are.
        active: how many work on one token, on average.
        plain: never quantised: vectors, routers and gates, learned positions (`moekit.adapt.quantise`).
    """

    part: str
    shape: tuple[int, ...]
    copies: int
    active: float
    plain: bool

    @property
    def numel(self) -> int:
        """Of one tensor."""
        return math.prod(self.shape)


def weights(config: AnyConfig) -> Iterator[Weights]:
    """All tensors that training learns; a tied head is none, a selection bias is no parameter."""
    if isinstance(config, SwitchConfig):
        yield from _switch(config)
        return
    hidden, layers, moe_layers = config.hidden_size, config.num_hidden_layers, len(config.moe_layers)
    yield _some("embedding", (config.vocab_size, hidden))
    if config.positions == "learned":
        yield _some("embedding", (config.max_position_embeddings, hidden), plain=True)
    yield from _attention(config) if config.mla is None else _latent_attention(config, config.mla)
    yield from _mlp("mlp", hidden, config.intermediate_size, config.mlp_gated, config.mlp_bias, layers - moe_layers)
    if config.moe is not None:
        yield from _moe(config.moe, moe_layers)
    yield from _norms(config)
    if not config.tie_word_embeddings:
        yield _some("head", (config.vocab_size, hidden))
    if config.head_bias:
        yield _some("head", (config.vocab_size,))


def _some(
    part: str, shape: tuple[int, ...], copies: int = 1, active: float | None = None, plain: bool = False
) -> Weights:
    return Weights(part, shape, copies, copies if active is None else active, plain or len(shape) < 2)


def _attention(config: ModelConfig) -> Iterator[Weights]:
    hidden, layers = config.hidden_size, config.num_hidden_layers
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield _some("attention", (queries, hidden), layers)
    yield _some("attention", (keys, hidden), 2 * layers)
    yield _some("attention", (hidden, queries), layers)
    if config.attention_bias:
        yield _some("attention", (queries,), layers)
        yield _some("attention", (keys,), 2 * layers)
        yield _some("attention", (hidden,), layers if config.attention.output_bias else 0)
    if config.attention.sinks:
        yield _some("attention", (config.num_attention_heads,), layers)


def _latent_attention(config: ModelConfig, mla: MLAConfig) -> Iterator[Weights]:
    """Projections into and out of the latent vectors, and the output's; the vectors' norms."""
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    queries, kept, rank = heads * mla.query_head_dim, mla.kv_lora_rank + mla.rope_head_dim, mla.q_lora_rank
    matrices = [(queries, hidden)] if rank is None else [(rank, hidden), (queries, rank)]
    matrices += [(kept, hidden), (heads * (mla.nope_head_dim + mla.value_head_dim), mla.kv_lora_rank)]
    matrices += [(hidden, heads * mla.value_head_dim)]
    for shape in matrices:
        yield _some("attention", shape, layers)
    for width in ([] if rank is None else [rank]) + [kept, hidden] if config.attention_bias else []:
        yield _some("attention", (width,), layers)
    for width in ([] if rank is None else [rank]) + [mla.kv_lora_rank]:
        yield _some("norms", (width,), layers)


def _mlp(
    part: str, hidden: int, width: int, gated: bool, bias: bool, copies: int, active: float | None = None
) -> Iterator[Weights]:
    """(Gate and) up and down, with their biases if they have any."""
    inputs, active = 2 if gated else 1, copies if active is None else active
    yield _some(part, (width, hidden), inputs * copies, inputs * active)
    yield _some(part, (hidden, width), copies, active)
    if bias:
        yield _some(part, (width,), inputs * copies, inputs * active)
        yield _some(part, (hidden,), copies, active)


def _moe(moe: MoEConfig, layers: int) -> Iterator[Weights]:
    """Router, routed experts, shared experts and their gate. Of the routed ones a token meets top_k, or what
    `RouterOptions.mean_k` says where their number varies; where they differ, so many of each kind on average."""
    rows, hidden = moe.options.gate_rows(moe.num_experts), moe.hidden_size
    yield _some("router", (rows, hidden), layers, plain=True)
    yield _some("router", (rows,), layers if getattr(moe.options, "gate_bias", False) else 0)
    mean = moe.options.mean_k(moe.top_k)
    groups = [moe.group_config(group) for group in moe.expert_groups] or [moe]
    for group in groups:
        if group.expert not in ("zero", "identity"):
            copies = layers * group.num_experts
            active, gated = copies * mean / moe.num_experts, group.expert != "mlp"
            yield from _mlp("experts", hidden, group.intermediate_size, gated, moe.bias, copies, active)
    if moe.num_shared_experts:
        yield from _mlp("shared", hidden, moe.shared_width, moe.expert != "mlp", moe.bias, layers)
        yield _some("shared", (1, hidden), layers if moe.shared_gate else 0, plain=True)


def _norms(config: ModelConfig) -> Iterator[Weights]:
    """Two or four norms a layer and the last one; with qk_norm two more, of one head's width or of all heads'."""
    layers, each = config.num_hidden_layers, 2 if config.norm_bias else 1
    places = 4 if config.norm_place == "both" else 2
    yield _some("norms", (config.hidden_size,), each * (places * layers + 1))
    if config.qk_norm:
        for heads in (config.num_attention_heads, config.num_key_value_heads):
            width = config.head_dim * (1 if config.attention.qk_norm_over == "head" else heads)
            yield _some("norms", (width,), each * layers)


def _switch(config: SwitchConfig) -> Iterator[Weights]:
    """Both stacks; the decoder attends twice. Relative positions are a table of the first layer of each stack."""
    model, inner = config.d_model, config.num_heads * config.d_kv
    stacks = ((config.num_layers, config.encoder_sparse, 1), (config.num_decoder_layers, config.decoder_sparse, 2))
    yield _some("embedding", (config.vocab_size, model))
    for layers, sparse, attentions in stacks:
        yield _some("attention", (inner, model), 3 * attentions * layers)
        yield _some("attention", (model, inner), attentions * layers)
        yield _some("attention", (config.relative_attention_num_buckets, config.num_heads), plain=True)
        yield from _mlp("mlp", model, config.d_ff, False, False, layers - sparse)
        yield _some("router", (config.num_experts, model), sparse, plain=True)
        yield from _mlp("experts", model, config.d_ff, False, False, sparse * config.num_experts, sparse)
        yield _some("norms", (model,), (attentions + 1) * layers + 1)
    if not config.tie_word_embeddings:
        yield _some("head", (config.vocab_size, model))
