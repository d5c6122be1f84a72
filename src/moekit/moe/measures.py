"""How a layer's routing was spread, how far its router has moved, and how alike its experts are.

Pure functions of counts and weights; what they cost does not grow with the size of the model: of large tensors a
fixed sample is read, the same one every time. Shapes: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.moe.types import RoutingTotals

__all__ = ["Drift", "ExpertStack", "LayerRouting", "RouterDrift", "Similarity", "expert_similarity"]

TWINS = 1e-6
"""Experts whose cosine is this close to 1 are one and the same: they differ by a thousandth of their norm."""


@dataclass(frozen=True)
class LayerRouting:
    """How one MoE layer spread its assignments over its experts. With c the counts and c̄ their mean over all E:"""

    layer: int
    counts: tuple[int, ...]
    """Assignments of real tokens that each expert computed."""
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
    drop_rate: float = 0.0
    """Assignments that found no room in their expert, over all that the router chose."""
    mean_k: float | None = None
    """Experts that a token chose on average; None where tokens were not counted."""

    @classmethod
    def of(cls, layer: int, counts: Sequence[int], *, dropped: int = 0, tokens: int | None = None) -> LayerRouting:
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
            drop_rate=dropped / (total + dropped) if total + dropped else 0.0,
            mean_k=(total + dropped) / tokens if tokens else None,
        )

    @classmethod
    def of_totals(cls, layer: int, totals: RoutingTotals) -> LayerRouting:
        """The measures of what one layer's experts computed."""
        return cls.of(layer, totals.kept_E.tolist(), dropped=totals.dropped, tokens=totals.tokens)

    @property
    def effective_experts(self) -> float:
        """exp of the entropy in nats: that many equally busy experts would be as spread; from 1 (K, dropless) to E."""
        return math.exp(self.entropy * math.log(len(self.counts)))


@dataclass(frozen=True)
class Drift:
    """How far one layer's router weight W has moved from W₀, where it was first seen."""

    layer: int
    distance: float
    """‖W − W₀‖ / ‖W₀‖; infinite when W₀ was 0 and W is not."""
    cosine: float
    """Of W and W₀: 1 while the direction is kept; 0 where either is 0 and the other is not."""
    speed: float
    """Root mean square change of a logit in one step since the report before, for a token whose entries have root
    mean square 1: √D times that of W's entries. Unlike a relative change it means the same for a small W."""


class RouterDrift:
    """Remembers router weights and says how far they have moved.

    Args:
        weights: each MoE layer's number to its router's weight (..., D); read again at every report.
        values: entries kept of each weight; of larger ones a fixed random sample.

    >>> weight = torch.ones(2, 3)
    >>> drift = RouterDrift({0: weight})
    >>> weight *= 1.5
    >>> drift.report()
    [Drift(layer=0, distance=0.5, cosine=1.0, speed=0.866...)]
    """

    def __init__(self, weights: Mapping[int, Tensor], values: int = 65_536) -> None:
        self._weights = dict(weights)
        self._samples = {layer: _sample(weight.numel(), values) for layer, weight in weights.items()}
        self._first = self._read()
        self._last = self._first

    def report(self, steps: int = 1) -> list[Drift]:
        """Each layer's drift, in the order given; `steps` have been taken since the report before."""
        now, found = self._read(), []
        for layer, weight in self._weights.items():
            change = (now[layer] - self._last[layer]).square().mean().item()
            speed = math.sqrt(weight.shape[-1] * change) / max(steps, 1)
            found.append(_drift(layer, now[layer], self._first[layer], speed))
        self._last = now
        return found

    def _read(self) -> dict[int, Tensor]:
        return {layer: _values(weight, self._samples[layer]) for layer, weight in self._weights.items()}


@dataclass(frozen=True)
class ExpertStack:
    """The weights of experts of one shape.

    Attributes:
        first: number of the first of them in its layer.
        tensors: their parameters, each (E, ...).
    """

    first: int
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Similarity:
    """How alike one layer's experts are: cosines between the weights of pairs of experts of one shape."""

    layer: int
    mean: float
    """Mean cosine of all pairs: near 0 for experts drawn at random, 1 for copies."""
    highest: float
    closest: tuple[int, int]
    """The pair of the highest cosine."""
    twins: int
    """Pairs that are practically equal (cosine above 1 − 10⁻⁶)."""
    pairs: int
    """Pairs that were compared."""


