"""MiniMax-M2: Mixtral's names, sigmoid scores with a bias for the choice, norms over all queries and over all keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moekit.config import AttentionConfig, RopeConfig, SigmoidOptions
from moekit.models.families.common import read_experts, read_rope, write_experts
from moekit.models.families.mixtral import MIXTRAL_LAYOUT
from moekit.models.families.row import Arch
from moekit.models.keys import Keys, unsupported


def _read(keys: Keys) -> dict[str, Any]:
    scoring = keys.optional("scoring_func") or "sigmoid"
    unsupported(keys, scoring != "sigmoid", f"scoring_func {scoring!r}", "'sigmoid'")
    unsupported(keys, not keys.flag("use_qk_norm"), "use_qk_norm False", "norms of queries and keys (True)")
    moe = read_experts(
        keys, router="sigmoid", router_options=SigmoidOptions(), gate_order="softmax_topk", norm_topk_prob=True
    )
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": moe,
        "qk_norm": True,
        "attention": AttentionConfig(qk_norm_over="all"),
        "router_aux_loss_coef": keys.real("router_aux_loss_coef"),
        "rope": _rope(keys),
    }


def _rope(keys: Keys) -> RopeConfig:
    """Published files say rotary_dim for the part of a head that is rotated."""
    head_dim = keys.whole("head_dim")
    rope: RopeConfig = read_rope(keys, head_dim)["rope"]
    dims = keys.whole("rotary_dim", rope.dims or head_dim)
    return replace(rope, dims=None if dims == head_dim else dims)


Arch(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    defaults={
        "rope_theta": 5_000_000.0,
        "rms_norm_eps": 1e-6,
        "head_dim": 128,
        "bos_token_id": 200_034,
        "eos_token_id": 200_020,
        "router_aux_loss_coef": 0.001,
        "use_qk_norm": True,
    },
    read=_read,
    write=write_experts,
    hf=replace(
        MIXTRAL_LAYOUT,
        inner={**MIXTRAL_LAYOUT.inner, "mlp.router.selection_bias": "block_sparse_moe.e_score_correction_bias"},
    ),
).register()
