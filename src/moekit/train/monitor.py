"""What the routers did: counts per layer and expert, the measures of balance they give, and the forms they leave in.

It counts assignments of real tokens and knows nothing of losses or of training.
Shapes: M MoE layers, E experts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from moekit.figures import new_figure
from moekit.files import replacing
from moekit.moe import Routing, RoutingTotals
from moekit.moe.measures import Drift, LayerRouting, Similarity

__all__ = ["LayerRouting", "RoutingMonitor", "to_jsonl", "to_prometheus"]


class RoutingMonitor:
    """Running counts of a model's MoE layers.

    Args:
        layers: the numbers of the MoE layers, as in `ModelConfig.moe_layers`.
        num_experts: E.

    Attributes:
        counts_ME: int64, assignments of real tokens that each expert computed.
        lost_ME: int64, those that the router chose less those; below 0 where an expert took over others' overflow.
        tokens_M: int64, real tokens that each layer routed; None once counts were added without them.

    >>> monitor = RoutingMonitor([1, 3], num_experts=2)
    >>> monitor.add(torch.tensor([[3, 1], [0, 4]]))
    >>> [layer.max_vio for layer in monitor.report()], monitor.experts_used
    ([0.5, 1.0], 3)
    """

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self.layers = tuple(layers)
        self.num_experts = num_experts
        self.counts_ME = torch.zeros(len(self.layers), num_experts, dtype=torch.int64)
        self.lost_ME = torch.zeros_like(self.counts_ME)
        self.tokens_M: Tensor | None = torch.zeros(len(self.layers), dtype=torch.int64)

    @property
    def chosen_ME(self) -> Tensor:
        """int64: what the routers chose, before capacity dropped or moved any."""
        return self.counts_ME + self.lost_ME

    def update(self, routings: Sequence[Routing]) -> None:
        """Add the counts of one forward pass: one routing a MoE layer, in layer order."""
        self.add_totals([RoutingTotals.of(routing) for routing in routings])

    def add_totals(self, totals: Sequence[RoutingTotals]) -> None:
        """Add what was already added up: one a MoE layer, in layer order."""
        assert len(totals) == len(self.layers)
        if not totals:
            return
        # One transfer from the device for all layers.
        both_2ME = torch.stack([torch.stack([total.kept_E, total.chosen_E]) for total in totals], dim=1).cpu()
        self.add(both_2ME[0], both_2ME[1], torch.tensor([total.tokens for total in totals]))

    def add(self, counts_ME: Tensor, chosen_ME: Tensor | None = None, tokens_M: Tensor | None = None) -> None:
        """Add counts that were taken elsewhere. Without `chosen_ME` nothing was dropped; without `tokens_M` no
        number of experts a token can be given any more."""
        self.counts_ME += counts_ME
        if chosen_ME is not None:
            self.lost_ME += chosen_ME - counts_ME
        self.tokens_M = None if self.tokens_M is None or tokens_M is None else self.tokens_M + tokens_M

    def merge(self, other: RoutingMonitor) -> None:
        """Add all that another monitor of the same layers has counted."""
        self.add(other.counts_ME, other.chosen_ME, other.tokens_M)

    def state(self) -> dict[str, Tensor]:
        """All of it as int64 tensors, for a checkpoint; `merge(RoutingMonitor.of_state(layers, state))` adds it."""
        state = {"counts": self.counts_ME, "chosen": self.chosen_ME}
        return state if self.tokens_M is None else state | {"tokens": self.tokens_M}

    @classmethod
    def of_state(cls, layers: Sequence[int], state: Mapping[str, Tensor]) -> RoutingMonitor:
        """A monitor that has counted what `state` says."""
        monitor = cls(layers, state["counts"].shape[1])
        monitor.add(state["counts"], state.get("chosen"), state.get("tokens"))
        return monitor

    def totals(self) -> list[RoutingTotals]:
        """Each MoE layer's chosen and kept counts so far; tokens are 0 where they are not known."""
        tokens = [0] * len(self.layers) if self.tokens_M is None else self.tokens_M.tolist()
        return [RoutingTotals(*row) for row in zip(self.chosen_ME, self.counts_ME.clone(), tokens, strict=True)]

    def report(self) -> list[LayerRouting]:
        """The measures of each MoE layer, in layer order."""
        return [LayerRouting.of_totals(*pair) for pair in zip(self.layers, self.totals(), strict=True)]

    @property
    def experts_used(self) -> int:
        """How many of the M · E experts got anything."""
        return int((self.counts_ME > 0).sum())

    @property
    def max_vio(self) -> float:
        """MaxVio of the worst layer; 0 for a model without MoE layers."""
        return max((layer.max_vio for layer in self.report()), default=0.0)

    @property
    def drop_rate(self) -> float:
        """Assignments of all layers that found no room, over all that the routers chose."""
        return int(self.lost_ME.sum()) / max(int(self.chosen_ME.sum()), 1)

    def as_dict(self) -> list[dict[str, Any]]:
        """`report()` for JSON."""
        return [asdict(layer) for layer in self.report()]

    def save_heatmap(self, path: str | os.PathLike[str]) -> None:
        """Draw each layer's share of assignments per expert, relative to an even share, as a PNG.

        Raises:
            MissingExtraError: matplotlib is not installed.
            FileError: the file cannot be written.
        """
        layers, experts = self.counts_ME.shape
        figure = new_figure(min(4 + 0.3 * experts, 16), min(3 + 0.25 * layers, 12))
        self.draw(figure.add_subplot())
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")

    def draw(self, axes: Any) -> None:
        """The heat map of `save_heatmap` on axes of matplotlib."""
        layers, experts = self.counts_ME.shape
        mean_M1 = self.counts_ME.double().mean(dim=1, keepdim=True).clamp(min=1e-9)
        ratios_ME = (self.counts_ME / mean_M1).numpy()
        image = axes.imshow(ratios_ME, cmap="viridis", vmin=0, vmax=max(2.0, ratios_ME.max()), aspect="auto")
        axes.set(title="Tokens sent to each expert", xlabel="expert", ylabel="layer")
        axes.set_yticks(range(layers), labels=[str(layer) for layer in self.layers])
        if experts <= 32:
            axes.set_xticks(range(experts))
        axes.figure.colorbar(image, ax=axes, label="times an even share")


