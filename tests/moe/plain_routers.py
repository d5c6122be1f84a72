"""Every router, and capacity, as the papers write them: loops over tokens and experts. What the tests compare with.

A reference has three parts: a gate (tensors, so that gradients are compared too), a choice (each token's experts, best
first) and weights. Between choice and weights stands capacity. Nothing here calls the package's routing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.config import CapacityConfig, GroupLimit, MoEConfig
from moekit.moe import MoE, Router

MASK_64 = (1 << 64) - 1


@dataclass
class PlainRouting:
    """For each token: the experts it chose, and the weights of those that serve it."""

    chosen: list[list[int]]
    served: list[dict[int, Tensor]]
    gate: list[Tensor]


@dataclass
class Draws:
    """The random numbers of one pass, in the order in which the routers draw them."""

    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def gumbel(self, *shape: int) -> Tensor:
        return -torch.log(-torch.log(self.uniform(*shape)))


def plain_routing(
    router: Router, x_TD: Tensor, *, seed: int | None = None, mask: list[bool] | None = None, ids: list[int] = ()
) -> PlainRouting:
    """Route token by token. `seed` is that of the noise; None in eval."""
    config = router.config
    draws = None if seed is None else Draws(seed)
    real = [True] * len(x_TD) if mask is None else mask
    gate = GATES.get(config.router, linear_gate)(router, x_TD, draws)
    values = [row.tolist() for row in gate]
    if config.router == "sparsemixer":
        options, whole = sparsemixer_experts(router, values, seed)
    else:
        options = CHOICES[config.router](router, values, real, ids)
    sent = [[True] * len(experts) for experts in options]
    if config.router == "gshard" and seed is not None:
        sent = gshard_sent(values, options, seed)
    chosen = [[e for e, go in zip(*pair, strict=True) if go] for pair in zip(options, sent, strict=True)]
    kept = sent
    if config.capacity is not None:
        wanted = [[go and real[t] for go in sent[t]] for t in range(len(sent))]
        rows = config.capacity.of(sum(real), config.num_experts, config.top_k)
        options, kept = plain_capacity(
            options, wanted, rows, selection(router, values), [affinity(config, row) for row in values], config.capacity
        )
        if config.capacity.lost_weight == "renormalise":
            stay = [[k or not s for k, s in zip(*pair, strict=True)] for pair in zip(kept, sent, strict=True)]
            options, kept = only(options, stay), only(kept, stay)
    served = []
    for gate_E, experts, keep in zip(gate, options, kept, strict=True):
        weights = WEIGHTS.get(config.router, gated)(router, gate_E, experts)
        if config.router == "sparsemixer":  # a third of the value, the whole gradient
            scaled = zip(weights, whole[len(served)], strict=True)
            weights = [w if all_of_it else w - w.detach() * 0.6667 for w, all_of_it in scaled]
        pairs = zip(experts, weights, keep, strict=True)
        served.append({e: w * config.routed_scaling_factor for e, w, k in pairs if k})
    return PlainRouting(chosen, served, list(gate))


def only(lists: list[list], stay: list[list[bool]]) -> list[list]:
    """The elements that stay, token by token."""
    return [[v for v, s in zip(*pair, strict=True) if s] for pair in zip(lists, stay, strict=True)]


# Capacity


def plain_capacity(
    options: list[list[int]],
    wanted: list[list[bool]],
    rows: int,
    scores: list[list[float]],
    probs: list[list[float]],
    config: CapacityConfig,
) -> tuple[list[list[int]], list[list[bool]]]:
    """(experts, kept) for each token: every expert takes at most `rows`.

    In rounds: all that wait ask, in order; those refused move on, one a token and round, to the best expert that had
    room when the round ended and that the token has nothing to do with yet.
    """
    experts = [list(row) for row in options]
    kept = [[False] * len(row) for row in options]
    held = [set(row) for row in options]
    room = [rows] * len(scores[0]) if scores else []
    queue = [(t, k) for t in range(len(options)) for k in range(len(options[t])) if wanted[t][k]]
    if config.order == "position":
        queue.sort(key=lambda at: (at[1], at[0]))
    else:
        queue.sort(key=lambda at: (-probs[at[0]][options[at[0]][at[1]]], at))
    while queue:
        refused = []
        for t, k in queue:
            if room[experts[t][k]] > 0:
                room[experts[t][k]] -= 1
                kept[t][k] = True
            else:
                refused.append((t, k))
        queue = []
        if config.overflow == "drop":
            break
        moved: set[int] = set()
        for t, k in refused:
            free = [e for e in range(len(room)) if room[e] > 0 and e not in held[t] and scores[t][e] > -math.inf]
            if t in moved:
                queue.append((t, k))
            elif free:
                moved.add(t)
                experts[t][k] = min(free, key=lambda e: (-scores[t][e], e))
                queue.append((t, k))
        for t in moved:
            held[t] |= set(experts[t])
    final = [
        [experts[t][k] if kept[t][k] else options[t][k] for k in range(len(options[t]))] for t in range(len(options))
    ]
    return final, kept


def affinity(config: MoEConfig, gate: list[float]) -> list[float]:
    """What order "probability" ranks by."""
    return [1 / (1 + math.exp(-v)) for v in gate] if config.router == "sigmoid" else softmax(gate)


def selection(router: Router, gates: list[list[float]]) -> list[list[float]]:
    """What the next best expert is found by: −inf where the token's groups are closed."""
    config = router.config
    if config.router == "hash":
        return gates
    if config.router == "hierarchical":
        return [
            [v if e // size(config) in best_groups(config, gate) else -math.inf for e, v in enumerate(gate)]
            for gate in gates
        ]
    if config.router in ("topk", "sigmoid"):
        return [inside_groups(config, scores(router, gate)) for gate in gates]
    return gates


# Gates: (T, E), with gradient


def product(router: Router, x_TD: Tensor, draws: Draws | None) -> Tensor:
    jitter = getattr(router.options, "jitter", 0.0)
    if draws is not None and jitter:
        x_TD = x_TD * (1 + jitter * (2 * draws.uniform(*x_TD.shape) - 1))
    return torch.stack([torch.stack([row @ x_D for row in router.weight]) for x_D in x_TD])


def linear_gate(router: Router, x_TD: Tensor, draws: Draws | None) -> Tensor:
    logits_TE = product(router, x_TD, draws)
    std = getattr(router.options, "noise_std", 0.0)
    return logits_TE + std * draws.normal(*logits_TE.shape) if draws is not None and std else logits_TE


def noisy_gate(router: Router, x_TD: Tensor, draws: Draws | None) -> Tensor:
    """H(x)_i = (x·W)_i + N · softplus((x·W_noise)_i) (1701.06538 eq 4)."""
    both = product(router, x_TD, draws)
    experts = router.config.num_experts
    if draws is None:
        return both[:, :experts]
    return both[:, :experts] + draws.normal(len(x_TD), experts) * (1 + both[:, experts:].exp()).log()


def gumbel_gate(router: Router, x_TD: Tensor, draws: Draws | None) -> Tensor:
    """(l + g) / τ with g = −log(−log u) (1611.01144 eq 1–2)."""
    logits_TE, o = product(router, x_TD, draws), router.options
    if draws is not None:
        logits_TE = logits_TE + draws.gumbel(*logits_TE.shape)
    return logits_TE / (o.start * (o.end / o.start) ** min(1, router.steps.item() / o.anneal_steps))


def hierarchical_gate(router: Router, x_TD: Tensor, draws: Draws | None) -> Tensor:
    """log(p(group) · p(expert | group)) (1701.06538 appendix B)."""
    both, groups, each = linear_gate(router, x_TD, draws), router.options.groups, size(router.config)
    rows = []
    for row in both:
        p_group = row[:groups].exp() / row[:groups].exp().sum()
        parts = []
        for g in range(groups):
            inside = row[groups + g * each : groups + (g + 1) * each].exp()
            parts.append(p_group[g] * inside / inside.sum())
        rows.append(torch.cat(parts).log())
    return torch.stack(rows)


def hash_gate(router: Router, x_TD: Tensor, draws: Draws | None) -> Tensor:
    return torch.zeros(len(x_TD), router.config.num_experts, dtype=x_TD.dtype)


GATES = {"noisy_topk": noisy_gate, "gumbel": gumbel_gate, "hierarchical": hierarchical_gate, "hash": hash_gate}


# Choices: a list of experts for each token, best first


def best(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def scores(router: Router, gate: list[float]) -> list[float]:
    """The logits; or sigmoid(logit) + bias (2412.19437 eq 15–16); or, with a bias, their softmax + bias (ERNIE 4.5)."""
    bias = [0.0] * len(gate) if router.selection_bias is None else router.selection_bias.tolist()
    if router.config.router == "sigmoid":
        return [1 / (1 + math.exp(-v)) + b for v, b in zip(gate, bias, strict=True)]
    return gate if router.selection_bias is None else [p + b for p, b in zip(softmax(gate), bias, strict=True)]


def inside_groups(config: MoEConfig, values: list[float]) -> list[float]:
    """−inf outside the best groups; a group's score is the sum of its best K/M, or its best one (M groups chosen)."""
    limit: GroupLimit | None = config.options.groups
    if limit is None:
        return values
    each = len(values) // limit.groups
    groups = [sorted(values[g * each : (g + 1) * each], reverse=True) for g in range(limit.groups)]
    count = max(1, config.top_k // limit.chosen) if limit.score == "sum" else 1
    opened = best([sum(group[:count]) for group in groups], limit.chosen)
    return [v if e // each in opened else -math.inf for e, v in enumerate(values)]


def choose_top(router, gates, real, ids):
    return [best(gate, router.config.top_k) for gate in gates]


def choose_limited(router, gates, real, ids):
    return [best(inside_groups(router.config, scores(router, gate)), router.config.top_k) for gate in gates]


def choose_top_p(router, gates, real, ids):
    """The smallest set whose probabilities reach p, of min_k to K experts (2403.07652 eq 3–5)."""
    chosen = []
    for gate in gates:
        probs, experts, total = softmax(gate), [], 0.0
        for e in best(gate, router.config.top_k):
            if len(experts) >= router.options.min_k and total >= router.threshold.item():
                break
            experts.append(e)
            total += probs[e]
        chosen.append(experts)
    return chosen


def choose_by_experts(router, gates, real, ids):
    """Each expert takes its C best tokens (2202.09368 eq 1–3); a token's experts in their own order."""
    config, tokens = router.config, [t for t, is_real in enumerate(real) if is_real]
    take = min(len(tokens), max(1, len(tokens) * config.top_k // config.num_experts))
    chosen: list[list[int]] = [[] for _ in gates]
    for e in range(config.num_experts):
        for t in sorted(tokens, key=lambda t: (-softmax(gates[t])[e], t))[:take]:
            chosen[t].append(e)
    return chosen


def splitmix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


def choose_by_hash(router, gates, real, ids):
    """The K experts whose number hashes highest with the token's id, as signed numbers."""
    config, chosen = router.config, []
    for token in ids:
        seeded = splitmix((token + splitmix(router.options.seed & MASK_64)) & MASK_64)
        hashes = [splitmix((seeded + splitmix(e + 1)) & MASK_64) for e in range(config.num_experts)]
        chosen.append(best([h - (h >> 63 << 64) for h in hashes], config.top_k))
    return chosen


def choose_sinkhorn(router, gates, real, ids):
    """Training: by exp(logits) after rows and columns were scaled in turn, over the real tokens."""
    if not router.training:
        return choose_top(router, gates, real, ids)
    experts, rows = router.config.num_experts, [t for t, is_real in enumerate(real) if is_real]
    plan = {t: [math.exp(v) for v in gates[t]] for t in rows}
    for _ in range(router.options.iterations):
        for t in rows:
            plan[t] = [v / sum(plan[t]) for v in plan[t]]
        for e in range(experts):
            column = sum(plan[t][e] for t in rows)
            for t in rows:
                plan[t][e] *= len(rows) / experts / column
    return [best(plan.get(t, gate), router.config.top_k) for t, gate in enumerate(gates)]


def size(config: MoEConfig) -> int:
    return config.num_experts // config.options.groups


def best_groups(config: MoEConfig, gate: list[float]) -> list[int]:
    each = size(config)
    p_group = [sum(math.exp(v) for v in gate[g * each : (g + 1) * each]) for g in range(config.options.groups)]
    return best(p_group, config.options.groups_per_token)


def choose_hierarchical(router, gates, real, ids):
    config, chosen = router.config, []
    for gate in gates:
        each, count = size(config), config.top_k // config.options.groups_per_token
        experts = []
        for g in best_groups(config, gate):
            experts += [g * each + e for e in best(gate[g * each : (g + 1) * each], count)]
        chosen.append(experts)
    return chosen


CHOICES = {
    "topk": choose_limited,
    "switch": choose_top,
    "sigmoid": choose_limited,
    "noisy_topk": choose_top,
    "gshard": choose_top,
    "gumbel": choose_top,
    "top_p": choose_top_p,
    "expert_choice": choose_by_experts,
    "hash": choose_by_hash,
    "sinkhorn": choose_sinkhorn,
    "hierarchical": choose_hierarchical,
}


def gshard_sent(gates, options, seed):
    """The second expert goes if 2·g₂ > u, g₂ being its share of the two (2006.16668 algorithm 1)."""
    u_T = Draws(seed + 1).uniform(len(gates)).tolist()
    shares = [softmax([gate[e] for e in experts])[1] for gate, experts in zip(gates, options, strict=True)]
    return [[True, 2 * share > u] for share, u in zip(shares, u_T, strict=True)]


def near(router, gate, taken):
    """The experts left that are not far below the best of them (2409.12136, and transformers' sparsemixer)."""
    left = [e for e in range(len(gate)) if e not in taken]
    most = max(gate[e] for e in left)
    return [e for e in left if (most - gate[e]) / max(abs(gate[e]), most) <= 2 * router.options.eps]


def sparsemixer_experts(router, gates, seed):
    """Each token's two experts, and whether each weighs its whole share."""
    shape = (len(gates), router.config.num_experts)
    draws = None if seed is None else Draws(seed)
    chosen, whole = [[] for _ in gates], [[] for _ in gates]
    for _ in range(2):
        g_TE = [[0.0] * shape[1]] * shape[0] if draws is None else draws.gumbel(*shape).tolist()
        u_T = [0.0] * shape[0] if draws is None else draws.uniform(shape[0]).tolist()
        for t, gate in enumerate(gates):
            best_one = min((e for e in range(shape[1]) if e not in chosen[t]), key=lambda e: (-gate[e], e))
            taken = min(near(router, gate, chosen[t]), key=lambda e: (-(gate[e] + g_TE[t][e]), e))
            chosen[t].append(taken)
            whole[t].append(taken == best_one or u_T[t] > 0.75)
    return chosen, whole


# Weights


def gated(router: Router, gate_E: Tensor, experts: list[int]) -> list[Tensor]:
    config = router.config
    if config.gate_order == "topk_softmax":
        total = sum(gate_E[e].exp() for e in experts)
        return [gate_E[e].exp() / total for e in experts]
    weights = [gate_E[e].exp() / gate_E.exp().sum() for e in experts]
    return [w / sum(weights) for w in weights] if config.norm_topk_prob else weights


def sigmoid_weights(router: Router, gate_E: Tensor, experts: list[int]) -> list[Tensor]:
    weights = [1 / (1 + (-gate_E[e]).exp()) for e in experts]
    return [w / sum(weights) for w in weights] if router.config.norm_topk_prob else weights


def gumbel_weights(router: Router, gate_E: Tensor, experts: list[int]) -> list[Tensor]:
    soft = [gate_E[e].exp() / gate_E.exp().sum() for e in experts]
    if router.options.straight_through:
        return [s - s.detach() + 1 / len(experts) for s in soft]
    return [s / sum(soft) for s in soft]


def probabilities(router: Router, gate_E: Tensor, experts: list[int]) -> list[Tensor]:
    return [gate_E[e].exp() / gate_E.exp().sum() for e in experts]


def sparsemixer_weights(router: Router, gate_E: Tensor, experts: list[int]) -> list[Tensor]:
    first, second = experts
    gate = gate_E.tolist()
    totals = [sum(gate_E[e].exp() for e in near(router, gate, taken)) for taken in ([], [first])]
    return [gate_E[e].exp() / total for e, total in zip((first, second), totals, strict=True)]


def equal_weights(router: Router, gate_E: Tensor, experts: list[int]) -> list[Tensor]:
    return [torch.tensor(1 / len(experts), dtype=gate_E.dtype) for _ in experts]


WEIGHTS = {
    "switch": probabilities,
    "sigmoid": sigmoid_weights,
    "gumbel": gumbel_weights,
    "expert_choice": probabilities,
    "hash": equal_weights,
    "sparsemixer": sparsemixer_weights,
}


def layer_weights(layer: MoE, x_TD: Tensor, **facts) -> list[dict[int, Tensor]]:
    """What `plain_moe` takes."""
    return plain_routing(layer.router, x_TD, **facts).served
