"""Which of the router's decisions a loss counts, and over which groups: conformance trap 5, with real routers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from routings import any_routing

from moekit import MoEConfig, losses
from moekit.config import CapacityConfig, GroupLimit
from moekit.errors import UnsupportedError
from moekit.moe import ROUTERS, MoE
from tolerances import rel


def router(name: str, experts: int = 6, top_k: int = 2, **changes: object):
    config = MoEConfig(hidden_size=5, intermediate_size=4, num_experts=experts, top_k=top_k, router=name, **changes)
    return ROUTERS[name](config).double()


def test_the_biased_choice_is_counted_and_the_bias_is_not_in_the_probabilities():
    sigmoid = router("sigmoid", experts=4, top_k=1, gate_order="softmax_topk")
    sigmoid.selection_bias += torch.tensor([0.0, 0.0, 9.0, 0.0])
    x_TD = torch.randn(10, 5, dtype=torch.float64)
    routing = sigmoid(x_TD)
    scores_TE = routing.logits_TE.sigmoid()
    wanted = 4 * (scores_TE / scores_TE.sum(-1, keepdim=True)).mean(0)[2]  # every token chose expert 2
    assert losses.load_balancing(routing).item() == pytest.approx(wanted.item(), rel=rel("fp64 scalar"))
    # Counted without it, as 2412.19437 eq 18 does, the loss is that of a router that never had a bias.
    with torch.no_grad():
        scored = losses.load_balancing(routing, count="scored").item()
        sigmoid.selection_bias.zero_()
    assert scored == losses.load_balancing(sigmoid(x_TD)).item()
    assert scored != losses.load_balancing(routing).item()


def test_the_group_limited_choice_is_counted():
    limited = router("topk", experts=4, router_options={"groups": {"groups": 2, "chosen": 1}})
    routing = limited(torch.randn(40, 5, dtype=torch.float64))
    free_TK = routing.logits_TE.topk(2).indices
    assert (routing.expert_ids_TK.sort(-1).values != free_TK.sort(-1).values).any()
    counts_E = routing.expert_ids_TK.flatten().bincount(minlength=4).double()
    wanted = 4 * (counts_E / 80 * routing.logits_TE.softmax(-1).mean(0)).sum()
    assert losses.load_balancing(routing).item() == pytest.approx(wanted.item(), rel=rel("fp64 scalar"))


def test_capacity_hides_an_overload_only_from_the_kept_count():
    gate = router("topk", experts=4, capacity=CapacityConfig(factor=1.0))
    free = router("topk", experts=4)
    with torch.no_grad():
        gate.weight[0] += 3.0
        free.weight.copy_(gate.weight)
    x = torch.randn(40, 5, dtype=torch.float64).abs()
    routing = gate(x)
    assert routing.dropped > 0
    chosen, kept = losses.load_balancing(routing), losses.load_balancing(routing, count="kept")
    assert chosen.item() == losses.load_balancing(free(x)).item()
    counts_E = routing.expert_ids_A.bincount(minlength=4).double()
    wanted = 4 * (counts_E / counts_E.sum() * routing.logits_TE.softmax(-1).mean(0)).sum()
    assert kept.item() == pytest.approx(wanted.item(), rel=rel("fp64 scalar"))
    assert kept.item() < chosen.item()


def test_noise_is_not_in_the_probabilities():
    noisy = router("topk", router_options={"noise_std": 3.0})
    x = torch.randn(30, 5, dtype=torch.float64)
    routing = noisy(x)
    share_E = routing.counts_E.double() / 60
    wanted = 6 * (share_E * (x @ noisy.weight.T).softmax(-1).mean(0)).sum()
    assert losses.load_balancing(routing).item() == pytest.approx(wanted.item(), rel=rel("fp64 scalar"))


def test_group_balancing_knows_the_routers_own_groups():
    tree = {"router": "hierarchical", "router_options": {"groups": 3, "groups_per_token": 2}}
    limited = {"router_options": {"groups": GroupLimit(groups=3, chosen=2)}}
    values = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 6, "top_k": 2}
    for changes in (tree, limited):
        routing = MoE(MoEConfig(**values, **changes))(torch.randn(20, 8))[1]
        assert losses.LOSSES["group_balancing"](routing).item() == losses.group_balancing(routing, 3).item()
    with pytest.raises(UnsupportedError, match="no groups of experts"):
        losses.group_balancing(MoE(MoEConfig(**values))(torch.randn(20, 8))[1])


def test_layers_may_have_different_groups():
    layers = [dataclasses.replace(any_routing(9, 6, 2), groups=groups) for groups in (2, 3)]
    mean = sum(losses.group_balancing(one, one.groups).item() for one in layers) / 2
    assert losses.group_balancing(layers).item() == pytest.approx(mean, rel=rel("fp64 scalar"))
