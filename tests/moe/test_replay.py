"""Decisions that are recorded and repeated: under every kind of activation checkpointing, nested, on file."""

from __future__ import annotations

import json
import threading
from functools import partial

import pytest
import torch
from cases import CAPACITIES, NO_CAPACITY, ROUTER_CASES, make, params, token_ids
from cases import ROUTED as ALL_ROUTED
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from moekit.errors import ConfigError, FileError, FormatError
from moekit.kernels import MOE_DECODE_MAX_TOKENS
from moekit.moe import Choice, MoE, RoutingRecord, RoutingTotals
from moekit.moe.replay import Decision


def keep_all(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE


def keep_products(ctx, op, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten._softmax.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


def selective(policy):
    return {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, policy)}


MODES = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "selective": selective(keep_products),
    "selective, all kept": selective(keep_all),
}
modes = pytest.mark.parametrize("mode", MODES)


def gradients_of(layer: MoE, x: torch.Tensor, ids: torch.Tensor, mode: str | None, **more) -> list[torch.Tensor]:
    """Output, logits, and every gradient of a loss of both."""
    layer.zero_grad()
    x = x.clone().requires_grad_()

    def run(x):
        y, routing = layer(x, input_ids=ids)
        return y, routing.logits_TE, routing.weights_A

    if mode is None:
        y, logits, weights = run(x)
    else:
        y, logits, weights = checkpoint(RoutingRecord().wrap(run), x, **(MODES[mode] | more))
    (y.square().sum() + logits.logsumexp(-1).square().mean() + weights.cos().sum()).backward()
    return [y.detach(), logits.detach(), x.grad, *(p.grad for p in layer.parameters())]


@modes
@pytest.mark.parametrize(("router", "capacity"), params(ALL_ROUTED))
def test_recomputation_changes_no_bit(router, capacity, mode):
    """Also of noisy routers, and though the random numbers of the recomputation would be others."""
    layer = make(router, capacity, dtype=torch.float32).train()
    tokens = MOE_DECODE_MAX_TOKENS + 1  # a reentrant forward pass has no gradient: few tokens would take another way
    x, ids = torch.randn(tokens, 5), token_ids(tokens)
    torch.manual_seed(11)
    plain = gradients_of(layer, x, ids, None)
    after = torch.get_rng_state()
    for preserve in (False, True):
        torch.manual_seed(11)
        got = gradients_of(layer, x, ids, mode, preserve_rng_state=preserve)
        for one, other in zip(got, plain, strict=True):
            assert torch.equal(one, other)
        # And the step after draws what it would have drawn.
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("mode", list(MODES)[:3])  # dropout works in place, which "all kept" cannot have
def test_dropout_behind_a_noisy_router_drops_the_same(mode):
    layer, seen = make("gumbel", dtype=torch.float32).train(), []

    def run(x):
        y = layer(x)[0]
        seen.append(torch.nn.functional.dropout(torch.ones(50)).detach())
        return y * seen[-1].sum()

    x = torch.randn(7, 5, requires_grad=True)
    checkpoint(RoutingRecord().wrap(run), x, **MODES[mode]).sum().backward()
    assert len(seen) == 2
    assert torch.equal(*seen)


@modes
def test_what_routers_count_and_learn_is_counted_once(mode):
    """Three steps of two micro-batches: the state that follows the totals is bit for bit that of no checkpointing."""
    for router, state in (
        ("sigmoid renormalised", "selection_bias"),
        ("gumbel", "steps"),
        ("top_p renormalised", "threshold"),
    ):
        ends, counts = [], []
        for how in (None, mode):
            torch.manual_seed(2)
            layer = make(router, dtype=torch.float32).train()
            optimizer, total = torch.optim.SGD(layer.parameters(), 1e-3), 0

            def run(x, layer=layer):
                y, routing = layer(x)
                return y, routing.counts_E, routing.chosen_counts_E

            for _ in range(3):
                totals = []
                for _ in range(2):
                    x = torch.randn(9, 5, requires_grad=True)
                    if how is None:
                        y, kept, chosen = run(x)
                    else:
                        y, kept, chosen = checkpoint(RoutingRecord().wrap(run), x, **MODES[how])
                    totals.append(RoutingTotals(chosen, kept, tokens=9))
                    y.square().sum().backward()
                layer.router.after_step(totals[0] + totals[1])
                total = total + totals[0].chosen_E + totals[1].chosen_E
                optimizer.step()
                optimizer.zero_grad()
            ends.append([getattr(layer.router, state), *layer.parameters()])
            counts.append(total)
        assert torch.equal(*counts)
        for one, other in zip(*ends, strict=True):
            assert torch.equal(one, other)


