"""Each family's row for GGUF files, in `GGUF_ARCHS`: what llama.cpp computes for that architecture (src/models/*.cpp).

It ignores keys that the architecture has no use for, and so do the rows: what a model has beside that comes back
different, and is refused when it is written.
"""

from __future__ import annotations

from typing import Any

from moekit.config import AttentionConfig, MLAConfig, ModelConfig, RopeConfig, SigmoidOptions, TopKOptions, YarnRope
from moekit.errors import UnsupportedError
from moekit.models.families.deepseek import latent_scale
from moekit.models.gguf_layout import ROPE_FREQS, gguf_layout
from moekit.models.gguf_rope import read_scaling
from moekit.models.gguf_rows import (
    GGUF_ARCHS,
    ONE_WIDTH,
    OWN_WIDTH,
    SIGMOID,
    SOFTMAX,
    GGUFArch,
    first_dense,
    read_experts,
    scored_experts,
    softmax_experts,
)
from moekit.models.keys import Keys, unsupported

__all__ = ["GGUF_ARCHS"]

_TIED, _BIASED = "tie_word_embeddings", "attention_bias"
_PLAIN = gguf_layout()
_PAIRED = gguf_layout(interleaved=True, ignored=(ROPE_FREQS,))
"""Where llama.cpp rotates neighbours, and may have a factor for each frequency."""
_NEXT = ("blk.{layers}.*",)  # a layer for predicting several tokens at once

# No windows: a Mistral that has one is refused.
GGUFArch("llama", _PAIRED, optional=(_TIED, _BIASED, "mlp_bias")).register(
    "llama", "mistral", told_by=lambda keys: "mixtral" if keys.whole("expert_count", 0) else "llama"
)
GGUFArch(
    "llama",
    _PAIRED,
    lambda keys: {"moe": read_experts(keys, ONE_WIDTH, gate_order="topk_softmax")},
    optional=(_TIED, _BIASED),
    experts_width=ONE_WIDTH,
).register("mixtral")

# Of Qwen's, no bias of the output projection is read.
_NO_OUTPUT_BIAS = {"attention": AttentionConfig(output_bias=False)}
GGUFArch("qwen2", _PLAIN, lambda _: _NO_OUTPUT_BIAS, optional=(_TIED, _BIASED), square=True).register("qwen2")
GGUFArch("qwen3", _PLAIN, lambda _: {"qk_norm": True}).register("qwen3")


def _shared_width(config: ModelConfig) -> dict[str, Any]:
    width = config.moe.shared_width if config.moe else 0
    return {"expert_shared_feed_forward_length": width} if width else {}


def _qwen2_moe(keys: Keys) -> dict[str, Any]:
    width = keys.whole("expert_shared_feed_forward_length")
    shared: dict[str, Any] = {"num_shared_experts": 1, "shared_intermediate_size": width, "shared_gate": True}
    return {"moe": softmax_experts(keys, False, **shared), **_NO_OUTPUT_BIAS}


def _qwen3_moe(keys: Keys) -> dict[str, Any]:
    return {"moe": softmax_experts(keys, True), "qk_norm": True}


GGUFArch(
    "qwen2moe", _PLAIN, _qwen2_moe, _shared_width, optional=(_BIASED,), experts_width=OWN_WIDTH, square=True
).register("qwen2_moe")
GGUFArch("qwen3moe", _PLAIN, _qwen3_moe, experts_width=OWN_WIDTH).register("qwen3_moe")


def _olmoe(keys: Keys) -> dict[str, Any]:
    """Its keys have as many heads as its queries."""
    return {
        "moe": softmax_experts(keys, False, ONE_WIDTH),
        "qk_norm": True,
        "attention": AttentionConfig(qk_norm_over="all"),
        "num_key_value_heads": keys.whole("attention.head_count"),
    }


GGUFArch("olmoe", _PLAIN, _olmoe, optional=(), experts_width=ONE_WIDTH, square=True).register("olmoe")


def _deepseek(keys: Keys) -> dict[str, Any]:
    shared, scale = keys.whole("expert_shared_count"), keys.real("expert_weights_scale", 0.0) or 1.0
    moe = softmax_experts(keys, False, num_shared_experts=shared, routed_scaling_factor=scale)
    return {"moe": moe, "dense_layers": first_dense(keys)}


GGUFArch("deepseek", _PAIRED, _deepseek, experts_width=OWN_WIDTH, square=True).register("deepseek")


