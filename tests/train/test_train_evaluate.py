"""Perplexity against whole logits, one row at a time, and what it must not depend on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_training import ByteTokenizer, tiny_data, tiny_decoder, write_corpus
from torch.nn import functional as F

from moekit.train import TrainingData, perplexity, perplexity_of_files
from tolerances import rel


def test_token_weighted_mean_over_every_label(data: TrainingData) -> None:
    decoder, rows = tiny_decoder(), data.train
    total, tokens, counts = 0.0, 0, torch.zeros(2, 4, dtype=torch.int64)
    for row in range(len(rows)):
        batch = rows.take([row])
        out = decoder(batch.input_ids_BL, document_ids=batch.document_ids_BL)
        total += F.cross_entropy(out.logits[0].double(), batch.labels_BL[0], reduction="sum").item()
        tokens += int((batch.labels_BL != -100).sum())
        counts += torch.stack([routing.counts_E for routing in out.routings])
    found = perplexity(decoder, rows, batch_size=3)
    assert found.tokens == tokens == rows.num_tokens - rows.num_documents
    assert found.nll == pytest.approx(total / tokens, rel=rel("fp32 scalar"))
    assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=rel("fp32 loss"))
    assert torch.equal(found.routing.counts_ME, counts)


def test_same_bits_twice_near_the_same_for_any_batch_size_and_no_mode_left_behind(data: TrainingData) -> None:
    decoder = tiny_decoder().train()
    first, second = (perplexity(decoder, data.train, batch_size=4) for _ in range(2))
    assert first.nll == second.nll
    assert perplexity(decoder, data.train, batch_size=7).nll == pytest.approx(first.nll, rel=rel("fp32 scalar"))
    assert perplexity(decoder, data.train, autocast="bfloat16").nll == pytest.approx(first.nll, rel=rel("bf16 loss"))
    assert decoder.training
    assert all(p.grad is None for p in decoder.parameters())


def test_uniform_model_has_the_perplexity_of_its_vocabulary(data: TrainingData) -> None:
    decoder = tiny_decoder()
    with torch.no_grad():
        decoder.head.weight.zero_()
    assert perplexity(decoder, data.train).perplexity == pytest.approx(257, rel=rel("fp32 scalar"))


def test_a_weight_that_is_nan_shows(data: TrainingData) -> None:
    decoder = tiny_decoder()
    with torch.no_grad():
        decoder.norm.weight[0] = float("nan")
    found = perplexity(decoder, data.train)
    assert math.isnan(found.nll)
    assert math.isnan(found.perplexity)


def test_files_and_progress(tmp_path: Path) -> None:
    corpus, seen = write_corpus(tmp_path / "corpus"), []
    found = perplexity_of_files(
        tiny_decoder(),
        ByteTokenizer(),
        [str(corpus)],
        tmp_path / "cache",
        sequence_length=32,
        progress=lambda done, total: seen.append((done, total)),
    )
    rows = len(tiny_data(tmp_path).train)
    assert found.nll == perplexity(tiny_decoder(), tiny_data(tmp_path).train).nll
    assert seen[-1] == (rows, rows)
