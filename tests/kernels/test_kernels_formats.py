"""The quantised formats against gguf's, against published tables, and against their own definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.errors import ConfigError, UnknownNameError
from moekit.kernels import rounding
from moekit.kernels.formats import Format, Packed, pack, relative_error, unpack
from tolerances import near

NAMES = (
    "int8-g32",
    "int8-g64",
    "int8-g128",
    "int4-g32",
    "int4-g64",
    "int4-g128",
    "int4-g32-asym",
    "int4-g64-asym",
    "int4-g128-asym",
    "nf4",
    "mxfp4",
)
# Half a step of the coarsest rounding, as a share of the group's largest magnitude (of its range when asymmetric),
# and the fp16 scale's 2⁻¹¹ on top: int8 1/254, int4 1/16 (the value opposite the largest is cut at 7/8), asymmetric
# 1/30 of a range of at most 2, nf4 half its widest gap, 0.304/2, mxfp4 values from 6 to 8 become 6.
WORST = {"int8": 0.0045, "int4": 0.126, "int4-asym": 0.068, "nf4": 0.16, "mxfp4": 0.2501}
PEERS = {"int8-g32": "Q8_0", "int4-g32": "Q4_0", "int4-g32-asym": "Q4_1"}

formats_of_all_kinds = st.sampled_from(NAMES).map(Format.parse)


def test_names_say_kind_group_and_symmetry():
    assert [str(Format.parse(name)) for name in NAMES] == list(NAMES)
    assert Format.parse("int4") == Format("int4", 32)
    assert Format.parse("int8") == Format("int8", 64)
    assert Format.parse("nf4-g64") == Format.parse("nf4")
    assert Format.parse("int4-asym") == Format("int4", 32, symmetric=False)


@pytest.mark.parametrize("name", ["", "int5", "int4-g16", "int8-asym", "nf4-g32", "int4-", "int4-g64-asym-", "INT4"])
def test_an_unknown_name_is_refused_with_the_choices(name):
    with pytest.raises(UnknownNameError, match="unknown format"):
        Format.parse(name)


@settings(max_examples=60)
@given(format=formats_of_all_kinds, rows=st.integers(1, 40), cols=st.integers(1, 150), parts=st.integers(1, 2))
def test_every_number_comes_back_within_half_a_step(format, rows, cols, parts):
    weight = torch.randn(2, rows * parts, cols, generator=torch.Generator().manual_seed(rows * cols))
    packed = pack(weight, format, parts)
    assert packed.data.shape == (2, format.matrix_bytes(rows * parts, cols, parts))
    assert packed.shape == weight.shape
    padded = torch.nn.functional.pad(weight, (0, format.padded_cols(cols) - cols))
    largest = padded.view(2, rows * parts, -1, format.group).abs().amax(-1, keepdim=True)
    limit = largest * WORST[format.kind + format.variant]
    if format.kind == "nf4":  # its scale is rounded too, to 1/255 of the range of its strip's
        limit = limit + largest.max() / 255
    error = (unpack(packed) - weight).abs()
    assert (error <= limit.expand(*limit.shape[:-1], format.group).flatten(2)[..., :cols]).all()


@settings(max_examples=30)
@given(format=formats_of_all_kinds, rows=st.integers(1, 33), cols=st.integers(1, 150))
def test_packing_what_was_unpacked_changes_nothing(format, rows, cols):
    exact = unpack(pack(torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols)), format))
    torch.testing.assert_close(unpack(pack(exact, format)), exact, **near("requantised"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_packs_like_fp32(name, dtype):
    weight = torch.randn(3, 17, 70).to(dtype)
    packed, format = pack(weight, Format.parse(name)), Format.parse(name)
    assert torch.equal(packed.data, pack(weight.float(), format).data)
    assert torch.equal(unpack(packed, dtype), unpack(packed).to(dtype))
    assert torch.equal(unpack(packed[1]), unpack(packed)[1])


@pytest.mark.parametrize("name", PEERS)
def test_group_32_is_ggml_bit_for_bit(name):
    weight = torch.randn(48, 160)
    weight[3, 32:64] = 0
    weight[4] = weight[4].round()  # ties
    weight[5, 64:96] *= 1e-5
    peer = GGMLQuantizationType[PEERS[name]]
    theirs = quants.dequantize(quants.quantize(weight.numpy(), peer), peer)
    assert np.array_equal(unpack(pack(weight, Format.parse(name))).numpy(), theirs)
    again = unpack(pack(torch.from_numpy(theirs), Format.parse(name))).numpy()
    assert np.allclose(again, theirs, *near("requantised").values())


def test_mxfp4_is_ggml_but_for_ties():
    weight = torch.randn(48, 160)
    peer = GGMLQuantizationType.MXFP4
    theirs = quants.dequantize(quants.quantize(weight.numpy(), peer), peer)
    assert np.array_equal(unpack(pack(weight, Format.parse("mxfp4"))).numpy(), theirs)


def test_mxfp4_values_are_those_of_the_standard():
    """Sign, two exponent bits with bias 1, one bit of mantissa; 2^e times each, and ties to the even mantissa."""
    for code, value in enumerate(rounding.MXFP4_VALUES):
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        assert value == (-magnitude if code & 8 else magnitude)
    row = torch.tensor([*rounding.MXFP4_VALUES, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75, 7.9, -7.9])
    want = torch.tensor([*rounding.MXFP4_VALUES, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -1.0, 6.0, -6.0])
    for exponent in (-100, -3, 0, 5, 100):
        packed = pack(row[None] * 2.0**exponent, Format.parse("mxfp4"))
        assert torch.equal(unpack(packed)[0], want * 2.0**exponent)


def test_nf4_levels_are_the_published_ones():
    """QLoRA's construction: quantiles of N(0, 1), one side with 8 values and one with 9, zero shared."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([negative, torch.zeros(1), positive]).sort().values
    torch.testing.assert_close(torch.tensor(rounding.NF4_LEVELS), levels / levels.max(), **near("fp32 twin"))


