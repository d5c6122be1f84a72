"""A packed model that decodes in less memory than it is large: how near to the disk's bound, how far from llama.cpp's
mapped file in the same memory, and what more memory would give.

Every contender is a process of its own (`budget_child`), in a control group that bounds its memory (`memory_group`)
where there can be one: only that holds llama.cpp to a limit. All take the same steps, a given token each.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.adapt.store import Key
from moekit.bench.budget_curve import CurvePoint, curve, trace_steps
from moekit.bench.budget_runs import BudgetRuns, Steps
from moekit.bench.decoders import ModelFiles
from moekit.bench.peers import LlamaCpp

__all__ = ["LIMIT", "BudgetResult", "budget", "ratio", "share_of_bound"]

LIMIT = 900_000_000
"""Bytes, for the decoder of 8 layers, whose file has 2.0 GB."""
_OURS, _PEER, _WHOLE = "moekit", "llama.cpp mmap", "moekit, all in memory"


@dataclass(frozen=True)
class BudgetResult:
    """What was measured. Rates are of tokens a second, "cold" from a dropped file cache and an empty expert cache on,
    "warm" after that.

    Attributes:
        memory_limit: bytes of the process.
        limited_by: "cgroup", or "itself" where there can be no group.
        peak_memory: of the group, bytes; None without one.
        kills: processes that the kernel ended for want of memory.
        slots, experts: in memory, and all.
        disk_gb_s: 10⁹ bytes a second of cold experts, read as the cache reads them, before and after the tokens.
        hit_share: of expert uses, warm.
        missed_bytes_per_token: warm.
        share_of_bound: what reading them at the disk's rate takes, as a share of a warm token's time.
        predicted_tokens_per_second: the bound of routing that prefers no expert, as a budgeted model tells it; None if
            all experts have room.
        tokens_per_second: of each contender, "cold" and "warm".
        ratio_to_llama_cpp_mmap: the lower of the ratios cold and warm; None where llama.cpp was not run.
        tokens_identical: with those of a run with all experts in memory.
        llama_cpp_correlation: of its logits after the first token with ours: it rounds otherwise, and where random
            routers nearly tie, it may take other experts.
        curve: over shares of the experts, for random routing and for the trace that was given.
        more: (bytes more than the limit, tokens per second).
        prompt_reads_per_expert: of the experts that a prompt needs at a quarter, how often each was read.
        alone_bytes_per_token, together_bytes_per_token: read at a quarter for a token of one sequence, and of many.
        missing: what was left out, and why.
    """

    memory_limit: int
    limited_by: str
    peak_memory: int | None
    kills: int
    slots: int
    experts: int
    disk_gb_s: float
    hit_share: float
    missed_bytes_per_token: float
    share_of_bound: float
    predicted_tokens_per_second: float | None
    tokens_per_second: dict[str, dict[str, float]]
    ratio_to_llama_cpp_mmap: float | None
    tokens_identical: bool
    llama_cpp_correlation: float | None
    curve: list[CurvePoint]
    more: list[tuple[int, float]]
    prompt_reads_per_expert: float
    alone_bytes_per_token: float
    together_bytes_per_token: float
    missing: list[str]


def share_of_bound(missed_bytes: float, disk_gb_s: float, seconds: float) -> float:
    """Of `seconds`, the share in which the disk brings so many bytes.

    >>> share_of_bound(200e6, 2.0, 0.125)
    0.8
    """
    return missed_bytes / (1e9 * disk_gb_s) / seconds


def ratio(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """The lower of the ratios cold and warm.

    >>> ratio({"cold": 8.0, "warm": 9.0}, {"cold": 1.0, "warm": 1.5})
    6.0
    """
    return min(ours[when] / theirs[when] for when in ("cold", "warm"))


def budget(
    files: ModelFiles,
    limit: int = LIMIT,
    steps: Steps | None = None,
    trace: Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> BudgetResult:
    """Measure a decoder, with random packed weights, within `limit` bytes.

    Args:
        files: of the decoder.
        limit: bytes of a process.
        steps: how much is run.
        trace: a routing trace, to have the curve of it too.
        tell: called with what is being done.
    Raises:
        FileError, FormatError: the trace is none.
        MoekitError: a process could not do its part; with its last words.
    """
    steps = steps or Steps()
    recorded = None if trace is None else trace_steps(trace)
    folder = files.random_packed()
    path = files.random_gguf() if LlamaCpp.installed() else None
    with tempfile.TemporaryDirectory(prefix="moekit-bench-") as cache:
        runs = BudgetRuns(folder, limit, steps, files.config.vocab_size, Path(cache), tell)
        ours = runs.alone()
        peer = runs.peer(path)
        whole = runs.whole()
        tell("the cache policies")
        points = curve(_as_steps(whole["trace"]), ours["total_slots"], "random")
        points = [dataclasses.replace(each, tokens_per_second=_measured(runs, each)) for each in points]
        quarter = runs.together(points[0].slots)
    if trace is not None and recorded is not None:
        points += curve(*recorded, trace.stem)
    return _result(runs, ours, peer, whole, points, quarter)


def _result(
    runs: BudgetRuns,
    ours: dict[str, Any],
    peer: dict[str, Any] | None,
    whole: dict[str, Any],
    points: list[CurvePoint],
    quarter: dict[str, Any],
) -> BudgetResult:
    size, cold, warm = ours["expert_bytes"], runs.steps.cold, runs.steps.warm
    speeds = {_OURS: _speeds(ours["seconds"], cold)}
    if peer is not None:
        speeds[_PEER] = _speeds(peer["seconds"], runs.steps.peer)
    speeds[_WHOLE] = _speeds(whole["seconds"], cold)
    missed = ours["misses"][1] * size / warm
    expected = ours["expected_missed_bytes"]
    measured = [(each, each.tokens_per_second) for each in points if each.slots > ours["slots"]]
    return BudgetResult(
        memory_limit=runs.limit,
        limited_by="itself" if runs.no_group else "cgroup",
        peak_memory=ours["peak"],
        kills=ours["kills"],
        slots=ours["slots"],
        experts=ours["total_slots"],
        disk_gb_s=ours["disk_gb_s"],
        hit_share=ours["hits"][1] / (ours["hits"][1] + ours["misses"][1]),
        missed_bytes_per_token=missed,
        share_of_bound=share_of_bound(missed, ours["disk_gb_s"], 1 / speeds[_OURS]["warm"]),
        predicted_tokens_per_second=1e9 * ours["disk_gb_s"] / expected if expected else None,
        tokens_per_second=speeds,
        ratio_to_llama_cpp_mmap=None if peer is None else ratio(speeds[_OURS], speeds[_PEER]),
        tokens_identical=ours["best"] == whole["best"][: len(ours["best"])],
        llama_cpp_correlation=None if peer is None else statistics.correlation(peer["logits"], whole["logits"]),
        curve=points,
        more=[(round((each.slots - ours["slots"]) * size), speed) for each, speed in measured if speed is not None],
        prompt_reads_per_expert=quarter["prompt_reads"] / quarter["prompt_experts"],
        alone_bytes_per_token=quarter["alone_reads_per_token"] * size,
        together_bytes_per_token=quarter["together_reads_per_token"] * size,
        missing=runs.missing,
    )


def _measured(runs: BudgetRuns, point: CurvePoint) -> float:
    return _speeds(runs.with_slots(point.slots)["seconds"], runs.steps.cold)["warm"]


def _speeds(seconds: Sequence[float], cold: int) -> dict[str, float]:
    """Tokens a second of the first `cold`, and of the others."""
    return {"cold": 1 / statistics.mean(seconds[:cold]), "warm": 1 / statistics.mean(seconds[cold:])}


def _as_steps(trace: Sequence[Sequence[Sequence[int]]]) -> list[list[Key]]:
    """For each token and layer the experts, as a cache sees them: one step after the other."""
    return [[(layer, expert) for expert in ids] for token in trace for layer, ids in enumerate(token)]
