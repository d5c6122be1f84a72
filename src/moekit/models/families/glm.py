"""GLM-4 MoE, Solar Open and dots.llm1: DeepSeek-V3's experts behind grouped-query attention."""

from __future__ import annotations

from typing import Any

from moekit.config import AttentionConfig, ModelConfig
from moekit.models.families.common import layer_types, moe_of, read_layer_types, read_window
from moekit.models.families.deepseek import DEEPSEEK_INNER, first_dense, sigmoid_experts, write_experts, write_groups
from moekit.models.families.row import Arch
from moekit.models.keys import Keys
from moekit.models.layout import HF_ATTENTION, HF_EXPERTS, HF_FUSED, HF_OUTER, HF_PREFIX, Layout


def _read_glm(keys: Keys) -> dict[str, Any]:
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": sigmoid_experts(keys),
        "dense_layers": first_dense(keys),
        "qk_norm": keys.flag("use_qk_norm"),
        "attention_bias": keys.flag("attention_bias"),
        "attention": AttentionConfig(output_bias=False),
    }


def _write_glm(config: ModelConfig) -> dict[str, Any]:
    return {**_write(config), "use_qk_norm": config.qk_norm, "first_k_dense_replace": len(config.dense_layers)}


def _read_solar(keys: Keys) -> dict[str, Any]:
    return {
        "intermediate_size": keys.whole("moe_intermediate_size"),  # of dense layers, and there are none
        "moe": sigmoid_experts(keys),
        "attention_bias": keys.flag("attention_bias"),
        "attention": AttentionConfig(output_bias=False),
    }


def _read_dots(keys: Keys) -> dict[str, Any]:
    first, layers = keys.whole("max_window_layers"), range(keys.whole("num_hidden_layers"))
    window = read_window(keys, read_layer_types(keys, [layer >= first for layer in layers]))
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": sigmoid_experts(keys),
        "dense_layers": first_dense(keys),
        "qk_norm": True,
        "attention_bias": keys.flag("attention_bias"),
        "attention": AttentionConfig(**window),
    }


def _write_dots(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write(config),
        "first_k_dense_replace": len(config.dense_layers),
        "sliding_window": config.attention.window,
        "layer_types": layer_types(config),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_experts(config), **write_groups(moe_of(config)), "attention_bias": config.attention_bias}


_LAYOUT = Layout(
    HF_OUTER,
    HF_PREFIX,
    HF_ATTENTION | DEEPSEEK_INNER,
    experts=HF_EXPERTS,
    fused=HF_FUSED,
    ignored=("model.layers.{layers}.*",),  # a layer for predicting several tokens at once
)

Arch(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    defaults={
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
    read=_read_glm,
    write=_write_glm,
    hf=_LAYOUT,
).register()

Arch(
    model_type="solar_open",
    architecture="SolarOpenForCausalLM",
    defaults={
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-5,
        "norm_topk_prob": True,
        "head_dim": 128,
        "n_shared_experts": 1,
    },
    read=_read_solar,
    write=_write,
    hf=_LAYOUT,
    absent=frozenset({"intermediate_size"}),
).register()

Arch(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    defaults={"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "sliding_window": 4096, "max_window_layers": 62},
    read=_read_dots,
    write=_write_dots,
    hf=_LAYOUT,
).register()
