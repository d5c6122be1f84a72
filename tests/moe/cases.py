"""Every router × expert kind × capacity rule, by name. A router or kind that is registered without a row here is tested
with its defaults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moekit import MoEConfig
from moekit.config import CapacityConfig, ExpertGroup, GroupLimit
from moekit.moe import EXPERTS, ROUTERS, MoE, Router, Routing, RoutingRecord

BASE = {"hidden_size": 5, "intermediate_size": 3, "num_experts": 6, "top_k": 2}
ALL = {"gate_order": "softmax_topk"}
NORM = ALL | {"norm_topk_prob": True}

ROUTER_ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "topk": {
        "": {},
        "softmax first": ALL,
        "renormalised": NORM | {"routed_scaling_factor": 2.5},
        "switch": ALL | {"top_k": 1},
        "dense": {"top_k": 6},
        "group sum": NORM | {"top_k": 4, "router_options": {"groups": GroupLimit(groups=3, chosen=2)}},
        "group max": {"router_options": {"groups": GroupLimit(groups=3, chosen=1, score="max")}},
        "noise": {"router_options": {"noise_std": 0.5}},
        "jitter": ALL | {"router_options": {"jitter": 0.1, "noise_std": 0.1}},
        "selection bias": NORM | {"router_options": {"bias": True, "noise_std": 0.2}},
        "selection bias, groups": ALL | {"router_options": {"bias": True, "groups": GroupLimit(groups=3, chosen=1)}},
    },
    "sigmoid": {
        "": {},
        "renormalised": NORM | {"routed_scaling_factor": 2.5},
        "no bias": {"router_options": {"bias": False}},
        "groups": NORM | {"top_k": 4, "router_options": {"groups": GroupLimit(groups=3, chosen=2), "noise_std": 0.2}},
    },
    "noisy_topk": {"": {}, "switch": ALL | {"top_k": 1}, "dense": {"top_k": 6}},
    "gshard": {"": {}, "probabilities": ALL | {"router_options": {"jitter": 0.1}}},
    "gumbel": {"": {}, "soft": {"router_options": {"straight_through": False}}, "one": {"top_k": 1}},
    "top_p": {
        "": ALL | {"top_k": 4},
        "renormalised": {"top_k": 4, "router_options": {"min_k": 2, "target_k": 2.5, "noise_std": 0.1}},
    },
    "expert_choice": {"": {}, "noise": {"router_options": {"noise_std": 0.2}}, "dense": {"top_k": 6}},
    "switch": {"": {"top_k": 1}, "two": {"router_options": {"jitter": 0.1, "noise_std": 0.1}}},
    "sparsemixer": {"": {"router_options": {"eps": 0.3}}},
    "hash": {"": {}, "one": {"top_k": 1, "router_options": {"seed": 7}}},
    "sinkhorn": {"": {}, "switch": ALL | {"top_k": 1}},
    "hierarchical": {
        "": {"top_k": 4, "router_options": {"groups": 3, "groups_per_token": 2}},
        "one group": ALL | {"router_options": {"groups": 2, "groups_per_token": 1, "jitter": 0.1}},
    },
}
ROUTER_CASES = {
    f"{name} {row}".strip(): {"router": name} | changes
    for name in ROUTERS
    for row, changes in ROUTER_ROWS.get(name, {"": {}}).items()
}

MIXED = (
    ExpertGroup(count=1, intermediate_size=4),
    ExpertGroup(count=1, kind="zero"),
    ExpertGroup(count=2, kind="mlp", activation="relu"),
    ExpertGroup(count=2, kind="identity"),
)
SHARED = {"num_shared_experts": 2, "shared_intermediate_size": 2, "shared_gate": True}
EXPERT_ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "swiglu": {"": {}, "bias, shared": {"bias": True} | SHARED},
    "mlp": {"": {"activation": "gelu"}, "bias, shared": {"bias": True, "num_shared_experts": 1}},
    "mixed": {"": {"expert_groups": MIXED}, "bias, shared": {"expert_groups": MIXED, "bias": True} | SHARED},
}
EXPERT_CASES = {
    f"{name} {row}".strip(): {"expert": name} | changes
    for name in EXPERTS
    for row, changes in EXPERT_ROWS.get(name, {"": {}}).items()
}

CAPACITIES: dict[str, CapacityConfig | None] = {
    "dropless": None,
    "drop": CapacityConfig(factor=1.0),
    "drop by probability": CapacityConfig(factor=0.7, order="probability"),
    "next": CapacityConfig(factor=0.7, overflow="next"),
    "next by probability": CapacityConfig(factor=1.0, overflow="next", order="probability", lost_weight="renormalise"),
    "renormalise": CapacityConfig(factor=0.6, lost_weight="renormalise"),
    "tokens, padded": CapacityConfig(tokens=2, pad=True),
    "all fit, padded": CapacityConfig(factor=100.0, pad=True),
}

NO_CAPACITY = ("expert_choice", "sparsemixer")
ROUTED = [(r, c) for r in ROUTER_CASES for c in CAPACITIES if c == "dropless" or not r.startswith(NO_CAPACITY)]
FULL = [(r, e, c) for r, c in ROUTED for e in EXPERT_CASES]


def _every_run() -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """Rows that no run may skip, the others being heavy: every router dropless and under two capacities, which take
    turns, each of these with one kind of experts, which take turns too; and every router with every kind.

    The second set is smaller: every router twice.
    """
    limited, kinds = [c for c in CAPACITIES if c != "dropless"], list(EXPERT_CASES)
    some: set[tuple[str, ...]] = set()
    few: set[tuple[str, ...]] = set()
    for number, router in enumerate(ROUTER_CASES):
        capacities = ["dropless", *(limited[(2 * number + i) % len(limited)] for i in range(2))]
        pairs = [(capacity, kinds[(number + i) % len(kinds)]) for i, capacity in enumerate(capacities)]
        some |= {(router, capacity) for capacity in capacities}
        some |= {(router, kind, capacity) for capacity, kind in pairs} | {(router, kind, "dropless") for kind in kinds}
        few |= {(router, kind, capacity) for capacity, kind in pairs[:2]}
    return some, few


SOME, FEW = _every_run()


def params(rows: list[tuple[str, ...]], every_run: set[tuple[str, ...]] = SOME) -> list[Any]:
    """For `pytest.mark.parametrize`."""
    return [pytest.param(*row, id=" / ".join(row), marks=() if row in every_run else pytest.mark.heavy) for row in rows]


def config(router: str, capacity: str = "dropless", expert: str = "swiglu", **changes: Any) -> MoEConfig:
    values = BASE | ROUTER_CASES[router] | EXPERT_CASES[expert] | changes
    return MoEConfig(**values, capacity=CAPACITIES[capacity])


def make(
    router: str, capacity: str = "dropless", expert: str = "swiglu", dtype: torch.dtype = torch.float64, **changes: Any
) -> MoE:
    """A layer that no symmetry hides anything of: every parameter and the selection bias are random."""
    layer = MoE(config(router, capacity, expert, **changes)).to(dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=1.0 if name.startswith("router") else 0.7)
        bias = getattr(layer.router, "selection_bias", None)
        if bias is not None:
            bias.copy_(torch.randn(bias.shape) * 0.5 - 1.0)  # scores below zero occur
    return layer


def token_ids(tokens: int) -> Tensor:
    return torch.randint(0, 1000, (tokens,))


def run(router: Router, x_TD: Tensor, **facts: Any) -> tuple[Routing, int | None]:
    """The routing, and the seed of its noise."""
    record = RoutingRecord()
    with record.recording():
        routing = router(x_TD, **facts)
    return routing, record.decisions[0].seed


def by_token(routing: Routing) -> list[dict[int, float]]:
    """Expert → weight for each token."""
    tokens: list[dict[int, float]] = [{} for _ in range(routing.num_tokens)]
    rows = zip(routing.token_ids_A.tolist(), routing.expert_ids_A.tolist(), routing.weights_A.tolist(), strict=True)
    for token, expert, weight in rows:
        assert expert not in tokens[token], "a token got the same expert twice"
        tokens[token][expert] = weight
    return tokens
