"""A trap that nothing can fall into proves nothing: moekit, made wrong in one place, must fail."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.adapter import Layer, Routed, run
from conformance.judge import status_of
from conformance.losses import definition, top
from conformance.on_moekit_models import MoekitModels
from conformance.report import TRAPS

right = MoekitModels()


def pooled(self, layers: list[Tensor], top_k: int, mask_T: Tensor | None = None) -> Tensor:
    return right.balance_loss([torch.cat(layers)], top_k)


def of_micro_batches(self, parts: list[Tensor], top_k: int) -> Tensor:
    return sum(right.balance_loss([part_TE], top_k) for part_TE in parts) / len(parts)


def with_grown_counts(self, layers: list[Tensor], top_k: int, mask_T: Tensor | None = None) -> Tensor:
    probs_TE = layers[0].softmax(1)
    return definition(probs_TE, top(probs_TE, top_k)) + probs_TE.mean(0).square().sum()


def always_training(self, kind: str, x_TD: Tensor, gate_ED: Tensor, top_k: int, **options: Any) -> Routed:
    return right.route(kind, x_TD, gate_ED, top_k, **(options | {"training": True}))


def random_hash(self, kind: str, x_TD: Tensor, gate_ED: Tensor, top_k: int, **options: Any) -> Routed:
    return right.route(kind, x_TD, gate_ED, top_k, **(options | {"ids_T": torch.randint(0, 4096, (4096,))}))


def another_bias(self, gate_ED: Tensor, bias_E: Tensor, top_k: int) -> Any:
    router = right.biased_router(gate_ED, bias_E, top_k)

    def step_twice(parts: list[Tensor], mode: str) -> None:
        for part_TD in parts:
            router.step([part_TD], mode)

    return router._replace(step=step_twice)


def noisy_layer(self, *args: Any, **options: Any) -> Layer:
    layer = right.layer(*args, **options)
    return layer._replace(run=lambda x_BLD: layer.run(x_BLD) * (1 + 1e-3 * torch.rand(1).to(x_BLD.dtype)))


def unweighted_bias(self) -> Any:
    run_, weights, experts, hidden = right.down_biased()
    return lambda x_BLD, bias_ED: run_(x_BLD, bias_ED * 0) + bias_ED.mean(0), weights, experts, hidden


def expert_choice_too(self, gate_ED: Tensor, top_k: int, *, training: bool) -> Any:
    return {"expert_choice": lambda x_TD: right.route("expert_choice", x_TD, gate_ED, top_k)}


def not_replayed(self, layer: Layer, x_BLD: Tensor, change: Any) -> Any:
    first = right.replayed(layer, x_BLD, change)[0]
    return first, right.route("topk", x_BLD[0], layer.parts().gate_ED, 2, renormalise=True)


def counted_twice(self) -> Any:
    (total, active), by_hand = right.parameter_counts()
    return (total, active + 1), by_hand


def doubled(self, form: str) -> tuple[Tensor, Tensor]:
    dense_BLV, sparse_BLV = right.upcycled(form)
    return dense_BLV, 2 * sparse_BLV


WRONG = {
    (2, "pooled layers"): {"balance_loss": pooled},
    (3, "no mask"): {"z_loss": lambda self, logits_TE, mask_T=None: right.z_loss(logits_TE)},
    (4, "pooled sequences"): {
        "sequence_loss": lambda self, logits_TE, ids_T, top_k, mask_T: right.balance_loss([logits_TE], top_k, mask_T)
    },
    (5, "kept for chosen"): {
        "limited_balance": lambda self, logits_TE, rows, count: right.limited_balance(logits_TE, rows, "kept")
    },
    (6, "not squared"): {"z_loss": lambda self, logits_TE, mask_T=None: logits_TE.logsumexp(1).abs().mean()},
    (7, "micro-batches"): {"global_loss": of_micro_batches},
    (8, "added twice"): {
        "trained": lambda self, coef, mode, **options: right.trained(2 * coef, mode, **options),
    },
    (9, "counts with gradient"): {"balance_loss": with_grown_counts},
    (12, "updated each micro-batch"): {"biased_router": another_bias},
    (16, "a router that sees the batch"): {"dropless": expert_choice_too},
    (17, "balanced in eval"): {"route": always_training},
    (18, "noise in eval"): {"route": always_training},
    (19, "a hash of chance"): {"route": random_hash},
    (20, "rounded down, without K"): {
        "capacity": lambda self, tokens, experts, top_k, factor: int(factor * tokens / experts)
    },
    (21, "not replayed"): {"replayed": not_replayed},
    (22, "a thousandth off"): {"layer": noisy_layer},
    (25, "bias not weighed"): {"down_biased": unweighted_bias},
    (26, "another sum each time"): {"layer": noisy_layer},
    (32, "scale forgotten"): {"upcycled": doubled},
    (36, "recomputed without a record"): {"recomputing": lambda self, layer: layer.run},
    (37, "router counted twice"): {"parameter_counts": counted_twice},
}


@pytest.mark.parametrize(("number", "what"), WRONG, ids=str)
def test_a_trap_sees(number, what):
    wrong = type("Wrong", (MoekitModels,), WRONG[number, what])()
    findings = run(TRAPS[number][1], number, wrong)
    assert status_of(findings) == "fail"
    assert all(not finding.note.startswith("raises") for finding in findings), "it must fail by its number"
    assert any(finding.deviation and not math.isnan(finding.deviation) for finding in findings)