def test_recomputation_repeats_the_recorded_choice_with_live_weights():
    """A router that chooses differently each time, as one on another kernel would."""
    layer = make("topk", dtype=torch.float32)
    chosen = []

    def choose(gate_TE, mask_T, input_ids_T):
        chosen.append(torch.stack([torch.randperm(6)[:2] for _ in gate_TE]))
        return Choice.regular(chosen[-1])

    layer.router._choose = choose
    x = torch.randn(9, 5)
    got = gradients_of(layer, x, token_ids(9), "non-reentrant", preserve_rng_state=False)
    assert len(chosen) == 1
    layer.router._choose = lambda *_: Choice.regular(chosen[0])
    for one, other in zip(got, gradients_of(layer, x, token_ids(9), None), strict=True):
        assert torch.equal(one, other)


# Records around and inside others


def test_a_record_around_checkpointed_layers_holds_their_decisions_once():
    layers, x = [make("gumbel"), make("topk", "drop")], torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    outer = RoutingRecord()
    with outer.recording():
        for _ in range(2):
            y = x
            for layer in layers:
                y = checkpoint(RoutingRecord().wrap(lambda y, layer=layer: layer(y)[0]), y, use_reentrant=False)
            y.sum().backward()
    assert len(outer.decisions) == 4
    assert [d.seed is None for d in outer.decisions] == [False, True, False, True]


def test_a_checkpoint_inside_a_checkpoint_repeats_what_the_outer_one_recorded():
    layer = make("gumbel", dtype=torch.float32).train()
    x, seen = torch.randn(8, 5, requires_grad=True), []

    def inner(x):
        y, routing = layer(x)
        seen.append((routing.expert_ids_A.tolist(), routing.logits_TE.tolist()))
        return y

    def outer(x):
        return checkpoint(RoutingRecord().wrap(inner), x.sin(), preserve_rng_state=False, use_reentrant=False)

    with set_checkpoint_early_stop(False):
        y = checkpoint(RoutingRecord().wrap(outer), x, preserve_rng_state=False, use_reentrant=False)
        torch.manual_seed(99)
        y.sum().backward()
    assert len(seen) == 3
    assert all(one == seen[0] for one in seen)


@modes
def test_a_trace_is_followed_by_checkpointed_layers(mode):
    layer = make("topk", dtype=torch.float32)
    record = RoutingRecord.of_ids([torch.tensor([[4, 5]] * 8)])
    x = torch.randn(8, 5, requires_grad=True)

    def run(x):
        y, routing = layer(x)
        return y, routing.expert_ids_A

    with record.replaying():
        y, ids = checkpoint(RoutingRecord().wrap(run), x, **MODES[mode])
    y.sum().backward()  # outside: the layer's own record knows
    assert ids.view(8, 2).tolist() == [[4, 5]] * 8
    assert [e for e in range(6) if (layer.experts.down_proj.grad[e] != 0).any()] == [4, 5]


def test_a_record_binds_nothing_outside_its_block_nor_in_another_thread():
    router, record = make("topk").router, RoutingRecord()
    x = torch.randn(3, 5, dtype=torch.float64)
    with record.recording():
        first = router(x).expert_ids_TK
        other = threading.Thread(target=router, args=(x,))
        other.start()
        other.join()
    with torch.no_grad():
        router.weight.neg_()
    with record.replaying():
        replayed = router(x)
    assert torch.equal(replayed.expert_ids_TK, first)
    assert torch.equal(replayed.logits_TE, x @ router.weight.T)  # live scores
    assert not torch.equal(router(x).expert_ids_TK, first)
    assert len(record.decisions) == 1
    with pytest.raises(ZeroDivisionError), record.replaying():
        _ = 1 / 0
    assert not torch.equal(router(x).expert_ids_TK, first)
    with record.recording():
        pass
    assert record.decisions == []


# Traces


def test_given_ids_have_live_weights_and_a_router_gradient():
    layer = make("topk").train()
    x = torch.randn(5, 5, dtype=torch.float64)
    ids = torch.tensor([[5, 0], [1, 2], [3, 4], [0, 1], [2, 5]])
    with RoutingRecord.of_ids([ids]).replaying():
        routing = layer.router(x)
    assert torch.equal(routing.expert_ids_TK, ids)
    logits = x @ layer.router.weight.T
    torch.testing.assert_close(routing.weights_TK, logits.gather(1, ids).softmax(-1))
    routing.weights_TK[:, 0].sum().backward()
    assert (layer.router.weight.grad != 0).any(dim=1).all()


