"""The K best experts of a token against a plain sort by key."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit import kernels
from moekit.errors import ConfigError
from moekit.kernels import cpu, reference

# Few values, so that rows are full of equals.
SCORES = st.sampled_from([0.0, -0.0, 1.0, 1.5, -1.0, 1e-45, math.inf, -math.inf, math.nan, -math.nan])


def by_key(scores: list[float], k: int) -> list[int]:
    """A NaN first, then the larger score, then the lower number."""
    key = [
        (0.0 if math.isnan(score) else 1.0, 0.0 if math.isnan(score) else -score, i) for i, score in enumerate(scores)
    ]
    return [number for *_, number in sorted(key)[:k]]


@settings(max_examples=300)
@given(st.data(), st.integers(0, 5), st.integers(1, 80), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_best_of_each_row(data, tokens, experts, dtype):
    k = data.draw(st.integers(0, experts))
    rows = data.draw(st.lists(st.lists(SCORES, min_size=experts, max_size=experts), min_size=tokens, max_size=tokens))
    scores_TE = torch.tensor(rows).view(tokens, experts).to(dtype)
    wanted = [by_key(row, k) for row in scores_TE.tolist()]
    for backend in (cpu, reference, kernels):
        assert backend.top_k(scores_TE, k).tolist() == wanted


@pytest.mark.parametrize(("tokens", "experts", "k"), [(3000, 8, 2), (2048, 256, 8), (7, 5000, 600), (300, 64, 33)])
@pytest.mark.parametrize("threads", [1, 2])
def test_many_rows_and_long_ones(tokens, experts, k, threads):
    scores_TE = torch.randint(-50, 50, (tokens, experts), generator=torch.Generator().manual_seed(tokens)).float()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ids_TK = kernels.top_k(scores_TE, k)
    finally:
        torch.set_num_threads(before)
    assert ids_TK.dtype == torch.int64
    assert torch.equal(ids_TK, reference.top_k(scores_TE, k))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float16])
def test_scores_that_float32_cannot_hold_or_the_kernels_do_not_know(dtype):
    scores_TE = torch.tensor([[1, 3, 2, 3]]).to(dtype)
    scores_TE[0, 1] += 2**-40 if dtype == torch.float64 else 0
    scores_TE[0, 3] += 2**-39 if dtype == torch.float64 else 0
    assert kernels.top_k(scores_TE, 3).tolist() == [[3, 1, 2] if dtype == torch.float64 else [1, 3, 2]]


def test_rows_that_do_not_lie_in_a_row():
    scores_TE = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 4.0]])
    assert kernels.top_k(scores_TE.T, 2).tolist() == [[2, 1], [0, 1]]


@pytest.mark.parametrize("backend", ["blas", "reference", "cpu"])
def test_a_forced_backend_gives_the_same(backend):
    scores_TE = torch.tensor([[1, 2**60, 2**60 + 1]])  # of the hash router: numbers that float32 would round
    with kernels.forced(backend):
        assert kernels.top_k(scores_TE, 2).tolist() == [[2, 1]]
        assert kernels.top_k(scores_TE.float(), 2).tolist() == [[1, 2]]


def test_it_can_be_traced():
    traced = torch.compile(kernels.top_k, fullgraph=True, backend="eager")
    assert traced(torch.tensor([[1.0, 3.0, 3.0]]), 2).tolist() == [[1, 2]]
    torch.library.opcheck(
        torch.ops.moekit.top_k.default, (torch.randn(4, 9), 3), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(("scores", "k"), [(torch.ones(3), 1), (torch.ones(2, 3), 4), (torch.ones(2, 3), -1)])
def test_what_does_not_fit_is_refused(scores, k):
    with pytest.raises(ConfigError, match="top_k"):
        kernels.top_k(scores, k)
