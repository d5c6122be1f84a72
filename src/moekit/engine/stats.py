"""What a generation cost and which experts worked. Counting happens after the text is out, not between tokens."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moekit.adapt.budget import MemoryBudget
from moekit.moe import Routing

__all__ = ["ExpertStats", "FinishReason", "GenerationStats", "Traffic", "count_experts"]

FinishReason = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True)
class ExpertStats:
    """What experts on disk cost while an answer was made, prompt and others' answers included.

    Attributes:
        hit_rate: share of the experts that were taken from memory.
        bytes_read: from disk.
        bytes_per_token: of the answer after its first token: read from disk for each.
        wait_share: of the answer's time, waiting for the disk.
    """

    hit_rate: float
    bytes_read: int
    bytes_per_token: float
    wait_share: float


@dataclass(frozen=True)
class GenerationStats:
    """Figures of one generation.

    Attributes:
        prompt_tokens: ids of the prompt, of which `reused_tokens` were still in the session's cache.
        new_tokens: ids generated; an end-of-sequence id is not counted.
        time_to_first_token: seconds of prefill and the first choice.
        prefill_tokens_per_second: prompt tokens computed in that time.
        decode_tokens_per_second: tokens after the first over the time they took; 0 without any.
        finish_reason: stop (end of sequence or a stop string), length (max_new_tokens), context (the model's
            context is full) or cancelled (whoever iterated stopped doing so).
        expert_counts: one row an MoE layer, in layer order: tokens each expert worked on, prompt included.
        experts: None where all are in memory.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    time_to_first_token: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    finish_reason: FinishReason
    expert_counts: tuple[tuple[int, ...], ...]
    experts: ExpertStats | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


class Traffic:
    """Watches the experts' cache while one answer is made."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget, self._began = budget, time.perf_counter()
        self._first = self._start = self._last = budget.stats
        self._tokens = 0

    def token(self) -> None:
        """One more token is there."""
        self._last, self._tokens, self._seconds = (
            self._budget.stats,
            self._tokens + 1,
            time.perf_counter() - self._began,
        )
        if self._tokens == 1:
            self._first = self._last

    def stats(self) -> ExpertStats:
        """So far."""
        start, last, later = self._start, self._last, max(self._tokens - 1, 1)
        hits, misses = last.hits - start.hits, last.misses - start.misses
        return ExpertStats(
            hit_rate=hits / max(hits + misses, 1),
            bytes_read=last.bytes_read - start.bytes_read,
            bytes_per_token=(last.bytes_read - self._first.bytes_read) / later,
            wait_share=(last.wait_seconds - start.wait_seconds) / self._seconds if self._tokens else 0.0,
        )


def count_experts(passes: Sequence[tuple[Routing, ...]]) -> tuple[tuple[int, ...], ...]:
    """Add up the assignments of several passes, each with one routing an MoE layer: layer × expert."""
    layers = zip(*passes, strict=True)
    return tuple(_count(layer) for layer in layers)


def _count(layer: Sequence[Routing]) -> tuple[int, ...]:
    ids_A = torch.cat([routing.expert_ids_A for routing in layer])
    return tuple(torch.bincount(ids_A, minlength=layer[0].num_experts).tolist())
