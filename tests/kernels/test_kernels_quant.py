"""Products with quantised matrices: tight against a twin that rounds activations alike, loose against exact ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moekit.errors import BackendError, ConfigError
from moekit.kernels import cpu, explain, forced, formats
from moekit.kernels.formats import Format, Packed, pack, unpack
from moekit.kernels.quant import Matrices, quant_grouped_mm, quant_linear, quant_moe
from moekit.kernels.reference import activate
from tolerances import TOLERANCES, assert_close

NAMES = ("int8-g32", "int8-g128", "int4-g32", "int4-g64", "int4-g128", "int4-g64-asym", "nf4", "mxfp4")
WIDTHS = {"one": (1, 1), "odd": (15, 17), "past a strip": (33, 130), "two parts": (34, 70), "real": (64, 576)}
ROWS = (1, 2, 3, 7, 12, 13, 40)


@pytest.fixture(params=cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.forced_isa(request.param):
        yield request.param


def rounded(x: Tensor) -> Tensor:
    """The activations that the kernels multiply with, in fp64: int8 in blocks of 32 columns."""
    blocks = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = torch.where(largest > 0, (blocks * (torch.full_like(largest, 127) / largest)).round(), 0)
    return (codes.double() * (largest / 127).double()).flatten(-2)[..., : x.shape[-1]]


def multiplied(packed: Packed | Tensor) -> Tensor:
    """The weights that the kernels multiply with, in fp64: for nf4 its levels are n/127."""
    if isinstance(packed, Tensor):
        return packed.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "NF4_LEVELS", tuple(round(level * 127) / 127 for level in formats.NF4_LEVELS))
        return unpack(packed).double()


def layer_by_hand(
    x_TD: Tensor, ids: Tensor, weights: Tensor, gate_up: list, down: list, act: str, gated: bool
) -> Tensor:
    """One expert at a time in fp64, rounding where the kernels do."""
    out = torch.zeros(x_TD.shape, dtype=torch.float64)
    for expert, (first, second) in enumerate(zip(gate_up, down, strict=True)):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        x = x_TD[token].double() if isinstance(first, Tensor) else rounded(x_TD[token])
        hidden = x @ multiplied(first).T
        if gated:
            gate, up = hidden.chunk(2, dim=1)
            hidden = activate(gate, act) * up
        else:
            hidden = activate(hidden, act)
        hidden = hidden if isinstance(second, Tensor) else rounded(hidden)
        out.index_add_(0, token, weights[token, slot, None].double() * (hidden @ multiplied(second).T))
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", WIDTHS)
def test_linear_multiplies_rounded_activations_with_unpacked_weights(isa, name, shape):
    out, width = WIDTHS[shape]
    parts = 2 if shape == "two parts" else 1
    packed = pack(torch.randn(out, width), Format.parse(name), parts)
    for rows in ROWS:
        x = torch.randn(rows, width)
        x[0, : width // 2] = 0
        got = quant_linear(x, packed)
        assert_close(got, rounded(x) @ multiplied(packed).T, "quant")
        assert (got - x @ unpack(packed).T).norm() <= TOLERANCES["quant rounding", torch.float32] * got.norm()


@pytest.mark.parametrize("name", NAMES)
def test_numbers_depend_neither_on_company_nor_on_threads(isa, name):
    torch.manual_seed(3)
    gate_up, down = (
        pack(torch.randn(5, 2 * 40, 96), Format.parse(name), 2),
        pack(torch.randn(5, 96, 40), Format.parse(name)),
    )
    x, ids, weights = torch.randn(40, 96), torch.randint(5, (40, 3)), torch.rand(40, 3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            together = quant_moe(x, ids, weights, gate_up, down, "silu", True)
            alone = [
                quant_moe(x[i : i + 1], ids[i : i + 1], weights[i : i + 1], gate_up, down, "silu", True)
                for i in range(40)
            ]
            rows = quant_linear(x, gate_up[0])
            results += [
                (together, rows),
                (torch.cat(alone), torch.cat([quant_linear(row, gate_up[0])[None] for row in x])),
            ]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gated", [True, False])
def test_a_layer_is_its_experts(isa, name, gated, poisoned):
    experts, hidden, inner, tokens = 6, 70, 45, 30
    format = Format.parse(name)
    gate_up = pack(torch.randn(experts, (1 + gated) * inner, hidden) / 8, format, 1 + gated)
    down = pack(torch.randn(experts, hidden, inner) / 6, format)
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, 2)
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(tokens)])  # expert 5 has nobody
    ids[:20, 0] = 1
    for act in ("silu", "gelu", "gelu_tanh", "relu"):
        got = quant_moe(x, ids, weights, gate_up, down, act, gated)
        want = layer_by_hand(
            x, ids, weights, [gate_up[e] for e in range(experts)], [down[e] for e in range(experts)], act, gated
        )
        assert_close(got, want, "quant layer")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("gated", [True, False])
def test_experts_of_several_calls_add_up_to_the_same_bits(backend, gated):
    format = Format.parse("int4")
    gate_up, down = pack(torch.randn(7, (1 + gated) * 40, 70), format, 1 + gated), pack(torch.randn(7, 70, 40), format)
    x, ids, weights = torch.randn(9, 70), torch.randint(7, (9, 3)), torch.rand(9, 3)
    with forced(backend):
        whole = quant_moe(x, ids, weights, gate_up, down, "silu", gated)
        parts = torch.zeros(9, 70)
        for experts in ([0], [1, 4], [5, 6]):  # 2 and 3 never come
            number = torch.full((7,), -1)
            number[experts] = torch.arange(len(experts))
            some = [[stack[e] for e in experts] for stack in (gate_up, down)]
            quant_moe(x, number[ids], weights, *some, "silu", gated, add_to=parts)
        without = weights.masked_fill((ids == 2) | (ids == 3), 0.0)
        assert torch.equal(parts, quant_moe(x, ids, without, gate_up, down, "silu", gated))
        assert not torch.equal(parts, whole)


def test_every_expert_may_have_its_own_format(isa):
    weights = [torch.randn(2 * 40, 70) / 8 for _ in range(5)], [torch.randn(70, 40) / 6 for _ in range(5)]
    kinds = ("int8", "int4-g64-asym", "nf4", "mxfp4")
    gate_up = [*(pack(w, Format.parse(kind), 2) for w, kind in zip(weights[0], kinds, strict=False)), weights[0][4]]
    down = [
        weights[1][0].bfloat16(),
        *(pack(w, Format.parse(kind)) for w, kind in zip(weights[1][1:], kinds, strict=True)),
    ]
    x, ids, scale = torch.randn(9, 70), torch.arange(18).view(9, 2) % 5, torch.rand(9, 2)
    got = quant_moe(x, ids, scale, gate_up, down, "silu", True)
    assert_close(got, layer_by_hand(x, ids, scale, gate_up, down, "silu", True), "quant layer")
    rows = quant_grouped_mm(x, Matrices(gate_up), torch.tensor([2, 0, 3, 0, 4]))
    want = [rounded(x[:2]) @ multiplied(gate_up[0]).T, rounded(x[2:5]) @ multiplied(gate_up[2]).T, x[5:] @ gate_up[4].T]
    assert_close(rows, torch.cat([each.double() for each in want]), "quant")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_matrices_are_exact(isa, dtype):
    weight, x = torch.randn(33, 70).to(dtype), torch.randn(13, 70)
    assert_close(quant_linear(x, weight), x.double() @ weight.double().T, "quant")


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 30, 0], [1, 0, 25], [13, 2, 12]])
def test_grouped_products_of_empty_and_full_experts(isa, counts, poisoned):
    packed = pack(torch.randn(3, 50, 70), Format.parse("int4"))
    x = torch.randn(sum(counts) + 2, 70)
    x[sum(counts) :] = float("nan")
    want = torch.zeros(len(x), 50, dtype=torch.float64)
    start = 0
    for expert, count in enumerate(counts):
        want[start : start + count] = rounded(x[start : start + count]) @ multiplied(packed[expert]).T
        start += count
    assert_close(quant_grouped_mm(x, packed, torch.tensor(counts)), want, "quant")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_nan_or_infinity_gives_nan_and_harms_no_other(isa, bad):
    packed, x = pack(torch.randn(20, 70), Format.parse("int4")), torch.randn(5, 70)
    want = quant_linear(x, packed)
    x[2, 40] = bad
    got = quant_linear(x, packed)
    assert got[2].isnan().all()
    assert torch.equal(got[[0, 1, 3, 4]], want[[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_the_rows(dtype):
    packed, x = pack(torch.randn(20, 70), Format.parse("int4")), torch.randn(2, 3, 70).to(dtype)
    bias = torch.randn(20).to(dtype)
    got = quant_linear(x, packed, bias)
    assert got.dtype == dtype
    assert torch.equal(got, quant_linear(x.float(), packed).to(dtype) + bias)


def test_the_gradient_reaches_the_rows():
    packed = pack(torch.randn(3, 10, 14), Format.parse("int4"))
    x = torch.randn(6, 14, requires_grad=True)
    grad = torch.randn(6, 10)
    quant_grouped_mm(x, packed, torch.tensor([2, 0, 3])).backward(grad)
    dense = unpack(packed)
    assert_close(x.grad[:2], grad[:2].double() @ dense[0].double(), "quant")
    assert_close(x.grad[2:5], grad[2:5].double() @ dense[2].double(), "quant")
    assert (x.grad[5] == 0).all()


def test_many_rows_and_tokens_pass_in_pieces():
    """More than the workspace takes at once: 8,192 rows, 1,024 tokens."""
    packed = pack(torch.randn(2, 32, 32), Format.parse("int8"))
    x, counts = torch.randn(9000, 32), torch.tensor([500, 8500])
    assert torch.equal(quant_grouped_mm(x, packed, counts)[8990:], quant_linear(x[8990:], packed[1]))
    ids, weights = torch.randint(2, (1100, 1)), torch.rand(1100, 1)
    whole = quant_moe(x[:1100], ids, weights, packed, packed, "relu", False)
    assert torch.equal(whole[1050:], quant_moe(x[1050:1100], ids[1050:], weights[1050:], packed, packed, "relu", False))


def test_a_copy_does_not_use_the_memory_of_the_original():
    packed, x = pack(torch.randn(64, 640), Format.parse("int8")), torch.randn(1, 640)
    want = quant_linear(x, packed)
    twin = copy.deepcopy(packed)
    packed.data.fill_(0)
    assert torch.equal(quant_linear(x, twin), want)


def test_no_rows_and_no_tokens():
    packed = pack(torch.randn(2, 32, 32), Format.parse("int8"))
    assert quant_linear(torch.zeros(2, 0, 32), packed[0]).shape == (2, 0, 32)
    none = torch.zeros(0, 1)
    assert quant_moe(torch.zeros(0, 32), none.long(), none, packed, packed, "relu", False).shape == (0, 32)


def test_the_reference_is_the_exact_product():
    gate_up, down = (
        pack(torch.randn(3, 80, 70), Format.parse("nf4"), 2),
        pack(torch.randn(3, 70, 40), Format.parse("nf4")),
    )
    x, ids, weights = torch.randn(9, 70), torch.arange(18).view(9, 2) % 3, torch.rand(9, 2)
    with forced("reference"):
        exact, rows = quant_moe(x, ids, weights, gate_up, down, "silu", True), quant_linear(x, gate_up[0])
    assert_close(rows, x.double() @ unpack(gate_up[0]).double().T, "quant")
    near = quant_moe(x, ids, weights, gate_up, down, "silu", True)
    assert (near - exact).norm() <= 3 * TOLERANCES["quant rounding", torch.float32] * exact.norm()


def test_explain_says_how_quantised_matrices_are_multiplied(isa):
    choice = explain()[-1]
    assert (choice.op, choice.backend) == ("quantised", "cpu")
    assert cpu.quant_products() in choice.reason
    with forced("blas"), pytest.raises(BackendError, match="no blas backend for quantised matrices"):
        quant_linear(torch.zeros(1, 32), pack(torch.zeros(1, 32), Format.parse("int4")))


def test_what_does_not_fit_is_refused():
    packed = pack(torch.randn(3, 80, 70), Format.parse("int4"))
    x, one = torch.zeros(2, 70), torch.zeros(2, 1)
    for call in (
        lambda: quant_linear(torch.zeros(2, 71), packed[0]),
        lambda: quant_grouped_mm(x, packed, torch.tensor([1, 1])),
        lambda: quant_grouped_mm(x, packed, torch.tensor([1, 2, 0])),
        lambda: quant_moe(x, one.long(), one, packed, packed, "silu", True),
        lambda: quant_moe(x, one.long(), one, packed, pack(torch.zeros(3, 70, 40), packed.format), "silu", True),
        lambda: quant_moe(x, one, one, packed, pack(torch.zeros(3, 70, 80), packed.format), "silu", False),
        lambda: quant_moe(x, one.long() + 3, one, packed, pack(torch.zeros(3, 70, 80), packed.format), "silu", False),
        lambda: quant_moe(x, one.long(), one, packed, pack(torch.zeros(3, 70, 80), packed.format), "mish", False),
        lambda: Matrices([packed[0], pack(torch.zeros(80, 71), packed.format)]),
        lambda: Matrices(torch.zeros(3, 80, 70, dtype=torch.float64)),
    ):
        with pytest.raises(ConfigError):
            call()
