"""Capacity: the formula, who finds room, where the others go, and what becomes of their weight."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_routers import plain_capacity

from moekit import MoEConfig
from moekit.config import CapacityConfig
from moekit.errors import ConfigError
from moekit.moe import Choice, MoE, Routing
from moekit.moe.capacity import limit, rank_in_group
from tolerances import near

# How much room


@pytest.mark.parametrize(
    ("factor", "tokens", "experts", "top_k", "room"),
    [
        (1.0, 8, 4, 2, 4),
        (1.25, 10, 4, 2, 7),  # 6.25
        (1.0, 7, 4, 2, 4),  # 3.5
        (1.0, 1, 64, 1, 1),  # 1/64: at least 1
        (0.1, 3, 8, 1, 1),
        (4.0, 3, 2, 2, 3),  # 12: never more than the tokens
        (1.0, 0, 4, 2, 1),  # no token: still at least 1
        (1.1, 30, 1, 1, 30),  # 33.000000000000004 in floating point, capped
        (1.1, 30, 3, 1, 11),  # 11.000000000000002
        (1.1, 300, 30, 1, 11),
        (0.1, 30, 1, 1, 3),  # 3.0000000000000004 is not 4
        (0.7, 10, 1, 1, 7),  # 7.000000000000001
        (0.29, 100, 1, 1, 29),  # 28.999999999999996
        (2.3, 100, 10, 1, 23),  # 22.999999999999996
        (1.25, 4096 * 1024, 64, 8, 655360),
        (1.0, 2**31, 3, 1, 715827883),  # 715827882.67
    ],
)
def test_the_formula(factor, tokens, experts, top_k, room):
    assert CapacityConfig(factor=factor).of(tokens, experts, top_k) == room


@given(
    hundredths=st.integers(1, 1000),
    tokens=st.integers(0, 5000),
    experts=st.integers(1, 256),
    data=st.data(),
)
def test_the_formula_in_whole_numbers(hundredths, tokens, experts, data):
    top_k = data.draw(st.integers(1, experts))
    exact = math.ceil(Fraction(hundredths, 100) * top_k * tokens / experts)
    assert CapacityConfig(factor=hundredths / 100).of(tokens, experts, top_k) == max(1, min(exact, tokens))


def test_an_absolute_number():
    assert CapacityConfig(tokens=256).of(10_000, 8, 2) == 256
    assert CapacityConfig(tokens=256).of(100, 8, 2) == 100
    assert CapacityConfig(tokens=256).of(0, 8, 2) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either factor or tokens, not neither"),
        ({"factor": 1.0, "tokens": 3}, "either factor or tokens, not factor and tokens"),
        ({"factor": 0.0}, "above 0, not 0.0"),
        ({"factor": -1.0}, "above 0, not -1.0"),
        ({"factor": math.inf}, "above 0, not inf"),
        ({"factor": math.nan}, "above 0, not nan"),
        ({"tokens": 0}, "tokens must be a whole number of at least 1"),
        ({"tokens": 2.5}, "tokens must be a whole number of at least 1"),
        ({"factor": 1.0, "order": "first"}, "order must be one of position, probability"),
        ({"factor": 1.0, "per": "token"}, "per must be one of batch, sequence"),
        ({"factor": 1.0, "overflow": "keep"}, "overflow must be one of drop, next"),
        ({"factor": 1.0, "lost_weight": "keep"}, "lost_weight must be one of lose, renormalise"),
    ],
)
def test_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        CapacityConfig(**values)


# Who finds room


@st.composite
def problems(draw):
    tokens, experts = draw(st.integers(0, 8)), draw(st.integers(1, 6))
    options = [draw(st.permutations(range(experts)))[: draw(st.integers(0, experts))] for _ in range(tokens)]
    # Few values, so that equals are common; −inf only for experts that were not chosen.
    number = st.integers(-2, 2).map(float)
    scores = [
        [draw(number) if e in row or draw(st.booleans()) else -math.inf for e in range(experts)] for row in options
    ]
    probs = [[draw(number) for _ in range(experts)] for _ in range(tokens)]
    wanted = [[draw(st.integers(0, 4)) > 0 for _ in row] for row in options]
    config = CapacityConfig(
        factor=1.0,
        order=draw(st.sampled_from(["position", "probability"])),
        overflow=draw(st.sampled_from(["drop", "next"])),
    )
    return options, scores, probs, wanted, draw(st.integers(1, 4)), config


@pytest.mark.parametrize("overflow", ["drop", "next"])
@pytest.mark.parametrize("order", ["position", "probability"])
@pytest.mark.parametrize("room", [{"factor": 0.8}, {"tokens": 2}], ids=str)
def test_each_sequence_for_itself(order, overflow, room):
    capacity = CapacityConfig(per="sequence", order=order, overflow=overflow, **room)
    config = MoEConfig(hidden_size=4, intermediate_size=3, num_experts=5, top_k=2, capacity=capacity)
    layer, x = MoE(config).double(), torch.randn(2, 3, 7, 4, dtype=torch.float64)
    mask = torch.rand(2, 3, 7) > 0.2
    y, routing = layer(x, mask)
    alone = [layer(x[i, j], mask[i, j]) for i in range(2) for j in range(3)]
    if "tokens" in room:  # of a factor, a whole sequence's length counts, where a call alone counts real tokens
        torch.testing.assert_close(y.flatten(0, 1), torch.stack([each for each, _ in alone]), **near("fp64"))
        assert torch.equal(routing.expert_ids_A, torch.cat([each.expert_ids_A for _, each in alone]))
    y, routing = layer(x)
    alone = [layer(x[i, j]) for i in range(2) for j in range(3)]
    torch.testing.assert_close(y.flatten(0, 1), torch.stack([each for each, _ in alone]), **near("fp64"))
    assert torch.equal(routing.expert_ids_A, torch.cat([each.expert_ids_A for _, each in alone]))
    assert 0 < routing.dropped == sum(each.dropped for _, each in alone) or overflow == "next"


def test_padding_up_to_the_room_of_all_sequences():
    capacity = CapacityConfig(per="sequence", tokens=3, pad=True)
    layer = MoE(MoEConfig(hidden_size=4, intermediate_size=3, num_experts=5, top_k=2, capacity=capacity))
    _, routing = layer(torch.randn(4, 6, 4))
    assert routing.rows_per_expert == 12


@settings(max_examples=120)
@given(problem=problems())
def test_any_choice_is_limited_as_the_loop_does(problem):
    options, scores, probs, wanted, rows, config = problem
    experts = len(scores[0]) if scores else 3
    flat = [(t, e) for t, row in enumerate(options) for e in row]
    pairs = torch.tensor(flat, dtype=torch.int64).view(-1, 2)
    moved, kept = limit(
        Choice(pairs[:, 0], pairs[:, 1], None),
        rows,
        config,
        wanted_A=torch.tensor([w for row in wanted for w in row], dtype=torch.bool),
        scores_TE=torch.tensor(scores, dtype=torch.float64).view(-1, experts),
        probs_TE=torch.tensor(probs, dtype=torch.float64).view(-1, experts),
    )
    plain_experts, plain_kept = plain_capacity(options, wanted, rows, scores, probs, config)
    assert moved.expert_ids_A.tolist() == [e for row in plain_experts for e in row]
    assert kept.tolist() == [k for row in plain_kept for k in row]
    assert moved.token_ids_A is pairs[:, 0] or torch.equal(moved.token_ids_A, pairs[:, 0])

    # Whatever the loop says: nobody has too many, no token the same expert twice, nobody got what nobody wanted,
    # and with overflow "next" an assignment is lost only where all experts it could go to are full.
    served = [
        (t, e) for t, e, k in zip(pairs[:, 0].tolist(), moved.expert_ids_A.tolist(), kept.tolist(), strict=True) if k
    ]
    counts = [sum(e == other for _, other in served) for e in range(experts)]
    assert max(counts, default=0) <= rows
    assert len(set(served)) == len(served)
    wants = [w for row in wanted for w in row]
    assert not any(k and not w for k, w in zip(kept.tolist(), wants, strict=True))
    if config.overflow == "drop":
        assert torch.equal(moved.expert_ids_A, pairs[:, 1])
        asked = [sum(e == other and w for (_, other), w in zip(flat, wants, strict=True)) for e in range(experts)]
        assert counts == [min(rows, n) for n in asked]
        return
    for (t, _), k, w in zip(flat, kept.tolist(), wants, strict=True):
        if w and not k:
            mine = set(options[t]) | {e for token, e in served if token == t}
            assert all(counts[e] == rows for e in range(experts) if e not in mine and scores[t][e] > -math.inf)


def test_position_serves_all_first_choices_before_any_second_one():
    # Token 2's first choice comes before token 0's second.
    kept = limited([[0, 1], [0, 2], [1, 0]], rows=1)[1]
    assert kept == [[True, False], [False, True], [True, False]]


def test_probability_serves_the_surest():
    probs = [[0.5, 0.4, 0.1], [0.6, 0.0, 0.4], [0.3, 0.7, 0.0]]
    kept = limited([[0, 1], [0, 2], [1, 0]], rows=1, order="probability", probs=probs)[1]
    assert kept == [[False, False], [True, True], [True, False]]


def test_next_goes_to_the_best_expert_with_room_and_never_twice_to_one():
    scores = [[3.0, 2.0, 1.0, 0.0], [3.0, 1.0, 2.0, 0.0], [3.0, 1.0, 2.0, -math.inf]]
    experts, kept = limited([[0], [0], [0]], rows=1, overflow="next", scores=scores)
    assert (experts, kept) == ([[0], [2], [1]], [[True]] * 3)
    # Token 2's second choice comes before any move; token 1's first moves to 3; what finds nothing keeps its name.
    experts, kept = limited([[0, 1], [0, 1], [0, 2]], rows=1, overflow="next", scores=scores)
    assert experts == [[0, 1], [3, 1], [0, 2]]
    assert kept == [[True, True], [True, False], [False, True]]


def limited(options, rows, order="position", overflow="drop", scores=None, probs=None):
    """`limit` on lists."""
    pairs = torch.tensor([(t, e) for t, row in enumerate(options) for e in row])
    numbers = torch.tensor(scores or probs or [[0.0, 0.0, 0.0]] * 3)
    top_k = len(options[0])
    moved, kept = limit(
        Choice(pairs[:, 0], pairs[:, 1], top_k),
        rows,
        CapacityConfig(factor=1.0, order=order, overflow=overflow),
        wanted_A=torch.ones(len(pairs), dtype=torch.bool),
        scores_TE=numbers,
        probs_TE=numbers,
    )
    return moved.expert_ids_A.view(-1, top_k).tolist(), kept.view(-1, top_k).tolist()


@given(st.lists(st.integers(-3, 3)))
def test_rank_in_group(groups):
    ranks = rank_in_group(torch.tensor(groups, dtype=torch.int64))
    assert ranks.tolist() == [groups[:n].count(g) for n, g in enumerate(groups)]


# What becomes of the layer


def layer_of(logits: list[list[float]], capacity: CapacityConfig, *, top_k=2, **changes) -> tuple[MoE, torch.Tensor]:
    """A layer, and inputs that have these logits."""
    experts, tokens = len(logits[0]), len(logits)
    config = MoEConfig(
        hidden_size=tokens, intermediate_size=2, num_experts=experts, top_k=top_k, capacity=capacity, **changes
    )
    layer = MoE(config).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor(logits).T)
    return layer, torch.eye(tokens, dtype=torch.float64)


THREE = [[3.0, 2.0, 0.0, -1.0], [3.0, 0.0, 2.0, -1.0], [3.0, 2.5, 0.0, -1.0]]


def weights(routing: Routing) -> dict[tuple[int, int], float]:
    rows = zip(routing.token_ids_A.tolist(), routing.expert_ids_A.tolist(), routing.weights_A.tolist(), strict=True)
    return {(t, e): round(w, 6) for t, e, w in rows}


@pytest.mark.parametrize(
    "gate", [{}, {"gate_order": "softmax_topk"}, {"gate_order": "softmax_topk", "norm_topk_prob": True}]
)
def test_lost_weight_is_lost_or_shared_out(gate):
    """Expert 0 has room for token 0 alone, expert 1 too."""
    whole = weights(layer_of(THREE, CapacityConfig(factor=9.0), **gate)[0].router(torch.eye(3, dtype=torch.float64)))
    layer, x = layer_of(THREE, CapacityConfig(tokens=1), **gate)
    lose = layer.router(x)
    assert weights(lose) == {pair: whole[pair] for pair in [(0, 0), (0, 1), (1, 2)]}
    layer, x = layer_of(THREE, CapacityConfig(tokens=1, lost_weight="renormalise"), **gate)
    shared = weights(layer.router(x))
    assert shared == weights(lose) | ({} if gate == {"gate_order": "softmax_topk"} else {(1, 2): 1.0})
    assert (lose.dropped, lose.counts_E.tolist(), lose.chosen_counts_E.tolist()) == (3, [1, 1, 1, 0], [3, 2, 1, 0])


def test_moved_assignments_weigh_what_the_gate_says_of_their_new_expert():
    layer, x = layer_of(THREE, CapacityConfig(tokens=1, overflow="next"))
    routing = layer.router(x)
    # Token 0 keeps both; token 1 keeps 2 and moves to 3; token 2 finds nothing.
    e = math.exp
    assert weights(routing) == {
        (0, 0): round(e(3) / (e(3) + e(2)), 6),
        (0, 1): round(e(2) / (e(3) + e(2)), 6),
        (1, 2): round(e(2) / (e(2) + e(-1)), 6),
        (1, 3): round(e(-1) / (e(2) + e(-1)), 6),
    }
    assert routing.dropped == 2


def test_a_dropped_token_comes_out_as_the_shared_experts_alone_or_as_zero():
    logits = [[5.0, 4.0, 0.0, 0.0]] * 3
    layer, x = layer_of(logits, CapacityConfig(tokens=1))
    y, routing = layer(x)
    assert routing.token_ids_A.tolist() == [0, 0]
    assert (y[1:] == 0).all()
    assert (y[0] != 0).any()
    layer, x = layer_of(logits, CapacityConfig(tokens=1), num_shared_experts=1)
    torch.testing.assert_close(layer(x)[0][1:], layer.shared(x)[1:])


def test_room_for_all_changes_nothing_at_all():
    x = torch.randn(20, 6)
    for padded in (False, True):
        torch.manual_seed(1)
        free = MoE(MoEConfig(hidden_size=6, intermediate_size=3, num_experts=4, top_k=2))
        torch.manual_seed(1)
        capacity = CapacityConfig(factor=4.0, pad=padded)
        roomy = MoE(MoEConfig(hidden_size=6, intermediate_size=3, num_experts=4, top_k=2, capacity=capacity))
        y, routing = roomy(x)
        # Padded rows are multiplied by the grouped products, those without padding in the fused op.
        assert torch.equal(y, free(x)[0]) if not padded else torch.allclose(y, free(x)[0], **near("fp32 twin"))
        assert routing.top_k == 2
        assert routing.dropped == 0


def test_padding_takes_no_room_and_shrinks_none():
    """Garbage tokens that want expert 0 more than anyone, in front: nothing changes for the real ones."""
    for order in ("position", "probability"):
        capacity = CapacityConfig(factor=1.0, order=order, overflow="next")
        layer, x = layer_of(THREE, capacity)
        y, routing = layer(x)
        garbage = torch.tensor([[10.0, 0.0, 0.0]] * 5, dtype=torch.float64)
        mask = torch.tensor([False] * 5 + [True] * 3)
        padded, masked = layer(torch.cat([garbage, x]), mask)
        assert torch.equal(padded[5:], y)
        assert (padded[:5] == 0).all()
        assert torch.equal(masked.counts_E, routing.counts_E)
        assert torch.equal(masked.chosen_counts_E, routing.chosen_counts_E)
        assert masked.dropped == routing.dropped


def test_nobody_and_nobody_real():
    for overflow in ("drop", "next"):
        layer, x = layer_of(THREE, CapacityConfig(factor=1.0, overflow=overflow, pad=True))
        y, routing = layer(x[:0])
        assert y.shape == (0, 3)
        assert routing.counts_E.tolist() == [0] * 4
        y, routing = layer(x, torch.zeros(3, dtype=torch.bool))
        assert (y == 0).all()
        assert routing.dropped == 0


def test_capacity_ranks_by_probability_and_not_by_logits():
    # Token 0 has the higher logit for expert 0, token 1 is the surer of it.
    layer, x = layer_of(
        [[5.0, 5.0], [1.0, -9.0]], CapacityConfig(tokens=1, order="probability"), top_k=1, gate_order="softmax_topk"
    )
    assert weights(layer.router(x)).keys() == {(1, 0)}


def test_sparsemixer_takes_no_capacity():
    sizes = {"hidden_size": 4, "intermediate_size": 3, "num_experts": 4, "top_k": 2}
    with pytest.raises(ConfigError, match="sparsemixer weighs a second expert without the first: no capacity"):
        MoEConfig(**sizes, router="sparsemixer", capacity=CapacityConfig(factor=1.0))
    with pytest.raises(ConfigError, match="router sparsemixer takes top_k 2, not 1"):
        MoEConfig(**sizes | {"top_k": 1}, router="sparsemixer")


def test_expert_choice_takes_no_capacity():
    with pytest.raises(ConfigError, match="expert_choice fills every expert exactly"):
        MoEConfig(
            hidden_size=4,
            intermediate_size=2,
            num_experts=4,
            top_k=2,
            router="expert_choice",
            capacity=CapacityConfig(factor=1.0),
        )
