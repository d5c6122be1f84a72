"""`GGUF_ARCHS`: how each family's configuration and tensors are named in GGUF files, used to read and to write them.

The names are those of llama.cpp's loaders (src/llama-arch.cpp, src/models/*.cpp). What those compute is fixed by the
architecture's name, so a model that differs (probabilities of experts that are not normalised, dense layers among the
sparse ones) is refused when written. Names and numbers only: torch is never imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moekit.config import ModelConfig, MoEConfig
from moekit.errors import ConfigError, FormatError, UnsupportedError, shown
from moekit.models.gguf_file import GGUFFile
from moekit.models.keys import Keys, refuse_inexpressible, unsupported
from moekit.models.layout import LLAMA_GGUF, MIXTRAL_GGUF, QWEN3_MOE_GGUF, Layout
from moekit.registry import Registry

__all__ = ["GGUF_ARCHS", "GGUFArch", "gguf_config", "gguf_metadata"]


@dataclass(frozen=True)
class GGUFArch:
    """A family in GGUF files.

    Attributes:
        name: general.architecture, which also stands before the family's own keys.
        layout: names of the tensors.
        read: the family's keys to the fields of `ModelConfig` that are its own.
        write: those fields back to keys.
    """

    name: str
    layout: Layout
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The configuration in a GGUF file's metadata.

    Raises:
        FormatError: a key is missing or has a value of the wrong kind.
        UnknownNameError: an architecture that moekit does not read.
        UnsupportedError: the model has something that the decoder would compute wrongly.
    """
    if "token_embd.weight" not in file.tensors:
        raise FormatError(f"{file.path}: the tensor 'token_embd.weight' is missing")
    vocabulary = file.tensors["token_embd.weight"].shape[0]
    tied, biased = "output.weight" not in file.tensors, "blk.0.attn_q.bias" in file.tensors
    return _read(file.metadata, str(file.path), vocab_size=vocabulary, tie_word_embeddings=tied, attention_bias=biased)


def gguf_metadata(config: ModelConfig) -> dict[str, Any]:
    """The keys of a GGUF file that holds this model: whole numbers, floats and texts.

    Raises:
        UnsupportedError: llama.cpp has no architecture that computes this model; the message names what is in the way.
    """
    if config.arch not in GGUF_ARCHS:
        raise UnsupportedError(f"a {config.arch} model has no place in a GGUF file; {', '.join(GGUF_ARCHS)} have one")
    arch = GGUF_ARCHS[config.arch]
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
        **arch.write(config),
    }
    tokens = {"bos_token_id": config.bos_token_id, "padding_token_id": config.pad_token_id}
    tokens |= dict(zip(_END_TOKENS, config.eos_token_ids, strict=False))
    metadata = {
        "general.architecture": arch.name,
        "general.type": "model",
        **{f"{arch.name}.{key}": value for key, value in values.items()},
        **{f"tokenizer.ggml.{key}": value for key, value in tokens.items() if value is not None},
    }
    same = {name: getattr(config, name) for name in ("vocab_size", "tie_word_embeddings")}
    # llama.cpp reads the biases of llama's four projections; of qwen3moe's it reads none of the output's.
    bias = config.attention_bias and arch.name == "llama"
    read_back = _read(metadata, "the metadata", **same, attention_bias=bias)
    refuse_inexpressible(config, read_back, "in a GGUF file", ignored=("router_aux_loss_coef", *_same_gate(config)))
    return metadata


