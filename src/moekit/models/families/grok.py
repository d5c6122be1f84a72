"""Grok-1: soft-capped scores, GeGLU experts, multipliers, norms before and after. transformers has no code for it.

Read off xai-org/grok-1 (model.py: scores · attn_output_multiplier, then 30 · tanh(s / 30); tanh GELU; probabilities of
the chosen experts as they are). Names are those of the converted weights that llama.cpp's converter reads.
"""

from __future__ import annotations

from typing import Any

from moekit.config import AttentionConfig, ModelConfig
from moekit.models.families.common import read_experts, write_experts
from moekit.models.families.row import Arch
from moekit.models.keys import Keys
from moekit.models.layout import HF_PREFIX, Layout


def _read(keys: Keys) -> dict[str, Any]:
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": read_experts(keys, gate_order="softmax_topk", activation="gelu_tanh"),
        "norm_place": "both",
        "activation": "gelu_tanh",
        "attention": AttentionConfig(scale=keys.real("attn_output_multiplier"), softcap=keys.real("max_attn_value")),
        "embedding_multiplier": keys.real("embedding_multiplier_scale"),
        "logits_multiplier": keys.real("output_multiplier_scale"),
        "router_aux_loss_coef": keys.real("router_aux_loss_coef"),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_experts(config, "num_experts"),
        "attn_output_multiplier": config.attention.scale,
        "max_attn_value": config.attention.softcap,
        "embedding_multiplier_scale": config.embedding_multiplier,
        "output_multiplier_scale": config.logits_multiplier,
    }


Arch(
    model_type="grok-1",
    architecture="Grok1ModelForCausalLM",
    defaults={
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "attn_output_multiplier": 0.08838834764831845,
        "max_attn_value": 30.0,
        "embedding_multiplier_scale": 78.38367176906169,
        "output_multiplier_scale": 0.5773502691896257,
        "router_aux_loss_coef": 0.001,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
    read=_read,
    write=_write,
    hf=Layout(
        outer={
            "embed.weight": "model.embed_tokens.weight",
            "norm.weight": "model.norm.scale",
            "head.weight": "lm_head.weight",
        },
        prefix=HF_PREFIX,
        inner={
            **{f"attn.{name}_proj.weight": f"attn.{name}_proj.weight" for name in "qkvo"},
            "attn_norm.weight": "pre_attn_norm.scale",
            "attn_out_norm.weight": "post_attn_norm.scale",
            "mlp_norm.weight": "pre_moe_norm.scale",
            "mlp_out_norm.weight": "post_moe_norm.scale",
            "mlp.router.weight": "moe_block.gate.weight",
        },
        experts={
            "mlp.experts.gate_up_proj": (
                "moe_block.experts.{e}.linear.weight",
                "moe_block.experts.{e}.linear_v.weight",
            ),
            "mlp.experts.down_proj": ("moe_block.experts.{e}.linear_1.weight",),
        },
    ),
    absent=frozenset({"hidden_act"}),
).register()
