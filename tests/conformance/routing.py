"""Traps 11 to 21: routing."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from conformance.adapter import MODES, Adapter, Routed, Shape
from conformance.judge import Check, Measured, each, off
from tolerances import rel

FP32 = rel("fp32 scalar")
TWIN = rel("fp32 twin")


def some(tokens: int = 24, experts: int = 8, hidden: int = 16) -> tuple[Tensor, Tensor]:
    """Hidden states and a gate whose logits are N(0, 1)."""
    return torch.randn(tokens, hidden), torch.randn(experts, hidden) / math.sqrt(hidden)


def differing(one: Routed, other: Routed) -> float:
    """Tokens whose experts differ."""
    return (one.chosen_TE != other.chosen_TE).any(1).float().sum().item()


def trap_11(adapter: Adapter) -> Iterator[Check]:
    def refused() -> float:
        try:
            layer = adapter.renormalised_top1()
        except ValueError:
            return 0.0
        x = torch.randn(1, 32, 16)
        y = layer(x)
        (y[0] if isinstance(y, tuple) else y).square().sum().backward()
        router = next(p for name, p in layer.named_parameters() if "gate.weight" in name or "router" in name)
        others = [p.grad.abs().max() for p in layer.parameters() if p is not router and p.grad is not None]
        # 0 would be a router that learns like the rest; 1 is one that does not learn at all.
        return float(router.grad.abs().max() < 1e-4 * max(others))

    yield Check("refused, or the router learns (1: accepted, and its gradient is rounding)", refused)


def trap_12(adapter: Adapter) -> Iterator[Check]:
    def made():
        x_TD, gate_ED = some()
        bias_E = torch.tensor([0.4, 0.3, 0.1, 0.0, 0.0, -0.1, -0.3, -0.37])
        return adapter.biased_router(gate_ED, bias_E, 2), x_TD, gate_ED, bias_E

    def weights() -> float:
        router, x_TD, gate_ED, bias_E = made()
        scores_TE = (x_TD @ gate_ED.T).sigmoid()
        ids_TK = (scores_TE + bias_E).topk(2).indices
        picked_TK = scores_TE.gather(1, ids_TK)
        want = Routed.of(scores_TE, ids_TK, picked_TK / picked_TK.sum(1, keepdim=True))
        assert differing(want, Routed.of(scores_TE, scores_TE.topk(2).indices, picked_TK)) > 0, "the bias must matter"
        return off(router.route(x_TD).weights_TE, want.weights_TE)

    def gradient() -> float:
        router, x_TD, *_ = made()
        (router.route(x_TD).weights_TE * torch.randn(24, 8)).sum().backward()
        grad = router.bias().grad
        return 0.0 if grad is None else grad.abs().max().item()

    def narrowed() -> float:
        router, *_ = made()
        before_E = router.bias().clone()
        router.module.bfloat16()
        return (router.bias().float() - before_E).abs().max().item()

    def reloaded() -> float:
        router, _, gate_ED, bias_E = made()
        fresh = adapter.biased_router(gate_ED, torch.zeros_like(bias_E), 2)
        fresh.module.load_state_dict(router.module.state_dict())
        return (fresh.bias() - bias_E).abs().max().item()

    def stepped(mode: str, training: bool = True) -> float:
        router, x_TD, gate_ED, bias_E = made()
        parts = [x_TD[:7], x_TD[7:]]
        counts_E = sum(router.route(part).chosen_TE.sum(0) for part in parts).float()
        fresh = adapter.biased_router(gate_ED, bias_E, 2)
        fresh.module.train(training)
        fresh.step(parts, mode)
        moved_E = fresh.bias().detach() - bias_E
        want_E = fresh.rate * (counts_E.mean() - counts_E).sign() if training else torch.zeros(8)
        # Adding the same to every bias changes no choice, so a centred update is as good.
        return off(moved_E - moved_E.mean(), want_E - want_E.mean())

    yield Check("selection with the bias, weights without it", weights, FP32)
    yield Check("no gradient reaches the bias", gradient)
    yield Check("the bias keeps its fp32 bits through .to(bfloat16)", narrowed)
    yield Check("and through saving and loading", reloaded)
    yield Check("a step of two micro-batches moves it once, by rate · sign(mean − load)", lambda: stepped("none"), 1e-3)
    yield Check("recomputation does not move it again", lambda: stepped("non-reentrant"), 1e-3)
    yield Check("eval does not move it", lambda: stepped("none", training=False))


def trap_13(adapter: Adapter) -> Iterator[Check]:
    def counted(mode: str) -> float:
        got_E, want_E = adapter.counted(mode)
        return off(got_E, want_E)

    for mode in MODES:
        yield Check(f"counts are exact, checkpointing {mode}", lambda mode=mode: counted(mode))


def trap_14(adapter: Adapter) -> Iterator[Check]:
    def outside() -> Measured:
        x_TD, gate_ED = some()
        # All biased scores are negative: a masked score of 0 would beat every one that is open.
        given = {"bias_E": torch.full((8,), -2.0), "groups": 4, "chosen": 1}

        def leaving(name: str) -> float:
            groups_T = routes[name](x_TD, gate_ED, 2, **given).chosen_TE.view(-1, 4, 2).any(2).sum(1)
            return (groups_T > 1).float().sum().item()

        routes = adapter.grouped()
        return each(routes, leaving)

    def group_score(top_k: int, chosen: int) -> Measured:
        x_TD, gate_ED = some(64, 16)
        bias_E = 0.3 * torch.rand(16)
        scores_TE = (x_TD @ gate_ED.T).sigmoid() + bias_E
        group_TG = scores_TE.view(-1, 4, 4).topk(top_k // chosen).values.sum(2)
        open_TG = torch.zeros(64, 4, dtype=torch.bool).scatter(1, group_TG.topk(chosen).indices, True)
        open_TE = open_TG.repeat_interleave(4, 1)
        want_TE = torch.zeros(64, 16).scatter(1, scores_TE.masked_fill(~open_TE, -torch.inf).topk(top_k).indices, 1.0)
        want = Routed(want_TE, want_TE.bool(), scores_TE)
        routes = adapter.grouped()
        given = {"bias_E": bias_E, "groups": 4, "chosen": chosen}
        return each(routes, lambda name: differing(routes[name](x_TD, gate_ED, top_k, **given), want))

    yield Check("no token leaves its groups, all biased scores negative (of 24 tokens)", outside)
    yield Check("a group scores the sum of its K/M best, K/M = 2 (of 64 tokens)", lambda: group_score(4, 2))
    yield Check("a group scores the sum of its K/M best, K/M = 3 (of 64 tokens)", lambda: group_score(6, 2))


def trap_15(adapter: Adapter) -> Iterator[Check]:
    def ties() -> float:
        x_TD, gate_ED = torch.randn(33, 16), torch.zeros(64, 16)
        batch = adapter.route("topk", x_TD, gate_ED, 6, renormalise=True)
        alone = [adapter.route("topk", x_TD[i : i + 1], gate_ED, 6, renormalise=True) for i in range(33)]
        return sum(float((batch.chosen_TE[i] != alone[i].chosen_TE[0]).any()) for i in range(33))

    def autocast() -> Measured:
        x_TD, gate_ED = some(64, 64)
        seen = adapter.autocast_logits(x_TD, gate_ED)
        return each(seen, lambda name: off(seen[name], x_TD @ gate_ED.T))

    def narrow() -> float:
        x_TD, gate_ED = (value.bfloat16() for value in some(64, 64))
        routed = adapter.route("topk", x_TD, gate_ED, 6, renormalise=True)
        return off(routed.logits_TE, x_TD.double() @ gate_ED.double().T)

    yield Check("equal scores: the same experts alone as in a batch (of 33 tokens)", ties)
    yield Check("logits are fp32 under bf16 autocast", autocast, TWIN)
    yield Check("logits are fp32 for bf16 hidden states and gate", narrow, TWIN)


def leak(route, x_TD: Tensor) -> float:
    """How far earlier tokens' weights move when the last token changes."""
    torch.manual_seed(1)
    before = route(x_TD)
    torch.manual_seed(1)
    after = route(torch.cat([x_TD[:-1], -3 * x_TD[-1:]]))
    return (before.weights_TE[:-1] - after.weights_TE[:-1]).abs().max().item()