def test_nf4_scales_are_quantised_by_strip():
    weight = torch.randn(16, 640) * torch.logspace(-1, 0, 16)[:, None]
    largest = weight.view(16, 10, 64).abs().amax(-1)
    step = (largest.max() - largest.min()) / 255
    scales = unpack(pack(weight, Format.parse("nf4"))).view(16, 10, 64).abs().amax(-1)
    assert ((scales - largest).abs() <= step * 0.51).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_where_the_layout_says(name):
    """One element at a time, from the table in the module's docstring."""
    format = Format.parse(name)
    weight = torch.randn(2 * 18, 130)
    packed, values = pack(weight, format, parts=2), unpack(pack(weight, format, parts=2))
    regions = format.regions(130)
    strips = packed.data.view(4, sum(regions))
    for row, col in [(0, 0), (17, 129), (18, 5), (35, 77), (15, 64)]:
        strip, r = strips[row // 18 * 2 + row % 18 // rounding.STRIP], row % 18 % rounding.STRIP
        codes, *tables = strip.split(regions)
        if format.bits == 8:
            code = codes[col // 4 * 64 + r * 4 + col % 4].item()
        else:
            code = codes[col // 8 * 64 + r * 4 + col % 4].item() >> (4 if col % 8 >= 4 else 0) & 15
        at = col // format.group * rounding.STRIP + r
        if format.kind == "nf4":
            step, offset = tables[1][:8].view(torch.float32)
            want = (offset + step * tables[0][at]) * rounding.NF4_LEVELS[code]
        elif format.kind == "mxfp4":
            want = torch.tensor(2.0 ** (tables[0][at].item() - 127) * rounding.MXFP4_VALUES[code])
        else:
            scale, *minimum = (table.view(torch.float16)[at].float() for table in tables)
            want = scale * (code - format.zero_code) + sum(minimum)
        assert values[row, col] == want
    last = strips[:, : regions[0]].view(4, -1, rounding.STRIP, 4)[:, -1, :, 3]  # the last column is padding, and zero
    assert (last == (128 if format.bits == 8 else format.zero_code * 17)).all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name):
    for weight in (torch.zeros(17, 70), torch.zeros(0, 70), torch.zeros(2, 0)):
        packed = pack(weight, Format.parse(name))
        assert torch.equal(unpack(packed), weight)
        assert relative_error(weight, packed) == 0


@pytest.mark.parametrize("name", NAMES)
def test_tiny_numbers_do_no_harm(name):
    weight = torch.randn(16, 128) * 1e-42  # subnormal in fp32, below every fp16 scale
    weight[0] = torch.randn(128)
    values = unpack(pack(weight, Format.parse(name)))
    assert values.isfinite().all()
    assert values[1:].abs().max() <= 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_huge_numbers_are_stored_or_refused(name):
    weight, format = torch.randn(16, 128) * 1e9, Format.parse(name)
    if format.kind in ("nf4", "mxfp4"):
        assert relative_error(weight, pack(weight, format)) < 0.15
    else:
        with pytest.raises(ConfigError, match=r"matrix 0, rows 0 to 15: scales and minima are fp16, and .* too large"):
            pack(weight, format)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_with_their_place(name, bad):
    weight = torch.randn(3, 32, 128)
    weight[1, 17, 5] = bad
    with pytest.raises(ConfigError, match=r"matrix 1, rows .*: the weight has NaN or infinity"):
        pack(weight, Format.parse(name))


def test_bytes_that_are_not_such_a_matrix_are_refused():
    format = Format.parse("int4")
    with pytest.raises(ConfigError, match="16×32 matrix in int4-g32 is 320 contiguous bytes"):
        Packed(torch.zeros(319, dtype=torch.uint8), format, 16, 32)
    with pytest.raises(ConfigError, match="5 rows are not 2 equal parts"):
        pack(torch.zeros(5, 32), format, parts=2)


def test_relative_error_is_the_frobenius_ratio():
    weight = torch.randn(4, 33, 70)
    packed = pack(weight, Format.parse("int4"))
    want = ((unpack(packed) - weight).norm() / weight.norm()).item()
    assert relative_error(weight, packed) == pytest.approx(want, rel=1e-5)
