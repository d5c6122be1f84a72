"""The checks behind `Alarms`: one pure function an alarm, of the past and of this step.

Each returns the alarms it sees now, or None when this step brought nothing for it to judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from moekit.moe.measures import LayerRouting
from moekit.train.signals import Alarm, Past, Signals

__all__ = ["CHECKS"]

GIB = 1 << 30
NOISE = 1e-6

Check = Callable[[Past, Signals], list[Alarm] | None]


def loss_blow_up(past: Past, now: Signals) -> list[Alarm] | None:
    """The loss is not finite, or stands well above where it has been."""
    finite = math.isfinite(now.loss) and math.isfinite(now.grad_norm)
    limit = max(past.best * past.limits.blow_up, past.best + max(0.3, 5 * past.noise))
    if finite and not past.recent > limit:
        return []
    evidence = {"loss": now.loss, "grad_norm": now.grad_norm}
    if math.isfinite(past.best):
        evidence["best"] = past.best
    cause, remedy = _why_blown_up(past, now, evidence)
    return [Alarm("loss_blow_up", "error", now.step, cause, remedy, evidence=evidence)]


def _why_blown_up(past: Past, now: Signals, evidence: dict[str, float]) -> tuple[str, str]:
    facts, scale = past.facts, _logit_scale(now)
    lr = f"lower lr (at most {facts.lr:g})" if facts.lr else "lower lr"
    if scale is not None and scale > _scale_limit(past):
        evidence["logit_scale"] = scale
        return (
            "the router's logits have grown until its softmax is a step",
            f"{lr}, set z_coef 0.001 (now {facts.z_coef:g}), or raise the router's temperature",
        )
    if now.step <= facts.warmup_steps + past.limits.settled:
        return (
            "the learning rate rises faster than the optimizer's moments can follow",
            f"{lr} or raise warmup_steps (now {facts.warmup_steps})",
        )
    return "the learning rate is too high for these weights", f"{lr} and go on from the last good checkpoint"


def router_saturated(past: Past, now: Signals) -> list[Alarm] | None:
    """Logits so large that the router cannot change its mind: the temperature is too low for them."""
    scale = _logit_scale(now)
    if scale is None:
        return None
    if scale <= _scale_limit(past):
        return []
    return [
        Alarm(
            "router_saturated",
            "warning",
            now.step,
            "the router's logits are so large that its softmax is a step and has no gradient",
            f"set z_coef 0.001 (now {past.facts.z_coef:g}), raise the router's temperature or lower its learning rate",
            evidence={"logit_scale": scale, "limit": _scale_limit(past)},
        )
    ]


def _logit_scale(now: Signals) -> float | None:
    """Root mean square of logsumexp."""
    return None if now.z_loss is None or not math.isfinite(now.z_loss) else math.sqrt(now.z_loss)


def _scale_limit(past: Past) -> float:
    return max(past.limits.logit_scale, math.log(past.facts.num_experts) + 8)


def collapse(past: Past, now: Signals) -> list[Alarm] | None:
    """All tokens go to the same K experts, or nearly."""
    layers = past.routing
    if layers is None:
        return None
    return [
        Alarm(
            "collapse",
            "error",
            now.step,
            *_why_uneven(past, now),
            layer=one.layer,
            experts=_busiest(one, round(_top_k(past, one))),
            evidence={"effective_experts": one.effective_experts, "experts": len(one.counts), "max_vio": one.max_vio},
        )
        for one in layers
        if _collapsed(past, one)
    ]


def imbalance(past: Past, now: Signals) -> list[Alarm] | None:
    """One expert does far more than its share, without the layer having collapsed."""
    layers = past.routing
    if layers is None:
        return None
    return [
        Alarm(
            "imbalance",
            "warning",
            now.step,
            *_why_uneven(past, now),
            layer=one.layer,
            experts=_busiest(one, 1),
            evidence={"max_vio": one.max_vio, "balance_score": one.balance_score, "entropy": one.entropy},
        )
        for one in layers
        if not _collapsed(past, one) and one.max_vio > _vio_limit(past, one)
    ]


def dead_experts(past: Past, now: Signals) -> list[Alarm] | None:
    """Experts that no token chose in the whole window, without the layer having collapsed."""
    layers = past.routing
    if layers is None:
        return None
    cause, remedy = _why_uneven(past, now)
    return [
        Alarm(
            "dead_experts",
            "warning",
            now.step,
            f"{cause}, and an expert without tokens gets no gradient to win any back",
            remedy,
            layer=one.layer,
            experts=one.dead_experts,
            evidence={"dead": len(one.dead_experts), "experts": len(one.counts), "mean_load": _mean(one)},
        )
        for one in layers
        if one.dead_experts and not _collapsed(past, one)
    ]


def _why_uneven(past: Past, now: Signals) -> tuple[str, str]:
    facts = past.facts
    if facts.balanced:
        return "the router's own balancing is too slow for this data", "raise bias_rate, or lower the router's lr"
    if facts.balance_coef == 0:
        return "no balance loss is on: the experts that are ahead learn more and win more", "set balance_coef 0.01"
    seen = "" if now.balance_loss is None else f" at a loss of {now.balance_loss:.3g}, which is 1 when balanced,"
    return (
        f"the balance loss is too weak:{seen} its weight is {facts.balance_coef:g}",
        f"raise balance_coef to {10 * facts.balance_coef:g}, or lower the router's learning rate",
    )


def _top_k(past: Past, one: LayerRouting) -> float:
    return one.mean_k or past.facts.top_k


def _collapsed(past: Past, one: LayerRouting) -> bool:
    top_k, experts = _top_k(past, one), len(one.counts)
    return top_k < experts and (one.effective_experts - top_k) / (experts - top_k) <= past.limits.collapse


def _vio_limit(past: Past, one: LayerRouting) -> float:
    return min(past.limits.max_vio, 0.9 * (len(one.counts) / _top_k(past, one) - 1))


def _busiest(one: LayerRouting, number: int) -> tuple[int, ...]:
    return tuple(sorted(range(len(one.counts)), key=lambda expert: -one.counts[expert])[:number])


def _mean(one: LayerRouting) -> float:
    return sum(one.counts) / len(one.counts)


def drop_rate_high(past: Past, now: Signals) -> list[Alarm] | None:
    """Capacity throws away a good part of what the router chose."""
    layers = past.routing
    if layers is None:
        return None
    shown, found = {one.layer: one for one in layers}, []
    for layer, total in zip(now.layers or range(len(past.totals)), past.totals, strict=True):
        rate = total.dropped / max(int(total.chosen_E.sum()), 1)
        if layer in shown and rate > past.limits.drop_rate:
            needed = shown[layer].max_vio + 1
            found.append(
                Alarm(
                    "drop_rate_high",
                    "error" if rate > 3 * past.limits.drop_rate else "warning",
                    now.step,
                    "the experts' capacity is too small for how uneven the choice is",
                    f"raise capacity.factor to {needed:.2f}, set overflow next, or leave capacity off",
                    layer=layer,
                    evidence={"drop_rate": rate, "max_vio": needed - 1},
                )
            )
    return found


def k1_renormalised(past: Past, now: Signals) -> list[Alarm] | None:
    """K = 1 and the weight divided by itself: it is 1 whatever the router says."""
    facts = past.facts
    # Not exactly 0: x / x has a gradient of rounding errors, which AdamW would blow up to steps of full size.
    still = now.router_grad_norm is not None and now.router_grad_norm <= NOISE * now.grad_norm
    if facts.top_k != 1 or facts.num_experts == 1 or not (facts.renormalised or still):
        return []
    evidence = {"top_k": 1.0} | ({} if now.router_grad_norm is None else {"router_grad_norm": now.router_grad_norm})
    return [
        Alarm(
            "k1_renormalised",
            "error",
            now.step,
            "with one expert a token and renormalised weights every weight is 1, so the loss gives the router no "
            "gradient",
            "set norm_topk_prob False (gate_order softmax_topk), or take two experts",
            evidence=evidence,
        )
    ]


def padding_counted(past: Past, now: Signals) -> list[Alarm] | None:
    """The routers count more tokens than the batch has."""
    if now.real_tokens is None or not now.totals:
        return None
    counted = max(total.tokens for total in now.totals)
    if counted <= now.real_tokens:
        return []
    return [
        Alarm(
            "padding_counted",
            "warning",
            now.step,
            "padding is routed and counted like text, in the balance loss too",
            "pass the mask (attention_mask) to the model, or pack rows without padding",
            evidence={"counted": counted, "real": now.real_tokens, "padding": 1 - now.real_tokens / counted},
        )
    ]


def aux_switched_off(past: Past, now: Signals) -> list[Alarm] | None:
    """A coefficient is set, but no such loss was added."""
    asked = {"balance_coef": past.facts.balance_coef, "z_coef": past.facts.z_coef}
    added = {"balance_coef": now.balance_loss, "z_coef": now.z_loss}
    lost = {name: coef for name, coef in asked.items() if coef > 0 and added[name] is None}
    if not now.totals or not lost:
        return []
    return [
        Alarm(
            "aux_switched_off",
            "error",
            now.step,
            "a router loss has a weight, but is not part of what is minimised",
            "in transformers set output_router_logits True; elsewhere add the loss, or set the weight to 0",
            evidence=lost,
        )
    ]


def router_frozen(past: Past, now: Signals) -> list[Alarm] | None:
    """A router's weight has not changed by a bit since it was first seen."""
    if not now.drift or not past.facts.router_trains or past.first_step is None:
        return None
    steps = now.step - past.first_step
    if steps < past.limits.frozen_after or now.lr == 0:
        return []
    return [
        Alarm(
            "router_frozen",
            "warning",
            now.step,
            "the router does not learn: no optimizer holds it, its gradient is 0, or its steps are below what its "
            "dtype resolves",
            "give its weight to the optimizer, keep it in float32, and see that its gradient is not 0",
            layer=one.layer,
            evidence={"drift": one.distance, "steps": steps},
        )
        for one in now.drift
        if one.distance == 0
    ]


