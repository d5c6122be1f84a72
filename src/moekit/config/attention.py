"""How attention differs from family to family: positions, windows, limits, and the compressed kind (MLA)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from moekit.config.base import check, choice, positive

__all__ = [
    "AttentionConfig",
    "DynamicRope",
    "LinearRope",
    "Llama3Rope",
    "LongRope",
    "MLAConfig",
    "RopeConfig",
    "RopeScaling",
    "YarnRope",
]


class _Scaling:
    """What all kinds check."""

    def __post_init__(self) -> None:
        if hasattr(self, "original_max_position_embeddings"):
            positive(self, "original_max_position_embeddings")
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            above = all(0 < number < math.inf for number in numbers) or field.name in ("mscale", "mscale_all_dim")
            check(above or isinstance(value, bool), f"{field.name} must be above 0, not {value}")


@dataclass(frozen=True, kw_only=True)
class LinearRope(_Scaling):
    """Every frequency divided by `factor` (2306.15595)."""

    kind: ClassVar[str] = "linear"
    by_length: ClassVar[bool] = False
    factor: float


@dataclass(frozen=True, kw_only=True)
class DynamicRope(_Scaling):
    """A base that grows with the text once it is longer than max_position_embeddings ("NTK-aware")."""

    kind: ClassVar[str] = "dynamic"
    by_length: ClassVar[bool] = True
    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(_Scaling):
    """Long wavelengths divided by `factor`, short ones kept, a ramp between them (Llama 3.1)."""

    kind: ClassVar[str] = "llama3"
    by_length: ClassVar[bool] = False
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class YarnRope(_Scaling):
    """Frequencies that turn rarely divided by `factor`, the others kept; cos and sin scaled (2309.00071 §3.2–3.4)."""

    kind: ClassVar[str] = "yarn"
    by_length: ClassVar[bool] = False
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    """Turns within the original context above which a frequency is kept."""
    beta_slow: float = 1.0
    """Turns below which it is divided."""
    attention_factor: float | None = None
    """What cos and sin are multiplied by; 0.1 · ln(factor) + 1 when not given."""
    mscale: float | None = None
    """DeepSeek's form of the same: (0.1 · mscale · ln(factor) + 1) / (0.1 · mscale_all_dim · ln(factor) + 1)."""
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Round the ends of the ramp to whole frequencies."""


@dataclass(frozen=True, kw_only=True)
class LongRope(_Scaling):
    """A factor for each frequency, one set up to the original context and one beyond it (2402.13753)."""

    kind: ClassVar[str] = "longrope"
    by_length: ClassVar[bool] = True
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float | None = None
    """max_position_embeddings / original_max_position_embeddings when not given."""
    attention_factor: float | None = None
    """What cos and sin are multiplied by; √(1 + ln(factor) / ln(original context)) when not given."""
    short_mscale: float | None = None
    """The same up to the original context (Phi-3.5-MoE)."""
    long_mscale: float | None = None
    """The same beyond it."""


RopeScaling = LinearRope | DynamicRope | Llama3Rope | YarnRope | LongRope


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions where they are not the plain ones; the base is `ModelConfig.rope_theta`."""

    scaling: RopeScaling | None = None
    """How the frequencies are stretched for longer texts."""
    dims: int | None = None
    """Features of a head that are rotated, its first ones; all when not given."""
    interleaved: bool = False
    """Rotate neighbours (0, 1), (2, 3), … instead of first half with second half."""

    def __post_init__(self) -> None:
        if self.dims is not None:
            positive(self, "dims")
            check(self.dims % 2 == 0, f"dims must be even, not {self.dims}")


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention: keys and values come from one small vector a position (2405.04434 §2.1).

    The model's head_dim is `rope_head_dim` then.
    """

    kv_lora_rank: int
    """Width of that vector, which is all the cache holds beside the rotated part of the keys."""
    nope_head_dim: int
    """Features of a query and a key that are not rotated."""
    rope_head_dim: int
    """Features that are; those of the keys are shared by all heads."""
    value_head_dim: int
    """Features of a value."""
    q_lora_rank: int | None = None
    """Width of the vector that queries come from; straight from the hidden state when not given."""

    def __post_init__(self) -> None:
        positive(self, "kv_lora_rank", "nope_head_dim", "rope_head_dim", "value_head_dim")
        if self.q_lora_rank is not None:
            positive(self, "q_lora_rank")

    @property
    def query_head_dim(self) -> int:
        """Features of a query and of a key."""
        return self.nope_head_dim + self.rope_head_dim


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """What a family's attention has beside grouped queries; the defaults are Llama's."""

    output_bias: bool = True
    """With attention_bias the output projection has a bias too (Qwen2's has none)."""
    qk_norm_over: Literal["head", "all"] = "head"
    """With qk_norm: over each head's features (Qwen3), or over those of all heads together (OLMoE)."""
    qk_norm_after_rope: bool = False
    """With qk_norm: after the rotation instead of before it (Hunyuan)."""
    clip_qkv: float | None = None
    """Queries, keys and values are limited to ±this (DBRX, OLMo)."""
    scale: float | None = None
    """What scores are multiplied by; 1/√head_dim when not given."""
    softcap: float | None = None
    """Scores s become c·tanh(s / c) before the softmax (Grok-1)."""
    sinks: bool = False
    """A learned logit a head that takes probability and gives nothing (gpt-oss)."""
    window: int | None = None
    """A query sees itself and the window − 1 positions before it; all of them when not given."""
    window_layers: tuple[int, ...] | None = None
    """Layers that the window holds in; all when not given."""

    def __post_init__(self) -> None:
        choice(self, "qk_norm_over", ("head", "all"))
        for name in ("clip_qkv", "scale", "softcap"):
            value = getattr(self, name)
            check(value is None or value > 0, f"{name} must be above 0, not {value}")
        if self.window is not None:
            positive(self, "window")
        check(self.window is not None or self.window_layers is None, "window_layers needs a window")

    def window_of(self, layer: int) -> int | None:
        """The window of layer number `layer` (from 0), or None where it sees all positions."""
        return self.window if self.window_layers is None or layer in self.window_layers else None