def _latent(keys: Keys) -> dict[str, Any]:
    """DeepSeek-V2 and V3: one key and value head as wide as the latent vector, or in older files heads as they are."""
    rope, mla = keys.whole("rope.dimension_count"), "_mla" if keys.has("attention.key_length_mla") else ""
    sizes = MLAConfig(
        kv_lora_rank=keys.whole("attention.kv_lora_rank"),
        nope_head_dim=keys.whole(f"attention.key_length{mla}") - rope,
        rope_head_dim=rope,
        value_head_dim=keys.whole(f"attention.value_length{mla}"),
        q_lora_rank=keys.whole("attention.q_lora_rank", 0) or None,
    )
    # llama.cpp takes both factors of YaRN to be equal, and this is a tenth of them; without it scores get that of 1.
    weight = round(10 * keys.real("rope.scaling.yarn_log_multiplier", 0.0), 6)
    both: dict[str, Any] = {"mscale": weight, "mscale_all_dim": weight} if weight else {}
    scaling = read_scaling(keys, rope, **both)
    return {
        "head_dim": rope,
        "num_key_value_heads": keys.whole("attention.head_count"),
        "mla": sizes,
        "rope": RopeConfig(scaling=scaling, interleaved=True),
        "attention": AttentionConfig(scale=latent_scale(sizes, scaling, weight or 1.0)),
        "moe": scored_experts(keys, SOFTMAX),
        "dense_layers": first_dense(keys),
    }


def _write_latent(config: ModelConfig) -> dict[str, Any]:
    sizes, scaling = config.mla, config.rope.scaling
    if sizes is None:
        raise UnsupportedError(f"a {config.arch} model has latent attention, and this one has not")
    weight = scaling.mscale_all_dim if isinstance(scaling, YarnRope) else None
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": sizes.kv_lora_rank + sizes.rope_head_dim,
        "attention.value_length": sizes.kv_lora_rank,
        "attention.key_length_mla": sizes.query_head_dim,
        "attention.value_length_mla": sizes.value_head_dim,
        "attention.kv_lora_rank": sizes.kv_lora_rank,
        "attention.q_lora_rank": sizes.q_lora_rank or 0,
        **({"rope.scaling.yarn_log_multiplier": 0.1 * weight} if weight else {}),
    }


GGUFArch("deepseek2", gguf_layout(ignored=_NEXT), _latent, _write_latent, experts_width=OWN_WIDTH).register(
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    told_by=lambda keys: "deepseek_v3" if keys.whole("expert_gating_func", SOFTMAX) == SIGMOID else "deepseek_v2",
)


def _glm4_moe(keys: Keys) -> dict[str, Any]:
    return {"moe": scored_experts(keys, SIGMOID), "dense_layers": first_dense(keys), **_NO_OUTPUT_BIAS}


GGUFArch(
    "glm4moe",
    gguf_layout(mlp_norm="post_attention_norm", ignored=_NEXT),
    _glm4_moe,
    optional=(_TIED, _BIASED, "qk_norm"),
    experts_width=OWN_WIDTH,
    partly_rotated=True,
).register("glm4_moe", "solar_open")


def _dots1(keys: Keys) -> dict[str, Any]:
    """Its keys have as many heads as its queries."""
    heads = keys.whole("attention.head_count")
    moe = scored_experts(keys, SOFTMAX)
    return {"moe": moe, "dense_layers": first_dense(keys), "qk_norm": True, "num_key_value_heads": heads}


GGUFArch("dots1", _PLAIN, _dots1, optional=(), experts_width=OWN_WIDTH).register("dots1")


def _minimax(keys: Keys) -> dict[str, Any]:
    scores = keys.whole("expert_gating_func")
    unsupported(keys, scores != SIGMOID, f"expert_gating_func {scores}", "sigmoid (2) in this family")
    return {
        "moe": softmax_experts(keys, True, ONE_WIDTH, router="sigmoid", router_options=SigmoidOptions()),
        "qk_norm": True,
        "attention": AttentionConfig(qk_norm_over="all"),
    }


GGUFArch("minimax-m2", _PLAIN, _minimax, optional=(), experts_width=ONE_WIDTH, partly_rotated=True).register(
    "minimax_m2"
)


def _ernie(keys: Keys) -> dict[str, Any]:
    every = keys.whole("interleave_moe_layer_step")
    unsupported(keys, every != 1, f"interleave_moe_layer_step {every}", "experts in every layer after the first (1)")
    width, shared = keys.whole("expert_shared_feed_forward_length", 0), keys.whole("expert_shared_count", 0)
    own = None if width == shared * keys.whole("expert_feed_forward_length") else width // max(shared, 1)
    return {
        "moe": softmax_experts(
            keys,
            True,
            router_options=TopKOptions(bias=True),
            num_shared_experts=shared,
            shared_intermediate_size=own,
        ),
        "dense_layers": first_dense(keys),
        "rope": RopeConfig(scaling=read_scaling(keys, keys.whole("rope.dimension_count", 0)), interleaved=True),
    }


def _write_ernie(config: ModelConfig) -> dict[str, Any]:
    return {"interleave_moe_layer_step": 1, **_shared_width(config)}


GGUFArch("ernie4_5-moe", _PLAIN, _ernie, _write_ernie, experts_width=OWN_WIDTH).register("ernie4_5_moe")


