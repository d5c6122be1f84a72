"""DeepSeek: many small experts beside shared ones, the first layers dense; V2 and V3 with latent attention.

GLM-4.7 Flash (glm4_moe_lite) is V3 with other numbers.
"""

from __future__ import annotations

import math
from typing import Any

from moekit.config import (
    AttentionConfig,
    GroupLimit,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RopeScaling,
    SigmoidOptions,
    TopKOptions,
    YarnRope,
)
from moekit.errors import UnsupportedError, shown
from moekit.models.families.common import moe_of, read_rope
from moekit.models.families.row import Arch
from moekit.models.keys import Keys, unsupported
from moekit.models.layout import HF_ATTENTION, HF_DENSE, HF_EXPERTS, HF_FUSED, HF_OUTER, HF_PREFIX, Layout

__all__ = [
    "DEEPSEEK_INNER",
    "first_dense",
    "latent_scale",
    "read_groups",
    "sigmoid_experts",
    "write_experts",
    "write_groups",
]

_SHARED = {
    f"mlp.shared.{name}_proj.weight": f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")
}
_ROUTER = {
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.selection_bias": "mlp.gate.e_score_correction_bias",
}
DEEPSEEK_INNER = HF_DENSE | _SHARED | _ROUTER
"""Names of MLPs and experts, below a layer's prefix."""
_LATENT = {
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attn.q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn.kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    **{
        f"attn.{ours}.{kind}": f"self_attn.{theirs}.{kind}"
        for ours, theirs in (
            ("q_proj", "q_proj"),
            ("q_a_proj", "q_a_proj"),
            ("q_b_proj", "q_b_proj"),
            ("kv_a_proj", "kv_a_proj_with_mqa"),
            ("kv_b_proj", "kv_b_proj"),
            ("o_proj", "o_proj"),
        )
        for kind in ("weight", "bias")
    },
}


def _experts(keys: Keys, **router: Any) -> MoEConfig:
    shared = keys.whole("n_shared_experts", 0)
    return MoEConfig(
        hidden_size=keys.whole("hidden_size"),
        intermediate_size=keys.whole("moe_intermediate_size"),
        num_experts=keys.whole("n_routed_experts"),
        top_k=keys.whole("num_experts_per_tok"),
        gate_order="softmax_topk",
        num_shared_experts=shared,
        activation=keys.activation(),
        **router,
    )


def sigmoid_experts(keys: Keys) -> MoEConfig:
    """The experts of DeepSeek-V3: sigmoid scores, a bias for the choice, groups scored by their two best."""
    groups = read_groups(keys, "sum")
    summed = keys.whole("num_experts_per_tok") // groups.chosen if groups else 2
    unsupported(keys, summed != 2, f"groups scored by 2 experts with top_k // topk_group {summed}", "both alike")
    options = SigmoidOptions(groups=groups)
    return _experts(
        keys,
        router="sigmoid",
        router_options=options,
        norm_topk_prob=keys.flag("norm_topk_prob"),
        routed_scaling_factor=keys.real("routed_scaling_factor", 1.0),
    )


def read_groups(keys: Keys, score: Any) -> GroupLimit | None:
    """n_group and topk_group; one group is none."""
    groups = keys.whole("n_group", 1)
    return None if groups == 1 else GroupLimit(groups=groups, chosen=keys.whole("topk_group"), score=score)


def write_groups(moe: MoEConfig) -> dict[str, Any]:
    """n_group and topk_group."""
    groups = getattr(moe.options, "groups", None)
    return {"n_group": groups.groups if groups else 1, "topk_group": groups.chosen if groups else 1}


def write_experts(config: ModelConfig) -> dict[str, Any]:
    """The keys of the experts that all of these families have."""
    moe = moe_of(config)
    return {
        "moe_intermediate_size": moe.intermediate_size,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "n_shared_experts": moe.num_shared_experts,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "norm_topk_prob": moe.norm_topk_prob,
    }