def drift_fast(past: Past, now: Signals) -> list[Alarm] | None:
    """A router's weight changes so fast that the experts cannot follow."""
    if not now.drift:
        return None
    return [
        Alarm(
            "drift_fast",
            "warning",
            now.step,
            "the router moves faster than its experts can specialise",
            "lower router_lr_scale, or set z_coef 0.001",
            layer=one.layer,
            evidence={"speed": one.speed, "drift": one.distance, "cosine": one.cosine},
        )
        for one in now.drift
        if one.speed > past.limits.drift_speed
    ]


def experts_identical(past: Past, now: Signals) -> list[Alarm] | None:
    """Copies of one expert are still the same after they should have become different."""
    if not now.similarity or past.first_step is None:
        return None
    steps = now.step - past.first_step
    if steps < past.limits.identical_after:
        return []
    return [
        Alarm(
            "experts_identical",
            "warning",
            now.step,
            "copied experts get the same tokens or none, or learn too slowly, and so do not become different",
            "upcycle with noise or drop, raise lr, or unfreeze the experts",
            layer=one.layer,
            experts=one.closest,
            evidence={"twins": one.twins, "pairs": one.pairs, "cosine": one.highest, "steps": steps},
        )
        for one in now.similarity
        if one.twins
    ]


def fragmentation(past: Past, now: Signals) -> list[Alarm] | None:
    """The allocator holds much more memory than the tensors use."""
    if now.memory is None:
        return None
    used, held = now.memory.allocated, now.memory.reserved
    if held <= past.limits.fragmentation * max(used, 1) or held - used < GIB:
        return []
    return [
        Alarm(
            "fragmentation",
            "warning",
            now.step,
            "expert batches change size every step and leave holes in the allocator's memory",
            "set PYTORCH_ALLOC_CONF=expandable_segments:True, or fix the sizes with capacity.pad",
            evidence={"reserved_gib": held / GIB, "allocated_gib": used / GIB},
        )
    ]


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        loss_blow_up,
        router_saturated,
        collapse,
        imbalance,
        dead_experts,
        drop_rate_high,
        k1_renormalised,
        padding_counted,
        aux_switched_off,
        router_frozen,
        drift_fast,
        experts_identical,
        fragmentation,
    )
}