def trap_16(adapter: Adapter) -> Iterator[Check]:
    def exact() -> float:
        x_TD, gate_ED = some(24, 8)
        counts_E = adapter.route("expert_choice", x_TD, gate_ED, 2).chosen_TE.sum(0)
        return (counts_E - 24 * 2 / 8).abs().max().item()

    def refused() -> float:
        x_TD, gate_ED = some()
        moved = leak(lambda x: adapter.route("expert_choice", x, gate_ED, 2), x_TD)
        assert moved > 0, "the probe must see the leak"
        return 0.0 if adapter.refuses_causal("expert_choice") else moved

    def dropless(training: bool) -> Measured:
        x_TD, gate_ED = some()
        routers = adapter.dropless(gate_ED, 2, training=training)
        return each(routers, lambda name: leak(routers[name], x_TD))

    def capacity(order: str) -> float:
        x_TD, gate_ED = some()

        def moved_with(top_k: int) -> float:
            return leak(lambda x: adapter.route("capacity", x, gate_ED, top_k, rows=3, order=order), x_TD)

        moved = max(moved_with(top_k) for top_k in adapter.capacity_top_k)
        return 0.0 if moved == 0 or adapter.capacity_leak_is_said(order) else moved

    yield Check("expert choice: every expert takes exactly T·c/E tokens", exact)
    yield Check("expert choice: a causal model refuses it", refused)
    yield Check("dropless routers: later tokens move no earlier one, eval", lambda: dropless(False), FP32)
    yield Check("the same in training", lambda: dropless(True), FP32)
    yield Check("capacity by position: no leak, or it is said", lambda: capacity("position"))
    yield Check("capacity by probability: no leak, or it is said", lambda: capacity("probability"))


