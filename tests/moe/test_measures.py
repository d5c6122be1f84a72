"""Drift and similarity against plain loops over all weights, and what they cost on large ones."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from moekit.moe.measures import Drift, ExpertStack, LayerRouting, RouterDrift, Similarity, expert_similarity
from tolerances import rel


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return (sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))) / (a.norm() * b.norm()).item()


def test_drops_and_mean_k_of_a_layer():
    found = LayerRouting.of(5, [6, 0, 2], dropped=4, tokens=6)
    assert (found.layer, found.drop_rate, found.mean_k) == (5, 4 / 12, 2.0)
    assert LayerRouting.of(0, [0, 0]).drop_rate == 0
    assert LayerRouting.of(0, [1, 1]).mean_k is None


@pytest.mark.parametrize(("counts", "effective"), [([5, 5, 5, 5], 4), ([9, 9, 0, 0, 0], 2), ([7], 1), ([0, 3], 1)])
def test_effective_experts_of_an_even_load_is_their_number(counts, effective):
    assert LayerRouting.of(0, counts).effective_experts == pytest.approx(effective)


def test_drift_against_its_definition():
    torch.manual_seed(0)
    weights = {3: torch.randn(5, 7), 1: torch.randn(3, 4, dtype=torch.bfloat16)}
    start = {layer: weight.clone() for layer, weight in weights.items()}
    drift = RouterDrift(weights)
    assert drift.report() == [Drift(3, 0.0, 1.0, 0.0), Drift(1, 0.0, 1.0, 0.0)]
    weights[3].add_(torch.randn(5, 7))
    middle = weights[3].clone()
    drift.report()
    weights[3].mul_(0.5)
    found = drift.report(steps=4)
    assert [one.layer for one in found] == [3, 1]
    want = (weights[3] - start[3]).double().norm() / start[3].double().norm()
    assert found[0].distance == pytest.approx(want.item(), rel=rel("fp32 scalar"))
    assert found[0].cosine == pytest.approx(cosine(weights[3], start[3]), rel=rel("fp32 scalar"))
    squares = [x**2 for x in (weights[3] - middle).double().flatten().tolist()]
    assert found[0].speed == pytest.approx(math.sqrt(7 * sum(squares) / 35) / 4, rel=rel("fp32 scalar"))
    assert found[1] == Drift(1, 0.0, 1.0, 0.0)


def test_speed_is_how_far_the_logits_of_a_token_move_in_a_step():
    torch.manual_seed(0)
    weight, x = torch.randn(6, 256), torch.randn(2000, 256)
    before, drift = x @ weight.T, RouterDrift({0: weight})
    weight += 0.01 * torch.randn(6, 256)
    moved = (x @ weight.T - before).square().mean().sqrt().item()
    assert drift.report()[0].speed == pytest.approx(moved, rel=rel("standard deviation of few"))


def test_drift_from_and_to_zero():
    weight = torch.zeros(2, 2)
    drift = RouterDrift({0: weight})
    weight.fill_(1)
    assert drift.report() == [Drift(0, math.inf, 0.0, pytest.approx(2**0.5))]
    weight.zero_()
    assert drift.report() == [Drift(0, 0.0, 1.0, pytest.approx(2**0.5))]


def test_drift_of_a_large_weight_reads_a_sample_and_comes_near():
    torch.manual_seed(0)
    weight = torch.randn(64, 512)
    start = weight.clone()
    drift, sampled = RouterDrift({0: weight}), RouterDrift({0: weight}, values=1000)
    assert sampled._first[0].numel() == 1000
    weight += 0.1 * torch.randn(64, 512)
    want = ((weight - start).norm() / start.norm()).item()
    assert drift.report()[0].distance == pytest.approx(want, rel=rel("fp32 scalar"))
    assert sampled.report()[0].distance == pytest.approx(want, rel=rel("standard deviation of few"))


def test_a_monitor_draws_nothing_from_torch():
    torch.manual_seed(3)
    RouterDrift({0: torch.ones(100, 100)}, values=10)
    expert_similarity(0, [ExpertStack(0, (torch.ones(3, 50, 50),))], values=10)
    got = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(got, torch.rand(1))


def test_similarity_against_a_loop_over_pairs():
    torch.manual_seed(0)
    up, down = torch.randn(5, 3, 4), torch.randn(5, 4, 2)
    up[4], down[4] = 2 * up[1], 2 * down[1]  # a multiple points the same way
    found = expert_similarity(7, [ExpertStack(0, (up, down))])
    rows = [torch.cat([up[e].flatten(), down[e].flatten()]) for e in range(5)]
    pairs = {(a, b): cosine(rows[a], rows[b]) for a, b in itertools.combinations(range(5), 2)}
    assert found == Similarity(
        layer=7,
        mean=pytest.approx(sum(pairs.values()) / 10, rel=rel("fp32 scalar")),
        highest=pytest.approx(1.0),
        closest=(1, 4),
        twins=1,
        pairs=10,
    )


def test_stacks_are_compared_each_in_itself():
    torch.manual_seed(0)
    narrow, wide = torch.randn(2, 3, 4), torch.randn(3, 6, 4)
    wide[2] = wide[0]
    found = expert_similarity(0, [ExpertStack(0, (narrow,)), ExpertStack(2, (wide,))])
    assert found is not None
    assert (found.pairs, found.twins, found.closest) == (1 + 3, 1, (2, 4))
    assert expert_similarity(0, [ExpertStack(0, (narrow[:1],)), ExpertStack(1, ())]) is None


def test_almost_equal_experts_are_twins_and_a_percent_apart_are_not():
    torch.manual_seed(0)
    one = torch.randn(400)
    near = torch.stack([one, one + 1e-4 * torch.randn(400)])[..., None]
    far = torch.stack([one, one + 1e-2 * torch.randn(400)])[..., None]
    assert expert_similarity(0, [ExpertStack(0, (near,))]).twins == 1
    assert expert_similarity(0, [ExpertStack(0, (far,))]).twins == 0


def test_of_many_large_experts_a_sample_is_compared():
    torch.manual_seed(0)
    stack = torch.randn(40, 30, 50) + torch.randn(30, 50)  # cosine 1/2
    stack[39] = 0
    found = expert_similarity(0, [ExpertStack(100, (stack, stack[:, :5]))], experts=8, values=300)
    assert found is not None
    assert found.pairs == 8 * 7 // 2
    assert {expert % 5 for expert in found.closest} == {0}
    assert found.mean == pytest.approx(0.5, rel=rel("standard deviation of few"))


def test_experts_of_zeros_are_no_twins():
    assert expert_similarity(0, [ExpertStack(0, (torch.zeros(2, 3),))]).twins == 0
