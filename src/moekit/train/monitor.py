"""What the routers did: counts per layer and expert, and the measures of balance they give.

It counts assignments of real tokens and knows nothing of losses or of training.
Shapes: M MoE layers, E experts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.errors import MissingExtraError
from moekit.files import replacing
from moekit.moe import Routing

__all__ = ["LayerRouting", "RoutingMonitor"]


@dataclass(frozen=True)
class LayerRouting:
    """How one MoE layer spread its assignments over its experts. With c the counts and c̄ their mean over all E:"""

    layer: int
    counts: tuple[int, ...]
    utilisation: float
    """Fraction of the experts that got anything."""
    entropy: float
    """−Σ q ln q / ln E with q = c / Σ c: 1 when uniform, 0 when one expert gets all (or E = 1)."""
    max_vio: float
    """max c / c̄ − 1: how far the busiest expert exceeds the mean (2408.15664 eq 4)."""
    balance_score: float
    """Population standard deviation of c over c̄: 0 when uniform."""
    dead_experts: tuple[int, ...]
    """Experts that got nothing."""

    @classmethod
    def of(cls, layer: int, counts: Sequence[int]) -> LayerRouting:
        """The measures of these counts; without any assignment they are all 0 and every expert is dead.

        >>> LayerRouting.of(0, [6, 2, 0, 0]).max_vio
        2.0
        """
        total, experts = sum(counts), len(counts)
        mean = total / experts
        shares = [count / total for count in counts if count] if total else []
        entropy = -sum(share * math.log(share) for share in shares)
        spread = math.sqrt(sum((count - mean) ** 2 for count in counts) / experts)
        return cls(
            layer=layer,
            counts=tuple(counts),
            utilisation=len(shares) / experts,
            entropy=max(entropy, 0.0) / math.log(experts) if experts > 1 else 0.0,
            max_vio=max(counts) / mean - 1 if total else 0.0,
            balance_score=spread / mean if total else 0.0,
            dead_experts=tuple(expert for expert, count in enumerate(counts) if count == 0),
        )


class RoutingMonitor:
    """Running counts of a model's MoE layers.

    Args:
        layers: the numbers of the MoE layers, as in `ModelConfig.moe_layers`.
        num_experts: E.

    >>> monitor = RoutingMonitor([1, 3], num_experts=2)
    >>> monitor.counts_ME += torch.tensor([[3, 1], [0, 4]])
    >>> [layer.max_vio for layer in monitor.report()], monitor.experts_used
    ([0.5, 1.0], 3)
    """

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self.layers = tuple(layers)
        self.num_experts = num_experts
        self.counts_ME = torch.zeros(len(self.layers), num_experts, dtype=torch.int64)

    def update(self, routings: Sequence[Routing]) -> None:
        """Add the counts of one forward pass: one routing a MoE layer, in layer order."""
        assert len(routings) == len(self.layers)
        for row, routing in enumerate(routings):
            self.counts_ME[row] += routing.counts_E.cpu()

    def add(self, counts_ME: Tensor) -> None:
        """Add counts that were taken elsewhere."""
        self.counts_ME += counts_ME

    def report(self) -> list[LayerRouting]:
        """The measures of each MoE layer, in layer order."""
        return [LayerRouting.of(*pair) for pair in zip(self.layers, self.counts_ME.tolist(), strict=True)]

    @property
    def experts_used(self) -> int:
        """How many of the M · E experts got anything."""
        return int((self.counts_ME > 0).sum())

    @property
    def max_vio(self) -> float:
        """MaxVio of the worst layer; 0 for a model without MoE layers."""
        return max((layer.max_vio for layer in self.report()), default=0.0)

    def as_dict(self) -> list[dict[str, Any]]:
        """`report()` for JSON."""
        return [asdict(layer) for layer in self.report()]

    def save_heatmap(self, path: str | os.PathLike[str]) -> None:
        """Draw each layer's share of assignments per expert, relative to an even share, as a PNG.

        Raises:
            MissingExtraError: matplotlib is not installed.
            FileError: the file cannot be written.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingExtraError("matplotlib", extra="train") from None
        layers, experts = self.counts_ME.shape
        figure = Figure(figsize=(min(4 + 0.3 * experts, 16), min(3 + 0.25 * layers, 12)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        mean_M1 = self.counts_ME.double().mean(dim=1, keepdim=True).clamp(min=1e-9)
        ratios_ME = (self.counts_ME / mean_M1).numpy()
        image = axes.imshow(ratios_ME, cmap="viridis", vmin=0, vmax=max(2.0, ratios_ME.max()), aspect="auto")
        axes.set(title="Tokens sent to each expert", xlabel="expert", ylabel="layer")
        axes.set_yticks(range(layers), labels=[str(layer) for layer in self.layers])
        if experts <= 32:
            axes.set_xticks(range(experts))
        figure.colorbar(image, ax=axes, label="times an even share")
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
