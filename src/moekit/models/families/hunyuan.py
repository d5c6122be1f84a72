"""Hunyuan: norms on queries and keys after their rotation, and one shared expert of the routed ones' width."""

from __future__ import annotations

from typing import Any

from moekit.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moekit.models.families.common import moe_of
from moekit.models.families.row import Arch
from moekit.models.keys import Keys, unsupported
from moekit.models.layout import HF_ATTENTION, HF_EXPERTS, HF_FUSED, HF_OUTER, HF_PREFIX, Layout


def _everywhere(keys: Keys, key: str, otherwise: int) -> int:
    """A number, or a list with the same one for each layer."""
    numbers = set(keys.tokens(key)) or {otherwise}
    unsupported(keys, len(numbers) > 1, f"a {key} that differs between layers", "the same in all of them")
    return next(iter(numbers))


def _read(keys: Keys) -> dict[str, Any]:
    width = keys.whole("intermediate_size")
    for key, same in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
        value = _everywhere(keys, key, same)
        unsupported(keys, value != same, f"{key} {value}", str(same))
    moe = MoEConfig(
        hidden_size=keys.whole("hidden_size"),
        intermediate_size=width,
        num_experts=_everywhere(keys, "num_experts", 1),
        top_k=_everywhere(keys, "moe_topk", 1),
        gate_order="softmax_topk",
        norm_topk_prob=True,
        num_shared_experts=1,
        activation=keys.activation(),
    )
    unsupported(keys, not keys.flag("use_qk_norm"), "use_qk_norm False", "norms of queries and keys (True)")
    return {
        "intermediate_size": width,
        "moe": moe,
        "qk_norm": True,
        "attention_bias": keys.flag("attention_bias"),
        "attention": AttentionConfig(qk_norm_after_rope=True),
        **_rope(keys),
    }


def _rope(keys: Keys) -> dict[str, Any]:
    """A "dynamic" scaling with an alpha is a fixed larger base: theta · alpha^(d / (d − 2))."""
    given = keys.optional("rope_parameters") or keys.optional("rope_scaling") or {}
    alpha = Keys(given, keys.source).real("alpha", 0.0) if isinstance(given, dict) else 0.0
    size = keys.whole("head_dim", keys.whole("hidden_size") // max(keys.whole("num_attention_heads"), 1))
    if alpha <= 0 or size <= 2:
        return {}
    plain = {name: value for name, value in given.items() if name in ("rope_theta",)}
    theta = Keys(plain, keys.source, {"rope_theta": keys.optional("rope_theta")}).real("rope_theta")
    return {"rope_theta": theta * alpha ** (size / (size - 2)), "rope": RopeConfig()}


def _write(config: ModelConfig) -> dict[str, Any]:
    moe = moe_of(config)
    return {
        "intermediate_size": moe.intermediate_size,
        "num_experts": moe.num_experts,
        "moe_topk": moe.top_k,
        "attention_bias": config.attention_bias,
    }


_NORMS = {"q": "query", "k": "key"}
_INNER = {
    "mlp.router.weight": "mlp.gate.wg.weight",
    **{f"mlp.shared.{name}_proj.weight": f"mlp.shared_mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    **{
        f"attn.{short}_norm.weight": f"self_attn.{long}_layernorm.weight"
        for short, long in (("q", "query"), ("k", "key"))
    },
}

Arch(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    defaults={
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_qk_norm": True,
    },
    read=_read,
    write=_write,
    hf=Layout(HF_OUTER, HF_PREFIX, HF_ATTENTION | _INNER, experts=HF_EXPERTS, fused=HF_FUSED),
).register()
