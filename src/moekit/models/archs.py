"""`ARCHS`: each family of models is one row of data, used to read it and to write it.

A row says how its `config.json` maps to a `ModelConfig`, and what our parameters are called on disk in Hugging Face's
layout (`gguf_archs` has the same for GGUF). It knows names and numbers, no tensors: torch is never imported here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.config import ModelConfig, MoEConfig
from moekit.errors import ConfigError, FileError, FormatError, UnsupportedError
from moekit.files import read_json, write_atomic
from moekit.models.gguf_archs import gguf_config
from moekit.models.gguf_file import GGUFFile
from moekit.models.keys import Keys, packed_by_us, refuse_inexpressible, refuse_unsupported
from moekit.models.layout import HF_ATTENTION, HF_DENSE, HF_FUSED, HF_OUTER, Layout
from moekit.registry import Registry

__all__ = ["ARCHS", "Arch", "config_to_hf", "is_packed", "read_config", "write_config"]


@dataclass(frozen=True)
class Arch:
    """A family: how its configuration and its tensors are read and written.

    Attributes:
        model_type: in config.json.
        architecture: the transformers class that loads it.
        defaults: values of keys that config.json may leave out.
        read: config.json's keys to the fields of `ModelConfig` that are the family's own.
        write: those fields back to config.json's keys.
        hf: names in safetensors files.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    hf: Layout


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of the model at `path`: a folder with config.json, that file itself, or a .gguf file.

    Raises:
        FileError: there is no such file.
        FormatError: a key is missing or has a value of the wrong kind.
        UnknownNameError: a family that `ARCHS` does not hold.
        UnsupportedError: the model has something that the decoder would compute wrongly.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return gguf_config(GGUFFile(path))
    if path.is_dir() and not (path / "config.json").exists():
        raise FileError(f"{path} has no config.json: give a folder in Hugging Face layout, or a .gguf file")
    file = path / "config.json" if path.is_dir() else path
    return _hf_config(read_json(file), str(file))


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether the folder at `path` holds a model that `moekit pack` wrote, as its config.json says."""
    file = Path(path) / "config.json"
    return file.exists() and packed_by_us(read_json(file))


def write_config(config: ModelConfig, folder: str | os.PathLike[str], dtype: str = "float32") -> None:
    """Write `folder`/config.json so that transformers loads it, naming `dtype` as the weights' own.

    Raises:
        UnsupportedError: the family cannot express the model; the message names the fields.
        FileError: it could not be written.
    """
    import json

    write_atomic(Path(folder) / "config.json", json.dumps(config_to_hf(config, dtype), indent=2) + "\n")


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The keys and values of config.json. Raises `UnsupportedError` as `write_config` does."""
    arch = ARCHS[config.arch]
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    eos = config.eos_token_ids
    values = {
        "architectures": [arch.architecture],
        "model_type": arch.model_type,
        "dtype": dtype,
        "hidden_act": "silu",
        **{key: getattr(config, key) for key in _SAME},
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
        "pad_token_id": config.pad_token_id,
        **arch.write(config),
    }
    refuse_inexpressible(config, _hf_config(values, "config.json"))
    return values


_MAX_LAYERS = 10_000  # layers are counted out one by one, so a lying number must not get that far
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def _hf_config(values: Mapping[str, Any], source: str) -> ModelConfig:
    arch = ARCHS[Keys(values, source).values.get("model_type") or "(no model_type)"]
    keys = Keys(values, source, arch.defaults)
    refuse_unsupported(keys)
    heads = keys.whole("num_attention_heads")
    if keys.whole("num_hidden_layers") > _MAX_LAYERS:
        raise FormatError(f"{source}: num_hidden_layers must be at most {_MAX_LAYERS}")
    try:
        return ModelConfig(
            arch=arch.model_type,
            vocab_size=keys.whole("vocab_size"),
            hidden_size=keys.whole("hidden_size"),
            num_hidden_layers=keys.whole("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=keys.whole("num_key_value_heads", heads),
            head_dim=keys.whole("head_dim", keys.whole("hidden_size") // max(heads, 1)),
            max_position_embeddings=keys.whole("max_position_embeddings"),
            rope_theta=_rope(keys).real("rope_theta"),
            rms_norm_eps=keys.real("rms_norm_eps"),
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            bos_token_id=keys.token("bos_token_id"),
            eos_token_ids=keys.tokens("eos_token_id"),
            pad_token_id=keys.token("pad_token_id"),
            **arch.read(keys),
        )
    except ConfigError as error:
        raise FormatError(f"{source}: {error}") from None


def _rope(keys: Keys) -> Keys:
    """The keys that rotary positions are read from: transformers 5 moved them into rope_parameters."""
    nested = keys.optional("rope_parameters") or {}
    theta = keys.optional("rope_theta")
    return Keys(nested, f"{keys.source}: rope_parameters", {"rope_theta": theta})


def _read_llama(keys: Keys) -> dict[str, Any]:
    return {"intermediate_size": keys.whole("intermediate_size"), "attention_bias": keys.flag("attention_bias")}


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, "mlp_bias": False}


def _read_mixtral(keys: Keys) -> dict[str, Any]:
    moe = MoEConfig(
        hidden_size=keys.whole("hidden_size"),
        intermediate_size=keys.whole("intermediate_size"),
        num_experts=_num_experts(keys),
        top_k=keys.whole("num_experts_per_tok"),
        gate_order="topk_softmax",
    )
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": moe,
        "router_aux_loss_coef": keys.real("router_aux_loss_coef"),
    }


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    moe = _moe(config)
    return {
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "sliding_window": None,
    }


