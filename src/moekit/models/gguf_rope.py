"""Rotary positions in GGUF files: how frequencies are stretched, in metadata and, for Llama 3's rule, in a tensor.

What llama.cpp computes (src/llama-context.cpp, ggml-cpu/ops.cpp): linear and YaRN with the usual constants (32 and 1
turns, whole frequencies, 0.1 · ln(factor) + 1), and any factors that the file gives for each frequency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moekit.config import LinearRope, Llama3Rope, ModelConfig, RopeScaling, YarnRope
from moekit.errors import UnsupportedError, shown
from moekit.models.gguf_layout import ROPE_FREQS
from moekit.models.keys import Keys, unsupported

__all__ = ["read_scaling", "rope_factors", "write_scaling"]

_LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of all that Meta published (3.1 to 3.3); only the factor differs between them."""


def read_scaling(keys: Keys, dims: int, factors: Sequence[float] | None = None, **yarn: Any) -> RopeScaling | None:
    """The stretching that rope.scaling.* or the tensor of `factors` says, of heads with `dims` rotated features.

    Raises:
        UnsupportedError: another kind, or factors that are not Llama 3's.
    """
    if factors is not None:
        return _llama3(keys, dims, factors)
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 0.0))
    kind = keys.optional("rope.scaling.type") or "linear"
    unsupported(keys, kind not in _KINDS, f"rope.scaling.type {shown(kind)}", ", ".join(_KINDS))
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return LinearRope(factor=factor)
    original = keys.whole("rope.scaling.original_context_length", keys.whole("context_length"))
    return YarnRope(factor=factor, original_max_position_embeddings=original, **yarn)


_KINDS = ("none", "linear", "yarn")


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """The keys rope.scaling.*; none where a tensor says it."""
    if isinstance(scaling, LinearRope | YarnRope):
        values: dict[str, Any] = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
        if isinstance(scaling, YarnRope):
            values["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
        return values
    return {}


def rope_factors(config: ModelConfig) -> list[float] | None:
    """What each frequency is divided by under Llama 3's rule; None under any other."""
    scaling, dims = config.rope.scaling, config.rope.dims or config.head_dim
    return _divisors(scaling, config.rope_theta, dims) if isinstance(scaling, Llama3Rope) else None


def _divisors(scaling: Llama3Rope, theta: float, dims: int) -> list[float]:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    found = []
    for pair in range(dims // 2):
        turns = scaling.original_max_position_embeddings / (2 * math.pi * theta ** (2 * pair / dims))
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - kept) / scaling.factor + kept))
    return found


def _llama3(keys: Keys, dims: int, factors: Sequence[float]) -> Llama3Rope | None:
    """Its own factor is the largest of those in the file; that of 1 changes nothing."""
    scaling = Llama3Rope(factor=float(max(factors)), **_LLAMA3)
    expected = _divisors(scaling, keys.real("rope.freq_base", 10_000.0), dims)
    same = len(factors) == len(expected) and all(map(_near, factors, expected))
    if not same:
        raise UnsupportedError(f"{keys.source}: {ROPE_FREQS} holds other factors than Llama 3's")
    return None if scaling.factor == 1.0 else scaling


def _near(one: float, other: float) -> bool:
    """They are stored in fp32, and a converter computed them so."""
    return math.isclose(one, other, rel_tol=1e-4)
