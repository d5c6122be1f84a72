"""`Keys`: a configuration file's keys with their types, and the refusals of what the decoder does not do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from moekit.config import Activation, AttentionConfig, ModelConfig, MoEConfig
from moekit.errors import FormatError, UnsupportedError, shown

__all__ = [
    "ACTIVATION_NAMES",
    "PACKED_METHOD",
    "PUBLISHED_METHODS",
    "Keys",
    "packed_by_us",
    "quant_method",
    "refuse_inexpressible",
    "refuse_unread",
    "unsupported",
]


PACKED_METHOD = "moekit"
"""The quant_method of quantization_config in a packed folder, a name that no other program knows."""
PUBLISHED_METHODS = ("fp8", "mxfp4")
"""Those of other programs that are dequantised while they are read."""


class Keys:
    """A configuration file's keys, typed: what is missing or of the wrong kind is named with the file."""

    def __init__(
        self,
        values: Mapping[str, Any],
        source: str,
        defaults: Mapping[str, Any] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """`names` are what this file calls the keys that are asked for; `defaults` go by the file's own names."""
        self.values, self.source, self.defaults, self.names = values, source, defaults or {}, names or {}
        self.asked: set[str] = set()

    def has(self, key: str) -> bool:
        return self.optional(key) is not None

    def optional(self, key: str) -> Any:
        """The value as it stands, or its default, or None."""
        key = self.names.get(key, key)
        self.asked.add(key)
        return self.values[key] if key in self.values else self.defaults.get(key)

    def whole(self, key: str, otherwise: int | None = None) -> int:
        value: int = self._typed(key, int, "a whole number", otherwise)
        if abs(value) >= 1 << 31:
            raise FormatError(f"{self.source}: {key} is {shown(value)}, which no model has")
        return value

    def real(self, key: str, otherwise: float | None = None) -> float:
        value = self._typed(key, (int, float), "a number", otherwise)
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise FormatError(f"{self.source}: {key} is {shown(value)}, which no model has")
        return float(value)

    def flag(self, key: str) -> bool:
        return bool(self._typed(key, bool, "true or false", False))

    def reals(self, key: str) -> tuple[float, ...]:
        """A list of numbers."""
        values = self._typed(key, list, "a list of numbers", None)
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise FormatError(f"{self.source}: {key} must be a list of numbers, not {shown(values)}")
        return tuple(map(float, values))

    def activation(self, key: str = "hidden_act") -> Activation:
        """The non-linearity; silu where there is none."""
        name = self.optional(key) or "silu"
        known = isinstance(name, str) and name in _ACTIVATIONS
        unsupported(self, not known, f"{key} {shown(name)}", ", ".join(_ACTIVATIONS))
        return _ACTIVATIONS[name]

    def token(self, key: str) -> int | None:
        tokens = self.tokens(key)
        return tokens[0] if tokens else None

    def tokens(self, key: str) -> tuple[int, ...]:
        """Token ids given as one number, a list, or null."""
        value = self.optional(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in found):
            raise FormatError(f"{self.source}: {key} must be a token id or a list of them, not {shown(value)}")
        return tuple(found)

    def _typed(self, key: str, kind: type | tuple[type, ...], words: str, otherwise: Any) -> Any:
        value = self.optional(key)
        value = otherwise if value is None else value
        if value is None:
            raise FormatError(f"{self.source}: the key {key!r} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise FormatError(f"{self.source}: {key} must be {words}, not {shown(value)}")
        return value


ACTIVATION_NAMES: dict[Activation, str] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "relu": "relu",
}
"""What config.json calls each activation."""
_ACTIVATIONS: dict[str, Activation] = {
    **{theirs: ours for ours, theirs in ACTIVATION_NAMES.items()},
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_ESSENTIAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "first_k_dense_replace": (0,),
    "kv_lora_rank": (),
    "layer_types": (),
    "lm_head_bias": (False,),
    "logits_scaling": (1.0,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "n_group": (1,),
    "n_shared_experts": (0,),
    "no_rope_layers": (),
    "num_shared_experts": (0,),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1.0,),
    "position_embedding_type": ("rope", "rotary", "absolute"),
    "q_lora_rank": (),
    "qk_layernorm": (False,),
    "qkv_bias": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "routed_scaling_factor": (1.0,),
    "rope_interleave": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "scoring_func": ("softmax",),
    "shared_expert_intermediate_size": (0,),
    "shared_intermediate_size": (0,),
    "topk_method": ("greedy",),
    "use_cla": (False,),
    "use_bias": (False,),
    "use_qk_norm": (False,),
    "zero_expert_num": (0,),
}
"""Keys that change what a model computes, and the values with which they do not (null never does). A family that has
one reads it; a file of another family that has it anyway would be computed wrongly."""


def refuse_unread(keys: Keys) -> None:
    """Stop at what the family's row did not ask for and the model would therefore be computed without."""
    for key, harmless in _ESSENTIAL.items():
        value = keys.values.get(key)
        if value is not None and key not in keys.asked and value not in harmless:
            family = keys.values.get("model_type")
            raise UnsupportedError(f"{keys.source}: {key} {shown(value)} is not supported in {family} models")
    method = quant_method(keys.values)
    known = method in (None, PACKED_METHOD, *PUBLISHED_METHODS)
    readable = f"plain floats, {', '.join(PUBLISHED_METHODS)} and what `moekit pack` writes"
    unsupported(keys, not known, f"a quantization_config of quant_method {shown(method)}", readable)


def packed_by_us(values: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a packed folder."""
    return quant_method(values) == PACKED_METHOD


def quant_method(values: Mapping[str, Any]) -> Any:
    """How config.json says the weights are quantised; None where they are plain."""
    found = values.get("quantization_config")
    return found.get("quant_method", "(none)") if isinstance(found, Mapping) else found


def unsupported(keys: Keys, wrong: bool, what: str, instead: str) -> None:
    """Raise `UnsupportedError` if `wrong`: `what` the file asks for, and what moekit computes `instead`."""
    if wrong:
        raise UnsupportedError(f"{keys.source}: {what} is not supported; moekit computes {instead}")


def refuse_inexpressible(
    config: ModelConfig, read_back: ModelConfig, where: str = "on disk", ignored: Iterable[str] = ()
) -> None:
    """Raise `UnsupportedError` naming the fields of `config` that came back different from a file format."""
    wanted, kept = _fields(config), _fields(read_back)
    unused = ["intermediate_size"] if len(config.moe_layers) == config.num_hidden_layers else []  # no dense MLP is left
    lost = [name for name in wanted if wanted[name] != kept[name] and name not in (*unused, *ignored)]
    if lost:
        values = ", ".join(f"{name}={wanted[name]!r}" for name in lost)
        raise UnsupportedError(f"a {config.arch} model {where} cannot express {values}")


def _fields(config: ModelConfig) -> dict[str, Any]:
    """Every field that changes what the model computes, those of parts as moe.<name>, attention.<name>, rope.<name>."""
    parts = ("moe", "attention", "rope")  # mla is one value, for a family has it or not
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in parts}
    for part in (config.attention, config.rope):
        prefix = "attention" if isinstance(part, AttentionConfig) else "rope"
        values |= {f"{prefix}.{f.name}": getattr(part, f.name) for f in dataclasses.fields(part)}
    for f in dataclasses.fields(MoEConfig):
        if f.name != "router_init_scale":
            values[f"moe.{f.name}"] = getattr(config.moe, f.name, None)
    return values
