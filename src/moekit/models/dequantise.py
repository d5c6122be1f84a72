"""Checkpoints that are published in 8 or 4 bits, as plain tensors: two pure functions, and which tensors they need.

`Scheme.of(config.json)` says which scheme a folder follows; `Scheme.plan(tensors)` says how its stored tensors become
the tensors of the unquantised layout, name by name; `weights.py` applies it while reading, one tensor at a time. A
family's row in `ARCHS` therefore names and shapes unquantised tensors only.

| quant_method | stored | becomes | published by |
|---|---|---|---|
| fp8 | `X` (R, C) e4m3 and `X_scale_inv` (⌈R/128⌉, ⌈C/128⌉) | `X` (R, C) | DeepSeek-V3, Qwen3-FP8 |
| mxfp4 | `X_blocks` (E, R, C/32, 16) and `X_scales` (E, R, C/32), uint8 | `X` (E, C, R) | gpt-oss |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from moekit.errors import FormatError, UnsupportedError, shown
from moekit.models.keys import PUBLISHED_METHODS, quant_method

__all__ = ["Recipe", "Scheme", "dequantise_fp8", "dequantise_mxfp4"]

Shape = tuple[int, ...]


class Stored(Protocol):
    """What a file says of a tensor."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> Shape: ...


def dequantise_fp8(
    weight_RC: Tensor, scale_inv: Tensor, block: tuple[int, int] = (128, 128), dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """`weight[r, c] · scale_inv[r // 128, c // 128]`, computed in fp32 and rounded once.

    The last blocks of a row or column may be cut short, as in DeepSeek-V3's own `weight_dequant` (inference/kernel.py).

    Args:
        weight_RC: (R, C) in float8_e4m3fn.
        scale_inv: (⌈R / block[0]⌉, ⌈C / block[1]⌉), float; what a stored number is to be multiplied with.
        block: rows and columns that share a scale.
        dtype: of the result.
    Returns:
        (R, C) in `dtype`.
    Raises:
        FormatError: the scales are not one a block.

    >>> weight = torch.full((2, 3), 1.5).to(torch.float8_e4m3fn)
    >>> dequantise_fp8(weight, torch.tensor([[2.0, 4.0]]), block=(2, 2), dtype=torch.float32)
    tensor([[3., 3., 6.],
            [3., 3., 6.]])
    """
    (rows, columns), (height, width) = weight_RC.shape, block
    _check(weight_RC.dtype, torch.float8_e4m3fn, scale_inv.shape, _fp8_scales(weight_RC.shape, block), "the tensor")
    plain_RC = torch.empty(rows, columns, dtype=dtype)
    for number, start in enumerate(range(0, rows, height)):
        band = slice(start, start + height)
        scale_C = scale_inv[number].float().repeat_interleave(width)[:columns]
        plain_RC[band] = weight_RC[band].float() * scale_C
    return plain_RC


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantise_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Matrices of the OCP microscaling format MXFP4 v1.0: 32 e2m1 numbers share one power of two (e8m0, 255 is NaN).

    Every product is exact in bf16, unless it leaves its range.

    Args:
        blocks: (E, R, C / 32, 16) in uint8; the low four bits of a byte come before the high four.
        scales: (E, R, C / 32) in uint8; 2^(scale − 127).
        dtype: of the result.
    Returns:
        (E, R, C) in `dtype`.
    Raises:
        FormatError: the scales are not one a block.

    >>> byte = torch.full((1, 1, 1, 16), 0x21, dtype=torch.uint8)  # 0.5 below, 1.0 above
    >>> dequantise_mxfp4(byte, torch.full((1, 1, 1), 128, dtype=torch.uint8))[0, 0, :4]
    tensor([1., 2., 1., 2.], dtype=torch.bfloat16)
    """
    _check(blocks.dtype, torch.uint8, scales.shape, blocks.shape[:-1], "the tensor")
    experts, rows, groups, size = blocks.shape
    value = torch.tensor([*_E2M1, *(-number for number in _E2M1)])
    pairs = torch.stack([value.repeat(16), value.repeat_interleave(16)], dim=-1)  # byte to its two numbers
    power = torch.arange(256, dtype=torch.float32).sub_(127).exp2_()
    power[255] = torch.nan
    plain = torch.empty(experts, rows, groups * size * 2, dtype=dtype)
    for expert in range(experts):  # one at a time, because the numbers of the bytes are eight times as wide
        numbers = pairs[blocks[expert].int()].view(rows, groups, size * 2)
        plain[expert] = numbers.mul_(power[scales[expert].int()].unsqueeze(-1)).view(rows, -1)
    return plain


def _fp8_scales(weight: Shape, block: tuple[int, int]) -> Shape:
    return -(-weight[0] // block[0]), -(-weight[1] // block[1])


def _check(stored: Any, kind: Any, scales: Shape, wanted: Shape, what: str) -> None:
    if stored != kind:
        raise FormatError(f"{what} is stored as {stored}, and its format asks for {kind}")
    if tuple(scales) != tuple(wanted):
        raise FormatError(f"{what} has scales of shape {list(scales)}, and one a block would be {list(wanted)}")


@dataclass(frozen=True)
class Recipe:
    """How one tensor comes about.

    Attributes:
        parts: names of the stored tensors it is made of.
        shape: its own.
        make: takes those tensors and `dtype`.
        stack: whether each of its first axis is made of the same one of every part.
    """

    parts: tuple[str, ...]
    shape: Shape
    make: Callable[..., Tensor]
    stack: bool = False


@dataclass(frozen=True)
class Scheme:
    """How the matrices of a folder are quantised.

    Attributes:
        method: quant_method of config.json's quantization_config.
        block: rows and columns that share a scale (fp8).
    """

    method: str
    block: tuple[int, int] = (128, 128)

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> Scheme | None:
        """The scheme that config.json's `values` state, or None for any that is not in the table above.

        Raises:
            FormatError: the scheme has settings of the wrong kind.
            UnsupportedError: numbers of 8 bits that are not e4m3.
        """
        method = quant_method(values)
        if method not in PUBLISHED_METHODS:
            return None
        if method == "mxfp4":
            return cls(method)
        found = values["quantization_config"]
        if found.get("fmt", "e4m3") != "e4m3":
            raise UnsupportedError(f"{source}: fp8 weights in {shown(found['fmt'])} are not supported; e4m3 is")
        block = found.get("weight_block_size")
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in block):
            raise FormatError(f"{source}: weight_block_size must be two whole numbers above 0, not {shown(block)}")
        return cls(method, (block[0], block[1]))

    def plan(self, stored: Mapping[str, Stored], where: str) -> dict[str, Recipe]:
        """The tensors that stored ones make up, without those that are stored as they are.

        Raises:
            FormatError: a part of one is missing, or has another dtype or shape than the format gives it.
        """
        ending, scales_ending = ("", "_scale_inv") if self.method == "fp8" else ("_blocks", "_scales")
        recipes = {}
        for scales in [name for name in stored if name.endswith(scales_ending)]:
            name = scales.removesuffix(scales_ending)
            codes = name + ending
            if codes not in stored:
                raise FormatError(f"{where}: {shown(scales)} has no {shown(codes)} beside it")
            if ending and name in stored:
                raise FormatError(f"{where}: {shown(name)} is stored both plain and as {shown(codes)}")
            make = self._fp8 if self.method == "fp8" else self._mxfp4
            recipes[name] = make(codes, scales, stored, f"{where}: {shown(codes)}")
        return recipes

    def _fp8(self, weight: str, scales: str, stored: Mapping[str, Stored], what: str) -> Recipe:
        shape = stored[weight].shape
        if len(shape) != 2:
            raise FormatError(f"{what} has shape {list(shape)}, and fp8 blocks lie in matrices")
        wanted = _fp8_scales(shape, self.block)
        _check(stored[weight].dtype, torch.float8_e4m3fn, stored[scales].shape, wanted, what)
        return Recipe((weight, scales), shape, partial(dequantise_fp8, block=self.block))

    def _mxfp4(self, blocks: str, scales: str, stored: Mapping[str, Stored], what: str) -> Recipe:
        shape = stored[blocks].shape
        if len(shape) != 4 or shape[-1] != 16:
            raise FormatError(f"{what} has shape {list(shape)}, not (experts, rows, groups, 16)")
        _check(stored[blocks].dtype, torch.uint8, stored[scales].shape, shape[:-1], what)
        _check(stored[scales].dtype, torch.uint8, stored[scales].shape, shape[:-1], what + "'s scale")
        return Recipe((blocks, scales), (shape[0], shape[2] * 32, shape[1]), _inputs_first, stack=True)


def _inputs_first(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(E, C, R), as transformers stores gpt-oss unquantised; a view, which a layout turns back for nothing."""
    return dequantise_mxfp4(blocks, scales, dtype).transpose(1, 2)
