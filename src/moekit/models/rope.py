"""Rotary positions: the angles of every variant, and the rotation itself.

Shapes: B batch, L length, H heads, r rotated features of a head, h = r / 2 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.config import DynamicRope, LinearRope, Llama3Rope, LongRope, ModelConfig, YarnRope

__all__ = ["is_plain", "rotary_factors", "rotate"]


class Frequencies(NamedTuple):
    """What positions are multiplied by, and what cos and sin are."""

    of_h: Tensor
    magnitude: float = 1.0


def is_plain(config: ModelConfig) -> bool:
    """Whether whole heads are rotated, half with half, by angles that the position alone decides."""
    rope, by_length = config.rope, config.rope.scaling is not None and config.rope.scaling.by_length
    whole = rope.dims in (None, config.head_dim)
    return config.positions == "rope" and whole and not rope.interleaved and not by_length


def rotary_factors(positions_BL: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(−2i/r), each (B, 1, L, r) float32, the h angles twice (2104.09864 eq 15)."""
    dims = config.rope.dims or config.head_dim
    scaling = config.rope.scaling
    exponents = torch.arange(0, dims, 2, device=positions_BL.device, dtype=torch.float32) / dims
    if scaling is None:
        found = Frequencies(1.0 / config.rope_theta**exponents)
    else:
        length = int(positions_BL.max()) + 1 if scaling.by_length else 0
        found = _KINDS[type(scaling)](scaling, exponents, config, length)
    angles_BLh = positions_BL.float().unsqueeze(-1) * found.of_h
    angles_BLr = torch.cat([angles_BLh, angles_BLh], dim=-1).unsqueeze(1)
    return angles_BLr.cos() * found.magnitude, angles_BLr.sin() * found.magnitude


def rotate(x_BHLd: Tensor, cos_BLr: Tensor, sin_BLr: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of the first r features by their position's angle, the others stay; x's shape and dtype come back.

    A pair is (i, i + r/2), or with `interleaved` (2i, 2i + 1).
    """
    dims = cos_BLr.shape[-1]
    turned, rest = x_BHLd[..., :dims], x_BHLd[..., dims:]
    cos, sin = cos_BLr.to(x_BHLd.dtype), sin_BLr.to(x_BHLd.dtype)
    if interleaved:
        turned = turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-right, left], dim=-1) * sin
    if interleaved:
        turned = turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def _linear(scaling: LinearRope, exponents: Tensor, config: ModelConfig, length: int) -> Frequencies:
    return Frequencies(1.0 / config.rope_theta**exponents / scaling.factor)


def _dynamic(scaling: DynamicRope, exponents: Tensor, config: ModelConfig, length: int) -> Frequencies:
    dims, trained = 2 * exponents.numel(), config.max_position_embeddings
    stretch = scaling.factor * max(length, trained) / trained - (scaling.factor - 1)
    return Frequencies(1.0 / (config.rope_theta * stretch ** (dims / (dims - 2))) ** exponents)


def _llama3(scaling: Llama3Rope, exponents: Tensor, config: ModelConfig, length: int) -> Frequencies:
    plain = 1.0 / config.rope_theta**exponents
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # within the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return Frequencies((1 - kept) * plain / scaling.factor + kept * plain)


def _yarn(scaling: YarnRope, exponents: Tensor, config: ModelConfig, length: int) -> Frequencies:
    dims, plain = 2 * exponents.numel(), 1.0 / config.rope_theta**exponents

    def dimension(turns: float) -> float:
        """The feature whose frequency turns this often within the original context (eq 17 solved for it)."""
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return dims * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = torch.arange(exponents.numel(), device=exponents.device, dtype=torch.float32) - low
    divided = (ramp / (high - low or 0.001)).clamp(0, 1)
    return Frequencies(plain / scaling.factor * divided + plain * (1 - divided), _yarn_magnitude(scaling))


def _yarn_magnitude(scaling: YarnRope) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _long(scaling: LongRope, exponents: Tensor, config: ModelConfig, length: int) -> Frequencies:
    original = scaling.original_max_position_embeddings
    beyond = length > original
    factors = torch.tensor(scaling.long_factor if beyond else scaling.short_factor, device=exponents.device)
    factor = scaling.factor or config.max_position_embeddings / original
    magnitude = scaling.long_mscale if beyond else scaling.short_mscale
    if magnitude is None:
        magnitude = scaling.attention_factor
    if magnitude is None:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Frequencies(1.0 / (factors * config.rope_theta**exponents), magnitude)


_KINDS: Mapping[type, Callable[[Any, Tensor, ModelConfig, int], Frequencies]] = {
    LinearRope: _linear,
    DynamicRope: _dynamic,
    Llama3Rope: _llama3,
    YarnRope: _yarn,
    LongRope: _long,
}
