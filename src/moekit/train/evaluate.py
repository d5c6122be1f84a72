"""Perplexity: exp of the mean negative log-likelihood of held-out tokens, and how their routing was spread.

Shapes: B rows, L tokens a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.config import Autocast
from moekit.kernels import fast_bf16
from moekit.models.decoder import Decoder, Features
from moekit.train.data import Batch, Rows, TextTokenizer, find_files, tokenise
from moekit.train.loss import chunked_cross_entropy
from moekit.train.monitor import RoutingMonitor

__all__ = ["Evaluation", "autocast_dtype", "compute_context", "perplexity", "perplexity_of_files"]

QUANTISED_ROWS = 256
"""Rows of logits of a quantised head at a time: 50 MB for a vocabulary of 49,152."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `perplexity` measured.

    Attributes:
        perplexity: exp(nll).
        nll: mean over all predicted tokens (not over batches) of −log p, in nats.
        tokens: how many tokens were predicted.
        routing: the counts of every MoE layer.
    """

    perplexity: float
    nll: float
    tokens: int
    routing: RoutingMonitor


def perplexity(
    decoder: Decoder,
    rows: Rows,
    *,
    autocast: Autocast = "none",
    batch_size: int = 4,
    max_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure the decoder on every row once, in order; the same call gives the same bits.

    Every token of a document but its first is predicted once, from what precedes it in its row.

    Args:
        autocast: compute dtype over the decoder's own weights.
        max_rows: measure on this many rows, spread evenly over the text.
        progress: called with (rows done, rows in all) after each batch.
    """
    monitor = monitor_of(decoder)
    total, tokens, done = 0.0, 0, 0
    training = decoder.training
    decoder.eval()
    with torch.inference_mode(), compute_context(decoder, autocast):
        for batch in rows.in_order(batch_size, max_rows):
            if decoder.room is not None and not done:
                decoder.room.rehearse(partial(_of_batch, decoder, batch, autocast))
            features, nll = _of_batch(decoder, batch, autocast)
            monitor.update(features.routings)
            total += nll
            tokens += batch.num_labels
            done += len(batch.input_ids_BL)
            if progress is not None:
                progress(done, min(len(rows), max_rows or len(rows)))
    decoder.train(training)
    mean = total / max(tokens, 1)
    return Evaluation(math.exp(min(mean, 700.0)), mean, tokens, monitor)


def _of_batch(decoder: Decoder, batch: Batch, autocast: Autocast) -> tuple[Features, float]:
    features = decoder.features(batch.input_ids_BL, document_ids=batch.document_ids_BL)
    return features, _nll(decoder, features.hidden_BLD.flatten(0, 1), batch.labels_BL.flatten(), autocast)


def _nll(decoder: Decoder, hidden_ND: Tensor, labels_N: Tensor, autocast: Autocast) -> float:
    """Σ −log p of the labels that are not −100."""
    if decoder.head_packed is None:
        dtype = autocast_dtype(decoder, autocast)
        return chunked_cross_entropy(hidden_ND, decoder.head_weight, labels_N, denominator=1, dtype=dtype).item()
    parts = zip(hidden_ND.split(QUANTISED_ROWS), labels_N.split(QUANTISED_ROWS), strict=True)
    return sum(F.cross_entropy(decoder.logits(h), labels, reduction="sum").item() for h, labels in parts)


def perplexity_of_files(
    decoder: Decoder,
    tokenizer: TextTokenizer,
    files: Sequence[str],
    cache: Path,
    *,
    text_field: str = "text",
    sequence_length: int = 256,
    autocast: Autocast = "none",
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """`perplexity` of files, folders or globs, tokenised in `cache`. Raises what `train.data.prepare` raises."""
    rows = Rows(tokenise(find_files(files), tokenizer, cache, text_field), sequence_length)
    return perplexity(decoder, rows, autocast=autocast, batch_size=batch_size, progress=progress)


def compute_context(decoder: Decoder, autocast: Autocast) -> AbstractContextManager[object]:
    """Autocast to the dtype of `autocast_dtype` on the decoder's device, or autocast off."""
    dtype = autocast_dtype(decoder, autocast)
    return torch.autocast(decoder.device.type, dtype=torch.bfloat16, enabled=dtype is not None)


def autocast_dtype(decoder: Decoder, autocast: Autocast) -> torch.dtype | None:
    """bfloat16, or None for the weights' own; `auto` is bfloat16 where the decoder's device multiplies it fast.

    A quantised decoder computes in float32 whatever is asked: its products are integers inside.
    """
    if decoder.is_packed:
        return None
    if autocast == "auto":
        return torch.bfloat16 if fast_bf16(decoder.device) else None
    return torch.bfloat16 if autocast == "bfloat16" else None


def monitor_of(decoder: Decoder) -> RoutingMonitor:
    """An empty monitor for the decoder's MoE layers."""
    config = decoder.config
    return RoutingMonitor(config.moe_layers, config.moe.num_experts if config.moe else 1)