def trap_17(adapter: Adapter) -> Iterator[Check]:
    def no_gradient() -> float:
        x_TD, gate_ED = some()
        gate_ED.requires_grad_()
        routed = adapter.route("sinkhorn", x_TD, gate_ED, 2, training=True)
        logits_TE = x_TD @ gate_ED.T
        want_TE = logits_TE.masked_fill(~routed.chosen_TE, -torch.inf).softmax(1)
        seed_TE = torch.randn(24, 8)
        (got,) = torch.autograd.grad((routed.weights_TE * seed_TE).sum(), gate_ED)
        (want,) = torch.autograd.grad((want_TE * seed_TE).sum(), gate_ED)
        return off(got, want)

    def balanced() -> float:
        x_TD, gate_ED = some(64, 8)
        gate_ED[0] += 5 * x_TD.mean(0)  # one expert that most want
        spread = [
            adapter.route(kind, x_TD, gate_ED, 1, training=True, renormalise=False).chosen_TE.sum(0).max().item()
            for kind in ("sinkhorn", "topk")
        ]
        return max(0.0, spread[0] - spread[1])

    def silent() -> float:
        x_TD, gate_ED = some()
        return differing(
            adapter.route("sinkhorn", x_TD, gate_ED, 2), adapter.route("topk", x_TD, gate_ED, 2, renormalise=True)
        )

    yield Check("no gradient goes through the iterations", no_gradient, TWIN)
    yield Check("it balances in training", balanced)
    yield Check("eval is plain top-k (tokens that differ)", silent)


def trap_18(adapter: Adapter) -> Iterator[Check]:
    def silent(kind: str) -> float:
        x_TD, gate_ED = some()
        trained = [adapter.route(kind, x_TD, gate_ED, 2, training=True) for _ in range(2)]
        assert off(trained[0].weights_TE, trained[1].weights_TE) > 0, f"{kind} has no noise in training"
        one, two = (adapter.route(kind, x_TD, gate_ED, 2) for _ in range(2))
        return off(one.weights_TE, two.weights_TE)

    def load() -> float:
        got_TE, estimate_TE = adapter.load_TE(*some(12, 6), 2)
        return (got_TE - estimate_TE).abs().max().item()

    def reaches(which: int) -> float:
        x_BLD = torch.randn(2, 9, 16)
        after = adapter.jittered(x_BLD.clone())
        return off(after[which], (x_BLD, x_BLD.flatten(0, 1))[which])

    for kind in ("noisy", "gumbel", "jitter"):
        yield Check(f"{kind}: silent in eval", lambda kind=kind: silent(kind))
    # The standard error of 4,000 draws is at most 0.008; the largest of 72 stays below four of them.
    yield Check("noisy: Load(X) is what Monte-Carlo finds", load, 0.032)
    yield Check("jitter: the layer's argument is left as it was", lambda: reaches(0))
    yield Check("jitter: experts get the hidden states without it", lambda: reaches(1))


