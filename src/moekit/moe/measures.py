"""How a layer's routing was spread, over texts and pairs too; how far its router has moved; how alike its experts are.

Pure functions of counts and weights; what they cost does not grow with the size of the model: of large tensors a
fixed sample is read, the same one every time. Shapes: E experts, N texts (domains), T tokens, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.moe.types import RoutingTotals

__all__ = [
    "Drift",
    "ExpertPair",
    "ExpertStack",
    "LayerRouting",
    "RouterDrift",
    "Similarity",
    "Specialisation",
    "domain_shares",
    "expected_pairs",
    "expert_pairs",
    "expert_similarity",
    "pair_counts",
]

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


@dataclass(frozen=True)
class Specialisation:
    """How differently texts of N domains use one layer's experts. With q_d the distribution of domain d's assignments
    over the experts, q̄ the mean of all q_d, so that a long text weighs no more than a short one, and H in bits:"""

    layer: int
    bits: float
    """H(q̄) − Σ H(q_d) / N: the Jensen-Shannon divergence of the q_d with equal weights (Lin 1991, IEEE Trans. Inf.
    Theory 37:145, section V), which is the mutual information of domain and expert when all domains are as likely.
    From 0, all domains alike, to log2 min(N, E), no expert shared."""
    chance: float
    """What `bits` would be on average if there were no difference and every assignment, n_d of domain d, were drawn
    alone from q̄: (N−1)(E'−1) / (2 N² ln 2) · Σ 1/n_d, E' experts in use (the leading term; Miller 1955)."""
    domains: tuple[float, ...]
    """Σ q_d log2(q_d / q̄) of each domain, its divergence from the mean; `bits` is the mean of these."""

    @classmethod
    def of(cls, layer: int, counts_NE: Tensor) -> Specialisation:
        """The measures of these counts; a domain without assignments has divergence 0 and is left out of all means.

        >>> Specialisation.of(0, torch.tensor([[8, 0], [0, 2]])).bits
        1.0
        """
        totals_N = counts_NE.sum(dim=1).double()
        used_N = totals_N > 0
        domains = int(used_N.sum())
        q_NE = counts_NE[used_N].double() / totals_N[used_N, None]
        mean_E = q_NE.mean(dim=0) if domains else q_NE.sum(dim=0)
        divergence_N = totals_N.new_zeros(len(totals_N))
        divergence_N[used_N] = torch.where(q_NE > 0, q_NE * (q_NE / mean_E).log2(), 0).sum(dim=1).clamp(min=0)
        freedom = (domains - 1) * (int((mean_E > 0).sum()) - 1)
        chance = (
            freedom / (2 * math.log(2) * domains**2) * totals_N[used_N].reciprocal().sum().item() if domains else 0.0
        )
        return cls(layer, divergence_N.sum().item() / max(domains, 1), chance, tuple(divergence_N.tolist()))


def domain_shares(counts_NE: Tensor) -> Tensor:
    """(N, E) float64: the share of each expert's work that came from each domain, were all domains of one size.

    q_d(e) / Σ q(e) over the domains, with q_d(e) the share of domain d's assignments that expert e got (which is, up to
    the factor K, the "domain specialization" of 2409.02060). A column sums to 1, or is 0 for an expert without work.

    >>> domain_shares(torch.tensor([[30, 10], [1, 3]])).tolist()
    [[0.75, 0.25], [0.25, 0.75]]
    """
    q_NE = counts_NE.double() / counts_NE.sum(dim=1, keepdim=True).clamp(min=1)
    total_E = q_NE.sum(dim=0)
    return torch.where(total_E > 0, q_NE / total_E, 0)


def pair_counts(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """(E, E) int64: how many tokens took both experts; the diagonal has how many took the one.

    Args:
        expert_ids_TK: whole numbers, each expert of a token once; −1 where a token took fewer than K.
        num_experts: E.

    >>> pair_counts(torch.tensor([[0, 1], [1, -1]]), 3).tolist()
    [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    """
    assert len(expert_ids_TK) < 1 << 24  # up to there fp32 counts exactly
    ids_TK = expert_ids_TK.long()
    taken_TE = torch.zeros(len(ids_TK), num_experts + 1)
    taken_TE.scatter_(1, torch.where(ids_TK < 0, num_experts, ids_TK), 1.0)
    taken_TE = taken_TE[:, :num_experts]
    return (taken_TE.T @ taken_TE).long()


def expected_pairs(pairs_EE: Tensor, steps: int = 1000) -> Tensor:
    """(E, E) float64: the pair counts if experts were taken independently of each other; 0 on the diagonal.

    The K experts of a token are distinct, so n_i n_j / T is no fair yardstick: it is too large even for experts drawn
    at random. Quasi-independence is (Goodman 1968, J. Am. Stat. Assoc. 63:1091): a_i a_j off the diagonal, with a such
    that each expert is in as many pairs as it was. For K = 2 that is two independent draws, drawn again when equal.

    Args:
        pairs_EE: as from `pair_counts`; its diagonal is not read.
        steps: at most so many rounds of the fit.

    >>> expected_pairs(torch.tensor([[9, 4, 2], [4, 9, 2], [2, 2, 9]])).round(decimals=6).tolist()
    [[0.0, 4.0, 2.0], [4.0, 0.0, 2.0], [2.0, 2.0, 0.0]]
    """
    sums_E = pairs_EE.to(torch.float64, copy=True).fill_diagonal_(0).sum(dim=1)
    a_E = sums_E / sums_E.sum().clamp(min=1).sqrt()
    for _ in range(steps):
        others_E = a_E.sum() - a_E
        # The mean of old and new in logarithms: the new alone swings between two answers for ever.
        new_E = torch.where(sums_E > 0, (a_E * sums_E / others_E).sqrt(), 0)
        moved = (new_E - a_E).abs().max()
        a_E = new_E
        if moved <= 1e-12 * a_E.max():
            break
    return torch.outer(a_E, a_E).fill_diagonal_(0)


@dataclass(frozen=True)
class ExpertPair:
    """Two experts of one layer that took the same token `together` times, against `expected` (see `expected_pairs`)."""

    layer: int
    experts: tuple[int, int]
    together: int
    expected: float

    @property
    def lift(self) -> float:
        """How many times as often as expected."""
        return self.together / self.expected if self.expected else 0.0


def expert_pairs(layer: int, pairs_EE: Tensor, top: int) -> list[ExpertPair]:
    """The `top` pairs that were together most beyond what was expected, first the one with most tokens more.

    >>> [pair.experts for pair in expert_pairs(0, torch.tensor([[5, 4, 1], [4, 5, 1], [1, 1, 2]]), top=1)]
    [(0, 1)]
    """
    expected_EE = expected_pairs(pairs_EE)
    first_P, second_P = torch.triu_indices(len(pairs_EE), len(pairs_EE), offset=1)
    excess_P = (pairs_EE - expected_EE)[first_P, second_P]
    best = excess_P.sort(descending=True, stable=True).indices[:top].tolist()
    pairs = [(int(first_P[i]), int(second_P[i])) for i in best]
    return [ExpertPair(layer, (i, j), int(pairs_EE[i, j]), expected_EE[i, j].item()) for i, j in pairs]


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
