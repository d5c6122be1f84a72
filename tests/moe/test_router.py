"""Routing: the definitions, the ties, the precision, the replay; and transformers' routers beside ours."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import plain_weights
from torch.utils.checkpoint import checkpoint

from moekit import MoEConfig
from moekit.errors import UnsupportedError
from moekit.moe import Choice, MoE, Routing, RoutingRecord, TopKRouter
from tolerances import rel

CASES = [
    {"gate_order": "topk_softmax"},
    {"gate_order": "softmax_topk"},
    {"gate_order": "softmax_topk", "norm_topk_prob": True},
]


def make(experts=6, top_k=3, hidden=10, **changes) -> MoE:
    return MoE(MoEConfig(hidden_size=hidden, intermediate_size=4, num_experts=experts, top_k=top_k, **changes))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_and_ids_by_the_definition(case):
    layer = make(**case).double()
    x = torch.randn(40, 10, dtype=torch.float64)
    routing = layer.router(x)
    for token in range(40):
        expected = plain_weights(layer.router.weight @ x[token], layer)
        assert routing.expert_ids_TK[token].tolist() == list(expected)
        torch.testing.assert_close(routing.weights_TK[token], torch.stack(list(expected.values())))
    assert torch.equal(routing.token_ids_A, torch.arange(40).repeat_interleave(3))


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(0, 12), experts=st.integers(2, 12), data=st.data())
def test_properties(tokens, experts, data):
    top_k = data.draw(st.integers(2, experts))
    case = data.draw(st.sampled_from(CASES))
    router = make(experts, top_k, **case).router
    # Few distinct values, so that ties are common.
    x = torch.randint(-1, 2, (tokens, 10)).float()
    with torch.no_grad():
        router.weight.copy_(torch.randint(-1, 2, (experts, 10)).float())
    routing = router(x)
    ids_TK = routing.expert_ids_TK
    assert routing.expert_ids_A.numel() == tokens * top_k
    assert ((ids_TK >= 0) & (ids_TK < experts)).all()
    assert all(len(set(row)) == top_k for row in ids_TK.tolist()), "a token got the same expert twice"
    assert (routing.weights_A > 0).all()
    if case != CASES[1]:
        torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(tokens))
    # Ties go to the lower number, and no unchosen expert scores above a chosen one.
    for logits, ids in zip(routing.logits_TE.tolist(), ids_TK.tolist(), strict=True):
        assert ids == sorted(range(experts), key=lambda e: (-logits[e], e))[:top_k]
    # Permuting the tokens permutes the routing.
    order = torch.randperm(tokens)
    assert torch.equal(router(x[order]).expert_ids_TK, ids_TK[order])


def test_scores_are_fp32_whatever_the_input_and_the_autocast():
    router = make().router.bfloat16()
    x = torch.randn(7, 10, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    assert routing.logits_TE.dtype == routing.weights_A.dtype == torch.float32
    assert torch.equal(routing.logits_TE, x.float() @ router.weight.float().T)


def test_initial_scale():
    wide = {"hidden_size": 1000, "intermediate_size": 4, "num_experts": 100, "top_k": 2}
    for scale in (1.0, 0.1):
        std = TopKRouter(MoEConfig(**wide, router_init_scale=scale)).weight.std().item()
        assert std == pytest.approx((scale / 1000) ** 0.5, rel=rel("standard deviation of many"))


def test_against_transformers_routers():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    from transformers import MixtralConfig, Qwen3MoeConfig

    x = torch.randn(50, 10)
    theirs = mixtral.MixtralTopKRouter(MixtralConfig(hidden_size=10, num_local_experts=6, num_experts_per_tok=3))
    pairs = [(theirs, make().router)]
    for renormalise in (True, False):
        config = Qwen3MoeConfig(hidden_size=10, num_experts=6, num_experts_per_tok=3, norm_topk_prob=renormalise)
        ours = make(gate_order="softmax_topk", norm_topk_prob=renormalise).router
        pairs.append((qwen.Qwen3MoeTopKRouter(config), ours))
    for theirs, ours in pairs:
        with torch.no_grad():
            theirs.weight.copy_(ours.weight)
        logits, weights, ids = theirs(x)
        routing = ours(x)
        torch.testing.assert_close(routing.logits_TE, logits)
        torch.testing.assert_close(routing.weights_TK, weights)
        assert torch.equal(routing.expert_ids_TK, ids)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_router_gets_a_gradient(case):
    layer = make(**case)
    y, _ = layer(torch.randn(20, 10))
    y.square().sum().backward()
    assert (layer.router.weight.grad != 0).any(dim=1).all()


def test_irregular_routing_has_no_regular_view():
    routing = Routing(torch.tensor([0]), torch.tensor([1]), torch.ones(1), torch.zeros(2, 3), top_k=None)
    assert routing.counts_E.tolist() == [0, 1, 0]
    with pytest.raises(UnsupportedError, match="no \\(T, K\\) view"):
        _ = routing.expert_ids_TK


class Noisy(TopKRouter):
    """Chooses differently each time, as a router with noise or on another kernel would."""

    def _choose(self, gate_TE, mask_T, input_ids_T):
        return Choice.regular(torch.stack([torch.randperm(gate_TE.shape[1])[: self.config.top_k] for _ in gate_TE]))


def test_recomputation_repeats_the_recorded_choice_with_live_weights():
    layer = make()
    layer.router.__class__ = Noisy
    x = torch.randn(9, 10, requires_grad=True)
    record = RoutingRecord()
    y, routing = checkpoint(record.wrap(layer), x, use_reentrant=False, preserve_rng_state=False)
    chosen = routing.expert_ids_TK.clone()
    seed = torch.randn_like(y)
    (y * seed).sum().backward()
    assert torch.equal(record.decisions[0].options.expert_ids_A, chosen.flatten())
    got = {name: p.grad.clone() for name, p in layer.named_parameters()} | {"x": x.grad.clone()}

    # The same choice without checkpointing: every gradient must agree, the router's included.
    layer.zero_grad()
    x.grad = None
    layer.router._choose = lambda *_: Choice.regular(chosen)
    (layer(x)[0] * seed).sum().backward()
    expected = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda m, n=name: f"{n}: {m}")
    assert (got["router.weight"] != 0).any()


def test_replay_binds_nothing_outside_its_block():
    router, record = make().router, RoutingRecord()
    x = torch.randn(3, 10)
    with record.recording():
        first = router(x).expert_ids_TK
    with torch.no_grad():
        router.weight.neg_()
    with record.replaying():
        replayed = router(x)
    assert torch.equal(replayed.expert_ids_TK, first)
    assert torch.equal(replayed.logits_TE, x @ router.weight.T)  # live scores
    assert not torch.equal(router(x).expert_ids_TK, first)
    assert len(record.decisions) == 1
