"""What a change of a model costs: perplexity before and after, and how far the predictions moved.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.models.decoder import Decoder
from moekit.train.data import Batch, Rows
from moekit.train.evaluate import perplexity
from moekit.train.monitor import RoutingMonitor

__all__ = ["Quality", "measured_quality"]

KL_ROWS = 4
"""Rows whose logits are kept whole: 200 MB for 256 tokens and a vocabulary of 49,152."""


@dataclass(frozen=True)
class Quality:
    """Perplexity before and after on the same `tokens`, and the mean of KL(before ‖ after) in nats over a few rows."""

    before: float
    after: float
    kl: float
    tokens: int

    @property
    def rise(self) -> float:
        """after / before − 1."""
        return self.after / self.before - 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rise": self.rise}


def measured_quality(
    decoder: Decoder,
    rows: Rows,
    change: Callable[[RoutingMonitor], object],
    *,
    max_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Measure, call `change`, which alters the decoder in place, and measure again.

    Args:
        change: is given the counts of the first measurement, so that it may depend on which experts are busy.
        max_rows, progress: see `perplexity`.
    """
    before = perplexity(decoder, rows, max_rows=max_rows, progress=progress)
    first = list(rows.in_order(1, KL_ROWS))
    kept = [_log_probs(decoder, batch) for batch in first]
    change(before.routing)
    after = perplexity(decoder, rows, max_rows=max_rows, progress=progress)
    total, positions = 0.0, 0
    for batch, old_NV in zip(first, kept, strict=True):
        new_NV = _log_probs(decoder, batch)
        total += (old_NV.exp() * (old_NV - new_NV)).sum().item()
        positions += len(old_NV)
    return Quality(before.perplexity, after.perplexity, total / max(positions, 1), before.tokens)


@torch.inference_mode()
def _log_probs(decoder: Decoder, batch: Batch) -> Tensor:
    """log p (N, V) at every position of the batch, float32."""
    output = decoder(batch.input_ids_BL, document_ids=batch.document_ids_BL)
    log_probs_NV: Tensor = output.logits.flatten(0, 1).float().log_softmax(-1)
    return log_probs_NV