_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""End of sequence, of turn, of message: the keys for the first, second and third of `eos_token_ids`."""


def _same_gate(config: ModelConfig) -> tuple[str, ...]:
    """The softmax over the K selected logits is the whole softmax divided by the sum of the selected."""
    moe = config.moe
    normalised = moe is not None and (moe.gate_order == "topk_softmax" or moe.norm_topk_prob)
    return ("moe.gate_order", "moe.norm_topk_prob") if normalised else ()


def _read(metadata: Mapping[str, Any], source: str, **stored: Any) -> ModelConfig:
    """`stored` are the fields that the tensors tell."""
    architecture = str(metadata.get("general.architecture"))
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    keys, tokens = Keys(values, source), Keys(metadata, source)
    name = _FAMILY_OF[architecture](keys)
    _refuse(keys)
    heads, hidden = keys.whole("attention.head_count"), keys.whole("embedding_length")
    try:
        return ModelConfig(
            arch=name,
            hidden_size=hidden,
            intermediate_size=keys.whole("feed_forward_length"),
            num_hidden_layers=keys.whole("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=keys.whole("attention.head_count_kv", heads),
            head_dim=keys.whole("attention.key_length", hidden // max(heads, 1)),
            max_position_embeddings=keys.whole("context_length"),
            rope_theta=keys.real("rope.freq_base", 10_000.0),
            rms_norm_eps=keys.real("attention.layer_norm_rms_epsilon"),
            bos_token_id=tokens.token("tokenizer.ggml.bos_token_id"),
            eos_token_ids=tuple(id for key in _END_TOKENS for id in tokens.tokens(f"tokenizer.ggml.{key}")),
            pad_token_id=tokens.token("tokenizer.ggml.padding_token_id"),
            **GGUF_ARCHS[name].read(keys),
            **stored,
        )
    except ConfigError as error:
        raise FormatError(f"{source}: {error}") from None


def _refuse(keys: Keys) -> None:
    scaling = keys.optional("rope.scaling.type") or "none"
    unsupported(keys, scaling != "none", f"rope.scaling.type {shown(scaling)}", "plain rotary positions ('none')")
    heads = max(keys.whole("attention.head_count"), 1)
    size = keys.whole("attention.key_length", keys.whole("embedding_length") // heads)
    rotated = keys.whole("rope.dimension_count", size)
    unsupported(keys, rotated != size, f"rope.dimension_count {rotated}", f"rotation of whole heads ({size})")
    shared = keys.whole("expert_shared_feed_forward_length", 0)
    unsupported(keys, shared > 0, f"shared experts of width {shared}", "routed experts only in this family")
    scale = keys.real("expert_weights_scale", 0.0)
    unsupported(keys, scale not in (0.0, 1.0), f"expert_weights_scale {scale}", "weights that are not scaled")


def _read_mixtral(keys: Keys) -> dict[str, Any]:
    return {"moe": _moe(keys, keys.whole("feed_forward_length"), gate_order="topk_softmax")}


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    moe = _of(config)
    return {
        "feed_forward_length": moe.intermediate_size,
        "expert_count": moe.num_experts,
        "expert_used_count": moe.top_k,
    }


def _read_qwen3_moe(keys: Keys) -> dict[str, Any]:
    width = keys.whole("expert_feed_forward_length")
    return {"moe": _moe(keys, width, gate_order="softmax_topk", norm_topk_prob=True), "qk_norm": True}


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    moe = _of(config)
    return {
        "expert_count": moe.num_experts,
        "expert_used_count": moe.top_k,
        "expert_feed_forward_length": moe.intermediate_size,
    }


def _moe(keys: Keys, width: int, **gate: Any) -> MoEConfig:
    return MoEConfig(
        hidden_size=keys.whole("embedding_length"),
        intermediate_size=width,
        num_experts=keys.whole("expert_count"),
        top_k=keys.whole("expert_used_count"),
        **gate,
    )


def _of(config: ModelConfig) -> MoEConfig:
    if config.moe is None:
        raise UnsupportedError(f"a {config.arch} model needs MoE layers, and this one has none; write it as llama")
    return config.moe


GGUF_ARCHS: Registry[GGUFArch] = Registry("architecture in GGUF")
"""By the name of the row in `ARCHS`."""

GGUF_ARCHS.register("llama")(GGUFArch("llama", LLAMA_GGUF, lambda _: {}, lambda _: {}))
GGUF_ARCHS.register("mixtral")(GGUFArch("llama", MIXTRAL_GGUF, _read_mixtral, _write_mixtral))
GGUF_ARCHS.register("qwen3_moe")(GGUFArch("qwen3moe", QWEN3_MOE_GGUF, _read_qwen3_moe, _write_qwen3_moe))

_FAMILY_OF: Registry[Callable[[Keys], str]] = Registry("GGUF architecture")
"""general.architecture to the row above; llama.cpp's llama is Mixtral when it has experts."""

_FAMILY_OF.register("llama")(lambda keys: "mixtral" if keys.whole("expert_count", 0) else "llama")
_FAMILY_OF.register("qwen3moe")(lambda _: "qwen3_moe")
