"""Dispatch and combine: a round trip for any flat routing, also the irregular ones of capacity and expert choice."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit import MoEConfig
from moekit.config import CapacityConfig
from moekit.moe import LocalDispatcher, MoE, Routing
from tolerances import near


@st.composite
def routings(draw, padded=False) -> Routing:
    tokens, experts = draw(st.integers(0, 8)), draw(st.integers(1, 6))
    pairs = [(t, e) for t in range(tokens) for e in range(experts)]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    ids = torch.tensor(chosen, dtype=torch.int64).view(-1, 2)
    weights = torch.tensor([draw(st.floats(-2, 2)) for _ in chosen], dtype=torch.float64)
    most = max((sum(e == other for _, other in chosen) for e in range(experts)), default=0)
    rows = most + draw(st.integers(0 if most else 1, 2)) if padded else None
    return Routing(ids[:, 0], ids[:, 1], weights, torch.zeros(tokens, experts), top_k=None, rows_per_expert=rows)


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


@settings(max_examples=100, deadline=None)
@given(routing=routings(padded=True))
def test_padding_gives_every_expert_the_same_rows_and_changes_nothing(routing):
    x = torch.randn(routing.num_tokens, 3, dtype=torch.float64)
    dispatcher, rows = LocalDispatcher(), routing.rows_per_expert
    out, plan = dispatcher.dispatch(x, routing)
    plain, plain_plan = dispatcher.dispatch(x, dataclasses.replace(routing, rows_per_expert=None))
    assert plan.counts_E.tolist() == [rows] * routing.num_experts
    for expert, part in enumerate(out.split(rows)):
        sent = x[routing.token_ids_A[routing.expert_ids_A == expert]]
        assert torch.equal(part[: len(sent)], sent)
        assert (part[len(sent) :] == 0).all()
    # What an expert makes of padding goes nowhere, be it nan.
    made = out.sin()
    made[plan.order_R == routing.expert_ids_A.shape[0]] = torch.nan
    assert torch.equal(dispatcher.combine(made, plan), dispatcher.combine(plain.sin(), plain_plan))


@pytest.mark.parametrize("rows", [None, 2, 3])
@pytest.mark.parametrize("top_k", [2, None])
@pytest.mark.usefixtures("poisoned")
def test_gradients(top_k, rows):
    ids = torch.tensor([[0, 2], [2, 1], [1, 0]])
    weights = torch.rand(6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    tokens = torch.arange(3).repeat_interleave(2)

    def run(x, weights):
        routing = Routing(tokens, ids.flatten(), weights, torch.zeros(3, 3), top_k, rows_per_expert=rows)
        rows_RD, plan = LocalDispatcher().dispatch(x, routing)
        return LocalDispatcher().combine(rows_RD.cos(), plan)  # 1 for a row of padding

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


def test_biases_get_no_gradient_from_padding():
    """An expert with a bias makes something of a row of zeros; nothing of that may reach the bias."""
    values = {"hidden_size": 6, "intermediate_size": 4, "num_experts": 4, "top_k": 2, "expert": "mlp", "bias": True}
    x, grads = torch.randn(9, 6, dtype=torch.float64), []
    for pad in (False, True):
        torch.manual_seed(2)
        layer = MoE(MoEConfig(**values, capacity=CapacityConfig(tokens=3, pad=pad))).double()
        torch.nn.init.normal_(layer.experts.up_bias)
        torch.nn.init.normal_(layer.experts.down_bias)
        y, routing = layer(x)
        assert routing.rows_per_expert == (3 if pad else None)
        y.sum().backward()
        grads.append([y.detach(), *(p.grad for p in layer.parameters())])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, **near("fp64"))


def test_the_shape_of_padded_rows_depends_on_the_number_of_tokens_alone():
    layer = MoE(
        MoEConfig(
            hidden_size=6, intermediate_size=4, num_experts=4, top_k=2, capacity=CapacityConfig(factor=1.25, pad=True)
        )
    )
    shapes = set()
    for _ in range(5):
        x = torch.randn(10, 6)
        shapes.add(tuple(layer.dispatcher.dispatch(x, layer.router(x))[0].shape))
    assert shapes == {(4 * 7, 6)}
