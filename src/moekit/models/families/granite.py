"""Granite MoE, with and without a shared expert: multipliers everywhere; experts stored fused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from moekit.config import AttentionConfig, ModelConfig
from moekit.models.families.common import moe_of, read_experts, write_experts
from moekit.models.families.row import Arch
from moekit.models.keys import Keys
from moekit.models.layout import HF_ATTENTION, HF_OUTER, HF_PREFIX, Layout, Piece


def _read_shared(keys: Keys) -> dict[str, Any]:
    return _read(keys, keys.whole("shared_intermediate_size", 0))


def _read(keys: Keys, shared: int = 0) -> dict[str, Any]:
    moe = read_experts(keys, num_shared_experts=1 if shared else 0, shared_intermediate_size=shared or None)
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
    return {
        **write_experts(config),
        "attention_bias": config.attention_bias,
        "attention_multiplier": config.attention.scale,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": 1 / config.logits_multiplier,
    }


def _write_shared(config: ModelConfig) -> dict[str, Any]:
    return {**_write(config), "shared_intermediate_size": moe_of(config).shared_width}


def _half(number: int) -> Callable[[ModelConfig], Iterable[Piece]]:
    """Gate or up of the shared expert, which are stored as one."""

    def pieces(config: ModelConfig) -> Iterable[Piece]:
        width = moe_of(config).shared_width
        yield Piece("shared_mlp.input_linear.weight", stored=(slice(number * width, (number + 1) * width),))

    return pieces


_DEFAULTS = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}
_LAYOUT = Layout(
    HF_OUTER,
    HF_PREFIX,
    HF_ATTENTION
    | {
        "mlp.router.weight": "block_sparse_moe.router.layer.weight",
        "mlp.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
        "mlp.experts.down_proj": "block_sparse_moe.output_linear.weight",
        "mlp.shared.down_proj.weight": "shared_mlp.output_linear.weight",
    },
    joined={f"mlp.shared.{name}_proj.weight": _half(number) for number, name in enumerate(("gate", "up"))},
)

Arch(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    defaults=_DEFAULTS,
    read=_read,
    write=_write,
    hf=_LAYOUT,
).register()

Arch(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    defaults=_DEFAULTS,
    read=_read_shared,
    write=_write_shared,
    hf=_LAYOUT,
).register()