@pytest.mark.parametrize("router", ROUTER_CASES)
@pytest.mark.parametrize("capacity", ["dropless", "next", "tokens, padded", "renormalise"])
def test_a_saved_trace_routes_as_the_first_time(router, capacity, tmp_path):
    if capacity != "dropless" and router.startswith(NO_CAPACITY):
        pytest.skip("these routers take no capacity")
    layer = make(router, capacity).train()
    x, ids, record = torch.randn(10, 5, dtype=torch.float64), token_ids(10), RoutingRecord()
    with record.recording():
        first = [layer.router(x, input_ids_T=ids), layer.router(x[:4], input_ids_T=ids[:4])]
    record.save(tmp_path / "trace.safetensors")
    loaded = RoutingRecord.load(tmp_path / "trace.safetensors")
    for one, other in zip(record.decisions, loaded.decisions, strict=True):
        assert equal(one, other)
    with loaded.replaying():
        again = [layer.router(x), layer.router(x[:4])]  # without ids: nothing is chosen
    for one, other in zip(first, again, strict=True):
        for name in ("token_ids_A", "expert_ids_A", "weights_A", "logits_TE", "counts_E", "chosen_counts_E"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert (one.top_k, one.rows_per_expert, one.dropped) == (other.top_k, other.rows_per_expert, other.dropped)
    assert [p.name for p in tmp_path.iterdir()] == ["trace.safetensors"]


def equal(one: Decision, other: Decision) -> bool:
    def facts(decision: Decision):
        tensors = [decision.options.token_ids_A, decision.options.expert_ids_A, decision.kept_A]
        if decision.chosen is not None:
            tensors += [
                decision.chosen.token_ids_A,
                decision.chosen.expert_ids_A,
                torch.tensor(decision.chosen.top_k or 0),
            ]
        numbers = decision.options.top_k, decision.tokens, decision.experts, decision.seed, decision.rows_per_expert
        return [None if t is None else t.tolist() for t in tensors], numbers

    return facts(one) == facts(other)


def test_a_trace_of_no_layer_and_of_no_token(tmp_path):
    RoutingRecord().save(tmp_path / "empty")
    assert RoutingRecord.load(tmp_path / "empty").decisions == []
    layer, record = make("topk", "tokens, padded"), RoutingRecord()
    with record.recording():
        layer(torch.zeros(0, 5, dtype=torch.float64))
    record.save(tmp_path / "none")
    with RoutingRecord.load(tmp_path / "none").replaying():
        assert layer(torch.zeros(0, 5, dtype=torch.float64))[0].shape == (0, 5)


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> bytes:
    layer, record = make("gshard", "tokens, padded").train(), RoutingRecord()
    with record.recording():
        layer(torch.randn(6, 5, dtype=torch.float64))
    path = tmp_path_factory.mktemp("trace") / "trace"
    record.save(path)
    return path.read_bytes()


def test_a_truncated_trace(trace, tmp_path):
    for size in range(0, len(trace), 7):
        (tmp_path / "cut").write_bytes(trace[:size])
        with pytest.raises(FormatError, match="cut is not a record of routings"):
            RoutingRecord.load(tmp_path / "cut")


@settings(max_examples=150)
@given(at=st.integers(0, 1 << 20), byte=st.integers(0, 255), insert=st.booleans())
def test_a_damaged_trace_is_refused_or_harmless(trace, tmp_path_factory, at, byte, insert):
    path = tmp_path_factory.getbasetemp() / "damaged"
    at %= len(trace)
    path.write_bytes(trace[:at] + bytes([byte]) + trace[at + (not insert) :])
    try:
        record = RoutingRecord.load(path)
    except FormatError:
        return
    layer = make("gshard").train()
    try:
        with record.replaying():
            y, routing = layer(torch.randn(6, 5, dtype=torch.float64))
    except ConfigError:
        return  # other sizes
    assert y.isfinite().all()
    assert routing.counts_E.sum() <= 12


def rewritten(trace: bytes, tmp_path, tensors=None, **facts):
    """The trace with something else in it."""
    content = load(trace) | (tensors or {})
    path = tmp_path / "rewritten"
    path.write_bytes(trace)
    with safe_open(path, "pt") as file:
        known = json.loads(file.metadata()["moekit_routing"])
    known[0] |= facts
    content = {name: tensor for name, tensor in content.items() if tensor is not None}
    path.write_bytes(save(content, {"moekit_routing": json.dumps(known)}))
    return path


@pytest.mark.parametrize(
    ("tensors", "facts"),
    [
        ({"0.tokens": None}, {}),
        ({"0.experts": None}, {}),
        ({"0.chosen_experts": None}, {}),
        ({"0.tokens": torch.zeros(12, dtype=torch.int32)}, {}),
        ({"0.tokens": torch.zeros(12, dtype=torch.int64)}, {}),  # not K for each
        ({"0.tokens": torch.arange(12)}, {}),
        ({"0.tokens": torch.arange(12).flip(0) // 2}, {"top_k": None}),  # descending
        ({"0.experts": torch.full((12,), 6)}, {}),
        ({"0.experts": torch.full((12,), -1)}, {}),
        ({"0.experts": torch.zeros(11, dtype=torch.int64)}, {}),
        ({"0.experts": torch.zeros(6, 2, dtype=torch.int64)}, {}),
        ({"0.experts": torch.zeros(12)}, {}),
        ({"0.kept": torch.ones(11, dtype=torch.bool)}, {}),
        ({"0.kept": torch.ones(12)}, {}),
        ({"0.experts": torch.zeros(12, dtype=torch.int64), "0.kept": torch.ones(12, dtype=torch.bool)}, {}),  # no room
        ({}, {"top_k": 3}),
        ({}, {"top_k": 0}),
        ({}, {"top_k": -1}),
        ({}, {"top_k": "2"}),
        ({}, {"top_k": 2.0}),
        ({}, {"tokens": 5}),
        ({}, {"tokens": 1 << 62}),
        ({}, {"tokens": None}),
        ({}, {"experts": 1}),
        ({}, {"experts": True}),
        ({}, {"seed": -1}),
        ({}, {"seed": 1 << 64}),
        ({}, {"rows_per_expert": 0}),
    ],
    ids=str,
)
def test_a_trace_that_makes_no_sense(trace, tmp_path, tensors, facts):
    RoutingRecord.load(rewritten(trace, tmp_path))
    with pytest.raises(FormatError, match="rewritten is not a record of routings"):
        RoutingRecord.load(rewritten(trace, tmp_path, tensors, **facts))


def test_other_files(tmp_path):
    for name, content in {
        "other": save({"weight": torch.zeros(2)}),
        "text": b"hello world, this is no trace",
        "deep": (100_000).to_bytes(8, "little") + b"[" * 100_000,
        "list": save({}, {"moekit_routing": "[[1]]"}),
        "number": save({}, {"moekit_routing": "3"}),
        "words": save({}, {"moekit_routing": '{"abcd": 1}'}),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match=f"{name} is not a record of routings"):
            RoutingRecord.load(tmp_path / name)
    with pytest.raises(FileError, match="nowhere"):
        RoutingRecord.load(tmp_path / "nowhere")
    with pytest.raises(FileError):
        RoutingRecord().save(tmp_path / "text" / "trace")


def test_other_sizes_are_refused():
    x, record = torch.randn(6, 5, dtype=torch.float64), RoutingRecord()
    for router, capacity in (
        ("topk", "dropless"),
        ("top_p", "dropless"),
        ("expert_choice", "dropless"),
        ("topk", "drop"),
    ):
        layer = make(router, capacity)
        with record.recording():
            layer(x)
        for tokens in (5, 7, 0):
            with (
                record.replaying(),
                pytest.raises(ConfigError, match=f"made with 6 tokens, but now there are {tokens}"),
            ):
                layer(torch.randn(tokens, 5, dtype=torch.float64))
        with record.replaying():
            layer(x)
            with pytest.raises(ConfigError, match="the routing record has ended"):
                layer(x)
    small = make("topk", num_experts=4)
    with record.replaying(), pytest.raises(ConfigError, match="made with 6 experts, this layer has 4"):
        small(x)
    record = RoutingRecord.of_ids([torch.tensor([[0, 4]] * 6)])
    with record.replaying(), pytest.raises(ConfigError, match="made with 5 experts, this layer has 4"):
        small(x)
    with RoutingRecord.of_ids([torch.tensor([[0, 3]] * 6)]).replaying():
        small(x)
    for ids in (torch.zeros(3, dtype=torch.int64), torch.tensor([[0, -1]])):
        with pytest.raises(ConfigError, match=r"expert ids must be \(tokens, k\)"):
            RoutingRecord.of_ids([ids])


def test_every_capacity_of_the_cases_drops_or_moves_something():
    """So that the tests above mean it."""
    for name, capacity in CAPACITIES.items():
        if capacity is None or name == "all fit, padded":
            continue
        routing = make("topk", name).router(torch.randn(12, 5, dtype=torch.float64))
        moved = not torch.equal(routing.counts_E, routing.chosen_counts_E)
        assert moved, name
        assert (routing.dropped > 0) == (capacity.overflow == "drop" or capacity.factor < 1), name
