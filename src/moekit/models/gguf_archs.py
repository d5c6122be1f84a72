"""The metadata of GGUF files to a `ModelConfig` and back: what all families have; the rest is in `gguf_families`.

The names are those of llama.cpp's loaders (src/llama-arch.cpp, src/llama-model.cpp). What those compute is fixed by the
architecture's name, so a model that differs is refused when written: the metadata is read back and compared. Names and
numbers only: torch is never imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moekit.config import ModelConfig, MoEConfig, RopeConfig
from moekit.errors import ConfigError, FormatError, UnsupportedError, shown
from moekit.models.families.common import moe_of
from moekit.models.gguf_families import GGUF_ARCHS
from moekit.models.gguf_file import GGUFFile
from moekit.models.gguf_layout import ROPE_FREQS
from moekit.models.gguf_rope import read_scaling, rope_factors, write_scaling
from moekit.models.gguf_rows import FAMILY_OF, OWN_WIDTH, SIGMOID, SOFTMAX, GGUFArch
from moekit.models.keys import Keys, refuse_inexpressible, unsupported

__all__ = ["GGUF_ARCHS", "gguf_config", "gguf_constants", "gguf_metadata"]


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The configuration in a GGUF file's metadata.

    Raises:
        FormatError: a key is missing or has a value of the wrong kind.
        UnknownNameError: an architecture that moekit does not read.
        UnsupportedError: the model has something that the decoder would compute wrongly.
    """
    if "token_embd.weight" not in file.tensors:
        raise FormatError(f"{file.path}: the tensor 'token_embd.weight' is missing")
    architecture = str(file.metadata.get("general.architecture"))
    keys = _keys(file.metadata, architecture, str(file.path))
    family = FAMILY_OF[architecture](keys)
    row = GGUF_ARCHS[family]
    config = _read(keys, family, _stored(file, row), _tokens(file.metadata, keys.source))
    _refuse(keys, row, architecture)
    return config


def gguf_metadata(config: ModelConfig) -> dict[str, Any]:
    """The keys of a GGUF file that holds this model: whole numbers, floats and texts.

    Raises:
        UnsupportedError: llama.cpp has no architecture that computes this model; the message names what is in the way.
    """
    if config.arch not in GGUF_ARCHS:
        raise UnsupportedError(f"a {config.arch} model has no place in a GGUF file; {', '.join(GGUF_ARCHS)} have one")
    row, source = GGUF_ARCHS[config.arch], "the metadata"
    tokens = {"bos_token_id": config.bos_token_id, "padding_token_id": config.pad_token_id}
    tokens |= dict(zip(_END_TOKENS, config.eos_token_ids, strict=False))
    metadata = {
        "general.architecture": row.name,
        "general.type": "model",
        **{f"{row.name}.{key}": value for key, value in _values(config, row).items()},
        **{f"tokenizer.ggml.{key}": value for key, value in tokens.items() if value is not None},
    }
    stored = _Stored(config.vocab_size, {name: getattr(config, name) for name in _TOLD}, rope_factors(config))
    read_back = _read(_keys(metadata, row.name, source), config.arch, stored, _tokens(metadata, source))
    refuse_inexpressible(config, read_back, "in a GGUF file", ignored=("router_aux_loss_coef", *_same_gate(config)))
    return metadata


def gguf_constants(config: ModelConfig) -> dict[str, list[float]]:
    """Tensors of one axis that the configuration makes and no parameter holds."""
    factors = rope_factors(config)
    return {} if factors is None else {ROPE_FREQS: factors}


_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""End of sequence, of turn, of message: the keys for the first, second and third of `eos_token_ids`."""
_TOLD = ("tie_word_embeddings", "attention_bias", "qk_norm", "mlp_bias")
_MAX_LAYERS = 10_000  # layers are counted out one by one, so a lying number must not get that far


@dataclass(frozen=True)
class _Stored:
    """What no key says but the tensors: rows of the embedding, the fields in `_TOLD`, factors of the frequencies."""

    vocab_size: int
    told: Mapping[str, bool]
    factors: Sequence[float] | None


def _stored(file: GGUFFile, row: GGUFArch) -> _Stored:
    there = file.tensors
    told = {
        "tie_word_embeddings": "output.weight" not in there,
        "attention_bias": "blk.0.attn_q.bias" in there,
        "qk_norm": "blk.0.attn_q_norm.weight" in there,
        "mlp_bias": "blk.0.ffn_up.bias" in there,
    }
    stretched = ROPE_FREQS in there and ROPE_FREQS in row.layout.ignored
    return _Stored(there["token_embd.weight"].shape[0], told, file.read(ROPE_FREQS).tolist() if stretched else None)


def _values(config: ModelConfig, row: GGUFArch) -> dict[str, Any]:
    """The keys below the architecture's name."""
    norm = "layer_norm_rms_epsilon" if config.norm == "rms" else "layer_norm_epsilon"
    rope = {
        "rope.dimension_count": config.rope.dims or config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        **write_scaling(config.rope.scaling),
    }
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        f"attention.{norm}": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        **(rope if config.positions == "rope" else {}),
        **(_expert_values(config, moe_of(config), row.experts_width) if row.experts_width else {}),
        **row.write(config),
    }