def to_jsonl(report: Iterable[LayerRouting], step: int) -> str:
    """One line of JSON a layer, each with the step.

    >>> to_jsonl([LayerRouting.of(2, [1, 3])], step=7)[:52]
    '{"step": 7, "layer": 2, "counts": [1, 3], "utilisati'
    """
    return "".join(json.dumps({"step": step} | asdict(layer)) + "\n" for layer in report)


def to_prometheus(
    report: Sequence[LayerRouting],
    *,
    drift: Sequence[Drift] = (),
    similarity: Sequence[Similarity] = (),
    labels: Mapping[str, str] | None = None,
) -> str:
    """The report in Prometheus' text format 0.0.4, for a scrape or a textfile collector.

    Args:
        report: counts that only grow are counters, as `RoutingMonitor` keeps them.
        labels: further labels of every sample, {"model": "…"} say.

    >>> print(to_prometheus([LayerRouting.of(0, [3, 1])], labels={"run": "a"}).splitlines()[2])
    moekit_expert_assignments_total{run="a",layer="0",expert="0"} 3
    """
    common = dict(labels or {})
    lines: list[str] = []
    for name, kind, text, samples in _metrics(report, drift, similarity):
        found = [_sample(name, common | own, value) for own, value in samples]
        if found:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *found]
    return "".join(line + "\n" for line in lines)


_Samples = Iterator[tuple[dict[str, str], float]]


def _metrics(
    report: Sequence[LayerRouting], drift: Sequence[Drift], similarity: Sequence[Similarity]
) -> Iterator[tuple[str, str, str, _Samples]]:
    """Name, type, help and samples of every metric."""
    counts: _Samples = (
        ({"layer": str(one.layer), "expert": str(expert)}, count)
        for one in report
        for expert, count in enumerate(one.counts)
    )
    yield "moekit_expert_assignments_total", "counter", "Assignments of real tokens that each expert computed.", counts
    for field, text in (
        ("utilisation", "Fraction of the experts that got anything."),
        ("entropy", "Entropy of the load over ln(experts), 1 when uniform."),
        ("max_vio", "Load of the busiest expert over the mean, minus 1."),
        ("balance_score", "Population standard deviation of the load over its mean."),
        ("drop_rate", "Assignments without room over all that were chosen."),
        ("mean_k", "Experts that a token chose on average."),
    ):
        yield f"moekit_routing_{field}", "gauge", text, _gauge(report, field)
    dead: _Samples = (({"layer": str(one.layer)}, len(one.dead_experts)) for one in report)
    yield "moekit_routing_dead_experts", "gauge", "Experts that got nothing.", dead
    yield (
        "moekit_router_drift",
        "gauge",
        "Distance of the router weight from its start, relative.",
        _gauge(drift, "distance"),
    )
    yield "moekit_router_drift_cosine", "gauge", "Cosine of the router weight and its start.", _gauge(drift, "cosine")
    yield "moekit_expert_similarity", "gauge", "Mean cosine of pairs of experts.", _gauge(similarity, "mean")
    yield "moekit_expert_twins", "gauge", "Pairs of experts that are practically equal.", _gauge(similarity, "twins")


def _gauge(rows: Sequence[Any], field: str) -> _Samples:
    return (({"layer": str(row.layer)}, value) for row in rows if (value := getattr(row, field)) is not None)


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    number = {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(str(value), str(value))
    return f"{name}{{{inside}}} {number}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
