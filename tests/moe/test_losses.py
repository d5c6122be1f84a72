"""Router losses against the published equations, by loops, and against transformers."""

from __future__ import annotations

import pytest
import torch

from moekit import losses
from moekit.errors import ConfigError
from moekit.moe import Routing
from tolerances import rel


def routing_of(logits_TE: torch.Tensor, ids_TK: torch.Tensor, mask_T: torch.Tensor | None = None) -> Routing:
    tokens, top_k = ids_TK.shape
    token_ids = torch.arange(tokens).repeat_interleave(top_k)
    weights = torch.full((tokens * top_k,), 1 / top_k, dtype=logits_TE.dtype)
    return Routing(token_ids, ids_TK.flatten(), weights, logits_TE, top_k, mask_T)


def top_k_routing(tokens=13, experts=6, top_k=2, mask_T=None) -> Routing:
    logits = torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True)
    return routing_of(logits, logits.topk(top_k).indices, mask_T)


def plain_balance(routing: Routing, real: list[int]) -> float:
    """E / (K T²) Σ_i c_i Σ_t p_ti, written out (2101.03961 eq 4–6 with K assignments a token)."""
    experts, top_k, tokens = routing.num_experts, routing.top_k, len(real)
    total = 0.0
    for i in range(experts):
        count = sum(int(e) == i for t in real for e in routing.expert_ids_TK[t])
        prob = sum(routing.logits_TE[t].softmax(0)[i].item() for t in real)
        total += count * prob
    return experts * total / (top_k * tokens**2)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_load_balancing_by_the_equation(top_k):
    routing = top_k_routing(top_k=top_k)
    assert losses.load_balancing(routing).item() == pytest.approx(
        plain_balance(routing, list(range(13))), rel=rel("fp64 scalar")
    )


def test_uniform_is_one_and_collapse_is_the_number_of_experts():
    ids = torch.arange(8)[:, None] % 4
    assert losses.load_balancing(routing_of(torch.zeros(8, 4), ids)).item() == 1.0
    ids = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]])
    assert losses.load_balancing(routing_of(torch.zeros(4, 4), ids)).item() == 1.0
    collapsed = torch.zeros(8, 4)
    collapsed[:, 2] = 1000.0
    assert losses.load_balancing(routing_of(collapsed, torch.full((8, 1), 2))).item() == 4.0


def test_layers_are_averaged_not_pooled():
    # Two layers collapsed on different experts: pooled counts would look balanced (1.0).
    one, other = torch.tensor([[1e3, 0.0]] * 4), torch.tensor([[0.0, 1e3]] * 4)
    layers = [routing_of(one, torch.zeros(4, 1).long()), routing_of(other, torch.ones(4, 1).long())]
    assert losses.load_balancing(layers).item() == 2.0


@pytest.mark.parametrize("loss", [losses.load_balancing, losses.z_loss])
def test_garbage_padding_changes_nothing_exactly(loss):
    clean = top_k_routing()
    garbage = torch.randn(4, 6, dtype=torch.float64) * 100
    mask = torch.tensor([True] * 13 + [False] * 4)
    logits = torch.cat([clean.logits_TE, garbage])
    padded = routing_of(logits, logits.topk(2).indices, mask)
    assert loss(padded).item() == loss(clean).item()
    assert torch.equal(padded.counts_E, clean.counts_E)
    (gradient,) = torch.autograd.grad(loss(padded), logits)
    assert (gradient[13:] == 0).all()
    assert (gradient[:13] != 0).any()


def test_z_loss_value_and_gradient():
    # Value mean lse², gradient 2·lse·softmax/T (2202.08906 eq 5).
    routing = top_k_routing()
    lse = routing.logits_TE.exp().sum(-1).log()
    assert losses.z_loss(routing).item() == pytest.approx((lse**2).mean().item(), rel=rel("fp64 scalar"))
    (gradient,) = torch.autograd.grad(losses.z_loss(routing), routing.logits_TE)
    torch.testing.assert_close(gradient, 2 * lse[:, None] * routing.logits_TE.softmax(-1) / 13)


def test_gradient_flows_through_probabilities_and_not_through_counts():
    routing = top_k_routing()
    (gradient,) = torch.autograd.grad(losses.load_balancing(routing), routing.logits_TE)
    logits = routing.logits_TE.detach().requires_grad_()
    share = routing.counts_E.double() / routing.counts_E.sum()
    (6 * share @ logits.softmax(-1).mean(0)).backward()
    torch.testing.assert_close(gradient, logits.grad)


def test_no_real_token_gives_zero():
    empty = routing_of(torch.zeros(0, 4), torch.zeros(0, 2).long())
    masked = routing_of(torch.zeros(3, 4), torch.zeros(3, 2).long(), torch.zeros(3).bool())
    for routing in (empty, masked):
        assert losses.load_balancing(routing).item() == 0.0
        assert losses.z_loss(routing).item() == 0.0


def test_a_dense_model_has_nothing_to_balance():
    with pytest.raises(ConfigError, match="no MoE layer"):
        losses.load_balancing(())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_transformers_version_is_top_k_times_ours(top_k):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    routing = top_k_routing(top_k=top_k)
    theirs = mixtral.load_balancing_loss_func((routing.logits_TE,), 6, top_k)
    assert theirs.item() == pytest.approx(top_k * losses.load_balancing(routing).item(), rel=rel("fp32 scalar"))
