"""The native kernels and the reference against equations in fp64, on every instruction set of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from grouped_cases import OPS, SHAPES, by_einsum, decode_by_hand, decode_inputs, expected, grouped_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.errors import BackendError, ConfigError
from moekit.kernels import blas, cpu, reference
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("reference", "blas", *cpu.available_isas())
DECODE_SHAPES = {  # tokens, top_k, experts, hidden, inner
    "one": (1, 1, 1, 3, 5),
    "no token": (0, 2, 4, 8, 8),
    "single token": (1, 2, 6, 64, 48),
    "odd": (5, 3, 7, 101, 37),
    "shared experts": (16, 2, 3, 33, 129),
    "every expert": (4, 4, 4, 40, 72),
}


@contextmanager
def named(name: str) -> Iterator[object]:
    """The reference, the BLAS, or the native kernels on one instruction set."""
    if name in ("reference", "blas"):
        yield {"reference": reference, "blas": blas}[name]
    else:
        with cpu.forced_isa(name):
            yield cpu


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[object]:
    with named(request.param) as module:
        yield module


@pytest.fixture(params=[name for name in BACKENDS if name != "blas"])
def decoding(request: pytest.FixtureRequest) -> Iterator[object]:
    """Those that have moe_decode."""
    with named(request.param) as module:
        yield module


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_grouped_ops_follow_their_equations(backend, op, shape, dtype):
    if backend is not reference and dtype == torch.float64:
        return
    left, right, counts_E = grouped_inputs(op, shape, dtype)
    assert_close(getattr(backend, op)(left, right, counts_E), expected(op, shape, dtype), "kernels")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", DECODE_SHAPES)
def test_moe_decode_follows_its_equation(decoding, shape, gated, dtype):
    inputs = decode_inputs(*DECODE_SHAPES[shape], gated)
    x, ids, weights, in_proj, down = (each if each.dtype == torch.int64 else each.to(dtype) for each in inputs)
    for activation in reference.ACTIVATIONS:
        got = decoding.moe_decode(x, ids, weights.float(), in_proj, down, activation)
        want = decode_by_hand(inputs[0], ids, weights.float().double(), inputs[3], inputs[4], activation)
        assert_close(got, want, "decode reference" if decoding is reference else "decode")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_non_contiguous_inputs(backend, op, dtype):
    left, right, counts_E = grouped_inputs(op, "empty experts", dtype)
    spread = [each.mT.contiguous().mT for each in (left, right)]
    every_second = torch.stack([counts_E, counts_E], dim=1)[:, 0]
    assert not any(each.is_contiguous() for each in (*spread, every_second))
    assert_close(getattr(backend, op)(*spread, every_second), expected(op, "empty experts", dtype), "kernels")


def test_moe_decode_takes_non_contiguous_inputs_and_repeated_experts(decoding):
    inputs = decode_inputs(4, 2, 5, 24, 40, True)
    x, _, weights, in_proj, down = (each.float() for each in inputs)
    ids = torch.tensor([[1, 1], [1, 4], [4, 4], [0, 1]])
    got = decoding.moe_decode(x.T.contiguous().T, ids, weights, in_proj.mT.contiguous().mT, down, "silu")
    want = decode_by_hand(inputs[0], ids, weights.double(), inputs[3], inputs[4], "silu")
    assert_close(got, want, "decode")
    assert got.is_contiguous()


@pytest.mark.parametrize("op", OPS)
def test_rows_and_experts_of_nobody_come_out_as_zeros(backend, op, poisoned):
    """Outputs come from memory full of NaN, and spare rows are NaN: neither may show."""
    left, right, counts_E = grouped_inputs(op, "empty experts", torch.float32)
    out = getattr(backend, op)(left, right, counts_E)
    unused = out[counts_E == 0] if op == "grouped_outer" else out[int(counts_E.sum()) :]
    assert unused.numel()
    assert torch.equal(unused, torch.zeros_like(unused))
    assert out.isfinite().all()


def test_not_a_number_and_infinity_pass_through(backend):
    rows, weight, counts_E = grouped_inputs("grouped_mm", "one expert", torch.bfloat16)
    rows[0, 0], rows[1, 0], weight[0, :, 0] = float("nan"), float("inf"), 1.0
    out = backend.grouped_mm(rows, weight, counts_E)
    assert out[0].isnan().all()
    assert (out[1] == float("inf")).all()
    assert out[2:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", cpu.available_isas())
def test_one_and_two_threads_give_the_same_bits(isa, dtype):
    before = torch.get_num_threads()
    decode = [each if each.dtype == torch.int64 else each.to(dtype) for each in decode_inputs(5, 3, 7, 301, 137, True)]
    results = []
    with cpu.forced_isa(isa):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs = [getattr(cpu, op)(*grouped_inputs(op, "past every tile", dtype)) for op in OPS]
            results.append([*outs, cpu.moe_decode(*decode, "silu")])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_among_others(dtype):
    rows, weight, counts_E = grouped_inputs("grouped_mm", "past every tile", dtype)
    together = cpu.grouped_mm(rows, weight, counts_E)
    alone = cpu.grouped_mm(rows[100:101], weight, torch.tensor([0, 1, 0]))
    assert torch.equal(together[100:101], alone)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    spare=st.integers(0, 3),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES),
    op=st.sampled_from(OPS),
)
def test_any_counts(counts, spare, widths, dtype, op):
    rows = sum(counts) + spare
    sizes = {"o": (rows, widths[0]), "i": (rows, widths[1]), "w": (len(counts), *widths)}
    order = {"grouped_mm": "iw", "grouped_mm_transposed": "ow", "grouped_outer": "oi"}[op]
    left, right = (torch.randn(sizes[each]).to(dtype) for each in order)
    counts_E = torch.tensor(counts)
    assert_close(getattr(cpu, op)(left, right, counts_E), by_einsum(op, left, right, counts_E), "kernels")


@pytest.mark.parametrize("counts", [[3, -1], [4, 2], [2**62, 2**62]])
def test_counts_that_do_not_fit_the_rows(backend, counts):
    with pytest.raises(ConfigError, match=r"counts_E\["):
        backend.grouped_mm(torch.zeros(5, 2), torch.zeros(2, 3, 2), torch.tensor(counts))


@pytest.mark.parametrize("wrong", [-1, 5])
def test_expert_ids_out_of_range(decoding, wrong):
    x, ids, weights, in_proj, down = decode_inputs(2, 2, 5, 4, 4, True)
    ids[1, 0] = wrong
    with pytest.raises(ConfigError, match=f"expert id {wrong}"):
        decoding.moe_decode(x.float(), ids, weights.float(), in_proj.float(), down.float(), "silu")


def test_forcing_an_instruction_set():
    before = cpu.isa()
    with cpu.forced_isa("portable"):
        assert cpu.isa() == "portable"
    assert cpu.isa() == before
    with pytest.raises(BackendError, match="'sse9' is not available here; there are portable"), cpu.forced_isa("sse9"):
        pass


@pytest.mark.parametrize(("name", "expected"), [("portable", "portable"), ("sse9", "BackendError")])
def test_instruction_set_from_the_environment(name, expected):
    code = """
from moekit.errors import BackendError
from moekit.kernels import cpu
try:
    print(cpu.isa())
except BackendError:
    print("BackendError")
"""
    env = {**os.environ, "MOEKIT_ISA": name}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime_in_the_process():
    """The extension uses the threads PyTorch has, not a second pool."""
    cpu.grouped_mm(*grouped_inputs("grouped_mm", "one expert", torch.float32))
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}
    assert len(runtimes) == 1, runtimes
