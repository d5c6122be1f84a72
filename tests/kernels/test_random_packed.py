"""Random packed matrices: the size that was asked for, no mean, and laid out as `pack` lays a matrix out."""

from __future__ import annotations

import pytest
import torch

from moekit.kernels.formats import Format, Packed, pack, unpack
from moekit.kernels.random_packed import make_random

FORMATS = ("int8", "int8-g128", "int4", "int4-g64", "int4-asym", "int4-g128-asym", "nf4", "mxfp4")


def made(name: str, rows: int, cols: int, parts: int = 1, std: float = 0.1) -> Packed:
    format = Format.parse(name)
    bits = torch.randint(256, (format.matrix_bytes(rows, cols, parts),), dtype=torch.uint8)
    packed = Packed(bits, format, rows, cols, parts)
    make_random(packed, std)
    return packed


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("std", [0.004, 0.1, 1.0])
def test_size_and_mean(name, std):
    weight = unpack(made(name, 256, 512, std=std)) / std
    root = 2**0.5 if name == "mxfp4" else 1.02
    assert 1 / root < weight.std() < root
    assert abs(weight.mean()) < 4 / weight.numel() ** 0.5
    # The direction (1, 1, ...), to which int4's codes alone would give 2.4 in every row.
    assert abs((weight @ torch.ones(512) / 512**0.5).mean()) < 0.5


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "cols", "parts"), [(64, 256, 1), (34, 72, 2), (96, 100, 2), (7, 33, 1)])
def test_padding_is_that_of_pack(name, rows, cols, parts):
    """Rounding what the bytes stand for to the same format must find the same codes in the padding."""
    ours = made(name, rows, cols, parts)
    theirs = pack(unpack(ours), ours.format, parts)
    size, bits = ours.format.regions(cols)[0], ours.format.bits
    strips = [each.data.view(-1, sum(ours.format.regions(cols)))[:, :size] for each in (ours, theirs)]
    blocks = [each.view(each.shape[0], -1, 16, 4) for each in strips]  # strip, columns, row, byte
    pad_rows = -(rows // parts) % 16
    assert torch.equal(*[each[-1, :, 16 - pad_rows :] for each in blocks])
    per_block = 8 if bits == 4 else 4
    assert torch.equal(*[each[:, -(-cols // per_block) :] for each in blocks])