def _hunyuan(keys: Keys) -> dict[str, Any]:
    width, shared = keys.whole(ONE_WIDTH), keys.whole("expert_shared_feed_forward_length", 0)
    own = None if shared in (0, width) else shared
    return {
        "moe": softmax_experts(keys, True, ONE_WIDTH, num_shared_experts=1, shared_intermediate_size=own),
        "qk_norm": True,
        "attention": AttentionConfig(qk_norm_after_rope=True),
    }


GGUFArch("hunyuan-moe", _PLAIN, _hunyuan, _shared_width, experts_width=ONE_WIDTH).register("hunyuan_v1_moe")


def _granite(keys: Keys) -> dict[str, Any]:
    shared = keys.whole("expert_shared_feed_forward_length", 0)
    own = {"num_shared_experts": 1, "shared_intermediate_size": shared} if shared else {}
    return {
        "moe": read_experts(keys, ONE_WIDTH, gate_order="topk_softmax", **own),
        "attention": AttentionConfig(scale=keys.real("attention.scale", 0.0) or None),
        "embedding_multiplier": keys.real("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": keys.real("residual_scale", 0.0) or 1.0,
        "logits_multiplier": 1 / (keys.real("logit_scale") or 1.0),
    }


def _write_granite(config: ModelConfig) -> dict[str, Any]:
    scale = config.attention.scale
    return {
        **({} if scale is None else {"attention.scale": float(scale)}),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": 1 / config.logits_multiplier,
        **_shared_width(config),
    }


GGUFArch("granitemoe", _PAIRED, _granite, _write_granite, optional=(_TIED, _BIASED), experts_width=ONE_WIDTH).register(
    "granitemoe",
    "granitemoeshared",
    told_by=lambda keys: "granitemoeshared" if keys.has("expert_shared_feed_forward_length") else "granitemoe",
)


def _dbrx(keys: Keys) -> dict[str, Any]:
    return {
        "moe": softmax_experts(keys, True, ONE_WIDTH),
        "norm": "layer",
        "attention": AttentionConfig(clip_qkv=keys.real("attention.clamp_kqv") or None),
    }


GGUFArch(
    "dbrx",
    gguf_layout(joined_qkv=True, mlp_norm="attn_output_norm"),
    _dbrx,
    lambda config: {"attention.clamp_kqv": float(config.attention.clip_qkv or 0.0)},
    optional=(),
    experts_width=ONE_WIDTH,
    square=True,
).register("dbrx")


def _grok(keys: Keys) -> dict[str, Any]:
    """llama.cpp divides the chosen weights by their sum; the norm behind the experts undoes it but for its epsilon."""
    return {
        "moe": softmax_experts(keys, False, ONE_WIDTH, activation="gelu_tanh"),
        "norm_place": "both",
        "activation": "gelu_tanh",
        "attention": AttentionConfig(
            scale=keys.real("attention.output_scale", 0.08838834764831845),
            softcap=keys.real("attn_logit_softcapping", 30.0),
        ),
        "embedding_multiplier": keys.real("embedding_scale", 78.38367176906169),
        "logits_multiplier": keys.real("logit_scale", 0.5773502691896257),
    }


def _write_grok(config: ModelConfig) -> dict[str, Any]:
    return {
        "attention.output_scale": float(config.attention.scale or 0.0),
        "attn_logit_softcapping": float(config.attention.softcap or 0.0),
        "embedding_scale": float(config.embedding_multiplier),
        "logit_scale": float(config.logits_multiplier),
    }


GGUFArch("grok", _PLAIN, _grok, _write_grok, experts_width=ONE_WIDTH, square=True).register("grok-1")


def _gpt2(keys: Keys) -> dict[str, Any]:
    return {
        "positions": "learned",
        "norm": "layer",
        "norm_bias": True,
        "attention_bias": True,
        "activation": "gelu_tanh",
        "mlp_gated": False,
        "mlp_bias": True,
    }


GGUFArch("gpt2", gguf_layout(joined_qkv=True), _gpt2, square=True).register("gpt2")


def _gpt_oss(keys: Keys) -> dict[str, Any]:
    """A window in every second layer. The published ramp of YaRN is not cut to whole frequencies; llama.cpp's is."""
    layers, window = keys.whole("block_count"), keys.whole("attention.sliding_window")
    dims = keys.whole("attention.key_length")
    windowed = None if layers == 1 else tuple(range(0, layers, 2))
    return {
        "moe": read_experts(keys, router_options=TopKOptions(gate_bias=True), expert="clamped_swiglu", bias=True),
        "attention_bias": True,
        "attention": AttentionConfig(sinks=True, window=window, window_layers=windowed),
        "rope": RopeConfig(scaling=read_scaling(keys, dims, truncate=False)),
    }


GGUFArch(
    "gpt-oss",
    gguf_layout(mlp_norm="post_attention_norm"),
    _gpt_oss,
    lambda config: {"attention.sliding_window": config.attention.window or 0},
    optional=(),
    experts_width=OWN_WIDTH,
).register("gpt_oss")
