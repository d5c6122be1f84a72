"""Granite MoE: multipliers on embeddings, scores, residuals and logits; experts stored fused."""

from __future__ import annotations

from typing import Any

from moekit.config import AttentionConfig, ModelConfig, MoEConfig
from moekit.models.families.common import moe_of
from moekit.models.families.row import Arch
from moekit.models.keys import Keys
from moekit.models.layout import HF_ATTENTION, HF_OUTER, HF_PREFIX, Layout


def _read(keys: Keys) -> dict[str, Any]:
    moe = MoEConfig(
        hidden_size=keys.whole("hidden_size"),
        intermediate_size=keys.whole("intermediate_size"),
        num_experts=keys.whole("num_local_experts"),
        top_k=keys.whole("num_experts_per_tok"),
        activation=keys.activation(),
    )
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": moe,
        "attention_bias": keys.flag("attention_bias"),
        "attention": AttentionConfig(scale=keys.real("attention_multiplier", 1.0)),
        "embedding_multiplier": keys.real("embedding_multiplier", 1.0),
        "residual_multiplier": keys.real("residual_multiplier", 1.0),
        "logits_multiplier": 1 / keys.real("logits_scaling", 1.0),
        "router_aux_loss_coef": keys.real("router_aux_loss_coef", 0.001),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    moe = moe_of(config)
    return {
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "attention_bias": config.attention_bias,
        "attention_multiplier": config.attention.scale,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": 1 / config.logits_multiplier,
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }


Arch(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    defaults={"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2},
    read=_read,
    write=_write,
    hf=Layout(
        HF_OUTER,
        HF_PREFIX,
        HF_ATTENTION
        | {
            "mlp.router.weight": "block_sparse_moe.router.layer.weight",
            "mlp.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
            "mlp.experts.down_proj": "block_sparse_moe.output_linear.weight",
        },
    ),
).register()
