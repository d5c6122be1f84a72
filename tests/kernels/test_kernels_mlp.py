"""`moe_mlp` against its reference in fp64: outputs and every gradient, on every instruction set, for every routing."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from moekit import kernels
from moekit.errors import ConfigError, UnsupportedError
from moekit.kernels import cpu, mlp, reference, select
from tolerances import assert_close

DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("x", "weights", "in_proj", "in_bias", "down_proj", "down_bias")
# tokens, top_k, experts, hidden, inner
SHAPES = {
    "no tokens": (0, 2, 3, 8, 8),
    "no width": (1, 1, 3, 1, 1),
    "odd": (7, 3, 5, 33, 17),
    "past a panel": (64, 4, 3, 65, 130),
    "past a task": (300, 2, 3, 70, 35),
    "one expert has all": (550, 1, 1, 40, 36),
}


class Case:
    """Inputs of `moe_mlp` in a dtype, and the gradient of its result."""

    def __init__(self, shape, dtype, *, gated=True, bias=True, activation="silu", routing="regular", out_dtype=None):
        tokens, top_k, experts, hidden, inner = SHAPES[shape] if isinstance(shape, str) else shape
        width = 2 * inner if gated else inner
        self.activation, self.out_dtype = activation, out_dtype or dtype
        self.tokens_A = torch.arange(tokens).repeat_interleave(top_k)
        self.ids_A = torch.randint(0, experts, (tokens * top_k,))
        if routing == "dropped":  # tokens with fewer experts, and with none
            kept = torch.rand(tokens * top_k) > 0.5
            self.tokens_A, self.ids_A = self.tokens_A[kept], self.ids_A[kept]
        if routing == "elsewhere":  # an expert of another process, and one here without tokens
            self.ids_A[self.ids_A == 0] = experts
        tensors = {
            "x": torch.randn(tokens, hidden),
            "weights": torch.rand(self.ids_A.shape[0]) + 0.1,
            "in_proj": torch.randn(experts, width, hidden) * hidden**-0.5,
            "in_bias": torch.randn(experts, width) if bias else None,
            "down_proj": torch.randn(experts, hidden, inner) * inner**-0.5,
            "down_bias": torch.randn(experts, hidden) if bias else None,
        }
        self.tensors = {
            name: each if each is None or name == "weights" else each.to(dtype) for name, each in tensors.items()
        }
        self.grad = torch.randn(tokens, hidden).to(self.out_dtype)

    def run(self, op, wanted=NAMES, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The result and the wanted gradients by name, all inputs first converted to `dtype`."""
        t = {name: each if each is None or dtype is None else each.to(dtype) for name, each in self.tensors.items()}
        t = {n: e if e is None else e.clone().requires_grad_(n in wanted) for n, e in t.items()}
        args = (t["x"], self.tokens_A, self.ids_A, *list(t.values())[1:])
        y = op(*args, self.activation, dtype or self.out_dtype)
        leaves = {name: each for name, each in t.items() if name in wanted and each is not None}
        if leaves:
            y.backward(self.grad.to(y.dtype))
        return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def agree(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    assert got.keys() == want.keys()
    for name, each in got.items():
        assert_close(each, want[name], "moe_mlp", dtype)


@pytest.fixture(params=[name for name in cpu.available_isas() if "vnni" not in name])  # the same products
def isa(request):
    with cpu.forced_isa(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "no width"])
def test_outputs_and_gradients_follow_the_reference(isa, shape, gated, dtype, poisoned):
    for activation, bias in zip(reference.ACTIVATIONS, (True, False, True, False), strict=True):
        case = Case(shape, dtype, gated=gated, bias=bias, activation=activation)
        agree(case.run(kernels.moe_mlp), case.run(reference.moe_mlp, dtype=torch.float64), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ["dropped", "elsewhere"])
def test_irregular_routings(isa, routing, dtype, poisoned):
    case = Case((40, 3, 6, 48, 24), dtype, routing=routing)
    got = case.run(kernels.moe_mlp)
    agree(got, case.run(reference.moe_mlp, dtype=torch.float64), dtype)
    if routing == "elsewhere":
        assert not got["in_proj"][0].any()
        assert not got["weights"][case.ids_A == 6].any()


def test_no_width_to_speak_of(isa):
    case = Case("no width", torch.float32, activation="relu")
    agree(case.run(kernels.moe_mlp), case.run(reference.moe_mlp, dtype=torch.float64))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_over_their_whole_range(isa, activation):
    """Values and slopes from −120 to 120 and at both infinities' doors, through one expert that only activates."""
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([1e30, -1e30, 0.0, 1e-30])]).unsqueeze(1)
    ids, one = torch.zeros(x.shape[0], dtype=torch.int64), torch.ones(1, 1, 1)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y = kernels.moe_mlp(leaf, torch.arange(len(x)), ids, torch.ones(len(x)), one, None, one, None, activation)
    want = reference.activate(wide, activation)
    torch.autograd.backward([y, want], [torch.ones_like(y), torch.ones_like(want)])
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-6, atol=2e-6)


def test_not_a_number_stays_with_its_token(isa):
    case = Case((20, 2, 3, 16, 8), torch.float32)
    case.tensors["x"][5, 3] = float("nan")
    y = case.run(kernels.moe_mlp, wanted=())["y"]
    assert y[5].isnan().all()
    assert y[torch.arange(20) != 5].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(isa, dtype):
    before = torch.get_num_threads()
    case = Case((300, 3, 5, 200, 70), dtype)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(case.run(kernels.moe_mlp))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(each, other[name]) for name, each in results[0].items())


