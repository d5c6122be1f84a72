"""The quantised formats: what their bytes mean, in plain PyTorch. The native kernels are tested against `unpack`.

A matrix of O rows and I columns is cut into strips of 16 rows; rows are padded to whole strips (each of `parts` by
itself: gate and up are two), columns to whole groups with the code of zero. A strip is a run of regions, each padded
to 64 bytes:

    codes      4 bits: 64 bytes for every 8 columns, byte[4r + j] = code(r, 8p + j) | code(r, 8p + 4 + j) << 4
               8 bits: 64 bytes for every 4 columns, byte[4r + j] = q(r, 4p + j) + 128
    scales     for every group of columns one value a row: fp16, or uint8 (mxfp4: E8M0 exponent; nf4: code)
    minima     int4 asymmetric only: fp16, like the scales
    nf4 only   64 bytes that begin with two fp32, s and o: the scale of a group is o + s·code

int8 and int4 follow ggml's Q8_0, Q4_0 and Q4_1 (the same codes and scales at group 32). nf4 is QLoRA's NormalFloat
(arXiv 2305.14314) with the scales quantised once more by strip; mxfp4 is that of OCP Microscaling Formats v1.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.errors import ConfigError, UnknownNameError
from moekit.kernels.rounding import MXFP4_VALUES, NF4_LEVELS, QUANTISE, STRIP, power_of_two, table_of

__all__ = ["Format", "Packed", "integers", "interleaved", "pack", "relative_error", "unpack"]

GROUPS = {"int8": (64, 32, 128), "int4": (32, 64, 128), "nf4": (64,), "mxfp4": (32,)}  # the default first
_CHUNK = 1 << 18  # elements converted at a time: their temporaries stay in cache


@dataclass(frozen=True)
class Format:
    """How numbers are stored: `kind`, the columns that share a scale, and whether zero is a code.

    >>> Format.parse("int4-g64-asym")
    Format(kind='int4', group=64, symmetric=False)
    >>> str(Format.parse("int8")), str(Format.parse("nf4"))
    ('int8-g64', 'nf4')
    """

    kind: str
    group: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.kind not in GROUPS:
            raise UnknownNameError(f"unknown format {self.kind!r}; there are {', '.join(GROUPS)}")
        if self.group not in GROUPS[self.kind]:
            sizes = ", ".join(map(str, sorted(GROUPS[self.kind])))
            raise ConfigError(f"{self.kind} has groups of {sizes} columns, not {self.group}")
        if not self.symmetric and self.kind != "int4":
            raise ConfigError(f"only int4 has an asymmetric variant, not {self.kind}")

    @classmethod
    def parse(cls, text: str) -> Format:
        """The format of a name: int8, int4, nf4 or mxfp4, then -g32, -g64 or -g128, then -asym.

        Raises:
            UnknownNameError: no format is called so.
        """
        match = re.fullmatch(r"(\w+?)(?:-g(\d+))?(-asym)?", text)
        if match is None or match[1] not in GROUPS:
            raise UnknownNameError(f"unknown format {text!r}; there are {', '.join(GROUPS)}, as in int4-g64-asym")
        try:
            return cls(match[1], int(match[2] or GROUPS[match[1]][0]), match[3] is None)
        except ConfigError as error:
            raise UnknownNameError(f"unknown format {text!r}: {error}") from None

    def __str__(self) -> str:
        group = f"-g{self.group}" if len(GROUPS[self.kind]) > 1 else ""
        return f"{self.kind}{group}{self.variant}"

    @property
    def variant(self) -> str:
        return "" if self.symmetric else "-asym"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.kind == "int8" else 4

    @property
    def zero_code(self) -> int:
        """What padding holds: the code of zero, where the format has one."""
        if not self.symmetric:
            return 0
        return {"int8": 128, "int4": 8, "nf4": 7, "mxfp4": 0}[self.kind]

    def padded_cols(self, cols: int) -> int:
        return _up(cols, self.group)

    def regions(self, cols: int) -> list[int]:
        """Bytes of each region of a strip: codes, scales, and what else the kind has."""
        padded = self.padded_cols(cols)
        scales = padded // self.group * STRIP * (2 if self.kind in ("int8", "int4") else 1)
        sizes = [padded * STRIP * self.bits // 8, scales]
        if not self.symmetric:
            sizes.append(scales)
        if self.kind == "nf4":
            sizes.append(8)
        return [_up(size, 64) for size in sizes]

    def matrix_bytes(self, rows: int, cols: int, parts: int = 1) -> int:
        """Bytes of a matrix of rows × cols; a multiple of 64.

        Raises:
            ConfigError: the rows are not `parts` equal parts.
        """
        if parts < 1 or rows % parts:
            raise ConfigError(f"{rows} rows are not {parts} equal parts")
        return parts * (_up(rows // parts, STRIP) // STRIP) * sum(self.regions(cols))


@dataclass(frozen=True, eq=False)
class Packed:
    """Matrices in one format: `data` is uint8 (..., matrix_bytes), contiguous; rows and cols are those of one matrix.

    Raises:
        ConfigError: the bytes are not those of such matrices.
    """

    data: Tensor
    format: Format
    rows: int
    cols: int
    parts: int = 1

    def __post_init__(self) -> None:
        wanted = self.format.matrix_bytes(self.rows, self.cols, self.parts)
        if self.data.dtype != torch.uint8 or not self.data.is_contiguous() or self.data.shape[-1:] != (wanted,):
            raise ConfigError(
                f"a {self.rows}×{self.cols} matrix in {self.format} is {wanted} contiguous bytes, "
                f"not {self.data.dtype} of shape {tuple(self.data.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """Of the weight that was packed: (..., O, I)."""
        return torch.Size((*self.data.shape[:-1], self.rows, self.cols))

    def __getitem__(self, index: int) -> Packed:
        """One of the matrices along the first dimension, without a copy."""
        return Packed(self.data[index], self.format, self.rows, self.cols, self.parts)


def pack(weight: Tensor, format: Format, parts: int = 1) -> Packed:
    """Quantise (..., O, I) of any float dtype, on its device.

    Raises:
        ConfigError: the weight has NaN or infinity, or is larger than the format's scales.

    >>> packed = pack(torch.tensor([[0.0, 1.0, -8.0]]), Format.parse("int4"))
    >>> unpack(packed).tolist()
    [[0.0, 1.0, -8.0]]
    """
    rows, cols = weight.shape[-2:]
    size = format.matrix_bytes(rows, cols, parts)
    data = torch.zeros(*weight.shape[:-2], size, dtype=torch.uint8, device=weight.device)
    packed = Packed(data, format, rows, cols, parts)
    source = _matrices(weight)
    for matrix, first, count, strips in _slabs(packed):
        values = _padded(source[matrix, first : first + count].float(), format)
        try:
            codes, *tables = QUANTISE[format.kind + format.variant](values, format.group)
        except ConfigError as error:
            raise ConfigError(f"matrix {matrix}, rows {first} to {first + count - 1}: {error}") from None
        codes[count:] = format.zero_code
        codes[:, cols:] = format.zero_code
        _write(strips, [interleaved(codes, format), *tables], format.regions(cols))
    return packed


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that `packed` stands for, (..., O, I): computed in fp32, returned in `dtype`."""
    weight = torch.empty(*packed.shape, dtype=dtype, device=packed.data.device)
    target = _matrices(weight)
    for matrix, first, count, strips in _slabs(packed):
        target[matrix, first : first + count] = _values(strips, packed)[:count, : packed.cols]
    return weight


