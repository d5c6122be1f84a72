"""What alarms are made of: the numbers of a step, what the run was told, the limits, and the past that is kept.

Shapes: E experts.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moekit.config import ModelConfig, TrainConfig
from moekit.moe import RoutingTotals
from moekit.moe.measures import Drift, LayerRouting, Similarity

__all__ = ["Alarm", "AlarmLimits", "Memory", "Past", "RunFacts", "Signals"]


@dataclass(frozen=True)
class Alarm:
    """One thing that goes wrong. `str` gives it in one line."""

    name: str
    severity: Literal["warning", "error"]
    step: int
    cause: str
    remedy: str
    layer: int | None = None
    experts: tuple[int, ...] = ()
    evidence: Mapping[str, float] = field(default_factory=dict)
    """What was seen, in numbers."""

    def __str__(self) -> str:
        where = "" if self.layer is None else f" in layer {self.layer}"
        shown = ", ".join(map(str, self.experts[:8])) + (" …" if len(self.experts) > 8 else "")
        which = f" (experts {shown})" if self.experts else ""
        seen = ", ".join(f"{name} {value:.4g}" for name, value in self.evidence.items())
        return f"step {self.step}: {self.name}{where}{which}: {seen}. {self.cause}; {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the run was told, for alarms to name the right cause."""

    num_experts: int
    top_k: int
    balance_coef: float = 0.0
    """Weight of the balance loss that was asked for."""
    balanced: bool = False
    """Whether the router balances without a loss."""
    renormalised: bool = False
    """Whether a token's K weights are divided by their sum."""
    z_coef: float = 0.0
    lr: float | None = None
    """Peak learning rate, where it is known."""
    warmup_steps: int = 0
    router_trains: bool = True

    @classmethod
    def of(cls, model: ModelConfig, train: TrainConfig) -> RunFacts:
        """The facts of one of our own runs; a dense model has one expert."""
        moe, given = model.moe, train.balance_coef
        return cls(
            num_experts=moe.num_experts if moe else 1,
            top_k=moe.top_k if moe else 1,
            balance_coef=model.router_aux_loss_coef if given is None else given,
            balanced=moe.options.balanced if moe else True,
            renormalised=bool(moe and moe.options.gated and (moe.norm_topk_prob or moe.gate_order == "topk_softmax")),
            z_coef=train.z_coef,
            lr=train.lr,
            warmup_steps=train.warmup_steps,
            router_trains=train.router_lr_scale > 0 and bool(moe and moe.options.gate_rows(moe.num_experts)),
        )


@dataclass(frozen=True)
class Memory:
    """Bytes that tensors use, and bytes the allocator holds for them."""

    allocated: int
    reserved: int


@dataclass(frozen=True, kw_only=True)
class Signals:
    """One optimizer step, as far as it was measured; what is left out raises no alarm."""

    step: int
    loss: float
    """The language model's loss alone, in nats."""
    grad_norm: float
    """Before clipping."""
    lr: float = 0.0
    totals: Sequence[RoutingTotals] = ()
    """What each MoE layer's router chose and its experts computed, in layer order."""
    layers: Sequence[int] = ()
    """The numbers of those layers; 0, 1, … when not given."""
    balance_loss: float | None = None
    """The balance loss that was added, before its weight; None when none was."""
    z_loss: float | None = None
    router_grad_norm: float | None = None
    """Norm of the gradients of all router weights together."""
    real_tokens: int | None = None
    """Tokens of the step that are no padding, counted where the batch was made."""
    drift: Sequence[Drift] = ()
    similarity: Sequence[Similarity] = ()
    memory: Memory | None = None


