"""ERNIE 4.5: softmax scores with a selection bias, shared experts, positions that turn neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moekit.config import ModelConfig, MoEConfig, TopKOptions
from moekit.errors import FormatError
from moekit.models.families.common import moe_of, read_rope
from moekit.models.families.deepseek import DEEPSEEK_INNER
from moekit.models.families.row import Arch
from moekit.models.keys import Keys, unsupported
from moekit.models.layout import HF_ATTENTION, HF_EXPERTS, HF_FUSED, HF_OUTER, HF_PREFIX, Layout, Piece

_LEAST_SUM = 1e-12  # what `TopKRouter` divides by at least


def _read(keys: Keys) -> dict[str, Any]:
    least = keys.real("moe_norm_min")
    unsupported(keys, least != _LEAST_SUM, f"moe_norm_min {least}", str(_LEAST_SUM))
    unsupported(keys, keys.flag("use_bias"), "use_bias True", "projections without biases (False)")
    size = keys.whole("head_dim", keys.whole("hidden_size") // max(keys.whole("num_attention_heads"), 1))
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": MoEConfig(
            hidden_size=keys.whole("hidden_size"),
            intermediate_size=keys.whole("moe_intermediate_size"),
            num_experts=keys.whole("moe_num_experts"),
            top_k=keys.whole("moe_k"),
            router_options=TopKOptions(bias=True),
            gate_order="softmax_topk",
            norm_topk_prob=True,
            num_shared_experts=keys.whole("moe_num_shared_experts"),
            activation=keys.activation(),
        ),
        "dense_layers": _dense_layers(keys),
        "rope": replace(read_rope(keys, size)["rope"], interleaved=True),
        "router_aux_loss_coef": keys.real("router_aux_loss_coef"),
    }


def _dense_layers(keys: Keys) -> tuple[int, ...]:
    """All but every moe_layer_interval-th from moe_layer_start_index to moe_layer_end_index (-1: the last)."""
    layers, every = range(keys.whole("num_hidden_layers")), keys.whole("moe_layer_interval")
    if every < 1:
        raise FormatError(f"{keys.source}: moe_layer_interval must be at least 1, not {every}")
    first, last = keys.whole("moe_layer_start_index"), keys.whole("moe_layer_end_index")
    last = layers[-1] if last == -1 else last
    return tuple(layer for layer in layers if (layer + 1) % every or not first <= layer <= last)


def _write(config: ModelConfig) -> dict[str, Any]:
    moe, layers = moe_of(config), config.moe_layers or (config.num_hidden_layers,)
    return {
        "moe_intermediate_size": moe.intermediate_size,
        "moe_num_experts": moe.num_experts,
        "moe_k": moe.top_k,
        "moe_num_shared_experts": moe.num_shared_experts,
        "moe_layer_start_index": layers[0],
        "moe_layer_end_index": layers[-1],
        "moe_layer_interval": layers[1] - layers[0] if layers[1:] else 1,
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }


def _selection_bias(config: ModelConfig) -> Iterator[Piece]:
    """It has a row on disk."""
    yield Piece("mlp.moe_statics.e_score_correction_bias", (None,))


Arch(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    defaults={
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_norm_min": _LEAST_SUM,
        "moe_num_shared_experts": 2,
        "router_aux_loss_coef": 0.001,
    },
    read=_read,
    write=_write,
    hf=Layout(
        HF_OUTER,
        HF_PREFIX,
        HF_ATTENTION | DEEPSEEK_INNER,
        experts=HF_EXPERTS,
        fused=HF_FUSED,
        joined={"mlp.router.selection_bias": _selection_bias},
        ignored=("*mtp*",),  # for predicting several tokens at once
    ),
).register()