def integers(packed: Packed) -> tuple[Tensor, Tensor]:
    """int8 or symmetric int4 in the open: codes int8 (..., O, I) and scales fp16 (..., O, G), w = scale · code.

    Raises:
        ConfigError: the format has tables or minima beside its scales.

    >>> codes, scales = integers(pack(torch.tensor([[0.0, 1.0, -8.0]]), Format.parse("int4")))
    >>> codes.tolist(), scales.tolist()
    ([[0, 1, -8]], [[1.0]])
    """
    format = packed.format
    if format.kind not in ("int8", "int4") or not format.symmetric:
        raise ConfigError(f"{format} is not a scale times whole numbers; int8 and symmetric int4 are")
    groups = format.padded_cols(packed.cols) // format.group
    codes = torch.empty(packed.shape, dtype=torch.int8, device=packed.data.device)
    scales = torch.empty(*packed.shape[:-1], groups, dtype=torch.float16, device=packed.data.device)
    for matrix, first, count, strips in _slabs(packed):
        region, table = strips.split(format.regions(packed.cols), dim=1)
        rows = _rows_of(region, format)[:count, : packed.cols]
        _matrices(codes)[matrix, first : first + count] = (rows ^ 128 if format.bits == 8 else rows - 8).view(
            torch.int8
        )
        _matrices(scales)[matrix, first : first + count] = _by_row(table, torch.float16, groups)[:count, :, 0]
    return codes, scales


