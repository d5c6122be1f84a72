"""Other libraries' balance losses, from their public description, beside ours; and what write-ups get wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from routings import routing_of, top_k_routing
from torch import Tensor
from torch.nn import functional as F

from moekit import MoEConfig, losses
from moekit.moe import ROUTERS, Routing, TopKRouter
from tolerances import near, rel

# transformers: its own function.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_transformers_is_k_times_ours(top_k, masked):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    routing = top_k_routing(12, top_k=top_k, mask_T=torch.arange(12) % 4 > 0 if masked else None)
    mask_BL = None if routing.mask_T is None else routing.mask_T.view(3, 4)
    theirs = mixtral.load_balancing_loss_func((routing.logits_TE,), 6, top_k, mask_BL)
    ours = top_k * losses.load_balancing(routing)
    assert theirs.item() == pytest.approx(ours.item(), rel=rel("fp32 scalar"))
    gradients = [torch.autograd.grad(loss, routing.logits_TE)[0] for loss in (theirs, ours)]
    torch.testing.assert_close(*gradients, **near("fp32 scalar"))


def test_transformers_pools_the_layers_and_sees_no_collapse():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.tensor([[1e3, 0.0]] * 4), torch.tensor([[0.0, 1e3]] * 4)
    layers = [routing_of(one, one.topk(1).indices) for one in logits]
    assert mixtral.load_balancing_loss_func(logits, 2, 1).item() == 1.0
    assert losses.load_balancing(layers).item() == 2.0
    # What they compute is ours of one layer that holds the tokens of all.
    torch.manual_seed(1)
    layers = [top_k_routing(7, 6, 2) for _ in range(3)]
    pooled = torch.cat([one.logits_TE for one in layers])
    theirs = mixtral.load_balancing_loss_func(tuple(one.logits_TE for one in layers), 6, 2).item()
    ours = losses.load_balancing(routing_of(pooled, pooled.topk(2).indices)).item()
    assert theirs == pytest.approx(2 * ours, rel=rel("fp32 scalar"))
    assert theirs != pytest.approx(2 * losses.load_balancing(layers).item(), rel=1e-3)


# DeepSpeed: E · Σ me · ce, where ce counts the first choice alone (k = 1 and 2), or all K divided by K (k ≥ 3).


def deepspeed(logits_TE: Tensor, k: int) -> Tensor:
    experts = logits_TE.shape[1]
    gates_TE = F.softmax(logits_TE, dim=1)
    counted = 1 if k <= 2 else k
    mask_TE = F.one_hot(gates_TE.topk(counted).indices, experts).sum(1).double()
    return (gates_TE.mean(0) * mask_TE.mean(0)).sum() * experts / counted


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_deepspeed_is_ours_but_for_two_experts_a_token(top_k):
    routing = top_k_routing(top_k=top_k)
    theirs = deepspeed(routing.logits_TE, top_k).item()
    assert theirs == pytest.approx(losses.load_balancing(routing).item(), rel=rel("fp64 scalar"))


def test_deepspeed_counts_only_the_first_of_two():
    routing = top_k_routing(top_k=2)
    first = routing_of(routing.logits_TE, routing.expert_ids_TK[:, :1])
    theirs = deepspeed(routing.logits_TE, 2).item()
    assert theirs == pytest.approx(losses.load_balancing(first).item(), rel=rel("fp64 scalar"))
    assert theirs != pytest.approx(losses.load_balancing(routing).item(), rel=1e-3)


def test_gshard_paper_is_ours_of_the_first_choices_over_e_squared():
    # 2006.16668 algorithm 1: 1/E · Σ_e (c_e / S) · m_e.
    routing = top_k_routing(top_k=2)
    first = routing_of(routing.logits_TE, routing.expert_ids_TK[:, :1])
    theirs = sum((first.counts_E[e].double() / 13) * first.probs_TE[:, e].mean() for e in range(6)) / 6
    ours = losses.load_balancing(first).item()
    assert theirs.item() * 36 == pytest.approx(ours, rel=rel("fp64 scalar"))


# Megatron: coefficient · E / (K T²) · Σ_i (Σ_t p_ti) c_i, in every layer; counts and T of the group it is taken over.


def megatron(probs_TE: Tensor, counts_E: Tensor, tokens: int, k: int, coef: float) -> Tensor:
    return (probs_TE.sum(0) * counts_E).sum() * probs_TE.shape[1] * coef / (k * tokens * tokens)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_megatron_is_ours_and_adds_up_the_layers(top_k):
    layers = [top_k_routing(top_k=top_k) for _ in range(3)]
    theirs = sum(megatron(one.probs_TE, one.counts_E, 13, top_k, 0.01) for one in layers)
    ours = 0.01 * 3 * losses.load_balancing(layers)  # coefficient · layers
    assert theirs.item() == pytest.approx(ours.item(), rel=rel("fp64 scalar"))


def test_megatron_over_all_ranks_is_ours_with_the_counts_of_all():
    ranks = [top_k_routing(tokens) for tokens in (5, 9, 0)]
    counts_E = sum(one.counts_E for one in ranks)
    for one in ranks:
        theirs = megatron(one.probs_TE, counts_E, 14, 2, 1.0).item()
        ours = one.num_tokens / 14 * losses.load_balancing(one, counts_E=counts_E).item()
        assert theirs == pytest.approx(ours, rel=rel("fp64 scalar"))


def test_megatron_in_one_sequence_a_row():
    """The mean over the rows of a batch of E / (K L²) · Σ p c: equal lengths only."""
    routing = top_k_routing(12, top_k=2)
    rows = [
        megatron(routing.probs_TE[part], routing.expert_ids_TK[part].flatten().bincount(minlength=6), 4, 2, 1.0)
        for part in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    ours = losses.sequence_balancing(routing, torch.arange(12) // 4)
    assert ours.item() == pytest.approx(sum(rows).item() / 3, rel=rel("fp64 scalar"))


# DeepSeek's published modelling code: counts over (L·K/E), mean scores, summed over experts, averaged over rows.


def test_deepseek_in_one_sequence_a_row():
    routing = top_k_routing(12, top_k=3)
    ce_BE = torch.zeros(3, 6, dtype=torch.float64)
    ce_BE.scatter_add_(1, routing.expert_ids_TK.view(3, 12), torch.ones(3, 12, dtype=torch.float64))
    ce_BE /= 4 * 3 / 6
    theirs = (ce_BE * routing.probs_TE.view(3, 4, 6).mean(1)).sum(1).mean()
    ours = losses.sequence_balancing(routing, torch.arange(12) // 4)
    assert theirs.item() == pytest.approx(ours.item(), rel=rel("fp64 scalar"))


def test_importance_with_the_unbiased_variance_is_larger():
    """Ports of 1701.06538 that call var() divide by E − 1."""
    routing = top_k_routing(top_k=3)
    routing = dataclasses.replace(routing, weights_A=torch.rand(39, dtype=torch.float64))
    sums_E = torch.zeros(6, dtype=torch.float64).index_add(0, routing.expert_ids_A, routing.weights_A)
    theirs = sums_E.var() / sums_E.mean() ** 2
    assert theirs.item() * 5 / 6 == pytest.approx(losses.importance(routing).item(), rel=rel("fp64 scalar"))


# Common mistakes: docs/mistakes.md.


def skewed_gate(top_k: int, **changes: object) -> tuple[TopKRouter, Tensor]:
    """A gate that prefers expert 0 for everything, and tokens with a constant feature that it could use to stop."""
    config = MoEConfig(hidden_size=5, intermediate_size=4, num_experts=4, top_k=top_k, **changes)
    gate = ROUTERS["topk"](config).double()
    x_TD = torch.randn(64, 5, dtype=torch.float64)
    x_TD[:, 0] = 1.0
    with torch.no_grad():
        gate.weight.normal_(std=0.3)
        gate.weight[0, 0] += 1.5
    return gate, x_TD


def descend(gate: TopKRouter, x_TD: Tensor, loss, steps: int = 400, lr: float = 1.0) -> Routing:
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(gate(x_TD)), gate.weight)
        with torch.no_grad():
            gate.weight -= lr * gradient
    return gate(x_TD)


def wrong_balance(routing: Routing) -> Tensor:
    """Σ p̄ (1 − p̄), as a popular article has it."""
    mean_E = routing.probs_TE.mean(0)
    return (mean_E * (1 - mean_E)).sum()


def test_the_wrong_form_is_largest_at_balance_and_collapses_the_router():
    uniform = routing_of(torch.zeros(4, 4), torch.arange(4)[:, None])
    sure = routing_of(torch.eye(4)[[2] * 4] * 1e3, torch.full((4, 1), 2))
    assert wrong_balance(uniform).item() == 0.75
    assert wrong_balance(sure).item() == 0.0
    gate, x_TD = skewed_gate(4)
    before = gate(x_TD).probs_TE.mean(0).max().item()
    assert before < 0.7
    assert descend(gate, x_TD, wrong_balance).probs_TE.mean(0).max().item() > 0.95


def test_importance_balances_where_the_wrong_form_collapses():
    # With K = E the weights are the probabilities: the same gate, the same quantity, the right form.
    gate, x_TD = skewed_gate(4)
    assert losses.importance(gate(x_TD)).item() > 0.2
    after = descend(gate, x_TD, losses.importance)
    assert losses.importance(after).item() < 1e-4
    torch.testing.assert_close(after.probs_TE.mean(0), torch.full((4,), 0.25).double(), rtol=0, atol=5e-3)


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balancing_balances_what_is_really_chosen(top_k):
    gate, x_TD = skewed_gate(top_k, gate_order="softmax_topk")
    before = gate(x_TD).counts_E
    assert before.max() > 0.6 * 64
    after = descend(gate, x_TD, losses.load_balancing, lr=0.1).counts_E
    assert after.max() < 1.5 * 64 * top_k / 4
    assert after.min() > 0.5 * 64 * top_k / 4


def test_a_second_softmax_would_hide_a_collapse():
    # transformers#45120: probabilities that are taken for logits come out nearly uniform.
    logits_TE = torch.zeros(8, 64)
    logits_TE[:, 5] = 50.0
    routing = routing_of(logits_TE, torch.full((8, 1), 5))
    assert losses.load_balancing(routing).item() == 64.0
    twice = routing_of(logits_TE.softmax(-1), torch.full((8, 1), 5))
    assert losses.load_balancing(twice).item() < 3


def test_probabilities_of_the_chosen_alone_give_no_gradient_at_k_1():
    logits_TE = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    ids_TK = logits_TE.topk(1).indices
    selected_TE = torch.zeros_like(logits_TE).scatter(1, ids_TK, logits_TE.gather(1, ids_TK).softmax(-1))
    wrong = 4 * (selected_TE.mean(0) * (selected_TE.detach() > 0).double().mean(0)).sum()
    assert (torch.autograd.grad(wrong, logits_TE)[0] == 0).all()
    right = losses.load_balancing(routing_of(logits_TE, ids_TK))
    assert (torch.autograd.grad(right, logits_TE)[0] != 0).any()
