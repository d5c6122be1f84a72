"""Gradients of every backend against fp64, gradcheck, tracing, and the errors for inputs that do not fit."""

from __future__ import annotations

import re

import pytest
import torch
from grouped_cases import OPS, SHAPES, by_einsum, decode_inputs, grouped_inputs

from moekit import kernels
from moekit.errors import ConfigError, MoekitError
from moekit.kernels import autograd, cpu
from tolerances import assert_close

PUBLIC = {op: getattr(autograd, op) for op in OPS}
# d left and d right of each op as another op, from the chain rule
GRADIENTS = {
    "grouped_mm": (
        lambda grad, left, right, counts: by_einsum("grouped_mm_transposed", grad, right, counts),
        lambda grad, left, right, counts: by_einsum("grouped_outer", grad, left, counts),
    ),
    "grouped_mm_transposed": (
        lambda grad, left, right, counts: by_einsum("grouped_mm", grad, right, counts),
        lambda grad, left, right, counts: by_einsum("grouped_outer", left, grad, counts),
    ),
    "grouped_outer": (
        lambda grad, left, right, counts: by_einsum("grouped_mm", right, grad, counts),
        lambda grad, left, right, counts: by_einsum("grouped_mm_transposed", left, grad, counts),
    ),
}
COUNTS = torch.tensor([2, 0, 3])


def small(op: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs with gradients: six rows, the last of which belongs to nobody."""
    sizes = {"o": (6, 3), "i": (6, 4), "w": (3, 3, 4)}
    order = {"grouped_mm": "iw", "grouped_mm_transposed": "ow", "grouped_outer": "oi"}[op]
    left, right = (torch.randn(sizes[each], dtype=dtype, requires_grad=True) for each in order)
    return left, right, COUNTS


@pytest.mark.parametrize("op", OPS)
def test_first_and_second_derivatives(op):
    left, right, counts_E = small(op)
    assert torch.autograd.gradcheck(lambda a, b: PUBLIC[op](a, b, counts_E), (left, right))
    assert torch.autograd.gradgradcheck(lambda a, b: PUBLIC[op](a, b, counts_E), (left, right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "blas", "cpu"])
@pytest.mark.parametrize("shape", ["empty experts", "no rows", "all to one", "few rows of wide"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_every_backend(op, shape, backend, dtype):
    left, right, counts_E = grouped_inputs(op, shape, dtype)
    left.requires_grad_()
    right.requires_grad_()
    with kernels.forced(backend):
        out = PUBLIC[op](left, right, counts_E)
        grad = torch.randn(out.shape).to(dtype)
        grads = torch.autograd.grad(out, (left, right), grad)
    for got, gradient in zip(grads, GRADIENTS[op], strict=True):
        assert_close(got, gradient(grad, left.detach(), right.detach(), counts_E), "kernels")


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("op", OPS)
def test_only_the_needed_gradient_is_computed(op, wanted, monkeypatch):
    calls = []
    run = autograd.select.run
    monkeypatch.setattr(autograd.select, "run", lambda name, *args: calls.append(name) or run(name, *args))
    inputs = [each.detach() for each in small(op)]
    inputs[wanted].requires_grad_()
    PUBLIC[op](*inputs).sum().backward()
    assert len(calls) == 2
    assert inputs[wanted].grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, dtype):
    torch.library.opcheck(getattr(autograd, f"_{op}"), small(op, dtype))


def test_opcheck_of_moe_decode():
    x, ids, weights, in_proj, down = decode_inputs(3, 2, 5, 8, 4, True)
    args = (x.float(), ids, weights.float(), in_proj.float(), down.float(), "silu")
    torch.library.opcheck(autograd._moe_decode, args)
    torch.library.opcheck(autograd._moe_decode, (args[0].T.contiguous().T, *args[1:]))


def test_meta_tensors_have_the_right_shapes():
    rows, weight = torch.empty(7, 4, device="meta"), torch.empty(2, 3, 4, device="meta")
    assert kernels.grouped_mm(rows, weight, torch.empty(2, dtype=torch.int64, device="meta")).shape == (7, 3)


def test_traced_whole_with_symbolic_rows():
    """One graph, no break, the same numbers, and other row counts without a new trace."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    layer = torch.compile(
        lambda x, w, c: kernels.grouped_mm(x, w, c).relu(), backend=backend, fullgraph=True, dynamic=True
    )
    weight = torch.randn(3, 4, 6)
    for counts in ([2, 0, 3], [4, 1, 7]):
        counts_E = torch.tensor(counts)
        rows = torch.randn(sum(counts), 6)
        assert torch.equal(layer(rows, weight, counts_E), kernels.grouped_mm(rows, weight, counts_E).relu())
    assert len(graphs) == 1


