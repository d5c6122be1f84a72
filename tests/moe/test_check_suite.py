"""One contract, every implementation: each router × expert kind × capacity rule passes the same checks.

`cases.py` lists them; whatever is registered later is checked with its defaults, without a line here.
"""

from __future__ import annotations

import pytest
import torch
from cases import (
    CAPACITIES,
    EXPERT_CASES,
    FEW,
    FULL,
    ROUTED,
    ROUTER_CASES,
    by_token,
    config,
    make,
    params,
    run,
    token_ids,
)
from plain import gradients, plain_moe
from plain_routers import layer_weights

from moekit import MoEConfig
from moekit.config import ModelConfig
from moekit.errors import ConfigError
from moekit.moe import EXPERTS, ROUTERS, MoE, Routing, RoutingRecord
from tolerances import near

pytestmark = pytest.mark.usefixtures("poisoned")
SILENT = ("topk", "switch", "sigmoid", "top_p", "expert_choice", "hierarchical", "sinkhorn")  # no noise of their own
each_router = pytest.mark.parametrize("router", ROUTER_CASES)
routed = pytest.mark.parametrize(("router", "capacity"), params(ROUTED))
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def same(one: Routing, other: Routing) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("token_ids_A", "expert_ids_A", "weights_A", "logits_TE")
    )


def noise_free(router: str, capacity: str, training: bool) -> MoE:
    """The case without noise: what can be compared between two passes of different tokens."""
    changes = ROUTER_CASES[router]
    options = {k: v for k, v in changes.get("router_options", {}).items() if k not in ("noise_std", "jitter")}
    layer = make(router, capacity, router_options=options)
    return layer.train(training and changes["router"] in SILENT)


def test_every_name_is_covered():
    assert {case.split()[0] for case in ROUTER_CASES} == set(ROUTERS)
    assert {case.split()[0] for case in EXPERT_CASES} == set(EXPERTS)


# The routing


@modes
@routed
def test_weights_and_ids_are_valid(router, capacity, training):
    layer = make(router, capacity, dtype=torch.float32).train(training)
    settings, tokens = layer.config, 24
    routing = layer.router(torch.randn(tokens, 5), input_ids_T=token_ids(tokens))
    assert routing.weights_A.dtype == routing.logits_TE.dtype == torch.float32
    assert routing.expert_ids_A.dtype == routing.token_ids_A.dtype == torch.int64
    assert routing.logits_TE.shape == (tokens, 6)
    assert ((routing.expert_ids_A >= 0) & (routing.expert_ids_A < 6)).all()
    assert torch.equal(routing.token_ids_A, routing.token_ids_A.sort().values)
    assert routing.weights_A.isfinite().all()
    assert (routing.weights_A > 0).all()
    assert torch.equal(routing.counts_E, torch.bincount(routing.expert_ids_A, minlength=6))
    per_token = [len(one) for one in by_token(routing)]  # and no token has an expert twice
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(tokens))
    if settings.capacity is not None:
        assert routing.counts_E.max() <= settings.capacity.of(tokens, 6, settings.top_k)
        assert routing.dropped == routing.chosen_counts_E.sum() - routing.counts_E.sum() >= 0
    elif settings.router != "expert_choice":
        assert min(per_token) >= 1
        assert max(per_token) <= settings.top_k
        assert routing.dropped == 0
    if routing.top_k is not None:
        assert set(per_token) == {routing.top_k}
        renormalised = settings.norm_topk_prob or (
            settings.gate_order == "topk_softmax" and settings.router != "sigmoid"
        )
        if renormalised and settings.options.gated:
            total = torch.full((tokens,), settings.routed_scaling_factor)
            torch.testing.assert_close(routing.weights_TK.sum(-1), total)


