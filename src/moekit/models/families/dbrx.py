"""DBRX: one matrix for queries, keys and values, all experts of a layer in one tensor, LayerNorm without bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moekit.config import AttentionConfig, ModelConfig, MoEConfig
from moekit.models.families.common import moe_of
from moekit.models.families.row import Arch
from moekit.models.keys import ACTIVATION_NAMES, Keys, unsupported
from moekit.models.layout import Layout, Piece


def _part(keys: Keys, name: str) -> Keys:
    """The keys of attn_config or ffn_config."""
    value = keys.optional(name)
    return Keys(value if isinstance(value, dict) else {}, f"{keys.source}: {name}", _DEFAULTS[name])


_DEFAULTS: dict[str, dict[str, Any]] = {
    "attn_config": {"kv_n_heads": 1, "rope_theta": 10_000.0},
    "ffn_config": {
        "ffn_hidden_size": 3584,
        "moe_num_experts": 4,
        "moe_top_k": 1,
        "moe_loss_weight": 0.01,
        "moe_normalize_expert_weights": 1.0,
    },
}


def _read(keys: Keys) -> dict[str, Any]:
    attention, experts = _part(keys, "attn_config"), _part(keys, "ffn_config")
    power = experts.optional("moe_normalize_expert_weights")
    unsupported(keys, power not in (None, 1), f"weights normalised by their {power}-norm", "by their sum (1)")
    activation = Keys(experts.optional("ffn_act_fn") or {}, experts.source).activation("name")
    width = experts.whole("ffn_hidden_size")
    moe = MoEConfig(
        hidden_size=keys.whole("hidden_size"),
        intermediate_size=width,
        num_experts=experts.whole("moe_num_experts"),
        top_k=experts.whole("moe_top_k"),
        gate_order="softmax_topk",
        norm_topk_prob=power is not None,
        input_jitter=experts.real("moe_jitter_eps") if experts.has("moe_jitter_eps") else 0.0,
        activation=activation,
    )
    # Published files have the base in attn_config (500,000), which transformers 5.23 overlooks.
    rope = {} if keys.has("rope_parameters") else {"rope_theta": attention.real("rope_theta")}
    return {
        "num_key_value_heads": attention.whole("kv_n_heads"),
        "intermediate_size": width,
        "moe": moe,
        "norm": "layer",
        "attention": AttentionConfig(clip_qkv=attention.real("clip_qkv") if attention.has("clip_qkv") else None),
        "router_aux_loss_coef": experts.real("moe_loss_weight"),
        "activation": activation,
        **rope,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    moe = moe_of(config)
    attention = {"kv_n_heads": config.num_key_value_heads, "clip_qkv": config.attention.clip_qkv}
    experts = {
        "ffn_act_fn": {"name": ACTIVATION_NAMES[moe.activation]},
        "ffn_hidden_size": moe.intermediate_size,
        "moe_num_experts": moe.num_experts,
        "moe_top_k": moe.top_k,
        "moe_normalize_expert_weights": 1.0 if moe.norm_topk_prob else None,
        "moe_jitter_eps": moe.input_jitter or None,
        "moe_loss_weight": config.router_aux_loss_coef,
    }
    return {"attn_config": attention | {"rope_theta": config.rope_theta}, "ffn_config": experts}


def _queries(config: ModelConfig) -> Iterator[Piece]:
    yield Piece(_QKV, stored=(slice(0, config.num_attention_heads * config.head_dim),))


def _keys(config: ModelConfig) -> Iterator[Piece]:
    start, size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield Piece(_QKV, stored=(slice(start, start + size),))


def _values(config: ModelConfig) -> Iterator[Piece]:
    size = config.num_key_value_heads * config.head_dim
    start = config.num_attention_heads * config.head_dim + size
    yield Piece(_QKV, stored=(slice(start, start + size),))


def _gate_up(config: ModelConfig) -> Iterator[Piece]:
    """w1 and v1 hold the rows of all experts one after the other."""
    moe = moe_of(config)
    width = moe.intermediate_size
    for number, name in enumerate(("w1", "v1")):
        ours = slice(number * width, (number + 1) * width)
        for expert in range(moe.num_experts):
            rows = slice(expert * width, (expert + 1) * width)
            yield Piece(f"ffn.experts.mlp.{name}", (expert, ours), stored=(rows,), where=f"expert {expert}")


def _down(config: ModelConfig) -> Iterator[Piece]:
    """w2 too, where a row is one of the inner width."""
    moe = moe_of(config)
    for expert in range(moe.num_experts):
        rows = slice(expert * moe.intermediate_size, (expert + 1) * moe.intermediate_size)
        stored = (rows, slice(0, moe.hidden_size))
        yield Piece("ffn.experts.mlp.w2", (expert,), stored=stored, transposed=True, where=f"expert {expert}")


_QKV = "norm_attn_norm.attn.Wqkv.weight"

Arch(
    model_type="dbrx",
    architecture="DbrxForCausalLM",
    defaults={"max_seq_len": 2048, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5},
    read=_read,
    write=_write,
    hf=Layout(
        outer={
            "embed.weight": "transformer.wte.weight",
            "norm.weight": "transformer.norm_f.weight",
            "head.weight": "lm_head.weight",
        },
        prefix="transformer.blocks.{i}.",
        inner={
            "attn_norm.weight": "norm_attn_norm.norm_1.weight",
            "mlp_norm.weight": "norm_attn_norm.norm_2.weight",
            "attn.o_proj.weight": "norm_attn_norm.attn.out_proj.weight",
            "mlp.router.weight": "ffn.router.layer.weight",
        },
        joined={
            "attn.q_proj.weight": _queries,
            "attn.k_proj.weight": _keys,
            "attn.v_proj.weight": _values,
            "mlp.experts.gate_up_proj": _gate_up,
            "mlp.experts.down_proj": _down,
        },
    ),
    names={
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    },
    absent=frozenset(
        {"num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "intermediate_size", "hidden_act"}
    ),
).register()
