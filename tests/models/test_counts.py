"""What `moekit plan` counts, beside the modules that are built and packed: every family, part by part, byte by byte."""

from __future__ import annotations

import pytest
import torch
from plain_models import PlainModel
from twins import FAMILIES, twin

from moekit.adapt import quantise
from moekit.models import Decoder, KVCache
from moekit.models.archs import config_from_hf
from moekit.plan import kv_cache_bytes, parameters, part_bytes


@pytest.fixture(params=FAMILIES)
def config(request):
    model = twin(request.param)
    values = model.values if isinstance(model, PlainModel) else model.config.to_dict()
    return config_from_hf(values, request.param)


def part(name):
    """By the names of our modules, which plan does not know."""
    kinds = {"embed": "embedding", "positions": "embedding", "head": "head", "norm": "norms"}
    inner = {"attn": "attention", "router": "router", "experts": "experts", "shared": "shared", "shared_gate": "shared"}
    pieces = name.split(".")
    if any("norm" in piece for piece in pieces):
        return "norms"
    return kinds.get(pieces[0]) or next((inner[piece] for piece in pieces if piece in inner), "mlp")


def test_parts_are_those_of_the_decoder(config):
    with torch.device("meta"):
        decoder = Decoder(config)
    expected = dict.fromkeys(parameters(config).parts, 0)
    for name, parameter in decoder.named_parameters():
        expected[part(name)] += parameter.numel()
    count = parameters(config)
    assert count.parts == expected
    assert count.total == sum(p.numel() for p in decoder.parameters())
    looked_up = 0 if config.tie_word_embeddings else decoder.embed.weight.numel()
    looked_up += decoder.positions.numel() if config.positions == "learned" else 0
    assert count.total - count.total_without_embeddings == count.active - count.active_without_embeddings == looked_up
    if config.moe is not None:
        assert count.active_parts["experts"] * config.moe.num_experts == expected["experts"] * config.moe.top_k


@pytest.mark.parametrize("format", ["int8", "int4-g64-asym", "nf4", "mxfp4"])
def test_bytes_are_those_that_pack_writes(config, format):
    torch.manual_seed(0)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_()
    packed = quantise(decoder, format)
    assert part_bytes(config, format).total == packed.bytes_after


def test_the_cache_takes_what_is_planned(config):
    cache = KVCache(config, capacity=10, dtype=torch.bfloat16)
    assert kv_cache_bytes(config, 10) == cache.nbytes
