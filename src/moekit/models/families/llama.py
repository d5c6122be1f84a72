"""Llama and Mistral: dense, RMSNorm, SwiGLU, rotary positions."""

from __future__ import annotations

from typing import Any

from moekit.config import AttentionConfig, ModelConfig
from moekit.models.families.common import read_window, write_window
from moekit.models.families.row import Arch
from moekit.models.keys import Keys
from moekit.models.layout import HF_ATTENTION, HF_DENSE, HF_OUTER, HF_PREFIX, Layout

__all__ = ["DENSE_LAYOUT"]

DENSE_LAYOUT = Layout(HF_OUTER, HF_PREFIX, HF_ATTENTION | HF_DENSE, ignored=("*.rotary_emb.inv_freq",))


def _read_llama(keys: Keys) -> dict[str, Any]:
    flags = {name: keys.flag(name) for name in ("attention_bias", "mlp_bias")}
    return {"intermediate_size": keys.whole("intermediate_size"), **flags}


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def _read_mistral(keys: Keys) -> dict[str, Any]:
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "attention": AttentionConfig(**read_window(keys)),
    }


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": write_window(config)["sliding_window"]}


_DEFAULTS = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}

Arch(
    model_type="llama",
    architecture="LlamaForCausalLM",
    defaults=_DEFAULTS,
    read=_read_llama,
    write=_write_llama,
    hf=DENSE_LAYOUT,
).register()

Arch(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults=_DEFAULTS | {"sliding_window": 4096},
    read=_read_mistral,
    write=_write_mistral,
    hf=DENSE_LAYOUT,
).register()