def expert_similarity(
    layer: int, stacks: Sequence[ExpertStack], *, experts: int = 32, values: int = 4096
) -> Similarity | None:
    """Compare the experts of each stack with one another.

    At most `experts` experts of a stack, evenly spaced, and `values` weights of each, at random but the same ones
    every time: experts² · values multiplications a stack, in float64.

    Returns None when there are no two experts of one shape.

    >>> rows = torch.eye(3)[[0, 1, 0]]
    >>> expert_similarity(0, [ExpertStack(0, (rows,))])
    Similarity(layer=0, mean=0.333..., highest=1.0, closest=(0, 2), twins=1, pairs=3)
    """
    found = [pairs for stack in stacks if (pairs := _cosines(stack, experts, values)) is not None]
    if not found:
        return None
    first_P, second_P, cosines_P = (torch.cat(parts) for parts in zip(*found, strict=True))
    best = int(cosines_P.argmax())
    return Similarity(
        layer=layer,
        mean=cosines_P.mean().item(),
        highest=cosines_P[best].item(),
        closest=(int(first_P[best]), int(second_P[best])),
        twins=int((cosines_P > 1 - TWINS).sum()),
        pairs=cosines_P.numel(),
    )


def _cosines(stack: ExpertStack, experts: int, values: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """(P,) each: the first and the second expert of every pair, and their cosine."""
    tensors = [tensor.detach() for tensor in stack.tensors if tensor.numel()]
    count = tensors[0].shape[0] if tensors else 0
    if count < 2:
        return None
    chosen_N = torch.arange(min(count, experts)) * count // min(count, experts)
    size = sum(tensor[0].numel() for tensor in tensors)
    rows_NV = torch.cat([_rows(tensor, chosen_N, -(-values * tensor[0].numel() // size)) for tensor in tensors], dim=1)
    norms_N1 = rows_NV.norm(dim=1, keepdim=True)
    rows_NV = rows_NV / norms_N1.clamp(min=torch.finfo(torch.float64).tiny)
    first_P, second_P = torch.triu_indices(len(chosen_N), len(chosen_N), offset=1)
    cosines_P = (rows_NV @ rows_NV.T)[first_P, second_P].clamp(-1, 1)
    return chosen_N[first_P] + stack.first, chosen_N[second_P] + stack.first, cosines_P


def _rows(tensor: Tensor, chosen_N: Tensor, values: int) -> Tensor:
    """(N, values) float64: the same entries of each chosen expert."""
    flat_EV, chosen_N = tensor.reshape(tensor.shape[0], -1), chosen_N.to(tensor.device)
    sample = _sample(flat_EV.shape[1], values)
    rows_NV = flat_EV[chosen_N] if sample is None else flat_EV[chosen_N[:, None], sample.to(tensor.device)]
    return rows_NV.cpu().double()


def _drift(layer: int, now: Tensor, first: Tensor, speed: float) -> Drift:
    moved, start, norm = ((now - first).norm().item(), first.norm().item(), now.norm().item())
    if moved == 0:
        return Drift(layer, 0.0, 1.0, speed)
    cosine = (now @ first).item() / (norm * start) if norm and start else 0.0
    return Drift(layer, moved / start if start else math.inf, cosine, speed)


def _sample(size: int, values: int) -> Tensor | None:
    """Which `values` of `size` entries to read; None for all of them.

    Drawn at random, because evenly spaced ones can fall into one column of a matrix; from a generator of its own,
    because a monitor must not change what torch's draws next.
    """
    if size <= values:
        return None
    return torch.randint(size, (values,), generator=torch.Generator().manual_seed(0)).sort().values


def _values(weight: Tensor, sample: Tensor | None) -> Tensor:
    """Those entries, as float64 on the CPU, in memory of their own."""
    flat = weight.detach().reshape(-1)
    return (flat if sample is None else flat[sample.to(flat.device)]).to("cpu", torch.float64, copy=True)
