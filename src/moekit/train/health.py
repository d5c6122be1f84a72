"""`RunHealth`: everything that is watched about a run of our own decoder, in one call a step.

It reads weights and counts, draws no random number of torch's, and so changes no bit of what is learned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekit.config import TrainConfig
from moekit.models.decoder import Decoder
from moekit.moe import MoE, RoutingTotals
from moekit.moe.measures import Drift, ExpertStack, RouterDrift, Similarity, expert_similarity
from moekit.train.alarms import Alarm, AlarmLimits, Alarms, Memory, RunFacts, Signals
from moekit.train.metrics import StepMetrics

__all__ = ["RunHealth", "expert_stacks", "router_weights"]


class RunHealth:
    """Drift of the routers, similarity of the experts, and alarms.

    Drift is measured from the weights as they are when this is made; a run that goes on starts it anew.

    Args:
        decoder: the model that is trained.
        config: how.
        limits: where measures become alarms.
        every: steps between readings of the weights.

    Attributes:
        drift: of each router with weights, as last read.
        similarity: of each layer with comparable experts, as last read.
        alarms: the alarms' state; `alarms.active` are those that stand.
    """

    def __init__(
        self, decoder: Decoder, config: TrainConfig, *, limits: AlarmLimits | None = None, every: int = 25
    ) -> None:
        self.alarms = Alarms(RunFacts.of(decoder.config, config), limits)
        self.every = every
        self.drift: list[Drift] = []
        self.similarity: list[Similarity] = []
        self._layers = decoder.config.moe_layers
        self._moes = moe_layers(decoder)
        self._router_drift = RouterDrift(router_weights(decoder))
        self._device = decoder.device

    def step(
        self, metrics: StepMetrics, totals: Sequence[RoutingTotals], *, real_tokens: int | None = None
    ) -> list[Alarm]:
        """Take in one optimizer step.

        Args:
            metrics: what the step reported.
            totals: what each MoE layer did in it, in layer order.
            real_tokens: tokens of its batches that are no padding, where that was counted.
        Returns:
            The alarms that are new.
        """
        read = bool(self._moes) and metrics.step % self.every == 0
        if read:
            self.drift = self._router_drift.report(self.every)
            found = (expert_similarity(layer, expert_stacks(moe)) for layer, moe in self._moes.items())
            self.similarity = [one for one in found if one is not None]
        return self.alarms.step(
            Signals(
                step=metrics.step,
                loss=metrics.lm_loss,
                grad_norm=metrics.grad_norm,
                lr=metrics.lr,
                totals=totals,
                layers=self._layers,
                balance_loss=metrics.balance_loss,
                z_loss=metrics.z_loss,
                real_tokens=real_tokens,
                drift=self.drift if read else (),
                similarity=self.similarity if read else (),
                memory=_memory(self._device),
            )
        )


def moe_layers(decoder: Decoder) -> dict[int, MoE]:
    """The MoE layers by their number."""
    found = {number: block.mlp for number, block in enumerate(decoder.layers)}
    return {number: mlp for number, mlp in found.items() if isinstance(mlp, MoE)}


def router_weights(decoder: Decoder) -> dict[int, Tensor]:
    """Each MoE layer's router weight, of those that have one (hash has none)."""
    weights = {layer: moe.router.weight for layer, moe in moe_layers(decoder).items()}
    return {layer: weight for layer, weight in weights.items() if weight is not None}


def expert_stacks(moe: MoE) -> list[ExpertStack]:
    """The weights of a layer's experts, one stack for each group of equal shape."""
    groups = getattr(moe.experts, "groups", [moe.experts])
    sizes = getattr(moe.experts, "sizes", [moe.config.num_experts])
    stacks, first = [], 0
    for group, size in zip(groups, sizes, strict=True):
        tensors = tuple(parameter for parameter in group.parameters() if parameter.ndim == 3)
        if tensors:
            stacks.append(ExpertStack(first, tensors))
        first += size
    return stacks


def _memory(device: torch.device) -> Memory | None:
    """The allocator's figures; a CPU has none to ask for."""
    if device.type != "cuda":
        return None
    return Memory(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))