def _expert_values(config: ModelConfig, moe: MoEConfig, width: str) -> dict[str, Any]:
    groups = getattr(moe.options, "groups", None)
    return {
        "expert_count": moe.num_experts,
        "expert_used_count": moe.top_k,
        OWN_WIDTH: moe.intermediate_size,
        width: moe.intermediate_size,
        "expert_gating_func": SIGMOID if moe.options.sigmoid else SOFTMAX,
        "expert_weights_norm": bool(_same_gate(config)),
        "expert_weights_scale": float(moe.routed_scaling_factor),
        "leading_dense_block_count": len(config.dense_layers),
        "expert_shared_count": moe.num_shared_experts,
        **({"expert_group_count": groups.groups, "expert_group_used_count": groups.chosen} if groups else {}),
    }


def _same_gate(config: ModelConfig) -> tuple[str, ...]:
    """The softmax over the K selected logits is the whole softmax divided by the sum of the selected."""
    moe = config.moe
    normalised = moe is not None and (moe.gate_order == "topk_softmax" or moe.norm_topk_prob)
    return ("moe.gate_order", "moe.norm_topk_prob") if normalised else ()


def _keys(metadata: Mapping[str, Any], architecture: str, source: str) -> Keys:
    prefix = f"{architecture}."
    return Keys({key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}, source)


def _tokens(metadata: Mapping[str, Any], source: str) -> dict[str, Any]:
    tokens = Keys(metadata, source)
    return {
        "bos_token_id": tokens.token("tokenizer.ggml.bos_token_id"),
        "eos_token_ids": tuple(id for key in _END_TOKENS for id in tokens.tokens(f"tokenizer.ggml.{key}")),
        "pad_token_id": tokens.token("tokenizer.ggml.padding_token_id"),
    }


def _read(keys: Keys, family: str, stored: _Stored, tokens: Mapping[str, Any]) -> ModelConfig:
    row = GGUF_ARCHS[family]
    layers = keys.whole("block_count") - keys.whole("nextn_predict_layers", 0)
    if not 0 < layers <= _MAX_LAYERS:
        raise FormatError(f"{keys.source}: block_count must lie between 1 and {_MAX_LAYERS}")
    heads, hidden = keys.whole("attention.head_count"), keys.whole("embedding_length")
    size = hidden // max(heads, 1)
    size = size if row.square else keys.whole("attention.key_length", size)
    dims = keys.whole("rope.dimension_count", size) if row.partly_rotated else size
    norm = "layer_norm_epsilon" if keys.has("attention.layer_norm_epsilon") else "layer_norm_rms_epsilon"
    try:
        common = {
            "hidden_size": hidden,
            "intermediate_size": keys.whole("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
            "head_dim": size,
            "max_position_embeddings": keys.whole("context_length"),
            "rope_theta": keys.real("rope.freq_base", 10_000.0),
            "rope": RopeConfig(scaling=read_scaling(keys, dims, stored.factors), dims=None if dims == size else dims),
            "rms_norm_eps": keys.real(f"attention.{norm}"),
            **{name: stored.told[name] for name in row.optional},
        }
        return ModelConfig(arch=family, vocab_size=stored.vocab_size, **tokens, **{**common, **row.read(keys)})
    except ConfigError as error:
        raise FormatError(f"{keys.source}: {error}") from None


_HARMLESS: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "expert_count": (0,),
    "expert_group_count": (0, 1),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
}
"""Keys that change what a model computes, and the values with which they do not, for rows that do not read them."""


def _refuse(keys: Keys, row: GGUFArch, architecture: str) -> None:
    """Stop at what the row did not ask for and the model would therefore be computed without."""
    for key, harmless in _HARMLESS.items():
        value = keys.values.get(key)
        if value is not None and key not in keys.asked and value not in harmless:
            raise UnsupportedError(f"{keys.source}: {key} {shown(value)} is not supported in {architecture} files")
    if not row.partly_rotated and not keys.has("attention.kv_lora_rank"):
        heads = max(keys.whole("attention.head_count"), 1)
        size = keys.whole("attention.key_length", keys.whole("embedding_length") // heads)
        rotated, value = keys.whole("rope.dimension_count", size), keys.whole("attention.value_length", size)
        unsupported(keys, rotated != size, f"rope.dimension_count {rotated}", f"rotation of whole heads ({size})")
        unsupported(keys, value != size, f"attention.value_length {value}", f"values as wide as keys ({size})")