@modes
@routed
def test_deterministic_and_silent_in_eval(router, capacity, training):
    layer = make(router, capacity).train(training)
    x, ids = torch.randn(12, 5, dtype=torch.float64), token_ids(12)
    first, seed = run(layer.router, x, input_ids_T=ids)
    if not training:
        assert seed is None
        state = torch.get_rng_state()
        again = layer.router(x, input_ids_T=ids)
        assert torch.equal(torch.get_rng_state(), state), "eval drew a random number"
        assert same(first, again)
        return
    torch.manual_seed(5)
    first = layer.router(x, input_ids_T=ids)
    torch.manual_seed(5)
    assert same(first, layer.router(x, input_ids_T=ids))
    options = ROUTER_CASES[router].get("router_options", {})
    noisy = layer.config.router not in (*SILENT, "hash") or {"noise_std", "jitter"} & options.keys()
    assert (seed is not None) == bool(noisy)
    if noisy:
        others = [layer.router(x, input_ids_T=ids) for _ in range(5)]
        assert not all(same(first, other) for other in others), "noise that changes nothing"


@modes
@routed
def test_the_order_of_the_tokens(router, capacity, training):
    """Without capacity, and with capacity by probability (where no two are equal), a token's lot does not depend on
    where it stands. By position it must; but how many each expert keeps of a drop does not."""
    layer = noise_free(router, capacity, training)
    x, ids, order = torch.randn(13, 5, dtype=torch.float64), token_ids(13), torch.randperm(13)
    routing = layer.router(x, input_ids_T=ids)
    permuted = layer.router(x[order], input_ids_T=ids[order])
    rule = CAPACITIES[capacity]
    if rule is None or (rule.order == "probability" and layer.config.router != "hash"):
        got, want = by_token(permuted), by_token(routing)
        for at, token in enumerate(order.tolist()):
            assert got[at] == pytest.approx(want[token], rel=near("fp64")["rtol"])
    elif rule.overflow == "drop":
        assert torch.equal(permuted.counts_E, routing.counts_E)
        assert torch.equal(permuted.chosen_counts_E, routing.chosen_counts_E)


@routed
def test_the_gradient_reaches_every_row_of_the_gate(router, capacity):
    layer = make(router, capacity).train()
    routing = layer.router(torch.randn(60, 5, dtype=torch.float64), input_ids_T=token_ids(60))
    if layer.router.weight is None:
        assert not routing.weights_A.requires_grad
        return
    (routing.weights_A * torch.randn_like(routing.weights_A)).sum().backward()
    gradient = layer.router.weight.grad
    assert gradient.isfinite().all()
    reached = (gradient != 0).any(dim=1)
    if layer.config.router == "sigmoid":  # independent scores: of the chosen ones alone
        assert reached.any()
        assert not (reached & (routing.chosen_counts_E + routing.counts_E == 0)).any()
        if layer.config.capacity is None:
            assert torch.equal(reached, routing.counts_E > 0)
    else:
        assert reached.all()


def eighths(values: torch.Tensor) -> torch.Tensor:
    """Numbers whose products and sums are exact, in whatever order a matrix product of another size takes them."""
    return (values * 8).round() / 8


@modes
@routed
def test_padding_changes_nothing_exactly(router, capacity, training):
    layer = noise_free(router, capacity, training)
    x, ids = eighths(torch.randn(9, 5, dtype=torch.float64)), token_ids(9)
    for parameter in layer.router.parameters():
        parameter.data = eighths(parameter.data)
    where = torch.tensor([0, 3, 4, 5, 7, 8, 9, 12, 13])  # garbage before, between and after
    padded, padded_ids = torch.randn(15, 5, dtype=torch.float64) * 50, token_ids(15)
    padded[where], padded_ids[where] = x, ids
    mask = torch.zeros(15, dtype=torch.bool).index_fill(0, where, True)
    clean = layer.router(x, input_ids_T=ids)
    masked = layer.router(padded, mask, padded_ids)
    rows = by_token(masked)
    assert [rows[at] for at in where.tolist()] == by_token(clean)
    assert torch.equal(masked.counts_E, clean.counts_E)
    assert torch.equal(masked.chosen_counts_E, clean.chosen_counts_E)
    assert (masked.dropped, masked.real_tokens) == (clean.dropped, 9)


# Causality