def _read_qwen3_moe(keys: Keys) -> dict[str, Any]:
    moe = MoEConfig(
        hidden_size=keys.whole("hidden_size"),
        intermediate_size=keys.whole("moe_intermediate_size"),
        num_experts=_num_experts(keys),
        top_k=keys.whole("num_experts_per_tok"),
        gate_order="softmax_topk",
        norm_topk_prob=keys.flag("norm_topk_prob"),
    )
    only, step = keys.tokens("mlp_only_layers"), keys.whole("decoder_sparse_step")
    layers = range(keys.whole("num_hidden_layers"))
    if step < 1:
        raise FormatError(f"{keys.source}: decoder_sparse_step must be at least 1, not {step}")
    return {
        "intermediate_size": keys.whole("intermediate_size"),
        "moe": moe,
        "dense_layers": tuple(layer for layer in layers if layer in only or (layer + 1) % step),
        "qk_norm": True,
        "attention_bias": keys.flag("attention_bias"),
        "router_aux_loss_coef": keys.real("router_aux_loss_coef"),
    }


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    moe = _moe(config)
    return {
        "attention_bias": config.attention_bias,
        "moe_intermediate_size": moe.intermediate_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.norm_topk_prob,
        "mlp_only_layers": list(config.dense_layers),
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def _num_experts(keys: Keys) -> int:
    return keys.whole("num_local_experts" if keys.has("num_local_experts") else "num_experts")


def _moe(config: ModelConfig) -> MoEConfig:
    if config.moe is None:
        raise UnsupportedError(f"a {config.arch} model needs MoE layers, and this one has none; write it as llama")
    return config.moe


ARCHS: Registry[Arch] = Registry("architecture")

ARCHS.register("llama")(
    Arch(
        model_type="llama",
        architecture="LlamaForCausalLM",
        defaults={"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2},
        read=_read_llama,
        write=_write_llama,
        hf=Layout(HF_OUTER, "model.layers.{i}.", HF_ATTENTION | HF_DENSE),
    )
)

ARCHS.register("mixtral")(
    Arch(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        defaults={
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "router_aux_loss_coef": 0.001,
            "use_sliding_window": True,
        },
        read=_read_mixtral,
        write=_write_mixtral,
        hf=Layout(
            HF_OUTER,
            "model.layers.{i}.",
            HF_ATTENTION | {"mlp.router.weight": "block_sparse_moe.gate.weight"},
            experts={
                "mlp.experts.gate_up_proj": (
                    "block_sparse_moe.experts.{e}.w1.weight",
                    "block_sparse_moe.experts.{e}.w3.weight",
                ),
                "mlp.experts.down_proj": ("block_sparse_moe.experts.{e}.w2.weight",),
            },
        ),
    )
)

ARCHS.register("qwen3_moe")(
    Arch(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        defaults={
            "rope_theta": 10_000.0,
            "rms_norm_eps": 1e-6,
            "router_aux_loss_coef": 0.001,
            "decoder_sparse_step": 1,
        },
        read=_read_qwen3_moe,
        write=_write_qwen3_moe,
        hf=Layout(
            HF_OUTER,
            "model.layers.{i}.",
            HF_ATTENTION | HF_DENSE | {"mlp.router.weight": "mlp.gate.weight"},
            experts={
                "mlp.experts.gate_up_proj": (
                    "mlp.experts.{e}.gate_proj.weight",
                    "mlp.experts.{e}.up_proj.weight",
                ),
                "mlp.experts.down_proj": ("mlp.experts.{e}.down_proj.weight",),
            },
            fused=HF_FUSED,
        ),
    )
)
