"""What many rows read and write alike: rotary positions, windows, experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from moekit.config import (
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RopeScaling,
    YarnRope,
)
from moekit.errors import FormatError, UnsupportedError, shown
from moekit.models.keys import Keys, unsupported

__all__ = [
    "dense_layers",
    "layer_types",
    "moe_of",
    "num_experts",
    "read_experts",
    "read_layer_types",
    "read_rope",
    "read_window",
    "softmax_experts",
    "windowed",
    "write_experts",
    "write_rope",
    "write_window",
]

_SCALINGS: dict[str, type[RopeScaling]] = {
    cls.kind: cls for cls in (LinearRope, DynamicRope, Llama3Rope, YarnRope, LongRope)
}
_WINDOWED, _FULL = "sliding_attention", "full_attention"


def read_rope(keys: Keys, head_dim: int) -> dict[str, Any]:
    """`rope_theta` and `rope`, from rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
    nested: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = keys.optional(name) or {}
        if not isinstance(given, dict):
            raise FormatError(f"{keys.source}: {name} must be an object, not {shown(given)}")
        nested |= given
        kind = given.get("rope_type") or given.get("type") or "default"
        known = isinstance(kind, str) and (kind == "default" or kind in _SCALINGS)
        unsupported(keys, not known, f"{name} of type {shown(kind)}", f"default and {', '.join(_SCALINGS)}")
    outer = {name: keys.optional(name) for name in ("rope_theta", "partial_rotary_factor")}
    inner = Keys(nested, f"{keys.source}: rope_parameters", outer | {"type": "default"})
    partial = inner.real("partial_rotary_factor", 1.0)
    if not 0 < partial <= 1:
        raise FormatError(f"{inner.source}: partial_rotary_factor must lie in (0, 1], not {partial}")
    dims = int(head_dim * partial)
    return {
        "rope_theta": inner.real("rope_theta"),
        "rope": RopeConfig(
            scaling=_read_scaling(inner, keys), dims=None if dims == head_dim else dims, interleaved=False
        ),
    }


def _read_scaling(inner: Keys, keys: Keys) -> RopeScaling | None:
    kind = inner.optional("rope_type") or inner.optional("type")
    if kind == "default":
        return None
    name, longest = "original_max_position_embeddings", keys.whole("max_position_embeddings")
    original = (keys if keys.has(name) else inner).whole(name, longest)
    values = {name: value for name, value in inner.values.items() if value is not None}
    values[name] = original
    if kind == "yarn":
        values.setdefault("factor", longest / max(original, 1))
    typed, found = Keys(values, inner.source), {}
    for field in dataclasses.fields(_SCALINGS[kind]):
        if field.default is dataclasses.MISSING or typed.has(field.name):
            found[field.name] = _typed(typed, field.name, str(field.type))
    return _SCALINGS[kind](**found)


def _typed(keys: Keys, name: str, kind: str) -> Any:
    if kind.startswith("tuple"):
        return keys.reals(name)
    return keys.whole(name) if kind == "int" else keys.flag(name) if kind == "bool" else keys.real(name)


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The value of rope_parameters."""
    rope, scaling = config.rope, config.rope.scaling
    values: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default", "rope_theta": config.rope_theta}
    if rope.dims is not None:
        values["partial_rotary_factor"] = rope.dims / config.head_dim
    if scaling is not None:
        for field in dataclasses.fields(scaling):
            value = getattr(scaling, field.name)
            if value != field.default:
                values[field.name] = list(value) if isinstance(value, tuple) else value
    return values


def read_layer_types(keys: Keys, otherwise: Iterable[bool]) -> tuple[int, ...]:
    """The layers that layer_types gives a window; where the key is missing, those that are True in `otherwise`."""
    given = keys.optional("layer_types")
    if given is None:
        return tuple(layer for layer, windowed in enumerate(otherwise) if windowed)
    layers = keys.whole("num_hidden_layers")
    if not isinstance(given, list) or len(given) != layers:
        raise FormatError(f"{keys.source}: layer_types must be a list of {layers} kinds, not {shown(given)}")
    other = next((kind for kind in given if kind not in (_WINDOWED, _FULL)), None)
    unsupported(keys, other is not None, f"a layer of type {shown(other)}", f"{_FULL} and {_WINDOWED}")
    return tuple(layer for layer, kind in enumerate(given) if kind == _WINDOWED)


def read_window(keys: Keys, layers: Sequence[int] | None = None) -> dict[str, Any]:
    """`window` and `window_layers` of an `AttentionConfig`; a window that no text outgrows is none."""
    window = keys.whole("sliding_window", 0)
    if not window or window >= keys.whole("max_position_embeddings") or (layers is not None and not layers):
        return {}
    whole = layers is None or len(layers) == keys.whole("num_hidden_layers")
    return {"window": window, "window_layers": None if whole or layers is None else tuple(layers)}


def windowed(config: ModelConfig) -> list[bool]:
    """For each layer, whether it has a window."""
    return [config.attention.window_of(layer) is not None for layer in range(config.num_hidden_layers)]


def layer_types(config: ModelConfig) -> list[str]:
    """The value of layer_types."""
    return [_WINDOWED if each else _FULL for each in windowed(config)]


def write_window(config: ModelConfig) -> dict[str, Any]:
    """sliding_window and use_sliding_window."""
    window = config.attention.window
    return {"sliding_window": window, "use_sliding_window": window is not None}


def num_experts(keys: Keys) -> int:
    """Under the name that transformers 5 writes, or the one before."""
    return keys.whole("num_local_experts" if keys.has("num_local_experts") else "num_experts")


def read_experts(keys: Keys, width: str = "intermediate_size", **more: Any) -> MoEConfig:
    """Experts whose inner width stands under the key `width`, with fields of `MoEConfig` that are the family's own."""
    if "activation" not in more:
        more["activation"] = keys.activation()
    return MoEConfig(
        hidden_size=keys.whole("hidden_size"),
        intermediate_size=keys.whole(width),
        num_experts=num_experts(keys),
        top_k=keys.whole("num_experts_per_tok"),
        **more,
    )


def softmax_experts(keys: Keys, width: str, **more: Any) -> MoEConfig:
    """Experts with a softmax over all logits first, normalised over the chosen ones if norm_topk_prob says so."""
    return read_experts(keys, width, gate_order="softmax_topk", norm_topk_prob=keys.flag("norm_topk_prob"), **more)


def write_experts(config: ModelConfig, number: str = "num_local_experts") -> dict[str, Any]:
    """The keys of experts of width intermediate_size; their number under the key `number`."""
    moe = moe_of(config)
    return {
        "intermediate_size": moe.intermediate_size,
        number: moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }


def moe_of(config: ModelConfig) -> MoEConfig:
    """The experts, of a model that must have some."""
    if config.moe is None:
        raise UnsupportedError(f"a {config.arch} model needs MoE layers, and this one has none; write it as llama")
    return config.moe


def dense_layers(keys: Keys) -> tuple[int, ...]:
    """The layers without experts, by mlp_only_layers and decoder_sparse_step."""
    only, step = keys.tokens("mlp_only_layers"), keys.whole("decoder_sparse_step")
    if step < 1:
        raise FormatError(f"{keys.source}: decoder_sparse_step must be at least 1, not {step}")
    return tuple(layer for layer in range(keys.whole("num_hidden_layers")) if layer in only or (layer + 1) % step)