@dataclass(frozen=True, kw_only=True)
class AlarmLimits:
    """Where measures become alarms."""

    window: int = 20
    """Steps whose counts are added up before routing is judged."""
    every: int = 5
    """Steps between judgements of the routing."""
    quiet: int = 50
    """Steps before an alarm that went away may be raised again."""
    min_assignments: float = 32.0
    """Mean assignments an expert must have had in the window for it to be judged."""
    blow_up: float = 1.3
    """Loss over the best of the last 200 steps, medians of 5; and 0.3 nats, and 5 standard deviations, more than it."""
    logit_scale: float = 12.0
    """Root of the z-loss (the mean square of logsumexp), or ln E + 8 where that is more."""
    collapse: float = 0.1
    """Part of the way from K busy experts (0) to E (1) below which the layer has collapsed."""
    max_vio: float = 2.0
    """MaxVio, or nine tenths of the most that E experts and K allow, E/K − 1, where that is less."""
    drop_rate: float = 0.1
    """Share of the assignments without room; three times as much is an error."""
    frozen_after: int = 10
    """Steps a router may stand still."""
    drift_speed: float = 0.05
    """Change of a logit in one step, see `Drift.speed`."""
    settled: int = 20
    """Steps after the warm-up until a loss that blows up is no longer put down to it."""
    identical_after: int = 20
    """Steps that copied experts have to become different."""
    fragmentation: float = 1.5
    """Reserved over allocated memory, when more than 1 GiB lies between."""


class Past:
    """What is remembered of the steps so far: a bounded window, whatever the length of the run."""

    def __init__(self, facts: RunFacts, limits: AlarmLimits) -> None:
        self.facts, self.limits = facts, limits
        self.first_step: int | None = None
        self.recent = math.inf
        """Median loss of the last 5 steps."""
        self.best = math.inf
        """Lowest such median of the last 200 steps."""
        self.noise = 0.0
        """Standard deviation of the loss from step to step; 0 until there are 20 of them."""
        self.totals: list[RoutingTotals] = []
        """What each layer did in the window."""
        self.routing: list[LayerRouting] | None = None
        """What the routers chose in the window, for each layer with enough assignments; None when this step is not
        one to judge."""
        self._losses: deque[float] = deque(maxlen=50)
        self._medians: deque[float] = deque(maxlen=200)
        self._window: deque[Sequence[RoutingTotals]] = deque()

    def take(self, signals: Signals) -> None:
        """Move on by one step."""
        if self.first_step is None:
            self.first_step = signals.step
        self._add_loss(signals.loss)
        if signals.totals:
            self._add(signals.totals)
        due = signals.step % self.limits.every == 0 and len(self._window) == self.limits.window
        self.routing = self._judged(signals) if due else None

    def _add_loss(self, loss: float) -> None:
        self._losses.append(loss)
        losses = list(self._losses)
        self.recent = statistics.median(losses[-5:])
        if math.isfinite(self.recent):
            self._medians.append(self.recent)
            self.best = min(self._medians)
        changes = [abs(b - a) for a, b in itertools.pairwise(losses) if math.isfinite(b - a)]
        # The median change of independent normal values is 0.954 of their standard deviation, and blind to jumps.
        self.noise = statistics.median(changes) / 0.954 if len(changes) >= 20 else 0.0

    def _add(self, totals: Sequence[RoutingTotals]) -> None:
        """Move the window by one step."""
        step = [RoutingTotals(one.chosen_E.cpu(), one.kept_E.cpu(), one.tokens) for one in totals]
        self.totals = [a + b for a, b in zip(self.totals, step, strict=True)] if self.totals else step
        self._window.append(step)
        if len(self._window) > self.limits.window:
            gone = self._window.popleft()
            self.totals = [_less(a, b) for a, b in zip(self.totals, gone, strict=True)]

    def _judged(self, signals: Signals) -> list[LayerRouting]:
        layers = signals.layers or range(len(self.totals))
        return [
            LayerRouting.of(layer, total.chosen_E.tolist(), tokens=total.tokens or None)
            for layer, total in zip(layers, self.totals, strict=True)
            if total.chosen_E.double().mean() >= self.limits.min_assignments
        ]


def _less(a: RoutingTotals, b: RoutingTotals) -> RoutingTotals:
    return RoutingTotals(a.chosen_E - b.chosen_E, a.kept_E - b.kept_E, a.tokens - b.tokens)
