"""Router losses against the published equations written as loops, and their values at balance and at collapse."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from routings import EVERY_LOSS, GROUPS, any_routing, routing_of, top_k_routing
from torch import Tensor

from moekit import MoEConfig, losses
from moekit.errors import ConfigError, UnknownNameError, UnsupportedError
from moekit.moe import ROUTERS, Routing
from tolerances import near, rel


class Plain:
    """A routing as Python lists of its real tokens, and each loss as its paper has it."""

    def __init__(self, routing: Routing, count: str) -> None:
        self.experts = routing.num_experts
        mask = [True] * routing.num_tokens if routing.mask_T is None else routing.mask_T.tolist()
        self.real = [t for t in range(routing.num_tokens) if mask[t]]
        self.logits = {t: routing.logits_TE[t].tolist() for t in self.real}
        self.probs = {t: self.probabilities(t, routing.score_function) for t in self.real}
        kept = list(zip(routing.token_ids_A.tolist(), routing.expert_ids_A.tolist(), strict=True))
        self.weights = dict(zip(kept, routing.weights_A.tolist(), strict=True))
        chosen = routing.chosen or routing
        ids = chosen if count == "chosen" else routing
        self.pairs = list(zip(ids.token_ids_A.tolist(), ids.expert_ids_A.tolist(), strict=True))
        if count == "scored":
            best = {t: sorted(range(self.experts), key=lambda e, t=t: -self.logits[t][e]) for t in self.real}
            self.pairs = [(t, e) for t in self.real for e in best[t][: chosen.top_k]]
        self.load_TE = routing.load_TE

    def probabilities(self, t: int, score: str) -> list[float]:
        scores = [math.exp(x) if score == "softmax" else 1 / (1 + math.exp(-x)) for x in self.logits[t]]
        return [s / sum(scores) for s in scores]

    def f(self, i: int, tokens: list[int]) -> float:
        """N / (K T) Σ_t 1(token t selects expert i), with K·T as the number of assignments there are."""
        chosen = [e for t, e in self.pairs if t in tokens]
        return self.experts * chosen.count(i) / max(len(chosen), 1)

    def p(self, i: int, tokens: list[int]) -> float:
        return sum(self.probs[t][i] for t in tokens) / len(tokens)

    def group(self, g: int) -> list[int]:
        size = self.experts // GROUPS
        return list(range(g * size, (g + 1) * size))

    def load_balancing(self, tokens: list[int] | None = None) -> float:
        tokens = self.real if tokens is None else tokens
        return sum(self.f(i, tokens) * self.p(i, tokens) for i in range(self.experts))

    def sequence_balancing(self, ids: list[int]) -> float:
        sequences = {ids[t] for t in self.real}
        per_sequence = [self.load_balancing([t for t in self.real if ids[t] == s]) for s in sequences]
        return sum(per_sequence) / len(per_sequence)

    def group_balancing(self) -> float:
        total = 0.0
        for g in range(GROUPS):
            members = self.group(g)
            mean_f = sum(self.f(j, self.real) for j in members) / len(members)
            total += mean_f * sum(self.p(j, self.real) for j in members)
        return total

    def communication_balancing(self, limit: int) -> float:
        total = 0.0
        for g in range(GROUPS):
            members = self.group(g)
            sent = sum(any((t, e) in self.pairs for e in members) for t in self.real)
            total += GROUPS / (limit * len(self.real)) * sent * sum(self.p(j, self.real) for j in members)
        return total

    def z_loss(self) -> float:
        return sum(math.log(sum(map(math.exp, self.logits[t]))) ** 2 for t in self.real) / len(self.real)

    def variation(self, values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((v - mean) ** 2 for v in values) / len(values) / mean**2

    def importance(self) -> float:
        return self.variation(
            [sum(w for (t, e), w in self.weights.items() if e == i and t in self.real) for i in range(self.experts)]
        )

    def load(self) -> float:
        return self.variation([sum(self.load_TE[t, i].item() for t in self.real) for i in range(self.experts)])

    def entropy(self) -> float:
        return -sum(p * math.log(p) for t in self.real for p in self.probs[t]) / len(self.real)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(("drops", "masked"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", EVERY_LOSS)
def test_every_loss_is_its_equation(name, drops, masked, sigmoid):
    routing = any_routing(23, 6, 3, sigmoid=sigmoid, drops=drops, masked=masked)
    ids_T = torch.tensor([5, 5, 5, -2, 5, 9, 9, 7, 7, 7, 7] + [1] * 12)  # unequal lengths, one in two pieces
    loss, _, count = name.partition(" ")
    plain = Plain(routing, count or "chosen")
    arguments = {"sequence_balancing": [ids_T.tolist()], "communication_balancing": [1]}.get(loss, [])
    wanted = getattr(plain, loss)(*arguments)
    assert EVERY_LOSS[name](routing, ids_T).item() == pytest.approx(wanted, rel=rel("fp64 scalar"))


SCORED = {
    "load_balancing": lambda routing, _: losses.load_balancing(routing, count="scored"),
    "sequence_balancing": lambda routing, ids_T: losses.sequence_balancing(routing, ids_T, count="scored"),
    "group_balancing": lambda routing, _: losses.group_balancing(routing, GROUPS, count="scored"),
    "communication_balancing": lambda routing, _: losses.communication_balancing(routing, GROUPS, 1, count="scored"),
}


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("name", SCORED)
def test_the_best_scored_counted_by_the_equation(name, sigmoid):
    routing, ids_T = any_routing(9, 6, 2, sigmoid=sigmoid, drops=True, masked=True), torch.arange(9) // 4
    arguments = {"sequence_balancing": [ids_T.tolist()], "communication_balancing": [1]}.get(name, [])
    wanted = getattr(Plain(routing, "scored"), name)(*arguments)
    got = SCORED[name](routing, ids_T).item()
    assert got == pytest.approx(wanted, rel=rel("fp64 scalar"))
    assert got != EVERY_LOSS[name](routing, ids_T).item()
    with torch.no_grad():
        routing.logits_TE[~routing.mask_T] = torch.nan
    assert SCORED[name](routing, ids_T).item() == got


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_load_balancing_as_switch_writes_it(top_k):
    # E / (K T²) Σ_i c_i Σ_t p_ti.
    routing = top_k_routing(top_k=top_k)
    sums_E = routing.logits_TE.softmax(-1).sum(0)
    wanted = 6 / (top_k * 13**2) * sum(c * s for c, s in zip(routing.counts_E.tolist(), sums_E.tolist(), strict=True))
    assert losses.load_balancing(routing).item() == pytest.approx(wanted, rel=rel("fp64 scalar"))


def test_communication_loss_at_other_limits():
    routing = any_routing(9, 8, 3)
    for limit in (1, 2):
        wanted = Plain(routing, "chosen").communication_balancing(limit)
        got = losses.communication_balancing(routing, GROUPS, limit).item()
        assert got == pytest.approx(wanted, rel=rel("fp64 scalar"))


def balanced(top_k: int, experts: int = 4) -> Routing:
    """Uniform probabilities, equal counts, equal weights, equal loads."""
    ids_TK = (torch.arange(experts)[:, None] + torch.arange(top_k)) % experts
    routing = routing_of(torch.zeros(experts, experts), ids_TK)
    return dataclasses.replace(routing, load_TE=torch.full((experts, experts), top_k / experts))


def collapsed(top_k: int, experts: int = 4, tokens: int = 8) -> Routing:
    """Every token goes to experts 0 … K−1, surely and evenly."""
    logits_TE = torch.zeros(tokens, experts)
    logits_TE[:, :top_k] = 1000.0
    routing = routing_of(logits_TE, torch.arange(top_k).expand(tokens, top_k))
    return dataclasses.replace(routing, load_TE=(logits_TE > 0).float())


VALUES = {  # loss: at balance, at collapse on K of E = 4 experts, as docs/math.md has it
    "load_balancing": (lambda k: 1.0, lambda k: 4 / k),
    "load_balancing kept": (lambda k: 1.0, lambda k: 4 / k),
    "sequence_balancing": (lambda k: 1.0, lambda k: 4 / k),
    "group_balancing": (lambda k: 1.0, lambda k: GROUPS if k <= 2 else 1.0),
    "importance": (lambda k: 0.0, lambda k: 4 / k - 1),
    "load": (lambda k: 0.0, lambda k: 4 / k - 1),
    "entropy": (lambda k: math.log(4), math.log),
}


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("name", VALUES)
def test_values_at_balance_and_at_collapse(name, top_k):
    at_balance, at_collapse = VALUES[name]
    for routing, wanted in ((balanced(top_k), at_balance(top_k)), (collapsed(top_k), at_collapse(top_k))):
        ids_T = torch.zeros(routing.num_tokens, dtype=torch.long)
        assert EVERY_LOSS[name](routing, ids_T).item() == pytest.approx(wanted, **tolerance())


def tolerance() -> dict[str, float]:
    return dict(zip(("rel", "abs"), near("fp32 scalar").values(), strict=True))


def test_load_balancing_is_exact_at_both_ends():
    assert losses.load_balancing(balanced(1)).item() == losses.load_balancing(balanced(2)).item() == 1.0
    assert losses.load_balancing(collapsed(1)).item() == 4.0


def test_communication_at_balance_and_at_collapse():
    ids_TK = torch.tensor([[0, 2], [1, 3], [3, 0]])  # E = 4, G = 2: every token uses both groups
    both = routing_of(torch.zeros(3, 4), ids_TK)
    assert losses.communication_balancing(both, 2, 2).item() == 1.0
    one_each = routing_of(torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]]))
    assert losses.communication_balancing(one_each, 2, 1).item() == 1.0
    assert losses.communication_balancing(one_each, 2, 2).item() == 0.5  # fewer groups than allowed
    assert losses.communication_balancing(collapsed(1), 2, 1).item() == 2.0  # G / M
    assert losses.communication_balancing(collapsed(1), 4, 2).item() == 2.0


def test_load_balancing_is_no_distance():
    # The expert that is chosen more often has the smaller probability: below the value at balance.
    logits_TE = torch.tensor([[0.51, 0.49]] * 3 + [[0.01, 0.99]]).log()
    assert losses.load_balancing(routing_of(logits_TE, logits_TE.topk(1).indices)).item() < 0.9


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_layers_are_averaged_not_pooled(name):
    layers = [any_routing(9, 6, 2, drops=True) for _ in range(3)]
    ids_T = torch.arange(9) // 4
    mean = sum(EVERY_LOSS[name](one, ids_T).item() for one in layers) / 3
    assert EVERY_LOSS[name](layers, ids_T).item() == pytest.approx(mean, rel=rel("fp64 scalar"))
    assert EVERY_LOSS[name](tuple(layers[:1]), ids_T).item() == EVERY_LOSS[name](layers[0], ids_T).item()


def test_two_layers_collapsed_on_different_experts_do_not_look_balanced():
    one, other = torch.tensor([[1e3, 0.0]] * 4), torch.tensor([[0.0, 1e3]] * 4)
    layers = [routing_of(one, torch.zeros(4, 1).long()), routing_of(other, torch.ones(4, 1).long())]
    assert losses.load_balancing(layers).item() == 2.0
    assert losses.importance(layers).item() == 1.0


def test_sequences_that_collapse_on_different_experts_do_not_look_balanced():
    routing = routing_of(torch.eye(2).repeat_interleave(3, 0) * 1e3, torch.tensor([[0]] * 3 + [[1]] * 3))
    assert losses.load_balancing(routing).item() == 1.0
    assert losses.sequence_balancing(routing, torch.tensor([4, 4, 4, 8, 8, 8])).item() == 2.0


def test_hierarchical_router_is_balanced_by_its_groups():
    options = {"groups": 2, "groups_per_token": 1}
    config = MoEConfig(
        hidden_size=8, intermediate_size=4, num_experts=4, top_k=2, router="hierarchical", router_options=options,
        gate_order="softmax_topk",
    )  # fmt: skip
    routing = ROUTERS["hierarchical"](config).double()(torch.randn(11, 8, dtype=torch.float64))
    upper_TG = routing.logits_TE.exp().view(11, 2, 2).sum(-1).log()
    upper = routing_of(upper_TG, routing.expert_ids_TK[:, :1] // 2)
    got = losses.group_balancing(routing, 2).item()
    assert got == pytest.approx(losses.load_balancing(upper).item(), rel=rel("fp64 scalar"))


@pytest.mark.parametrize("experts", [4, 6])
def test_one_group_an_expert_is_load_balancing(experts):
    routing = any_routing(7, experts, 2, drops=True)
    got = losses.group_balancing(routing, experts).item()
    assert got == pytest.approx(losses.load_balancing(routing).item(), rel=rel("fp64 scalar"))


def router(name: str, experts: int = 6, top_k: int = 2, **changes: object):
    config = MoEConfig(hidden_size=5, intermediate_size=4, num_experts=experts, top_k=top_k, router=name, **changes)
    return ROUTERS[name](config).double()


def test_the_load_of_the_noisy_router():
    noisy = router("noisy_topk")
    routing = noisy(torch.randn(30, 5, dtype=torch.float64))
    loads_E = routing.load_TE.sum(0)
    wanted = loads_E.var(correction=0) / loads_E.mean() ** 2
    assert losses.load(routing).item() == pytest.approx(wanted.item(), rel=rel("fp64 scalar"))
    (gradient,) = torch.autograd.grad(losses.load(routing), noisy.weight)
    assert (gradient != 0).any(dim=1).all(), "both the gate's rows and the noise's"


def test_top_p_needs_fewer_experts_the_lower_the_entropy():
    gate = router("top_p", top_k=6, gate_order="softmax_topk")
    x = torch.randn(50, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD(gate.parameters(), lr=1.0)
    before = gate(x).expert_ids_A.numel()
    for _ in range(30):
        optimizer.zero_grad()
        losses.entropy(gate(x)).backward()
        optimizer.step()
    assert gate(x).expert_ids_A.numel() < before / 1.5


# Errors and the registry.


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_a_dense_model_has_nothing_to_balance(name):
    with pytest.raises(ConfigError, match="no MoE layer"):
        EVERY_LOSS[name]((), torch.zeros(0))


def test_without_a_load_the_load_loss_says_who_gives_one():
    for routing in (router("topk")(torch.randn(3, 5)), router("noisy_topk").eval()(torch.randn(3, 5))):
        with pytest.raises(UnsupportedError, match="noisy_topk"):
            losses.load(routing)


def test_arguments_that_do_not_fit():
    routing = top_k_routing()
    for groups in (0, -2, 4, 12):
        with pytest.raises(ConfigError, match="must divide the number of experts"):
            losses.group_balancing(routing, groups)
    for groups, limit in ((2, 3), (2, 0)):
        with pytest.raises(ConfigError, match="groups_per_token"):
            losses.communication_balancing(routing, groups, limit)
    with pytest.raises(ConfigError, match="must divide"):
        losses.communication_balancing(routing, 4, 1)
    for ids in (torch.zeros(12).long(), torch.zeros(1, 13).long()):
        with pytest.raises(ConfigError, match="one id for each of 13 tokens"):
            losses.sequence_balancing(routing, ids)
    for loss in (losses.load_balancing, lambda r, count: losses.sequence_balancing(r, torch.zeros(13), count=count)):
        with pytest.raises(ConfigError, match="scored, chosen or kept"):
            loss(routing, count="all")
    with pytest.raises(UnsupportedError, match="same number of experts"):
        losses.load_balancing(router("expert_choice")(torch.randn(6, 5)), count="scored")


def test_counts_that_do_not_fit():
    routing, six = top_k_routing(), torch.ones(6)
    for given, layers in (
        (torch.ones(5), routing),
        ([six, six], routing),
        (torch.ones(1, 6), [routing, routing]),
        (six, [routing, routing]),
        (torch.ones(()), routing),
    ):
        with pytest.raises(ConfigError, match="one count an expert for each layer"):
            losses.load_balancing(layers, counts_E=given)
    with pytest.raises(ConfigError, match="already says what is counted"):
        losses.load_balancing(routing, count="kept", counts_E=six)
    for given in ([six], torch.ones(1, 6)):
        assert losses.load_balancing(routing, counts_E=given).item() == pytest.approx(1.0, rel=rel("fp64 scalar"))


def test_the_registry_holds_what_needs_only_routings():
    assert list(losses.LOSSES) == ["entropy", "group_balancing", "importance", "load", "load_balancing", "z_loss"]
    layers = [dataclasses.replace(any_routing(9, 6, 2), groups=3) for _ in range(2)]
    for name in losses.LOSSES:
        assert losses.LOSSES[name](layers).item() == getattr(losses, name)(layers).item()
    with pytest.raises(UnknownNameError, match="unknown router loss 'balance'; choose from: entropy, "):
        losses.LOSSES["balance"]


def test_probabilities_are_those_of_the_routing():
    """One definition: E·Σ f·P of `Routing.probs_TE`, in both score functions."""
    for sigmoid in (False, True):
        routing = any_routing(9, 6, 2, sigmoid=sigmoid)
        share_E: Tensor = routing.counts_E.double() / 18
        wanted = 6 * (share_E * routing.probs_TE.mean(0)).sum()
        assert losses.load_balancing(routing).item() == pytest.approx(wanted.item(), rel=rel("fp64 scalar"))