def leaks(layer: MoE) -> bool:
    """Whether another last token ever changed what an earlier one got."""
    for _ in range(25):
        x, ids = torch.randn(9, 5, dtype=torch.float64), token_ids(9)
        other, other_ids = x.clone(), ids.clone()
        other[-1], other_ids[-1] = torch.randn(5, dtype=torch.float64), 1001
        before = by_token(layer.router(x, input_ids_T=ids))
        if by_token(layer.router(other, input_ids_T=other_ids))[:-1] != before[:-1]:
            return True
    return False


@each_router
def test_no_dropless_token_choice_looks_ahead(router):
    layer = make(router).eval()
    assert layer.config.options.causal == (layer.config.router != "expert_choice")
    assert leaks(layer) == (not layer.config.options.causal and layer.config.top_k < 6)


@each_router
def test_capacity_by_position_looks_ahead_only_for_second_choices_and_moves(router):
    settings = config(router)
    if settings.top_k == 1:
        assert not leaks(make(router, "drop").eval())
        assert not leaks(make(router, "renormalise").eval())
        assert leaks(make(router, "next").eval())
    elif settings.router in ("topk", "sigmoid") and settings.top_k == 2:
        # A later token's first choice takes the room of an earlier one's second.
        assert leaks(make(router, "renormalise").eval())


def test_capacity_by_probability_looks_ahead():
    for router in ("topk", "topk switch", "sigmoid", "gumbel one"):
        assert leaks(make(router, "drop by probability").eval())


def test_sinkhorn_looks_ahead_in_training_only():
    assert leaks(make("sinkhorn").train())
    assert not leaks(make("sinkhorn").eval())


def test_a_language_model_refuses_expert_choice():
    values = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 9}
    moe = MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2, router="expert_choice")
    with pytest.raises(ConfigError, match="router expert_choice lets later tokens change what earlier ones get"):
        ModelConfig(arch="mixtral", moe=moe, **values, **heads)


def test_earlier_outputs_of_the_layer_stay_bit_for_bit():
    for expert in EXPERT_CASES:
        layer = make("topk renormalised", expert=expert).eval()
        x = torch.randn(9, 5, dtype=torch.float64)
        other = torch.cat([x[:-1], torch.randn(1, 5, dtype=torch.float64)])
        torch.testing.assert_close(layer(other)[0][:-1], layer(x)[0][:-1], **near("fp64 scalar"))


# Few tokens, all experts, one expert


@modes
@routed
def test_no_token_and_one(router, capacity, training):
    layer = make(router, capacity).train(training)
    for tokens in (0, 1):
        x = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
        y, routing = layer(x, input_ids=token_ids(tokens))
        assert y.shape == (tokens, 5)
        assert y.isfinite().all()
        assert routing.counts_E.shape == (6,)
        y.sum().backward()
        assert x.grad.isfinite().all()


ALL_EXPERTS = {
    "gshard": {"num_experts": 2},
    "sparsemixer": {"num_experts": 2},
    "hierarchical": {"top_k": 6, "router_options": {"groups": 3, "groups_per_token": 3}},
    "top_p": {"top_k": 6, "router_options": {"min_k": 6}},
}
ONE_EXPERT = {"hierarchical": {"router_options": {"groups": 1, "groups_per_token": 1}}}


@modes
@pytest.mark.parametrize("name", ROUTERS)
def test_every_expert_for_every_token(name, training):
    values = {"hidden_size": 5, "intermediate_size": 3, "num_experts": 6, "top_k": 6} | ALL_EXPERTS.get(name, {})
    values["top_k"] = min(values["top_k"], values["num_experts"])
    layer = MoE(MoEConfig(router=name, **values)).double().train(training)
    routing = layer.router(torch.randn(7, 5, dtype=torch.float64), input_ids_T=token_ids(7))
    if (name, training) != ("gshard", True):
        assert routing.counts_E.tolist() == [7] * values["num_experts"]
    assert all(weight > 0 for one in by_token(routing) for weight in one.values())


@modes
@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in ("gshard", "sparsemixer")])
def test_one_expert_alone(name, training):
    values = {"hidden_size": 5, "intermediate_size": 3, "num_experts": 1, "top_k": 1} | ONE_EXPERT.get(name, {})
    layer = MoE(MoEConfig(router=name, **values)).double().train(training)
    x = torch.randn(4, 5, dtype=torch.float64)
    y, routing = layer(x, input_ids=token_ids(4))
    assert routing.counts_E.tolist() == [4]
    weights = 1.0 if name != "sigmoid" else routing.weights_A.unsqueeze(-1)
    torch.testing.assert_close(y, weights * layer.experts(x, torch.tensor([4])))


