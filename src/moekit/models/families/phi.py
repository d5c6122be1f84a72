"""Phi-3.5-MoE: two experts one after the other, LongRoPE with magnitudes of its own, LayerNorm, biases everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moekit.config import AttentionConfig, ModelConfig, SparseMixerOptions
from moekit.models.families.common import moe_of, read_experts, read_window, write_experts
from moekit.models.families.mixtral import MIXTRAL_LAYOUT
from moekit.models.families.row import Arch
from moekit.models.keys import Keys
from moekit.models.layout import HF_OUTER


def _read(keys: Keys) -> dict[str, Any]:
    moe = read_experts(
        keys,
        router="sparsemixer",
        router_options=SparseMixerOptions(eps=keys.real("router_jitter_noise")),
        input_jitter=keys.real("input_jitter_noise"),
    )
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": moe,
        "norm": "layer",
        "norm_bias": True,
        "attention_bias": keys.flag("attention_bias"),
        "attention": AttentionConfig(**read_window(keys)),
        "head_bias": keys.flag("lm_head_bias"),
        "router_aux_loss_coef": keys.real("router_aux_loss_coef"),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    moe = moe_of(config)
    eps = moe.options.eps if isinstance(moe.options, SparseMixerOptions) else None
    return {
        **write_experts(config),
        "router_jitter_noise": eps,
        "input_jitter_noise": moe.input_jitter,
        "attention_bias": config.attention_bias,
        "lm_head_bias": config.head_bias,
        "sliding_window": config.attention.window,
    }


_NORMS = {"attn_norm.bias": "input_layernorm.bias", "mlp_norm.bias": "post_attention_layernorm.bias"}

Arch(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    defaults={
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.01,
        "input_jitter_noise": 0.0,
    },
    read=_read,
    write=_write,
    hf=replace(
        MIXTRAL_LAYOUT,
        outer={**HF_OUTER, "norm.bias": "model.norm.bias", "head.bias": "lm_head.bias"},
        inner={**MIXTRAL_LAYOUT.inner, **_NORMS},
    ),
).register()
