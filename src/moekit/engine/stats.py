"""What a generation cost and which experts worked. Counting happens after the text is out, not between tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moekit.moe import Routing

__all__ = ["FinishReason", "GenerationStats", "count_experts"]

FinishReason = Literal["stop", "length", "context", "cancelled"]


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
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    time_to_first_token: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    finish_reason: FinishReason
    expert_counts: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def count_experts(passes: Sequence[tuple[Routing, ...]]) -> tuple[tuple[int, ...], ...]:
    """Add up the assignments of several passes, each with one routing an MoE layer: layer × expert."""
    layers = zip(*passes, strict=True)
    return tuple(_count(layer) for layer in layers)


def _count(layer: Sequence[Routing]) -> tuple[int, ...]:
    ids_A = torch.cat([routing.expert_ids_A for routing in layer])
    return tuple(torch.bincount(ids_A, minlength=layer[0].num_experts).tolist())
