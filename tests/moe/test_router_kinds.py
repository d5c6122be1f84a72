"""Each router beside its paper, written as loops: experts, weights, gradients, and the chances where chance decides."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from cases import ROUTED, by_token, make, params, run, token_ids
from plain_routers import plain_routing, softmax
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeConfig, Ernie4_5_MoeTopKRouter

from moekit import MoEConfig
from moekit.config import CapacityConfig, GroupLimit, TopPOptions
from moekit.errors import ConfigError, UnsupportedError
from moekit.moe import ROUTERS, Choice, Router, RoutingRecord, RoutingTotals
from moekit.moe.router import Noise
from moekit.moe.router_balanced import balanced
from moekit.moe.router_noisy import load_probability
from tolerances import near, rel


def router_of(name: str, *, experts=4, top_k=2, hidden=8, **changes) -> Router:
    config = MoEConfig(
        hidden_size=hidden, intermediate_size=1, num_experts=experts, top_k=top_k, router=name, **changes
    )
    return ROUTERS[name](config)


def fixed(router: Router, *logits: list[float]) -> torch.Tensor:
    """One-hot inputs that give these logits, token by token."""
    with torch.no_grad():
        router.weight.copy_(torch.tensor(logits, dtype=router.weight.dtype).T)
    return torch.eye(len(logits), dtype=router.weight.dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("router", "capacity"), params(ROUTED))
def test_equals_the_paper(router, capacity, training):
    masked = ROUTED.index((router, capacity)) % 2 == training
    layer = make(router, capacity).train(training)
    x = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    ids, mask = token_ids(10), torch.arange(10) % 4 != 1 if masked else None
    routing, seed = run(layer.router, x, mask_T=mask, input_ids_T=ids)
    plain = plain_routing(layer.router, x, seed=seed, mask=mask.tolist() if masked else None, ids=ids.tolist())
    assert [set(one) for one in by_token(routing)] == [set(one) for one in plain.served]
    chosen = routing if routing.chosen is None else routing.chosen
    pairs = sorted((t, e) for t, experts in enumerate(plain.chosen) for e in experts)
    assert sorted(zip(chosen.token_ids_A.tolist(), chosen.expert_ids_A.tolist(), strict=True)) == pairs
    rows = zip(routing.token_ids_A.tolist(), routing.expert_ids_A.tolist(), strict=True)
    want = torch.stack([plain.served[t][e] for t, e in rows])
    torch.testing.assert_close(routing.weights_A, want, **near("fp64"))
    if want.requires_grad:
        seed, wrt = torch.randn_like(want), [x, layer.router.weight]
        ours = torch.autograd.grad((routing.weights_A * seed).sum(), wrt)
        theirs = torch.autograd.grad((want * seed).sum(), wrt)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, **near("fp64"))


def test_every_token_with_every_expert_is_the_dense_softmax_gate():
    router = router_of("topk", top_k=4).double()
    x = torch.randn(7, 8, dtype=torch.float64)
    routing = router(x)
    dense_TE = torch.zeros(7, 4, dtype=torch.float64).scatter(1, routing.expert_ids_TK, routing.weights_TK)
    torch.testing.assert_close(dense_TE, (x @ router.weight.T).softmax(-1), **near("fp64"))


# sigmoid and groups


def test_groups_are_closed_with_minus_infinity_and_not_with_zero():
    # Biased scores below zero everywhere: a masked 0 would win.
    options = {"groups": GroupLimit(groups=2, chosen=1)}
    router = router_of("sigmoid", experts=6, hidden=1, router_options=options)
    router.selection_bias.fill_(-5.0)
    x = fixed(router, [0.1, 0.2, 0.3, 1.0, -9.0, 0.9])
    assert router(x).expert_ids_A.tolist() == [3, 5]


@pytest.mark.parametrize(("score", "chosen"), [("sum", {0, 1}), ("max", {2, 3})])
def test_a_group_counts_by_its_best_two_or_by_its_best_one(score, chosen):
    options = {"groups": GroupLimit(groups=2, chosen=1, score=score)}
    router = router_of("topk", hidden=1, router_options=options)
    assert set(router(fixed(router, [2.0, 2.0, 3.0, -9.0])).expert_ids_A.tolist()) == chosen


def test_a_group_counts_by_the_share_of_experts_that_it_gives():
    # 2 experts from 2 groups, so each by its best one: groups 0 and 2. By its best two, group 1 would be first.
    options = {"groups": GroupLimit(groups=3, chosen=2)}
    router = router_of("topk", experts=9, hidden=1, router_options=options)
    x = fixed(router, [3.0, -9.0, -9.0, 2.0, 2.0, 2.0, 2.5, -9.0, -9.0])
    assert router(x).expert_ids_A.tolist() == [0, 6]


@pytest.mark.parametrize("name", ["sigmoid", "topk"])
def test_the_selection_bias_moves_by_the_sign_of_the_load_once_a_step_and_only_in_training(name):
    router = router_of(name, router_options={"bias": True, "bias_rate": 0.25})
    totals = RoutingTotals(
        torch.tensor([9, 3, 6, 6]), torch.tensor([0, 0, 24, 0]), tokens=12
    )  # the kept ones do not count
    router.after_step(totals)
    assert router.selection_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    router.eval().after_step(totals)
    assert router.selection_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    # Loads that fp32 cannot hold: even is even, and one too many is one too many.
    router = router_of(name, experts=3, top_k=1, gate_order="softmax_topk", router_options={"bias": True})
    router.after_step(RoutingTotals(*[torch.full((3,), 2**25 + 1)] * 2, tokens=1))
    assert router.selection_bias.tolist() == [0.0, 0.0, 0.0]
    router.after_step(RoutingTotals(*[torch.tensor([2**25, 2**25 + 1, 2**25])] * 2, tokens=1))
    assert (router.selection_bias.sign() == torch.tensor([1, -1, 1])).all()


def test_the_selection_bias_has_no_gradient_and_does_not_weigh():
    router = router_of("sigmoid")
    x = torch.randn(50, 8)
    before = router(x)
    router.selection_bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    after = router(x)
    assert set(after.expert_ids_A.tolist()) == {0, 1} != set(before.expert_ids_A.tolist())
    assert torch.equal(after.weights_TK, after.logits_TE.gather(1, after.expert_ids_TK).sigmoid())
    assert [name for name, _ in router.named_parameters()] == ["weight"]


def test_experts_that_the_bias_alone_chose_weigh_as_in_ernie():
    """Their probabilities are below moe_norm_min, or 0: transformers divides by 1e-12, and nothing is 0 / 0."""
    sizes = {"hidden_size": 2, "moe_num_experts": 4, "moe_k": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    theirs = Ernie4_5_MoeTopKRouter(Ernie4_5_MoeConfig(**sizes))
    options = {"gate_order": "softmax_topk", "norm_topk_prob": True, "router_options": {"bias": True}}
    router = router_of("topk", hidden=2, **options)
    x = fixed(router, [40.0, 40.0, 11.0, 10.0], [400.0, 400.0, 0.0, -1.0])
    router.selection_bias.copy_(torch.tensor([0.0, 0.0, 2.0, 1.5]))
    with torch.no_grad():
        theirs.weight.copy_(router.weight)
        theirs.moe_statics.e_score_correction_bias.copy_(router.selection_bias)
        _, weights_TK, ids_TK = theirs(x)
    ours = router(x)
    assert torch.equal(ours.expert_ids_TK, ids_TK)
    assert ids_TK.tolist() == [[2, 3], [2, 3]]
    assert 0 < weights_TK[0].sum() < 1
    assert weights_TK[1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(ours.weights_TK, weights_TK, **near("fp32 twin"))


def test_the_bias_balances():
    # Experts 0 and 1 are everybody's favourites; after some steps all get their share.
    router = router_of("sigmoid", experts=8, router_options={"bias_rate": 0.02})
    with torch.no_grad():
        router.weight[:2, 0] += 2.0
    x = torch.randn(2000, 8)
    x[:, 0] = 1.0
    worst = []
    for _ in range(100):
        routing = router(x)
        worst.append(routing.counts_E.max().item() / 500)
        router.after_step(RoutingTotals.of(routing))
    assert worst[0] > 2.0
    assert worst[-1] < 1.15


# noisy top-k


def test_load_is_the_chance_under_fresh_noise():
    """P(x, i) beside 20,000 new draws of expert i's own noise, the others' held (1701.06538 eq 8–9)."""
    torch.manual_seed(3)
    logits, std = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64) + 0.3
    noisy = logits + std * torch.randn(4, 5, dtype=torch.float64)
    for top_k in (1, 3):
        load = load_probability(logits, noisy, std, top_k)
        for i in range(5):
            drawn = noisy.expand(20_000, 4, 5).clone()
            drawn[..., i] = logits[:, i] + std[:, i] * torch.randn(20_000, 4, dtype=torch.float64)
            share = (drawn.topk(top_k).indices == i).any(-1).double().mean(0)
            torch.testing.assert_close(share, load[:, i], **near("chance of many"))


def test_load_by_the_equation_with_its_gradient():
    layer = make("noisy_topk")
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    routing, seed = run(layer.router, x)
    plain = torch.stack(plain_routing(layer.router, x, seed=seed).gate)  # H(x)
    want = torch.zeros(6, 6, dtype=torch.float64)
    for t in range(6):
        for i in range(6):
            rivals = sorted((plain[t, j] for j in range(6) if j != i), reverse=True)
            std = (1 + (layer.router.weight[6 + i] @ x[t]).exp()).log()
            z = (layer.router.weight[i] @ x[t] - rivals[1]) / std
            want[t, i] = (1 + torch.erf(z / math.sqrt(2))) / 2
    torch.testing.assert_close(routing.load_TE, want, **near("fp64"))
    wrt = [x, layer.router.weight]
    grads = [torch.autograd.grad(load.square().sum(), wrt, retain_graph=True) for load in (routing.load_TE, want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, **near("fp64"))
    assert layer.eval().router(x).load_TE is None


def test_noise_starts_with_the_same_size_on_every_logit():
    router = router_of("noisy_topk", experts=3)
    assert (router.weight[3:] == 0).all()
    x = torch.randn(30_000, 8)
    record = RoutingRecord()
    with record.recording():
        routing = router(x)
    noise = router._score(x, Noise(record.decisions[0].seed, x.device)).gate_TE - routing.logits_TE
    assert noise.std().item() == pytest.approx(math.log(2), rel=rel("standard deviation of many"))


# GShard


def test_the_second_expert_is_taken_with_twice_its_share():
    router = router_of("gshard", hidden=1)
    for gap in (0.1, 1.0, 3.0):
        x = fixed(router, [0.0, gap, -9.0, -9.0])
        routing = router.train()(x.expand(20_000, 1))
        share = softmax([0.0, gap])[0]
        assert routing.counts_E.tolist()[1] == 20_000  # the first one always
        assert routing.counts_E[0].item() / 20_000 == pytest.approx(
            min(1, 2 * share), abs=near("chance of many")["atol"]
        )
        # Kept or skipped, the first weighs what it weighs beside the second.
        first = routing.weights_A[routing.expert_ids_A == 1]
        assert first.max() == first.min()
        assert first[0].item() == pytest.approx(1 - share, rel=rel("fp32 scalar"))
    assert router.eval()(x).counts_E.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("lost_weight", ["lose", "renormalise"])
def test_a_skipped_second_expert_is_not_lost_weight(lost_weight):
    # There is room for all: whatever becomes of lost weight, no weight is lost.
    router = router_of("gshard", capacity=CapacityConfig(tokens=1000, lost_weight=lost_weight))
    routing = router(torch.randn(500, 8))
    assert routing.dropped == 0
    assert 500 < routing.counts_E.sum() < 1000
    weights = [one[e] for one, e in zip(by_token(routing), routing.logits_TE.argmax(-1).tolist(), strict=True)]
    torch.testing.assert_close(torch.tensor(weights), routing.logits_TE.topk(2).values.softmax(-1)[:, 0])


# Gumbel


def test_gumbel_samples_from_the_softmax():
    router = router_of("gumbel", hidden=1, top_k=1)
    logits = [0.0, 1.0, -1.0, 0.5]
    routing = router.train()(fixed(router, logits).expand(40_000, 1))
    torch.testing.assert_close(
        routing.counts_E.double() / 40_000, torch.tensor(softmax(logits)).double(), **near("chance of many")
    )
    assert set(router.eval()(torch.ones(50, 1)).expert_ids_A.tolist()) == {1}


def test_straight_through_weighs_equally_and_sends_the_soft_gradient():
    router = router_of("gumbel", experts=5, top_k=2).double()
    x = torch.randn(6, 8, dtype=torch.float64)
    routing, seed = run(router, x)
    assert (routing.weights_A == 0.5).all()
    gate_TE = torch.stack(plain_routing(router, x, seed=seed).gate)
    out_TK = torch.randn(6, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((routing.weights_TK * out_TK).sum(), router.weight)
    # d soft_a / d l_j = soft_a (δ_aj − soft_j) / τ, with the temperature at first.
    soft_TE, tau = gate_TE.detach().softmax(-1), 0.5
    grad_TE = torch.zeros(6, 5, dtype=torch.float64)
    for t in range(6):
        for k, a in enumerate(routing.expert_ids_TK[t].tolist()):
            for j in range(5):
                grad_TE[t, j] += out_TK[t, k] * soft_TE[t, a] * (float(a == j) - soft_TE[t, j]) / tau
    torch.testing.assert_close(gradient, grad_TE.T @ x, **near("fp64"))


def test_temperature_falls_by_a_constant_factor_from_start_to_end():
    router = router_of("gumbel", router_options={"start": 0.8, "end": 0.1, "anneal_steps": 6})
    totals = RoutingTotals.of(router(torch.randn(3, 8)))
    seen = []
    for _ in range(9):
        seen.append(router.temperature)
        router.after_step(totals)
    assert seen[0] == 0.8
    assert seen[6:] == pytest.approx([0.1] * 3)
    assert [b / a for a, b in itertools.pairwise(seen[:7])] == pytest.approx([(1 / 8) ** (1 / 6)] * 6)
    router.eval().after_step(totals)
    assert router.steps == 9


def test_soft_weights_of_one_expert_teach_nothing():
    with pytest.raises(ConfigError, match="top_k 1 without straight_through"):
        router_of("gumbel", top_k=1, router_options={"straight_through": False})


# Adaptive k


def test_the_smallest_set_that_reaches_p():
    router = router_of("top_p", hidden=1, top_k=3, gate_order="softmax_topk", router_options={"p": 0.6})
    for probs, taken in (
        ([0.7, 0.1, 0.1, 0.1], [0]),
        ([0.1, 0.4, 0.1, 0.4], [1, 3]),
        ([0.25, 0.25, 0.25, 0.25], [0, 1, 2]),  # K of them, though 4 would be needed
    ):
        assert sorted(router(fixed(router, [math.log(p) for p in probs])).expert_ids_A.tolist()) == taken
    # A set that reaches p exactly is enough.
    half = router_of("top_p", hidden=1, top_k=3, gate_order="softmax_topk", router_options={"p": 0.5})
    assert half(fixed(half, [0.0, -99.0, 0.0, -99.0])).expert_ids_A.tolist() == [0]
    # However sure, min_k.
    sure = router_of("top_p", hidden=1, top_k=3, router_options={"p": 0.6, "min_k": 2})
    assert sure(fixed(sure, [9.0, 0.0, 1.0, 0.0])).expert_ids_A.tolist() == [0, 2]


@pytest.mark.parametrize("target", [1.5, 2.0, 3.2])
def test_the_threshold_finds_the_wanted_number_of_experts(target):
    options = TopPOptions(target_k=target, rate=0.2)
    router = router_of("top_p", experts=8, top_k=5, gate_order="softmax_topk", router_options=options)
    x = torch.randn(500, 8)
    for _ in range(150):
        totals = RoutingTotals.of(router(x))
        router.after_step(totals)
    assert RoutingTotals.of(router(x)).mean_k == pytest.approx(target, abs=0.05)
    before = router.threshold.clone()
    router.eval().after_step(totals)
    router.train().after_step(RoutingTotals(torch.zeros(8).long(), torch.zeros(8).long(), tokens=0))
    assert torch.equal(router.threshold, before)


def test_the_threshold_stays_between_one_hundredth_and_the_rest():
    # More experts than there is probability for, or fewer than min_k gives: p may not leave (0, 1).
    for target, end in ((4.0, 0.99), (1.0, 0.01)):
        options = TopPOptions(target_k=target, rate=1.0)
        router = router_of("top_p", top_k=4, gate_order="softmax_topk", router_options=options)
        counts = torch.tensor([10, 10, 0, 0])
        for _ in range(20):
            router.after_step(RoutingTotals(counts, counts, tokens=10))  # 2 a token, whatever p
        assert router.threshold.item() == pytest.approx(end)


def test_different_numbers_of_experts_have_no_regular_view():
    router = router_of("top_p", top_k=3, gate_order="softmax_topk")
    with pytest.raises(UnsupportedError, match="no \\(T, K\\) view"):
        _ = router(torch.randn(50, 8)).weights_TK


# Expert choice


@pytest.mark.parametrize(("tokens", "take"), [(1, 1), (3, 1), (10, 5), (11, 5), (0, 0)])
def test_every_expert_takes_exactly_its_number(tokens, take):
    router = router_of("expert_choice")
    assert router(torch.randn(tokens, 8)).counts_E.tolist() == [take] * 4


def test_no_expert_takes_padding():
    router = router_of("expert_choice")
    x = torch.randn(13, 8)
    mask = torch.arange(13) % 3 != 0
    x[~mask] *= 100  # scores that would win
    routing = router(x, mask)
    assert routing.counts_E.tolist() == [4] * 4
    assert mask[routing.token_ids_A].all()
    assert router(x, torch.zeros(13).bool()).counts_E.tolist() == [0] * 4


# Hash


HASHED = [[14, 7, 3], [13, 1, 7], [7, 1, 14], [8, 0, 1], [1, 10, 5]]
HASH = """
import json, torch
from moekit import MoEConfig
from moekit.moe import ROUTERS
router = ROUTERS["hash"](MoEConfig(hidden_size=8, intermediate_size=1, num_experts=16, top_k=3, router="hash"))
routing = router(torch.zeros(5, 8), input_ids_T=torch.tensor([0, 1, 2, 49151, 10**9]))
result = json.dumps(routing.expert_ids_TK.tolist())
"""


def test_hashes_are_pinned():
    # Python's own hash differs from process to process; the loop of test_equals_the_paper is the other witness.
    names: dict[str, str] = {}
    exec(HASH, names)
    assert json.loads(names["result"]) == HASHED


@pytest.mark.heavy
@pytest.mark.parametrize("seed", ["0", "1"])
def test_hash_is_the_same_in_every_process(seed):
    code, env = HASH + "print(result)", os.environ | {"PYTHONHASHSEED": seed}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == HASHED


def test_hash_spreads_evenly_and_differs_by_seed():
    router, ids = router_of("hash", experts=16, top_k=3), torch.arange(50_000)
    routing = router(torch.zeros(50_000, 8), input_ids_T=ids)
    assert all(len(set(row)) == 3 for row in routing.expert_ids_TK[:2000].tolist())
    # χ² with 15 degrees of freedom passes 37.7 once in a thousand; choosing without replacement makes it smaller still.
    expected = 50_000 * 3 / 16
    assert ((routing.counts_E - expected) ** 2 / expected).sum() < 37.7
    other = router_of("hash", experts=16, top_k=3, router_options={"seed": 1})
    again = other(torch.zeros(50_000, 8), input_ids_T=ids)
    same = (again.expert_ids_TK[:, 0] == routing.expert_ids_TK[:, 0]).double().mean().item()
    assert same == pytest.approx(1 / 16, abs=near("chance of many")["atol"])


def test_hash_needs_one_id_a_token_and_has_nothing_to_learn():
    router = router_of("hash")
    assert list(router.parameters()) == []
    with pytest.raises(ConfigError, match="needs the tokens' ids"):
        router(torch.zeros(3, 8))
    with pytest.raises(ConfigError, match="got 4 input_ids for 3 tokens"):
        router(torch.zeros(3, 8), input_ids_T=torch.arange(4))


# Sinkhorn


def test_scaling_makes_rows_and_columns_even_and_stays_finite():
    logits = torch.randn(12, 4, dtype=torch.float64) * 3
    plan = balanced(logits, 200).exp()
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 3.0, dtype=torch.float64), **near("fp64"))
    torch.testing.assert_close(plan.sum(1), torch.ones(12, dtype=torch.float64), **near("fp64"))
    # Still logits plus something a row plus something a column: it only rescales.
    rest = balanced(logits, 3) - logits
    torch.testing.assert_close(rest - rest[:1] - rest[:, :1] + rest[:1, :1], torch.zeros_like(rest), **near("fp64"))
    assert balanced(torch.tensor([[1e4, -1e4], [1e4, -1e4]]), 8).isfinite().all()
    assert balanced(torch.zeros(0, 4), 8).shape == (0, 4)


def test_sinkhorn_spreads_in_training_and_is_plain_top_k_in_eval():
    router = router_of("sinkhorn", experts=4, top_k=1, gate_order="softmax_topk")
    plain = router_of("topk", experts=4, top_k=1, gate_order="softmax_topk")
    with torch.no_grad():
        router.weight[0] += 1.5
        plain.weight.copy_(router.weight)
    x = torch.randn(400, 8) + 0.5
    assert plain(x).counts_E.max() > 300
    assert router.train()(x).counts_E.max() < 150
    evaluated = router.eval()(x)
    assert torch.equal(evaluated.expert_ids_A, plain(x).expert_ids_A)
    assert torch.equal(evaluated.weights_A, plain(x).weights_A)


# Hierarchical


def test_probabilities_of_the_tree_are_products_and_add_up_to_one():
    router = router_of("hierarchical", experts=6, router_options={"groups": 3, "groups_per_token": 2}).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    routing, raw = router(x), x @ router.weight.T
    groups, inside = raw[:, :3].softmax(-1), raw[:, 3:].view(5, 3, 2).softmax(-1)
    product = (groups.unsqueeze(-1) * inside).flatten(1)
    torch.testing.assert_close(routing.probs_TE, product, **near("fp64"))
    torch.testing.assert_close(routing.logits_TE.exp(), product, **near("fp64"))
    taken = (routing.expert_ids_TK // 2).sort(-1).values
    assert torch.equal(taken, groups.topk(2).indices.sort(-1).values)


def test_a_choice_of_other_sizes_is_no_view():
    choice = Choice.regular(torch.tensor([[1, 0], [2, 3]]))
    assert choice.where(torch.tensor([True, False, True, True])).top_k is None