@pytest.mark.parametrize("wanted", [(), *((name,) for name in NAMES), ("x", "weights"), ("down_proj", "down_bias")])
def test_only_what_is_wanted_is_computed(wanted, poisoned):
    case = Case("odd", torch.float32)
    everything = case.run(kernels.moe_mlp)
    got = case.run(kernels.moe_mlp, wanted=wanted)
    assert got.keys() == {"y", *wanted}
    assert all(torch.equal(each, everything[name]) for name, each in got.items())


def test_without_gradient_nothing_is_saved():
    case = Case("odd", torch.float32)
    args = (case.tensors["x"], case.tokens_A, case.ids_A, *list(case.tensors.values())[1:], "silu", torch.float32)
    assert mlp._moe_mlp(*args, False)[1].numel() == 0
    assert mlp._moe_mlp(*args, True)[1].shape == (21, 34)


def test_a_wide_result_of_narrow_weights():
    case = Case("odd", torch.bfloat16, out_dtype=torch.float32)
    got = case.run(kernels.moe_mlp)
    assert got["y"].dtype == torch.float32
    agree(got, case.run(reference.moe_mlp, dtype=torch.float64), torch.bfloat16)


def test_views_and_weights_of_another_dtype():
    case = Case((20, 2, 3, 16, 8), torch.bfloat16)
    plain = case.run(kernels.moe_mlp)
    case.tensors = {
        name: each.mT.contiguous().mT if each.ndim > 1 else each.repeat_interleave(2)[::2]
        for name, each in case.tensors.items()
    }
    assert all(torch.equal(each, plain[name]) for name, each in case.run(kernels.moe_mlp).items())
    case.tensors["weights"] = case.tensors["weights"].bfloat16()
    assert case.run(kernels.moe_mlp)["weights"].dtype == torch.bfloat16


def test_opcheck():
    case = Case((6, 2, 3, 8, 4), torch.float32)
    leaves = [None if each is None else each.requires_grad_() for each in case.tensors.values()]
    args = (leaves[0], case.tokens_A, case.ids_A, *leaves[1:], "silu", torch.float32, True)
    torch.library.opcheck(
        mlp._moe_mlp, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_traced_whole():
    """One graph for forward and backward, and the same numbers."""
    case = Case((12, 2, 3, 16, 8), torch.float32)
    compiled = torch.compile(kernels.moe_mlp, backend="aot_eager", fullgraph=True)
    plain = case.run(kernels.moe_mlp)
    assert all(torch.equal(each, plain[name]) for name, each in case.run(compiled).items())


def test_a_second_derivative_is_refused_and_the_reference_has_it():
    case = Case((3, 2, 2, 3, 2), torch.float32)
    x = case.tensors["x"].requires_grad_()
    args = (x, case.tokens_A, case.ids_A, *list(case.tensors.values())[1:], "silu")
    for backend in ("cpu", "reference"):
        with kernels.forced(backend):
            (grad,) = torch.autograd.grad(kernels.moe_mlp(*args).square().sum(), x, create_graph=True)
            if backend == "reference":
                torch.autograd.grad(grad.sum(), x)
                continue
            with pytest.raises(UnsupportedError, match="no second derivative"):
                torch.autograd.grad(grad.sum(), x)


def test_who_fuses():
    device = torch.device("cpu")
    assert select.fuses_mlp(device, torch.float32)
    assert not select.fuses_mlp(device, torch.float64)
    assert not select.fuses_mlp(torch.device("meta"), torch.float32)
    for backend in ("reference", "blas"):
        with kernels.forced(backend):
            assert not select.fuses_mlp(device, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(7, 32)}, "the shape of x_TD must be (any, 33), not (7, 32)"),
        ({"in_proj": torch.zeros(5, 20, 33)}, "in_proj has 20 rows, but the inner width is 17: F or 2F expected"),
        ({"in_bias": torch.zeros(5, 33)}, "the shape of in_bias_EG must be (5, 34), not (5, 33)"),
        ({"down_proj": torch.zeros(5, 33, 17).bfloat16()}, "not torch.bfloat16 on cpu"),
        ({"weights": torch.zeros(20)}, "the shape of weights_A must be (21), not (20,)"),
        ({"ids": torch.full((21,), 6)}, "expert id"),
        ({"ids": torch.full((21,), -1)}, "expert id"),
        ({"ids": torch.zeros(21, dtype=torch.int32)}, "expert_ids_A must be int64, not torch.int32"),
        ({"tokens": torch.full((21,), 7)}, "token_ids_A must ascend from 0 to below 7, but [0] is 7"),
        ({"tokens": torch.arange(21).flip(0) // 3}, "token_ids_A must ascend from 0 to below 7, but [3] is 5"),
        ({"activation": "swish"}, "unknown activation 'swish'; there are silu, gelu, gelu_tanh, relu"),
        ({"out_dtype": torch.bfloat16}, "the result can be torch.float32 as x is, or float32, not torch.bfloat16"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    case = Case("odd", torch.float32)
    case.tokens_A, case.ids_A = change.get("tokens", case.tokens_A), change.get("ids", case.ids_A)
    case.activation = change.get("activation", "silu")
    case.out_dtype = change.get("out_dtype", torch.float32)
    case.tensors.update({name: each for name, each in change.items() if name in NAMES})
    with pytest.raises(ConfigError, match=re.escape(message)):
        case.run(kernels.moe_mlp, wanted=())
