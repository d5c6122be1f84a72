"""What every router loss must keep to: padding, order, edges, and exact gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routings import EVERY_LOSS, GROUPS, any_routing, gradients, moved, rearranged, routing_of
from torch import Tensor

from moekit import MoEConfig, losses
from moekit.moe import ROUTERS, Choice, Routing, RoutingRecord
from tolerances import near

CASES = {
    "tokens": st.integers(0, 10),
    "half": st.integers(1, 4),
    "sigmoid": st.booleans(),
    "drops": st.booleans(),
    "masked": st.booleans(),
    "seed": st.integers(0, 2**32),
    "data": st.data(),
}


def drawn(tokens, half, sigmoid, drops, masked, seed, data) -> tuple[Routing, Tensor]:
    """A routing with an even number of experts, and sequence ids."""
    torch.manual_seed(seed)
    experts = 2 * half
    top_k = data.draw(st.integers(1, experts))
    routing = any_routing(tokens, experts, top_k, sigmoid=sigmoid, drops=drops, masked=masked)
    return routing, torch.randint(-2, 3, (tokens,))


GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 0.0]


def padded(routing: Routing, ids_T: Tensor, extra: int) -> tuple[Routing, Tensor, Tensor, Tensor]:
    """The routing with `extra` garbage tokens among its own, which go to every expert they like.

    Returns it, its sequence ids, where its real tokens are, and which of its assignments are real.
    """
    tokens, experts = routing.logits_TE.shape
    place_T = torch.randperm(tokens + extra)[:tokens].sort().values
    rest_T = torch.ones(tokens + extra, dtype=torch.bool)
    rest_T[place_T] = False

    def with_rubbish(choice: Choice) -> tuple[Choice, Tensor]:
        rubbish_A = torch.rand(extra, experts).round().nonzero()
        tokens_A = torch.cat([place_T[choice.token_ids_A], rest_T.nonzero().flatten()[rubbish_A[:, 0]]])
        experts_A = torch.cat([choice.expert_ids_A, rubbish_A[:, 1]])
        return moved(Choice(tokens_A, experts_A, None), torch.arange(tokens + extra))

    def stretched(values: Tensor, *shape: int) -> Tensor:
        garbage = torch.tensor(GARBAGE, dtype=torch.float64)[torch.randint(len(GARBAGE), shape)]
        return garbage.index_copy(0, place_T, values.detach()).requires_grad_()

    kept, order_A = with_rubbish(Choice(routing.token_ids_A, routing.expert_ids_A, None))
    real_A = order_A < routing.expert_ids_A.numel()
    weights_A = torch.full((len(order_A),), torch.nan, dtype=torch.float64)
    weights_A[real_A] = routing.weights_A.detach()[order_A[real_A]]
    mask_T = torch.zeros(tokens + extra, dtype=torch.bool)
    mask_T[place_T] = True if routing.mask_T is None else routing.mask_T
    all_ids_T = torch.randint(-9, 9, (tokens + extra,))
    all_ids_T[place_T] = ids_T
    result = dataclasses.replace(
        routing,
        token_ids_A=kept.token_ids_A,
        expert_ids_A=kept.expert_ids_A,
        weights_A=weights_A.requires_grad_(),
        logits_TE=stretched(routing.logits_TE, tokens + extra, experts),
        top_k=None,
        mask_T=mask_T,
        chosen=None if routing.chosen is None else with_rubbish(routing.chosen)[0],
        load_TE=stretched(routing.load_TE, tokens + extra, experts),
    )
    return result, all_ids_T, place_T, real_A


@settings(max_examples=60)
@given(extra=st.integers(1, 6), **CASES)
def test_garbage_padding_changes_nothing_exactly(extra, **case):
    routing, ids_T = drawn(**case)
    wide, all_ids_T, place_T, real_A = padded(routing, ids_T, extra)
    assert torch.equal(wide.counts_E, routing.counts_E)
    for name, loss in EVERY_LOSS.items():
        want, got = loss(routing, ids_T), loss(wide, all_ids_T)
        assert got.item() == want.item(), name
        logits, weights, load = gradients(got, wide)
        kept_rows = [logits[place_T], weights[real_A], load[place_T]]
        for wanted, row in zip(gradients(want, routing), kept_rows, strict=True):
            assert torch.equal(wanted, row), name
        assert sum(g.count_nonzero() for g in (logits, weights, load)) == sum(g.count_nonzero() for g in kept_rows)


@settings(max_examples=60)
@given(**CASES)
def test_the_order_of_tokens_and_the_names_of_experts_do_not_matter(**case):
    routing, ids_T = drawn(**case)
    place_T, experts = torch.randperm(routing.num_tokens), routing.num_experts
    # Groups change their places, and experts theirs inside their group.
    inside_GE = torch.stack([torch.randperm(experts // GROUPS) for _ in range(GROUPS)])
    experts_E = (inside_GE + torch.randperm(GROUPS).unsqueeze(1) * (experts // GROUPS)).flatten()
    other = rearranged(routing, place_T, experts_E)
    for name, loss in EVERY_LOSS.items():
        want, got = loss(routing, ids_T), loss(other, ids_T[place_T.argsort()])
        torch.testing.assert_close(got, want, **near("fp64 scalar"), msg=lambda text, name=name: f"{name}: {text}")
        for wanted, row in zip(gradients(want, routing), gradients(got, routing), strict=True):
            torch.testing.assert_close(row, wanted, **near("fp64"))


@settings(max_examples=40)
@given(**CASES)
def test_any_names_of_experts_where_there_are_no_groups(**case):
    routing, ids_T = drawn(**case)
    other = rearranged(routing, torch.arange(routing.num_tokens), torch.randperm(routing.num_experts))
    for name, loss in EVERY_LOSS.items():
        if "group" not in name and "communication" not in name:
            torch.testing.assert_close(loss(other, ids_T), loss(routing, ids_T), **near("fp64 scalar"))


@settings(max_examples=40)
@given(**CASES)
def test_bounds(**case):
    routing, ids_T = drawn(**case)
    experts = routing.num_experts
    assert 0 <= losses.load_balancing(routing).item() <= experts + 1e-9
    assert 0 <= losses.sequence_balancing(routing, ids_T).item() <= experts + 1e-9
    assert 0 <= losses.group_balancing(routing, GROUPS).item() <= GROUPS + 1e-9
    assert 0 <= losses.importance(routing).item() <= experts - 1 + 1e-9
    assert 0 <= losses.load(routing).item() <= experts - 1 + 1e-9
    assert 0 <= losses.entropy(routing).item() <= torch.tensor(float(experts)).log().item() + 1e-6


# Edges.

EMPTY = {
    "no token": (0, None),
    "only padding": (3, torch.zeros(3, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", EVERY_LOSS)
@pytest.mark.parametrize(("tokens", "mask_T"), EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_no_real_token_gives_zero_and_no_gradient(name, tokens, mask_T, sigmoid):
    routing = dataclasses.replace(any_routing(tokens, 4, 2, sigmoid=sigmoid), mask_T=mask_T)
    loss = EVERY_LOSS[name](routing, torch.zeros(tokens).long())
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients(loss, routing))


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_real_tokens_without_any_assignment(name):
    """All dropped, or none taken by an expert that chooses: whatever counts is 0, nothing is nan."""
    none = torch.zeros(0, dtype=torch.long)
    routing = dataclasses.replace(
        any_routing(3, 4, 2), token_ids_A=none, expert_ids_A=none, top_k=None,
        weights_A=torch.zeros(0, dtype=torch.float64, requires_grad=True),
    )  # fmt: skip
    loss = EVERY_LOSS[name](routing, torch.zeros(3).long())
    if name not in ("z_loss", "load", "entropy"):
        assert loss.item() == 0.0
    assert all(gradient.isfinite().all() for gradient in gradients(loss, routing))


def test_one_expert():
    routing, ids_T = any_routing(5, 1, 1), torch.arange(5)
    for loss in (losses.load_balancing, lambda r: losses.group_balancing(r, 1)):
        assert loss(routing).item() == 1.0
    assert losses.sequence_balancing(routing, ids_T).item() == 1.0
    assert losses.communication_balancing(routing, 1, 1).item() == 1.0
    for loss in (losses.importance, losses.load, losses.entropy):
        assert loss(routing).item() == 0.0
        assert all((gradient == 0).all() for gradient in gradients(loss(routing), routing))


def test_every_expert_chosen_by_every_token():
    routing = any_routing(5, 4, 4)
    for loss in (losses.load_balancing(routing), losses.sequence_balancing(routing, torch.tensor([0, 0, 1, 1, 1]))):
        assert loss.item() == pytest.approx(1.0, abs=near("fp64 scalar")["atol"])
        # Σ_i P_i is 1 whatever the router does.
        torch.testing.assert_close(gradients(loss, routing)[0], torch.zeros(5, 4, dtype=torch.float64))


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_sure_logits_stay_finite(sigmoid, size):
    """One expert gets everything, in fp32, also where every sigmoid is 0."""
    for sign in (1.0, -1.0):
        logits_TE = torch.full((6, 4), sign * size - size)
        logits_TE[:, 1] = sign * size
        logits_TE.requires_grad_()
        routing = dataclasses.replace(
            routing_of(logits_TE, torch.ones(6, 1).long()), score_function="sigmoid" if sigmoid else "softmax"
        )
        for loss in (losses.load_balancing(routing), losses.entropy(routing), losses.importance(routing)):
            assert loss.isfinite()
        assert losses.importance(routing).item() == 3.0
        (gradient,) = torch.autograd.grad(losses.load_balancing(routing) + losses.entropy(routing), logits_TE)
        assert gradient.isfinite().all()


# Gradients.


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("name", EVERY_LOSS)
def test_gradcheck(name, sigmoid):
    layers = [any_routing(7, 4, 2, sigmoid=sigmoid, drops=True, masked=masked) for masked in (True, False)]
    ids_T = torch.tensor([0, 0, 1, 1, 1, 2, 0])

    def loss(*leaves):
        parts = zip(layers, leaves[::3], leaves[1::3], leaves[2::3], strict=True)
        changed = [dataclasses.replace(one, logits_TE=x, weights_A=w, load_TE=p) for one, x, w, p in parts]
        return EVERY_LOSS[name](changed, ids_T)

    leaves = [leaf for one in layers for leaf in (one.logits_TE, one.weights_A, one.load_TE)]
    assert torch.autograd.gradcheck(loss, leaves)


ROUTER_CASES = {
    "topk": {"gate_order": "topk_softmax"},
    "sigmoid": {"gate_order": "softmax_topk", "norm_topk_prob": True},
    "hierarchical": {"gate_order": "softmax_topk", "router_options": {"groups": 2}},
    "top_p": {"gate_order": "softmax_topk"},
    "noisy_topk": {"gate_order": "softmax_topk"},
    "expert_choice": {},
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ROUTER_CASES for name in EVERY_LOSS if name != "load" or kind == "noisy_topk"],
)
def test_gradcheck_down_to_the_gate(kind, name):
    """Counts have no gradient: differences of the loss, which sees counts that do not change, say the same."""
    config = MoEConfig(hidden_size=3, intermediate_size=4, num_experts=4, top_k=2, router=kind, **ROUTER_CASES[kind])
    router = ROUTERS[kind](config).double()
    x_TD, ids_T = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 0])
    record = RoutingRecord()
    with record.recording():
        router(x_TD)

    def loss(weight):
        with record.replaying():  # the same noise again
            routing = torch.func.functional_call(router, {"weight": weight}, (x_TD,))
        return EVERY_LOSS[name](routing, ids_T)

    assert torch.autograd.gradcheck(loss, (router.weight,), nondet_tol=0.0)


def test_gradient_flows_through_probabilities_and_not_through_counts():
    routing = any_routing(13, 6, 2)
    logits_gradient, weights_gradient, _ = gradients(losses.load_balancing(routing), routing)
    logits = routing.logits_TE.detach().requires_grad_()
    share_E = routing.counts_E.double() / routing.counts_E.sum()
    (6 * share_E @ logits.softmax(-1).mean(0)).backward()
    torch.testing.assert_close(logits_gradient, logits.grad, **near("fp64"))
    assert (logits_gradient != 0).all()
    assert (weights_gradient == 0).all()


def test_one_expert_a_token_still_has_a_gradient():
    """With P of the selected weights alone, which are 1 at K = 1, there would be none."""
    routing = any_routing(13, 6, 1)
    assert (gradients(losses.load_balancing(routing), routing)[0] != 0).all()


def test_z_loss_gradient_by_the_formula():
    # 2·lse·softmax/T (2202.08906 eq 5).
    routing = any_routing(13, 6, 2)
    lse_T1 = routing.logits_TE.exp().sum(-1, keepdim=True).log()
    wanted = 2 * lse_T1 * routing.logits_TE.softmax(-1) / 13
    torch.testing.assert_close(gradients(losses.z_loss(routing), routing)[0], wanted, **near("fp64"))