def relative_error(weight: Tensor, packed: Packed) -> float:
    """‖W − Ŵ‖ / ‖W‖ in the Frobenius norm, over all matrices; 0 where W is zero."""
    source = _matrices(weight)
    lost = whole = 0.0
    for matrix, first, count, strips in _slabs(packed):
        exact = source[matrix, first : first + count].double()
        lost += (_values(strips, packed)[:count, : packed.cols] - exact).square().sum().item()
        whole += exact.square().sum().item()
    return (lost / whole) ** 0.5 if whole else 0.0


def _matrices(weight: Tensor) -> Tensor:
    """(..., O, I) as (N, O, I); a view where it can be one."""
    return weight.detach().reshape(weight.shape[:-2].numel(), *weight.shape[-2:])


def _slabs(packed: Packed) -> Iterator[tuple[int, int, int, Tensor]]:
    """(matrix, first row, rows, their strips (S, bytes)): every matrix, a few strips of one part at a time."""
    part_rows, strip_bytes = packed.rows // packed.parts, sum(packed.format.regions(packed.cols))
    if not part_rows or not packed.cols:
        return
    a_part = _up(part_rows, STRIP) // STRIP
    data = packed.data.view(-1, packed.parts, a_part, strip_bytes)
    step = max(1, _CHUNK // (STRIP * packed.format.padded_cols(packed.cols)))
    for matrix in range(data.shape[0]):
        for part in range(packed.parts):
            for strip in range(0, a_part, step):
                first, last = strip * STRIP, min((strip + step) * STRIP, part_rows)
                yield matrix, part * part_rows + first, last - first, data[matrix, part, strip : strip + step]


def _padded(values: Tensor, format: Format) -> Tensor:
    """Whole strips and groups, by repeating the last row and column: they change no maximum and no minimum."""
    rows, cols = values.shape
    if rows % STRIP:
        values = torch.cat([values, values[-1:].expand(_up(rows, STRIP) - rows, cols)])
    if cols % format.group:
        values = torch.cat([values, values[:, -1:].expand(-1, format.padded_cols(cols) - cols)], dim=1)
    return values


# ---- bytes ----------------------------------------------------------------------------------------------------------


def interleaved(codes: Tensor, format: Format) -> Tensor:
    """Codes (16 S, C) uint8 in the order of the codes region: (S, bytes)."""
    if format.bits == 8:
        return codes.view(-1, STRIP, codes.shape[1] // 4, 4).transpose(1, 2).flatten(1)
    pairs = codes.view(-1, STRIP, codes.shape[1] // 8, 2, 4)
    return (pairs[..., 0, :] | pairs[..., 1, :] << 4).transpose(1, 2).flatten(1)


def _rows_of(codes: Tensor, format: Format) -> Tensor:
    """The inverse of `interleaved`: (S, bytes) → (16 S, C)."""
    quads = codes.view(codes.shape[0], -1, STRIP, 4).transpose(1, 2)
    if format.bits == 4:
        quads = torch.stack([quads & 15, quads >> 4], dim=3)
    return quads.reshape(codes.shape[0] * STRIP, -1)


def _by_row(table: Tensor, dtype: torch.dtype, groups: int) -> Tensor:
    """The inverse of `_by_strip`, in fp32 (16 S, G, 1)."""
    values = table.contiguous().view(dtype)[:, : groups * STRIP].view(-1, groups, STRIP)
    return values.transpose(1, 2).reshape(-1, groups, 1).float()


def _write(strips: Tensor, parts: list[Tensor], sizes: list[int]) -> None:
    at = 0
    for part, size in zip(parts, sizes, strict=True):
        strips[:, at : at + part.shape[1]] = part
        at += size


def _values(strips: Tensor, packed: Packed) -> Tensor:
    """Strips (S, bytes) as fp32 (16 S, padded cols)."""
    format = packed.format
    codes, *tables = strips.split(format.regions(packed.cols), dim=1)
    rows = _rows_of(codes, format)
    groups = rows.shape[1] // format.group
    rows = rows.view(rows.shape[0], groups, format.group)
    values: Tensor
    if format.kind == "nf4":
        pairs = tables[1][:, :8].contiguous().view(torch.float32).repeat_interleave(STRIP, dim=0)
        scales = pairs[:, 1, None, None] + pairs[:, 0, None, None] * _by_row(tables[0], torch.uint8, groups)
        values = scales * table_of(NF4_LEVELS, rows)[rows.int()]
    elif format.kind == "mxfp4":
        scales = power_of_two(_by_row(tables[0], torch.uint8, groups))
        values = scales * table_of(MXFP4_VALUES, rows)[rows.int()]
    else:
        scales = _by_row(tables[0], torch.float16, groups)
        values = scales * (rows.float() - format.zero_code)
        if not format.symmetric:
            values += _by_row(tables[1], torch.float16, groups)
    return values.flatten(1)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