@modes
@pytest.mark.parametrize(("router", "expert"), [(r, e) for r in ROUTER_CASES for e in ("swiglu", "mixed bias, shared")])
def test_all_to_one_expert_with_logits_of_a_thousand(router, expert, training):
    """Nothing overflows, and experts that nobody chose get a gradient of exact zeros, not none."""
    layer = make(router, expert=expert, dtype=torch.float32).train(training)
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.zero_()[:6, 0] = torch.tensor([-1000.0, -500.0, 0.0, 10.0, 20.0, 1000.0])
    x = torch.randn(10, 5)
    x[:, 0] = 1.0
    y, routing = layer(x, input_ids=torch.full((10,), 3))
    assert y.isfinite().all()
    assert routing.weights_A.isfinite().all()
    (y.square().sum() + routing.logits_TE.square().mean() * 1e-6).backward()
    chosen = routing.counts_E > 0
    if layer.config.router not in ("expert_choice", "sinkhorn"):
        assert chosen.sum() <= layer.config.top_k + 1  # gumbel's noise may pick another third
    for name, parameter in layer.named_parameters():
        if not (name.startswith("router") and layer.config.router == "hash"):
            assert parameter.grad is not None, f"{name} got no gradient tensor"
            assert parameter.grad.isfinite().all(), name
    if expert == "swiglu":
        assert (layer.experts.gate_up_proj.grad[~chosen] == 0).all()
        assert (layer.experts.down_proj.grad[~chosen] == 0).all()


# The layer


@pytest.mark.parametrize(("router", "expert", "capacity"), params(FULL))
def test_the_layer_is_the_loop(router, expert, capacity):
    """Output and every gradient, in fp64 to rounding."""
    layer = make(router, capacity, expert).train(FULL.index((router, expert, capacity)) % 2 == 0)
    x, ids = torch.randn(8, 5, dtype=torch.float64, requires_grad=True), token_ids(8)
    record = RoutingRecord()
    with record.recording():
        y, _ = layer(x, input_ids=ids)
    weights = layer_weights(layer, x, seed=record.decisions[0].seed, ids=ids.tolist())
    expected = plain_moe(layer, x, weights)
    torch.testing.assert_close(y, expected, **near("fp64"))
    seed = torch.randn_like(y)
    ours, theirs = gradients(layer, y, x, seed), gradients(layer, expected, x, seed)
    for name, gradient in ours.items():
        assert gradient is not None, f"{name} got no gradient"
        reference = torch.zeros_like(gradient) if theirs[name] is None else theirs[name]
        torch.testing.assert_close(gradient, reference, **near("fp64"), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("router", "expert", "capacity"), params(FULL, FEW))
def test_gradcheck(router, expert, capacity):
    """The derivative itself, numerically, along the recorded decisions and their noise."""
    if router in ("gumbel", "gumbel one", "sparsemixer"):
        pytest.skip("straight-through is no derivative of what is computed; test_router_kinds has its formula")
    layer = make(router, capacity, expert).train()
    x, ids = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), token_ids(6)
    record = RoutingRecord()
    with record.recording():
        layer(x, input_ids=ids)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def along_the_record(x, *values):
        with record.replaying():
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, None, ids))[0]

    assert torch.autograd.gradcheck(along_the_record, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("expert", EXPERT_CASES)
@each_router
def test_without_gradients_the_numbers_are_the_same(router, expert):
    """Where a kind has a way of its own for few tokens."""
    layer = make(router, expert=expert, dtype=torch.float32).eval()
    x, ids = torch.randn(3, 5), token_ids(3)
    with torch.no_grad():
        decoded, routing = layer(x, input_ids=ids)
    y, again = layer(x, input_ids=ids)
    assert same(routing, again)
    torch.testing.assert_close(decoded, y.detach(), **near("fp32 twin"))
