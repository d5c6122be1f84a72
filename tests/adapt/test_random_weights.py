"""Random packed weights: sizes as planned, numbers by the seed, a decoder that behaves like a fresh one."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from twins import FAMILIES, VOCAB, config_values

from moekit.adapt import load_packed
from moekit.adapt.packing import write_packed
from moekit.adapt.quant import Recipe
from moekit.adapt.quant_modules import QuantExperts, QuantMatrix
from moekit.adapt.random_weights import RandomWeights
from moekit.config import ModelConfig, MoEConfig
from moekit.models.archs import config_from_hf
from moekit.plan import part_bytes
from tiny import tiny_config

SMALL = ModelConfig(
    arch="qwen3_moe",
    vocab_size=512,
    hidden_size=128,
    intermediate_size=64,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    qk_norm=True,
    moe=MoEConfig(
        hidden_size=128, intermediate_size=64, num_experts=32, top_k=4, gate_order="softmax_topk", norm_topk_prob=True
    ),
)


def written(config, folder, quant="int4", seed=0):
    write_packed(RandomWeights(config, Recipe.of(quant), seed), folder)
    return load_packed(folder)


@pytest.mark.parametrize("quant", ["int8", "int4", "nf4", "mxfp4"])
@pytest.mark.parametrize(
    "config", [SMALL, tiny_config(), tiny_config(moe=False)], ids=["qwen3_moe", "mixtral", "llama"]
)
def test_sizes_are_those_of_plan(tmp_path, config, quant):
    decoder = written(config, tmp_path / "out", quant)
    total = sum(parameter.numel() * 4 for parameter in decoder.parameters())
    for module in decoder.modules():
        if isinstance(module, QuantMatrix):
            total += module.bytes_of("weight")
        elif isinstance(module, QuantExperts):
            total += module.bytes_of("gate_up_proj") + module.bytes_of("down_proj")
    assert total == part_bytes(config, quant).total


def test_the_seed_alone_decides(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        written(tiny_config(), tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "packed.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def entropy(logits):
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("quant", ["int8", "int4", "int4-g64-asym", "nf4", "mxfp4"])
@pytest.mark.parametrize("tied", [False, True])
def test_predictions_are_neither_certain_nor_uniform(tmp_path, quant, tied):
    decoder = written(dataclasses.replace(SMALL, tie_word_embeddings=tied), tmp_path / "out", quant)
    with torch.no_grad():
        found = entropy(decoder(torch.randint(512, (1, 128))).logits)
    assert math.log(512) - 3.5 < found.mean() < math.log(512) - 1
    assert found.min() > 0.1


def test_experts_are_chosen_about_equally_often(tmp_path):
    decoder = written(SMALL, tmp_path / "out")
    with torch.no_grad():
        routings = decoder(torch.randint(512, (4, 256))).routings
    for routing in routings:
        counts = routing.expert_ids_TK.flatten().bincount(minlength=32).float()
        assert counts.std() / counts.mean() < 0.6  # with all of attention's output it is 1 to 2
        assert counts.min() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_finite_logits(tmp_path, name):
    config = config_from_hf(config_values(name), name)
    decoder = written(config, tmp_path / "out")
    with torch.no_grad():
        logits = decoder(torch.randint(VOCAB, (1, 32))).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.05