def trap_19(adapter: Adapter) -> Iterator[Check]:
    def stable() -> float:
        ids_T = torch.arange(4096)
        first = adapter.route("hash", torch.randn(4096, 16), torch.zeros(8, 16), 1, ids_T=ids_T)
        torch.manual_seed(1)
        again = adapter.route("hash", torch.randn(4096, 16), torch.zeros(8, 16), 1, ids_T=ids_T)
        # The same in every process: this number was computed in another one.
        known = int((first.chosen_TE.float() @ torch.arange(8.0)).long().mul(ids_T % 97 + 1).sum())
        return differing(first, again) + float(known != adapter.hashed)

    def even() -> float:
        routed = adapter.route("hash", torch.randn(4096, 16), torch.zeros(8, 16), 1, ids_T=torch.arange(4096))
        return (routed.chosen_TE.float().mean(0) * 8 - 1).abs().max().item()

    yield Check("the same whatever the hidden states, seed and process", stable)
    yield Check("experts get even shares of the ids", even, 0.15)


def trap_20(adapter: Adapter) -> Iterator[Check]:
    def formula() -> float:
        cases = [(10, 4, 2, 1.25), (1, 64, 2, 1.0), (30, 10, 1, 1.1), (8, 4, 4, 8.0), (7, 3, 1, 1.0)]
        wrong = 0.0
        for tokens, experts, top_k, factor in cases:
            want = max(1, min(tokens, math.ceil(round(top_k * tokens * factor, 9) / experts)))
            wrong = max(wrong, abs(adapter.capacity(tokens, experts, top_k, factor) - want))
        return wrong

    def kept() -> float:
        x_TD, gate_ED = some(32, 4)
        routed = adapter.route("capacity", x_TD, gate_ED, 1, rows=3)
        want_TE = torch.nn.functional.one_hot((x_TD @ gate_ED.T).argmax(1), 4).bool()
        want_TE &= want_TE.cumsum(0) <= 3
        dropped_T = ~want_TE.any(1)
        return (routed.chosen_TE != want_TE).float().sum().item() + routed.weights_TE[dropped_T].abs().max().item()

    def moved() -> float:
        x_TD, gate_ED = some(32, 4)
        routed = adapter.route("capacity", x_TD, gate_ED, 2, rows=24, overflow="next")
        # Room for all: each token has two experts, different ones, and no expert more than its room.
        return (routed.chosen_TE.sum(1) - 2).abs().max().item() + max(0, routed.chosen_TE.sum(0).max().item() - 24)

    yield Check("max(1, min(T, ⌈K·T·factor/E⌉)) rows", formula)
    yield Check("the first rows tokens of an expert are kept, the others weigh 0", kept)
    yield Check("overflow to the next expert never gives one twice", moved)


def trap_21(adapter: Adapter) -> Iterator[Check]:
    def case():
        layer = adapter.layer(Shape(), backend=adapter.backends[0])
        x_BLD = torch.randn(1, 24, 16)

        def change() -> None:
            with torch.no_grad():
                next(layer.router.parameters()).neg_()

        return layer, x_BLD, *adapter.replayed(layer, x_BLD, change)

    def ids() -> float:
        *_, first, again = case()
        return differing(first, again)

    def live() -> float:
        layer, x_BLD, _, again = case()
        logits_TE = x_BLD[0] @ layer.parts().gate_ED.T
        want_TE = logits_TE.masked_fill(~again.chosen_TE, -torch.inf).softmax(1)
        return off(again.weights_TE, want_TE)

    def gradient() -> float:
        layer, _, _, again = case()
        (again.weights_TE * torch.randn(again.weights_TE.shape)).sum().backward()
        grad = next(layer.router.parameters()).grad
        return float(grad is None or not grad.abs().max() > 0)

    yield Check("the indices are the recorded ones (tokens that differ)", ids)
    yield Check("the weights are computed from live logits", live, TWIN)
    yield Check("the router has a gradient", gradient)


TRAPS = {
    11: ("Top-1 with renormalised weights", trap_11),
    12: ("The selection bias", trap_12),
    13: ("Counters under recomputation", trap_13),
    14: ("Group-limited routing", trap_14),
    15: ("Ties, and fp32 routing", trap_15),
    16: ("Later tokens and earlier ones", trap_16),
    17: ("Sinkhorn", trap_17),
    18: ("Noise belongs to training, and to the router", trap_18),
    19: ("Hash routing", trap_19),
    20: ("Capacity", trap_20),
    21: ("Replayed routing", trap_21),
}
