"""MoE or dense: an MoE takes memory like its total and computes like its active parameters.

So it is advised where memory holds the one and the other saves enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Advice", "Case", "advise"]

WORTH = 1.25
"""Times that the work must fall for experts to pay: routing, sorting and small products may cost a layer a fifth of its
speed. 0.80 of a dense layer of equal FLOPs is what moekit asks of its own; benchmarks/RESULTS.md has the measured."""
TOKENS_PER_PARAMETER = 20
"""Training tokens for each parameter of a compute-optimal dense model (2203.15556 table 3)."""
SPARE = 2.0
"""Times that memory must hold a dense model before experts are worth a thought: two of each MLP are the fewest."""
BATCH = 16
"""Sequences decoded together, for what becomes of the saving in a batch."""


@dataclass(frozen=True)
class Case:
    """What the advice goes by. `work` in FLOPs a token; `dense_work` with all experts at work: that of a dense model of
    the same size. Bytes are those of the format and of the context asked for, `cache_bytes` apart."""

    total: int
    active: int
    work: int
    dense_work: int
    weight_bytes: int
    cache_bytes: int
    memory: int
    num_experts: int
    mean_k: float
    tokens: float | None = None


@dataclass(frozen=True)
class Advice:
    """`choice` for this memory, and why, a sentence each."""

    choice: Literal["moe", "dense", "neither"]
    reasons: tuple[str, ...]


def advise(case: Case) -> Advice:
    """Rules in this order: what does not fit is out; what saves too little is out; else experts.

    >>> mixtral = Case(total=47 * 10**9, active=13 * 10**9, work=25 * 10**9, dense_work=93 * 10**9,
    ...     weight_bytes=27 * 10**9, cache_bytes=10**9, memory=16 * 10**9, num_experts=8, mean_k=2)
    >>> advise(mixtral).choice
    'dense'
    """
    share = case.active / case.total
    dense_bytes = round(case.weight_bytes * share)
    needed, saving = case.weight_bytes + case.cache_bytes, case.dense_work / case.work
    reasons = tuple(_cautions(case))
    if case.num_experts == 1:
        return _of_dense(case, reasons)
    if needed > case.memory:
        why = f"memory is paid for all parameters: {_gib(needed)} with the cache, and there are {_gib(case.memory)}"
        if dense_bytes + case.cache_bytes > case.memory:
            return Advice("neither", (why, f"a dense model of equal work ({_gib(dense_bytes)}) does not fit either"))
        dense = f"a dense model of the active parameters' size does the same work in {_gib(dense_bytes)}"
        return Advice("dense", (why, dense, *reasons))
    if saving < WORTH:
        little = f"a token's work falls {saving:.2f} times only: under {WORTH}, routing eats it up"
        return Advice("dense", (little, *reasons))
    fits = f"all parameters fit: {_gib(needed)} with the cache, of {_gib(case.memory)}"
    saves = f"a token does 1/{saving:.1f} of the work of a dense model of this size, attention and head included"
    return Advice("moe", (fits, saves, *reasons))


def _of_dense(case: Case, reasons: tuple[str, ...]) -> Advice:
    """For a model without experts."""
    needed = case.weight_bytes + case.cache_bytes
    if needed > case.memory:
        return Advice("neither", (f"it takes {_gib(needed)} with the cache, and there are {_gib(case.memory)}",))
    room = (case.memory - case.cache_bytes) / case.weight_bytes
    more = "room to spare can hold experts at little more work (`moekit upcycle`)"
    return Advice(
        "dense", (f"memory holds it {room:.1f} times: {more if room >= SPARE else 'no room for experts'}", *reasons)
    )


def _cautions(case: Case) -> Iterator[str]:
    if case.mean_k < case.num_experts:
        met = 1 - (1 - case.mean_k / case.num_experts) ** BATCH
        yield (
            f"{BATCH} sequences decoded together read about {met:.0%} of the experts (routed evenly): in a batch the "
            "saving in bytes goes, that in FLOPs stays"
        )
    if case.tokens is not None and case.tokens < TOKENS_PER_PARAMETER * case.active:
        yield (
            f"{case.tokens / case.active:.1f} training tokens for each active parameter are fewer than the "
            f"{TOKENS_PER_PARAMETER} of a compute-optimal dense model: a smaller model is the better buy"
        )


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
