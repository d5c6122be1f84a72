"""Random packed matrices without a float: random bits for codes and signs, scales of one size. For sizing and tests.

A code is any of its values with the same chance, so a weight's size is the format's own for such codes (`_UNITS`) times
the scale. The scales' signs are random too: the codes of int4 (−8 to 7) have the mean −½, and a mean that all weights
of a matrix share is one strong direction, that of (1, 1, …), in which all tokens would look alike.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from moekit.kernels.formats import Format, Packed, interleaved
from moekit.kernels.rounding import MXFP4_VALUES, NF4_LEVELS, STRIP

__all__ = ["make_random"]

_UNITS = {
    "int8": math.sqrt((256**2 - 1) / 12 + 1 / 4),
    "int4": math.sqrt((16**2 - 1) / 12 + 1 / 4),
    "int4-asym": math.sqrt((16**2 - 1) / 12),  # about its own middle
    "nf4": math.sqrt(sum(level**2 for level in NF4_LEVELS) / 16),
    "mxfp4": math.sqrt(sum(value**2 for value in MXFP4_VALUES) / 16),
}
"""Root mean square of a code's values, all of them equally frequent."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def make_random(packed: Packed, std: float = 1.0) -> None:
    """Make a matrix of mean 0 and standard deviation `std` of the random bits in `packed`, in place: they stay as codes
    and signs; scales and padding are written over, and lie as `pack` would lay them out.

    mxfp4 has powers of two for scales: there the deviation is within a factor √2.

    >>> from moekit.kernels.formats import unpack
    >>> format = Format.parse("int4")
    >>> bits = torch.randint(256, (format.matrix_bytes(64, 256),), dtype=torch.uint8)
    >>> packed = Packed(bits, format, 64, 256)
    >>> make_random(packed, 0.1)
    >>> round(unpack(packed).std().item(), 2)
    0.1
    """
    format, parts, regions = packed.format, packed.parts, packed.format.regions(packed.cols)
    strips = packed.data.numpy().reshape(parts, -1, sum(regions))
    codes, *tables = np.split(strips, np.cumsum(regions)[:-1], axis=2)
    _blank_padding(codes, format, packed.rows // parts, packed.cols)
    used = format.padded_cols(packed.cols) // format.group * STRIP
    _set_scales(tables, format, std / _UNITS[format.kind + format.variant], used)


def _blank_padding(codes: Bytes, format: Format, rows: int, cols: int) -> None:
    """Zeros beyond the last row and column."""
    padded, last = format.padded_cols(cols), rows - (codes.shape[1] - 1) * STRIP
    if padded != cols:
        _keep(codes, format, STRIP, cols)
    if last != STRIP:
        _keep(codes[:, -1:], format, last, cols)


def _keep(codes: Bytes, format: Format, rows: int, cols: int) -> None:
    """Zero but for some rows and columns of each strip."""
    mask = torch.zeros(STRIP, format.padded_cols(cols), dtype=torch.uint8)
    mask[:rows, :cols] = 2**format.bits - 1
    inside = interleaved(mask, format).numpy()[0]
    zero = interleaved(torch.full_like(mask, format.zero_code), format).numpy()[0]
    codes[:] = codes & inside | zero & ~inside


def _set_scales(tables: list[Bytes], format: Format, scale: float, used: int) -> None:
    """Make scales of the random bits in their places; `used` numbers a strip, zeros after them."""
    first = tables[0]
    if format.kind == "mxfp4":
        first[..., :used] = 127 + round(math.log2(scale))
    elif format.kind == "nf4":
        first[..., :used] = (first[..., :used] >> 7) * 255  # of −s + code · 2s / 255
        pair = np.array([2 * scale / 255, -scale], np.float32).view(np.uint8)
        tables[1][..., : pair.size], tables[1][..., pair.size :] = pair, 0
    elif format.symmetric:
        halves = first.view(np.uint16)
        halves[..., :used] = halves[..., :used] & 0x8000 | np.float16(scale).view(np.uint16)
        used *= 2
    else:
        for table, value in zip(tables, (scale, -7.5 * scale), strict=True):
            table.view(np.uint16)[..., :used] = np.float16(value).view(np.uint16)
            table[..., 2 * used :] = 0
        used *= 2
    first[..., used:] = 0
