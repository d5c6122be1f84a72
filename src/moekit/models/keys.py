"""`Keys`: a configuration file's keys with their types, and the refusals of what the decoder does not do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from moekit.config import ModelConfig, MoEConfig
from moekit.errors import FormatError, UnsupportedError, shown

__all__ = [
    "PACKED_METHOD",
    "PUBLISHED_METHODS",
    "Keys",
    "packed_by_us",
    "quant_method",
    "refuse_inexpressible",
    "refuse_unsupported",
    "unsupported",
]


PACKED_METHOD = "moekit"
"""The quant_method of quantization_config in a packed folder, a name that no other program knows."""
PUBLISHED_METHODS = ("fp8", "mxfp4")
"""Those of other programs that are dequantised while they are read."""


class Keys:
    """A configuration file's keys, typed: what is missing or of the wrong kind is named with the file."""

    def __init__(self, values: Mapping[str, Any], source: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.values, self.source, self.defaults = values, source, defaults or {}

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def optional(self, key: str) -> Any:
        """The value as it stands, or its default, or None."""
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


def refuse_unsupported(keys: Keys) -> None:
    """Stop at what the decoder does not do and would therefore compute wrongly."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = keys.optional(name) or {}
        if not isinstance(rope, Mapping):
            raise FormatError(f"{keys.source}: {name} must be an object, not {shown(rope)}")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        unsupported(keys, kind != "default", f"{name} of type {shown(kind)}", "plain rotary positions ('default')")
        partial = rope.get("partial_rotary_factor") or keys.optional("partial_rotary_factor") or 1.0
        unsupported(keys, partial != 1.0, f"partial_rotary_factor {shown(partial)}", "rotation of whole heads (1.0)")
    activation = keys.optional("hidden_act") or "silu"
    unsupported(keys, activation != "silu", f"hidden_act {shown(activation)}", "'silu'")
    unsupported(keys, keys.flag("mlp_bias"), "mlp_bias true", "MLPs without biases")
    method = quant_method(keys.values)
    known = method in (None, PACKED_METHOD, *PUBLISHED_METHODS)
    readable = f"plain floats, {', '.join(PUBLISHED_METHODS)} and what `moekit pack` writes"
    unsupported(keys, not known, f"a quantization_config of quant_method {shown(method)}", readable)
    if keys.has("sliding_window") and keys.flag("use_sliding_window"):
        window, longest = keys.whole("sliding_window"), keys.whole("max_position_embeddings")
        short = window < longest
        unsupported(keys, short, f"a sliding_window of {window} below {longest} positions", "attention to all of them")


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
    """Every field that changes what the model computes, the MoE's as moe.<name>."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "moe"}
    for f in dataclasses.fields(MoEConfig):
        if f.name != "router_init_scale":
            values[f"moe.{f.name}"] = getattr(config.moe, f.name, None)
    return values
