"""How many experts must be read when only some fit: every cache policy over one recorded routing, beside Belady's
optimum, which knows the future. Nothing is read or timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moekit.adapt.expert_policies import DEFAULT
from moekit.adapt.expert_simulate import simulate
from moekit.adapt.store import Key
from moekit.engine.trace import RoutingTrace

__all__ = ["POLICIES", "SHARES", "CurvePoint", "curve", "trace_steps"]

SHARES = (0.25, 0.5, 0.75, 1.0)
POLICIES = ("lru", "lfu", "lfuda", DEFAULT, "belady")
TOKENS = 2048
"""Of a recorded trace, at most: what `trace_steps` takes."""


@dataclass(frozen=True)
class CurvePoint:
    """What a share of the experts in memory is worth.

    Attributes:
        routing: whose: "random", or a trace's name.
        share, slots: of all experts, those in memory.
        hits: for each policy, the share of expert uses that found the expert in memory, from an empty cache on.
        misses_of_belady: misses of the default policy, relative to Belady's, the fewest that are possible.
        misses_of_best_other: the same relative to the best of the other policies; below 1 the default is the best.
        tokens_per_second: measured with the default policy; None where nothing was run.
    """

    routing: str
    share: float
    slots: int
    hits: dict[str, float]
    misses_of_belady: float
    misses_of_best_other: float
    tokens_per_second: float | None = None


def curve(steps: Sequence[Sequence[Key]], experts: int, routing: str) -> list[CurvePoint]:
    """A point for each of `SHARES`.

    Args:
        steps: for each layer of each token, the experts used together.
        experts: how many there are.
        routing: its name.

    >>> points = curve([[(0, 0)], [(0, 1)], [(0, 2)], [(0, 3)]] * 8, 4, "in turn")
    >>> points[-1].hits["lru"], points[1].hits["lru"], points[1].hits["belady"] > 0.3
    (0.875, 0.0, True)
    """
    least, uses = max(map(len, steps)), sum(map(len, steps))
    points = []
    for share in SHARES:
        slots = max(least, round(share * experts))
        misses = {policy: simulate(steps, slots, policy).misses for policy in POLICIES}
        others = min(misses[policy] for policy in POLICIES if policy not in (DEFAULT, "belady"))
        hits = {policy: 1 - count / uses for policy, count in misses.items()}
        of_belady, of_best = misses[DEFAULT] / misses["belady"], misses[DEFAULT] / others
        points.append(CurvePoint(routing, share, slots, hits, of_belady, of_best))
    return points


def trace_steps(path: Path) -> tuple[list[list[Key]], int]:
    """The steps of a trace that `moekit inspect MODEL --text FILE --save-trace PATH` wrote, and the number of experts
    in all: token by token, as in decoding, of the first 2048 tokens.

    Raises:
        FileError, FormatError: it is none.
    """
    trace = RoutingTrace(path)
    steps: list[list[Key]] = []
    for number, ids_MK in enumerate(_tokens(trace)):
        if number == TOKENS:
            break
        for layer, ids_K in zip(trace.head.layers, ids_MK, strict=True):
            steps.append([(layer, expert) for expert in ids_K if expert >= 0])
    return [step for step in steps if step], len(trace.head.layers) * trace.head.num_experts


def _tokens(trace: RoutingTrace) -> Iterator[list[list[int]]]:
    for row in trace.rows():
        yield from row.experts_TMK.tolist()