def first_dense(keys: Keys) -> tuple[int, ...]:
    """The first layers have no experts."""
    first, every = keys.whole("first_k_dense_replace", 0), keys.whole("moe_layer_freq", 1)
    unsupported(keys, every != 1, f"moe_layer_freq {every}", "experts in every layer after the first ones (1)")
    return tuple(range(min(first, keys.whole("num_hidden_layers"))))


def _write_first(config: ModelConfig) -> dict[str, Any]:
    return {"first_k_dense_replace": len(config.dense_layers)}


def _read_deepseek(keys: Keys) -> dict[str, Any]:
    scoring = keys.optional("scoring_func") or "softmax"
    unsupported(keys, scoring != "softmax", f"scoring_func {scoring!r}", "'softmax'")
    moe = _experts(keys, norm_topk_prob=keys.flag("norm_topk_prob"))
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": moe,
        "dense_layers": first_dense(keys),
        "attention_bias": keys.flag("attention_bias"),
        "router_aux_loss_coef": keys.real("aux_loss_alpha", 0.001),
    }


def _write_deepseek(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_experts(config),
        **_write_first(config),
        "attention_bias": config.attention_bias,
        "scoring_func": "softmax",
        "aux_loss_alpha": config.router_aux_loss_coef,
    }


def _latent(keys: Keys, interleaved: bool) -> dict[str, Any]:
    """Attention through latent vectors; with YaRN the scores get its factor too (DeepSeek's code)."""
    rank = keys.whole("q_lora_rank") if keys.has("q_lora_rank") else None
    mla = MLAConfig(
        kv_lora_rank=keys.whole("kv_lora_rank"),
        nope_head_dim=keys.whole("qk_nope_head_dim"),
        rope_head_dim=keys.whole("qk_rope_head_dim"),
        value_head_dim=keys.whole("v_head_dim"),
        q_lora_rank=rank,
    )
    found = read_rope(keys, mla.rope_head_dim)
    scaling = found["rope"].scaling
    weight = (scaling.mscale_all_dim or 0.0) if isinstance(scaling, YarnRope) else 0.0
    return {
        "head_dim": mla.rope_head_dim,
        "num_key_value_heads": keys.whole("num_attention_heads"),
        "mla": mla,
        "rope_theta": found["rope_theta"],
        "rope": RopeConfig(scaling=scaling, interleaved=interleaved),
        "attention": AttentionConfig(scale=latent_scale(mla, scaling, weight)),
        "attention_bias": keys.flag("attention_bias"),
        "intermediate_size": keys.whole("intermediate_size"),
        "dense_layers": first_dense(keys),
    }


def latent_scale(mla: MLAConfig, scaling: RopeScaling | None, weight: float) -> float:
    """What scores are multiplied by: 1/√d, with YaRN times (0.1 · weight · ln(factor) + 1)²."""
    factor = max(scaling.factor, 1.0) if isinstance(scaling, YarnRope) else 1.0
    longer = 0.1 * weight * math.log(factor) + 1
    return mla.query_head_dim**-0.5 * longer**2


def _write_latent(config: ModelConfig) -> dict[str, Any]:
    mla = config.mla
    if mla is None:
        raise UnsupportedError(f"a {config.arch} model has latent attention, and this one has not")
    return {
        "kv_lora_rank": mla.kv_lora_rank,
        "q_lora_rank": mla.q_lora_rank,
        "qk_nope_head_dim": mla.nope_head_dim,
        "qk_rope_head_dim": mla.rope_head_dim,
        "v_head_dim": mla.value_head_dim,
        "attention_bias": config.attention_bias,
        **write_experts(config),
        **_write_first(config),
        **write_groups(moe_of(config)),
    }


