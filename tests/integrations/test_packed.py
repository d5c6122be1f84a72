"""Packed folders as models of transformers, whole and with their experts on disk."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from moekit.adapt import load_packed, load_quantised, save_packed
from moekit.errors import UnsupportedError
from moekit.integrations import packed as packed_models
from tolerances import assert_near

SIZES = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=6),
    "olmoe": OlmoeConfig(**SIZES, num_experts=6),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES, num_experts=6, moe_intermediate_size=32, shared_expert_intermediate_size=40, pad_token_id=None
    ),
    "qwen3_moe, tied": Qwen3MoeConfig(
        **SIZES, num_experts=6, moe_intermediate_size=32, head_dim=16, tie_word_embeddings=True
    ),
}


@pytest.fixture(autouse=True)
def own_memory_of_heat(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(tmp_path / "plain")
    decoder, _ = load_quantised(tmp_path / "plain", "int8")
    save_packed(decoder, tmp_path / "packed")
    return tmp_path / "packed"


def test_transformers_code_runs_on_packed_weights_and_experts_on_disk_change_no_bit(folder):
    whole, within = packed_models.load(folder), packed_models.load(folder, memory="1TB")
    ids = torch.randint(90, (2, 21))
    with torch.inference_mode():
        ours, theirs = load_packed(folder)(ids).logits, whole(ids).logits
        assert_near(theirs, ours, "packed decoder")
        assert (theirs - AutoModelForCausalLM.from_pretrained(folder.parent / "plain")(ids).logits).abs().max() > 0
        assert torch.equal(within(ids).logits, theirs)
    said = [model.generate(ids[:1], max_new_tokens=12, do_sample=False, pad_token_id=0) for model in (whole, within)]
    assert torch.equal(*said)
    assert within.room.stats.misses > 0


def test_a_gradient_is_refused_where_experts_are_on_disk(folder):
    model = packed_models.load(folder, memory="1TB")
    embedded = torch.randn(1, 5, 64, requires_grad=True)
    with pytest.raises(UnsupportedError, match="inference"):
        model(inputs_embeds=embedded)
