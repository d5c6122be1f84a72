"""gpt-oss: attention sinks, windows in every second layer, experts with biases and limits.

Published in mxfp4 (`dequantise.py`); experts are stored transposed, with gate and up side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moekit.config import AttentionConfig, ModelConfig, TopKOptions
from moekit.models.families.common import (
    layer_types,
    moe_of,
    read_experts,
    read_layer_types,
    read_window,
    write_experts,
)
from moekit.models.families.row import Arch
from moekit.models.keys import Keys, unsupported
from moekit.models.layout import HF_ATTENTION, HF_OUTER, HF_PREFIX, Layout, Piece


def _read(keys: Keys) -> dict[str, Any]:
    for key, known in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        value = keys.real(key, known)
        unsupported(keys, value != known, f"{key} {value}", str(known))
    router = TopKOptions(gate_bias=True)
    moe = read_experts(keys, router_options=router, expert="clamped_swiglu", bias=True, activation="silu")
    windowed = read_layer_types(keys, [layer % 2 == 0 for layer in range(keys.whole("num_hidden_layers"))])
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": moe,
        "attention_bias": keys.flag("attention_bias"),
        "attention": AttentionConfig(sinks=True, **read_window(keys, windowed)),
        "router_aux_loss_coef": keys.real("router_aux_loss_coef"),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_experts(config),
        "attention_bias": config.attention_bias,
        "sliding_window": config.attention.window,
        "layer_types": layer_types(config),
        "swiglu_limit": 7.0,
    }


def _gate_up(name: str, matrix: bool) -> Callable[[ModelConfig], Iterable[Piece]]:
    """Gate in the even columns, up in the odd ones, of (E, D, 2F) or (E, 2F)."""

    def pieces(config: ModelConfig) -> Iterable[Piece]:
        moe = moe_of(config)
        width, experts = moe.intermediate_size, slice(0, moe.num_experts)
        rows = (slice(0, moe.hidden_size),) if matrix else ()
        for part in (0, 1):
            ours = slice(part * width, (part + 1) * width)
            stored = (experts, *rows, slice(part, 2 * width, 2))
            yield Piece(f"mlp.experts.{name}", (slice(None), ours), stored=stored, transposed=matrix)

    return pieces


_JOINED: Mapping[str, Callable[[ModelConfig], Iterable[Piece]]] = {
    "mlp.experts.gate_up_proj": _gate_up("gate_up_proj", matrix=True),
    "mlp.experts.gate_up_bias": _gate_up("gate_up_proj_bias", matrix=False),
    "mlp.experts.down_proj": lambda _: [Piece("mlp.experts.down_proj", transposed=True)],
}

Arch(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    defaults={
        "rope_theta": 150_000.0,
        "rms_norm_eps": 1e-5,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "attention_bias": True,
        "router_aux_loss_coef": 0.001,
        "max_position_embeddings": 131_072,
    },
    read=_read,
    write=_write,
    hf=Layout(
        HF_OUTER,
        HF_PREFIX,
        HF_ATTENTION
        | {
            "attn.sinks": "self_attn.sinks",
            "mlp.router.weight": "mlp.router.weight",
            "mlp.router.bias": "mlp.router.bias",
            "mlp.experts.down_bias": "mlp.experts.down_proj_bias",
        },
        joined=_JOINED,
    ),
).register()