def _read_v2(keys: Keys) -> dict[str, Any]:
    method = keys.optional("topk_method") or "greedy"
    known = method in ("greedy", "group_limited_greedy")
    unsupported(keys, not known, f"topk_method {method!r}", "'greedy' and 'group_limited_greedy'")
    unsupported(keys, keys.flag("norm_topk_prob"), "norm_topk_prob True", "probabilities as they are (False)")
    groups = None if method == "greedy" else read_groups(keys, "max")
    return {
        **_latent(keys, interleaved=True),
        "moe": _experts(
            keys,
            router_options=TopKOptions(groups=groups),
            routed_scaling_factor=keys.real("routed_scaling_factor", 1.0),
        ),
        "mlp_bias": keys.flag("mlp_bias"),
    }


def _write_v2(config: ModelConfig) -> dict[str, Any]:
    limited = getattr(moe_of(config).options, "groups", None) is not None
    method = "group_limited_greedy" if limited else "greedy"
    groups = write_groups(moe_of(config)) if limited else {"n_group": None, "topk_group": None}
    return {**_write_latent(config), **groups, "topk_method": method, "mlp_bias": config.mlp_bias}


def _read_v3(keys: Keys) -> dict[str, Any]:
    for key, known in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        value = keys.optional(key) or known
        unsupported(keys, value != known, f"{key} {value!r}", f"{known!r}")
    return {**_latent(keys, interleaved=keys.flag("rope_interleave")), "moe": sigmoid_experts(keys)}


def _write_v3(config: ModelConfig) -> dict[str, Any]:
    return {**_write_latent(config), "rope_interleave": config.rope.interleaved}


def _read_glm_lite(keys: Keys) -> dict[str, Any]:
    kinds = keys.optional("mlp_layer_types")
    found = _read_v3(keys)
    if kinds is None:
        return found
    layers = keys.whole("num_hidden_layers")
    known = isinstance(kinds, list) and len(kinds) == layers and all(kind in ("dense", "sparse") for kind in kinds)
    unsupported(keys, not known, f"mlp_layer_types {shown(kinds)}", f"{layers} of 'dense' and 'sparse'")
    return {**found, "dense_layers": tuple(layer for layer, kind in enumerate(kinds) if kind == "dense")}


def _write_glm_lite(config: ModelConfig) -> dict[str, Any]:
    kinds = ["sparse" if config.is_moe_layer(layer) else "dense" for layer in range(config.num_hidden_layers)]
    values = {**_write_v3(config), "mlp_layer_types": kinds}
    del values["first_k_dense_replace"]
    return values


_DEFAULTS = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6}
_LATENT_LAYOUT = Layout(
    HF_OUTER,
    HF_PREFIX,
    _LATENT | DEEPSEEK_INNER,
    experts=HF_EXPERTS,
    fused=HF_FUSED,
    ignored=("*.rotary_emb.inv_freq", "model.layers.{layers}.*"),  # the second is for predicting several tokens
)

Arch(
    model_type="deepseek",
    architecture="DeepseekForCausalLM",
    defaults=_DEFAULTS | {"bos_token_id": 100_000, "eos_token_id": 100_001},
    read=_read_deepseek,
    write=_write_deepseek,
    hf=Layout(
        HF_OUTER,
        HF_PREFIX,
        HF_ATTENTION | DEEPSEEK_INNER,
        experts=HF_EXPERTS,
        ignored=("*.rotary_emb.inv_freq",),
    ),
).register()

Arch(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    defaults=_DEFAULTS | {"bos_token_id": 1, "eos_token_id": 2},
    read=_read_v2,
    write=_write_v2,
    hf=_LATENT_LAYOUT,
).register()

Arch(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    defaults=_DEFAULTS
    | {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "routed_scaling_factor": 2.5,
    },
    read=_read_v3,
    write=_write_v3,
    hf=_LATENT_LAYOUT,
).register()

Arch(
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    defaults={
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "routed_scaling_factor": 1.8,
        "first_k_dense_replace": 1,
        "q_lora_rank": 768,
        "n_shared_experts": 1,
    },
    read=_read_glm_lite,
    write=_write_glm_lite,
    hf=_LATENT_LAYOUT,
).register()
