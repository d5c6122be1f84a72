"""Dispatch and combine: a round trip for any flat routing, also the irregular ones of capacity and expert choice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.moe import LocalDispatcher, Routing


@st.composite
def routings(draw) -> Routing:
    tokens, experts = draw(st.integers(0, 8)), draw(st.integers(1, 6))
    pairs = [(t, e) for t in range(tokens) for e in range(experts)]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    ids = torch.tensor(chosen, dtype=torch.int64).view(-1, 2)
    weights = torch.tensor([draw(st.floats(-2, 2)) for _ in chosen], dtype=torch.float64)
    return Routing(ids[:, 0], ids[:, 1], weights, torch.zeros(tokens, experts), top_k=None)


@settings(max_examples=100, deadline=None)
@given(routing=routings())
def test_any_flat_routing(routing):
    x = torch.randn(routing.num_tokens, 3, dtype=torch.float64)
    dispatcher = LocalDispatcher()
    rows, plan = dispatcher.dispatch(x, routing)
    assert plan.counts_E.tolist() == [(routing.expert_ids_A == e).sum() for e in range(routing.num_experts)]
    # Each row holds the token of its assignment, and the experts' rows follow one another.
    experts_of_rows = routing.expert_ids_A[plan.order_R]
    assert experts_of_rows.tolist() == sorted(routing.expert_ids_A.tolist())
    assert torch.equal(rows, x[routing.token_ids_A[plan.order_R]])
    # "Expert e multiplies by e + 1", by a loop.
    out = dispatcher.combine(rows * (experts_of_rows + 1)[:, None], plan)
    expected = torch.zeros_like(x)
    for token, expert, weight in zip(routing.token_ids_A, routing.expert_ids_A, routing.weights_A, strict=True):
        expected[token] += weight * (expert + 1) * x[token]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("top_k", [2, None])
@pytest.mark.usefixtures("poisoned")
def test_gradients(top_k):
    ids = torch.tensor([[0, 2], [2, 1], [1, 0]])
    weights = torch.rand(6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    tokens = torch.arange(3).repeat_interleave(2)

    def run(x, weights):
        routing = Routing(tokens, ids.flatten(), weights, torch.zeros(3, 3), top_k)
        rows, plan = LocalDispatcher().dispatch(x, routing)
        return LocalDispatcher().combine(rows.sin(), plan)

    assert torch.autograd.gradcheck(run, (x, weights))


def test_weighs_in_fp32_and_returns_the_input_dtype():
    ids = torch.tensor([[0, 1]])
    # 1 + 2⁻¹⁰ is 1 in bf16, where the sum would be 0.
    weights = torch.tensor([1 + 2**-10, 1.0])
    routing = Routing(torch.zeros(2).long(), ids.flatten(), weights, torch.zeros(1, 2), top_k=2)
    _, plan = LocalDispatcher().dispatch(torch.tensor([[1.0]], dtype=torch.bfloat16), routing)
    out = LocalDispatcher().combine(torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16), plan)
    assert out.dtype == torch.bfloat16
    assert out.item() == 2**-10
