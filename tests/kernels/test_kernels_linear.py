"""`linear` is torch's linear, whoever computes it; and the native kernel does so only where it may."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moekit import kernels
from moekit.kernels import cpu, select
from tolerances import assert_close


@pytest.fixture
def native_calls(monkeypatch):
    calls = []

    def spy(name, original):
        monkeypatch.setattr(cpu, name, lambda *args: calls.append(name) or original(*args))

    spy("grouped_mm", cpu.grouped_mm)
    spy("linear_row", cpu.linear_row)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 7), (2, 3, 7), (0, 7), (1, 1, 7), (200, 7), (7,)])
def test_equals_torch(shape, bias, dtype, poisoned):
    x, weight = torch.randn(shape).to(dtype), torch.randn(5, 7).to(dtype)
    added = torch.randn(5).to(dtype) if bias else None
    with torch.no_grad():
        got = kernels.linear(x, weight, added)
    want = F.linear(x.double(), weight.double(), None if added is None else added.double())
    assert got.dtype == dtype
    assert_close(got, want, "kernels")


def test_few_rows_without_gradient_run_natively(native_calls):
    x, weight = torch.randn(2, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    with torch.no_grad():
        kernels.linear(x, weight)
        kernels.linear(x[:1], weight)
        kernels.linear(x[0].float(), weight.float())
    assert native_calls == ["grouped_mm", "linear_row", "linear_row"]


def test_everything_else_is_torchs(native_calls, monkeypatch):
    monkeypatch.setattr(select, "_few_rows", lambda op, dtype: 24)  # without AVX-512 every bf16 row would be native
    x, weight = torch.randn(2, 8).bfloat16(), torch.randn(4, 8).bfloat16().requires_grad_()
    kernels.linear(x, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        kernels.linear(torch.randn(5000, 8).bfloat16(), weight)
        kernels.linear(x.float(), weight.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert kernels.linear(x, weight).dtype == torch.bfloat16
        with kernels.forced("reference"):
            kernels.linear(x, weight)
    assert native_calls == []
    assert select.choose("grouped_mm", x.device, x.dtype, 2, 1) == "cpu"
