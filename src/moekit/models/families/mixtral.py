"""Mixtral: Mistral with experts, softmax over the chosen logits."""

from __future__ import annotations

from typing import Any

from moekit.config import AttentionConfig, ModelConfig
from moekit.models.families.common import read_experts, read_window, write_experts
from moekit.models.families.row import Arch
from moekit.models.keys import Keys
from moekit.models.layout import HF_ATTENTION, HF_OUTER, HF_PREFIX, Layout

__all__ = ["MIXTRAL_LAYOUT", "read_mixtral", "write_mixtral"]

MIXTRAL_LAYOUT = Layout(
    HF_OUTER,
    HF_PREFIX,
    HF_ATTENTION | {"mlp.router.weight": "block_sparse_moe.gate.weight"},
    experts={
        "mlp.experts.gate_up_proj": (
            "block_sparse_moe.experts.{e}.w1.weight",
            "block_sparse_moe.experts.{e}.w3.weight",
        ),
        "mlp.experts.down_proj": ("block_sparse_moe.experts.{e}.w2.weight",),
    },
)


def read_mixtral(keys: Keys) -> dict[str, Any]:
    """The fields of Mixtral."""
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": read_experts(keys, gate_order="topk_softmax"),
        "attention": AttentionConfig(**read_window(keys)),
        "router_aux_loss_coef": keys.real("router_aux_loss_coef"),
    }


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    """The keys of Mixtral."""
    return {**write_experts(config), "sliding_window": config.attention.window}


Arch(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    defaults={
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "router_aux_loss_coef": 0.001,
    },
    read=read_mixtral,
    write=write_mixtral,
    hf=MIXTRAL_LAYOUT,
).register()
