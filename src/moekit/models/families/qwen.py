"""Qwen2, Qwen3 and their sparse kin: biases on q, k and v, or norms on q and k; windows in some layers."""

from __future__ import annotations

from typing import Any

from moekit.config import AttentionConfig, ModelConfig
from moekit.models.families.common import (
    dense_layers,
    layer_types,
    moe_of,
    read_layer_types,
    read_window,
    softmax_experts,
    write_window,
)
from moekit.models.families.llama import DENSE_LAYOUT
from moekit.models.families.row import Arch
from moekit.models.keys import Keys
from moekit.models.layout import HF_ATTENTION, HF_DENSE, HF_EXPERTS, HF_FUSED, HF_OUTER, HF_PREFIX, Layout

_ROUTER = {"mlp.router.weight": "mlp.gate.weight"}
_SHARED = {
    **{f"mlp.shared.{name}_proj.weight": f"mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")},
    "mlp.shared.gate.weight": "mlp.shared_expert_gate.weight",
}
_DEFAULTS = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "max_window_layers": 28}
_SPARSE_DEFAULTS = {"router_aux_loss_coef": 0.001, "decoder_sparse_step": 1}


def _windows(keys: Keys, layers: tuple[int, ...] | None) -> dict[str, Any]:
    """The window counts only with use_sliding_window."""
    return read_window(keys, layers) if keys.flag("use_sliding_window") else {}


def _last_layers(keys: Keys) -> tuple[int, ...]:
    first, layers = keys.whole("max_window_layers"), range(keys.whole("num_hidden_layers"))
    return read_layer_types(keys, [layer >= first for layer in layers])


def _read_qwen2(keys: Keys) -> dict[str, Any]:
    windows = _windows(keys, _last_layers(keys))
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "attention_bias": True,
        "attention": AttentionConfig(output_bias=False, **windows),
    }


def _read_qwen3(keys: Keys) -> dict[str, Any]:
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "qk_norm": True,
        "attention_bias": keys.flag("attention_bias"),
        "attention": AttentionConfig(**_windows(keys, _last_layers(keys))),
    }


def _write_dense(config: ModelConfig) -> dict[str, Any]:
    return {**write_window(config), "layer_types": layer_types(config)}


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return {**_write_dense(config), "attention_bias": config.attention_bias}


def _read_qwen2_moe(keys: Keys) -> dict[str, Any]:
    first, layers = keys.whole("max_window_layers"), range(keys.whole("num_hidden_layers"))
    windows = _windows(keys, read_layer_types(keys, [layer % 2 == 0 and layer < first for layer in layers]))
    shared = keys.whole("shared_expert_intermediate_size")
    shared_expert = {"num_shared_experts": 1, "shared_intermediate_size": shared, "shared_gate": True}
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": softmax_experts(keys, "moe_intermediate_size", **shared_expert),
        "dense_layers": dense_layers(keys),
        "attention_bias": keys.flag("qkv_bias"),
        "attention": AttentionConfig(output_bias=False, **windows),
        "router_aux_loss_coef": keys.real("router_aux_loss_coef"),
    }


def _write_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write_sparse(config),
        "num_experts": moe_of(config).num_experts,
        "shared_expert_intermediate_size": moe_of(config).shared_intermediate_size,
        "qkv_bias": config.attention_bias,
        "layer_types": layer_types(config),
    }


def _read_qwen3_moe(keys: Keys) -> dict[str, Any]:
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": softmax_experts(keys, "moe_intermediate_size"),
        "dense_layers": dense_layers(keys),
        "qk_norm": True,
        "attention_bias": keys.flag("attention_bias"),
        "attention": AttentionConfig(**_windows(keys, None)),
        "router_aux_loss_coef": keys.real("router_aux_loss_coef"),
    }


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    experts = moe_of(config).num_experts
    return {**_write_sparse(config), "num_experts": experts, "attention_bias": config.attention_bias}


def _write_sparse(config: ModelConfig) -> dict[str, Any]:
    moe = moe_of(config)
    return {
        "moe_intermediate_size": moe.intermediate_size,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.norm_topk_prob,
        "mlp_only_layers": list(config.dense_layers),
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        **write_window(config),
    }


Arch(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=_DEFAULTS,
    read=_read_qwen2,
    write=_write_dense,
    hf=DENSE_LAYOUT,
).register()

Arch(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults=_DEFAULTS | {"head_dim": 128},
    read=_read_qwen3,
    write=_write_qwen3,
    hf=DENSE_LAYOUT,
).register()

Arch(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    defaults=_DEFAULTS | _SPARSE_DEFAULTS | {"qkv_bias": True},
    read=_read_qwen2_moe,
    write=_write_qwen2_moe,
    hf=Layout(
        HF_OUTER,
        HF_PREFIX,
        HF_ATTENTION | HF_DENSE | _ROUTER | _SHARED,
        experts=HF_EXPERTS,
        fused=HF_FUSED,
    ),
).register()

Arch(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    defaults=_DEFAULTS | _SPARSE_DEFAULTS,
    read=_read_qwen3_moe,
    write=_write_qwen3_moe,
    hf=Layout(HF_OUTER, HF_PREFIX, HF_ATTENTION | HF_DENSE | _ROUTER, experts=HF_EXPERTS, fused=HF_FUSED),
).register()