def test_moe_decode_has_no_gradient():
    x, ids, weights, in_proj, down = (each for each in decode_inputs(2, 2, 5, 8, 4, True))
    out = kernels.moe_decode(x.requires_grad_(), ids, weights, in_proj, down, "silu")
    with pytest.raises(RuntimeError, match="moe_decode"):
        out.sum().backward()


def test_moe_decode_equals_the_sorted_path():
    x, ids, weights, in_proj, down = decode_inputs(6, 3, 7, 40, 24, True)
    order = ids.flatten().argsort(stable=True)
    counts_E = ids.flatten().bincount(minlength=7)
    gate, up = kernels.grouped_mm(x[order // 3], in_proj, counts_E).chunk(2, dim=-1)
    rows = kernels.grouped_mm(kernels.activate(gate, "gelu") * up, down, counts_E)
    y = torch.zeros_like(x).index_add(0, order // 3, rows * weights.flatten()[order, None])
    assert_close(kernels.moe_decode(x, ids, weights, in_proj, down, "gelu"), y, "decode")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(5)}, "rows must have 2 dimensions, but its shape is (5,)"),
        ({"rows": torch.zeros(5, 3)}, "width of the rows and size 2 of the weight must be equal, not 3 and 4"),
        ({"rows": torch.zeros(5, 4).bfloat16()}, "one dtype, not torch.bfloat16 and torch.float32"),
        ({"counts": torch.tensor([5])}, "number of counts and experts of the weight must be equal, not 1 and 2"),
        ({"counts": torch.tensor([2, 3], dtype=torch.int32)}, "counts_E must be int64, not torch.int32"),
        ({"weight": torch.zeros(2, 3, 4, device="meta")}, "one device, not cpu and meta"),
    ],
)
def test_grouped_inputs_that_do_not_fit(change, message):
    inputs = {"rows": torch.zeros(5, 4), "weight": torch.zeros(2, 3, 4), "counts": torch.tensor([2, 3]), **change}
    with pytest.raises(ConfigError, match=re.escape(message)):
        kernels.grouped_mm(*inputs.values())


def test_outer_inputs_that_do_not_fit():
    with pytest.raises(ConfigError, match="rows of the two inputs must be equal, not 5 and 4"):
        kernels.grouped_outer(torch.zeros(5, 3), torch.zeros(4, 2), torch.tensor([2]))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3, 8), "tokens of x and of the ids"),
        (0, torch.zeros(2, 7), "width of x and of down_proj's output"),
        (1, torch.zeros(2, 2, dtype=torch.int32), "expert_ids_TK must be int64"),
        (2, torch.zeros(2, 3), "shapes of ids and weights"),
        (3, torch.zeros(4, 8, 8), "experts and width of in_proj"),
        (3, torch.zeros(5, 6, 8), "in_proj has 6 rows, but the inner width is 4"),
        (4, torch.zeros(5, 8, 4, dtype=torch.bfloat16), "one dtype"),
        (5, "swish", "unknown activation 'swish'; there are silu, gelu, gelu_tanh, relu"),
    ],
)
def test_decode_inputs_that_do_not_fit(place, value, message):
    x, ids, weights, in_proj, down = decode_inputs(2, 2, 5, 8, 4, True)
    args = [x.float(), ids, weights.float(), in_proj.float(), down.float(), "silu"]
    args[place] = value
    with pytest.raises(MoekitError, match=re.escape(message)):
        kernels.moe_decode(*args)


@pytest.mark.parametrize("backend", ["reference", "blas", "cpu"])
def test_shapes_cover_every_tile_edge(backend):
    """All widths from 1 to past two vectors of the widest instruction set."""
    for width in range(1, 36):
        counts_E = torch.tensor([width % 5, 9])
        rows, weight = torch.randn(int(counts_E.sum()), width), torch.randn(2, 36 - width, width)
        with kernels.forced(backend):
            got = kernels.grouped_mm(rows, weight, counts_E)
        assert_close(got, by_einsum("grouped_mm", rows, weight, counts_E), "kernels")


def test_the_cases_reach_both_sides_of_the_choice():
    """Automatic choice meets the native kernels and the BLAS among the shapes used here."""
    averages = [sum(counts) / len(counts) for counts, *_ in SHAPES.values()]
    device = torch.device("cpu")
    chosen = {kernels.select.choose("grouped_mm", device, torch.float32, int(a), 1) for a in averages}
    assert cpu.unavailable() is None
    assert chosen == {"cpu", "blas"}
