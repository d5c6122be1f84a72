"""How each format rounds a weight: (16 S, C) in fp32, whole strips and groups, to codes and tables of scales.

Every function returns codes (16 S, C) uint8, then the bytes of each table, (S, bytes), as formats.py orders them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.errors import ConfigError

__all__ = ["MXFP4_VALUES", "NF4_LEVELS", "QUANTISE", "STRIP", "power_of_two", "table_of"]

STRIP = 16  # rows
# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero: bitsandbytes' table.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _int8(values: Tensor, group: int) -> list[Tensor]:
    """ggml's quantize_row_q8_0: d = max|x| / 127, q = x / d rounded half away from zero."""
    groups = values.view(values.shape[0], -1, group)
    scale = _finite(groups.abs().amax(-1, keepdim=True)) / 127
    scaled = groups * _inverse(scale)
    whole = scaled.trunc()
    codes = whole + (2 * (scaled - whole)).trunc() + 128
    return [codes.to(torch.uint8).flatten(1), _by_strip(_half(scale).squeeze(-1))]


def _int4(values: Tensor, group: int) -> list[Tensor]:
    """ggml's quantize_row_q4_0: d = (the x of largest magnitude) / −8, so that this one is exact."""
    groups = values.view(values.shape[0], -1, group)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = _finite(largest) / -8
    codes = (groups * _inverse(scale) + 8.5).clamp(0, 15).to(torch.uint8)
    return [codes.flatten(1), _by_strip(_half(scale).squeeze(-1))]


def _int4_asymmetric(values: Tensor, group: int) -> list[Tensor]:
    """ggml's quantize_row_q4_1: m = min, d = (max − min) / 15."""
    groups = values.view(values.shape[0], -1, group)
    minimum, maximum = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = _finite(maximum - minimum) / 15
    codes = ((groups - minimum) * _inverse(scale) + 0.5).clamp(0, 15).to(torch.uint8)
    return [codes.flatten(1), *(_by_strip(_half(each).squeeze(-1)) for each in (scale, minimum))]


def _nf4(values: Tensor, group: int) -> list[Tensor]:
    """The nearest level to x / scale, where the scale is max|x| rounded to one of 256 steps of its strip."""
    groups = values.view(-1, STRIP, values.shape[1] // group, group)
    largest = _finite(groups.abs().amax(-1))
    lowest, highest = largest.amin((1, 2)), largest.amax((1, 2))
    step = (highest - lowest) / 255
    steps, offsets = step.view(-1, 1, 1), lowest.view(-1, 1, 1)
    code = ((largest - offsets) * torch.where(steps > 0, 1 / steps, 0)).round().clamp(0, 255)
    code = code.nan_to_num(0.0)  # a step so small that its inverse is infinite
    scaled = groups / (offsets + steps * code).unsqueeze(-1)
    levels = table_of(NF4_LEVELS, values)
    codes = torch.bucketize(scaled.nan_to_num(0.0), (levels[1:] + levels[:-1]) / 2, out_int32=True)
    pair = torch.stack([step, lowest], dim=1).view(torch.uint8)
    return [codes.to(torch.uint8).view_as(values), _by_strip(code.to(torch.uint8).flatten(0, 1)), pair]


def _mxfp4(values: Tensor, group: int) -> list[Tensor]:
    """OCP's conversion: exponent floor(log2 max|x|) − 2, values to the nearest, ties to even, saturating at 6."""
    groups = values.view(values.shape[0], -1, group)
    largest = _finite(groups.abs().amax(-1, keepdim=True))
    exponent = (torch.frexp(largest).exponent - 3 + 127).clamp(0, 254) * (largest > 0)
    scaled = groups / power_of_two(exponent)
    positive = table_of(MXFP4_VALUES, values)[:8]
    limits = (positive[1:] + positive[:-1]) / 2
    limits[1::2] = torch.nextafter(limits[1::2], limits.new_zeros(()))  # a tie here goes up: the even one is above
    codes = torch.bucketize(scaled.abs(), limits, out_int32=True)
    codes = codes + 8 * ((scaled < 0) & (codes > 0))
    return [codes.to(torch.uint8).flatten(1), _by_strip(exponent.to(torch.uint8).squeeze(-1))]


QUANTISE = {
    "int8": _int8,
    "int4": _int4,
    "int4-asym": _int4_asymmetric,
    "nf4": _nf4,
    "mxfp4": _mxfp4,
}


def _by_strip(values: Tensor) -> Tensor:
    """Values of each row and group (16 S, G) as bytes in a table's order, (S, bytes)."""
    return values.view(-1, STRIP, values.shape[1]).transpose(1, 2).flatten(1).contiguous().view(torch.uint8)


def _finite(scale: Tensor) -> Tensor:
    """The groups' maxima, which are NaN or infinite where any element is."""
    if not scale.isfinite().all():
        raise ConfigError("the weight has NaN or infinity")
    return scale


def _half(scale: Tensor) -> Tensor:
    half = scale.half()
    if half.isinf().any():
        raise ConfigError(f"scales and minima are fp16, and {scale.abs().max().item():g} is too large for that")
    return half


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where fp16 makes the scale zero, and with it the group."""
    return torch.where(scale.half() == 0, 0.0, 1 / scale)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^(e − 127), also where that is a subnormal of fp32."""
    power: Tensor = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - 127)
    return power.float()


def table_of(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)
