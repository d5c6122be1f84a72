"""OLMoE and FlexOlmo: norms over all of the queries and of the keys; FlexOlmo norms what attention and experts give."""

from __future__ import annotations

from typing import Any

from moekit.config import AttentionConfig, ModelConfig
from moekit.models.families.common import moe_of, softmax_experts, write_experts
from moekit.models.families.row import Arch
from moekit.models.keys import Keys
from moekit.models.layout import HF_ATTENTION, HF_EXPERTS, HF_FUSED, HF_OUTER, HF_PREFIX, Layout


def _read_olmoe(keys: Keys) -> dict[str, Any]:
    clip = keys.real("clip_qkv") if keys.has("clip_qkv") else None
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": softmax_experts(keys, "intermediate_size"),
        "qk_norm": True,
        "attention_bias": keys.flag("attention_bias"),
        "attention": AttentionConfig(qk_norm_over="all", clip_qkv=clip),
        "router_aux_loss_coef": keys.real("router_aux_loss_coef"),
    }


def _write_olmoe(config: ModelConfig) -> dict[str, Any]:
    moe = moe_of(config)
    return {
        **write_experts(config, "num_experts"),
        "norm_topk_prob": moe.norm_topk_prob,
        "attention_bias": config.attention_bias,
        "clip_qkv": config.attention.clip_qkv,
    }


def _read_flex(keys: Keys) -> dict[str, Any]:
    return {**_read_olmoe(keys), "attention": AttentionConfig(qk_norm_over="all"), "norm_place": "after"}


def _write_flex(config: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value in _write_olmoe(config).items() if name != "clip_qkv"}


Arch(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    defaults={
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 1,
        "eos_token_id": 50_279,
        "router_aux_loss_coef": 0.01,
    },
    read=_read_olmoe,
    write=_write_olmoe,
    hf=Layout(
        HF_OUTER,
        HF_PREFIX,
        HF_ATTENTION | {"mlp.router.weight": "mlp.gate.weight"},
        experts=HF_EXPERTS,
        fused=HF_FUSED,
    ),
).register()

Arch(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    defaults={
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 100_277,
        "eos_token_id": 100_257,
        "router_aux_loss_coef": 0.01,
    },
    read=_read_flex,
    write=_write_flex,
    hf=Layout(
        HF_OUTER,
        HF_PREFIX,
        HF_ATTENTION
        | {
            "attn_out_norm.weight": "post_attention_layernorm.weight",
            "mlp_out_norm.weight": "post_feedforward_layernorm.weight",
            "mlp.router.weight": "mlp.gate.weight",
        },
        experts=HF_EXPERTS,
        fused=HF_FUSED,
    ),
).register()
