"""The choice of backend: the rule, forcing, refusal instead of falling back, and what `explain` says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from moekit import kernels
from moekit.errors import BackendError
from moekit.kernels import cpu, select

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def without_library(monkeypatch):
    """As if `moekit._native` had never been built."""
    monkeypatch.setitem(sys.modules, "moekit._native", None)
    cpu.unavailable.cache_clear()
    cpu.native.cache_clear()
    yield
    cpu.unavailable.cache_clear()
    cpu.native.cache_clear()


def grouped(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ones(3, 4).to(dtype), torch.ones(2, 5, 4).to(dtype), torch.tensor([1, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", select.OPS[:3])
def test_few_rows_go_to_the_native_kernels_and_many_do_not(op, dtype):
    assert select.choose(op, CPU, dtype, rows=64, experts=64) == "cpu"
    if select._few_rows(op, dtype) < 512:
        assert select.choose(op, CPU, dtype, rows=64 * 512, experts=64) == "blas"


def test_what_only_the_reference_can_do():
    assert select.choose("grouped_mm", CPU, torch.float64, rows=1, experts=8) == "reference"
    assert select.choose("grouped_mm", CUDA, torch.float32, rows=1, experts=8) == "reference"
    assert select.choose("moe_decode", CPU, torch.float16, rows=1, experts=8) == "reference"


@pytest.mark.parametrize(
    ("capabilities", "few"),
    [
        ({"architecture": "x86_64", "avx512_f": True}, 24),
        ({"architecture": "x86_64", "avx512_f": False}, 10**6),
        ({"architecture": "aarch64"}, 24),
    ],
)
def test_without_amx_bf16_goes_to_the_native_kernels_for_longer(capabilities, few, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    select._few_rows.cache_clear()
    try:
        assert select.choose("grouped_mm", CPU, torch.bfloat16, rows=few, experts=1) == "cpu"
        beyond = select.choose("grouped_mm", CPU, torch.bfloat16, rows=few + 1, experts=1)
        assert beyond == ("blas" if few == 24 else "cpu")
    finally:
        select._few_rows.cache_clear()


@pytest.mark.parametrize("backend", ["reference", "blas", "cpu"])
def test_forced_runs_that_backend_and_no_other(backend, monkeypatch):
    calls = []
    for name, module in select.BACKENDS.items():
        original = module.grouped_mm
        monkeypatch.setattr(module, "grouped_mm", lambda *a, n=name, f=original: calls.append(n) or f(*a))
    with kernels.forced(backend):
        kernels.grouped_mm(*grouped())
    assert calls == [backend]


def test_forced_is_undone_also_after_an_error():
    before = select.choose("grouped_mm", CPU, torch.float32, rows=1, experts=1)
    with pytest.raises(ZeroDivisionError), kernels.forced("reference"):
        raise ZeroDivisionError
    assert select.choose("grouped_mm", CPU, torch.float32, rows=1, experts=1) == before


def test_forced_never_falls_back():
    with kernels.forced("cpu"), pytest.raises(BackendError, match="cannot run grouped_mm: it has no float64"):
        kernels.grouped_mm(*grouped(torch.float64))
    with kernels.forced("cpu"), pytest.raises(BackendError, match="the tensors are on cuda"):
        select.choose("grouped_mm", CUDA, torch.float32, rows=1, experts=1)
    with (
        pytest.raises(BackendError, match="unknown backend 'gpu'; there are reference, blas, cpu"),
        kernels.forced("gpu"),
    ):
        pass


def test_a_missing_library_is_an_error_when_forced_and_told_otherwise(without_library):
    with kernels.forced("cpu"), pytest.raises(BackendError, match="pip install --force-reinstall"):
        kernels.grouped_mm(*grouped())
    with pytest.raises(BackendError, match="the native kernels are not built"):
        cpu.isa()
    assert torch.equal(kernels.grouped_mm(*grouped()), torch.full((3, 5), 4.0))
    assert {choice.backend for choice in kernels.explain()} == {"reference", "blas", "none"}
    assert "not built" in str(kernels.explain())


@pytest.mark.parametrize(
    ("backend", "expected"), [("reference", "reference"), ("blas", "blas"), ("cpu", "cpu"), ("gpu", "BackendError")]
)
def test_backend_from_the_environment(backend, expected):
    code = """
import torch
from moekit.errors import BackendError
from moekit.kernels import select
try:
    print(select.choose("grouped_mm", torch.device("cpu"), torch.float32, 10**6, 1))
except BackendError:
    print("BackendError")
"""
    env = {**os.environ, "MOEKIT_BACKEND": backend}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == expected


def test_explain_tells_every_op_and_agrees_with_the_choice():
    explanation = kernels.explain()
    assert {choice.op for choice in explanation} == {*select.OPS, "decode step", "quantised"}
    assert explanation[-1].backend == select.choose_quantised(CPU)
    for choice in explanation[:-1]:
        dtype = getattr(torch, choice.dtype)
        if choice.op == "decode step":
            assert (choice.backend == "cpu") == (select.native_obstacle(CPU, dtype) is None)
            continue
        assert choice.backend == select.choose(choice.op, CPU, dtype, rows=choice.rows_an_expert, experts=1)
        assert choice.reason


def test_explain_as_text():
    with cpu.forced_isa("portable"):
        lines = str(kernels.explain()).splitlines()
    assert lines[0] == f"native CPU kernels: portable, threads: {cpu.num_threads()}"
    assert lines[1].split() == ["op", "dtype", "rows/expert", "backend", "why"]
    assert len(lines) == 2 + len(kernels.explain())
    with kernels.forced("reference"):
        assert {choice.reason for choice in kernels.explain()} == {"forced"}
