"""Tokens of several sequences together against each alone: the same bits, whatever the layer and the format."""

from __future__ import annotations

import copy

import pytest
import torch
from test_steps import BASE, LAYERS, decoder_with, same_routings

from moekit.adapt.quant import quantise
from moekit.errors import ContextLengthError
from moekit.models import KVCache
from moekit.moe import RoutingRecord

PASTS = (5, 1, 300, 17, 255)  # on both sides of the stretch of 256 positions whose angles are computed at once
TOKENS = (3, 44, 3, 0, 49)


def caches_of(decoder):
    """A past of each length, all different."""
    made = []
    with torch.no_grad():
        for i, length in enumerate(PASTS):
            made.append(KVCache(decoder.config, dtype=decoder.cache_dtype, capacity=4))
            decoder(torch.randint(50, (1, length), generator=torch.Generator().manual_seed(i)), cache=made[-1])
    return made


def one_by_one(decoder, tokens, caches):
    pairs = zip(tokens, caches, strict=True)
    return [decoder(torch.tensor([[token]]), cache=cache, last_only=True) for token, cache in pairs]


def assert_same_as_alone(decoder, caches):
    copies = copy.deepcopy(caches)
    for tokens in (TOKENS, TOKENS[::-1]):  # two steps: what the first wrote to a cache, the second reads
        together, alone = decoder.forward_each(tokens, caches), one_by_one(decoder, tokens, copies)
        for ours, wanted in zip(together, alone, strict=True):
            assert ours.logits.shape == (1, 1, 50)
            assert torch.equal(ours.logits, wanted.logits)
            same_routings([ours.routings], [wanted.routings])
    assert [cache.length for cache in caches] == [past + 2 for past in PASTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [None, *LAYERS])
@torch.no_grad()
def test_the_same_bits_as_alone(layer, dtype):
    decoder = decoder_with(layer and BASE | LAYERS[layer], dtype)
    assert_same_as_alone(decoder, caches_of(decoder))


@pytest.mark.parametrize("form", ["int4", "int8"])
@torch.no_grad()
def test_the_same_bits_in_a_quantised_decoder(form):
    decoder = decoder_with({**BASE, "num_shared_experts": 1})
    quantise(decoder, form)
    assert_same_as_alone(decoder, caches_of(decoder))


@torch.no_grad()
def test_hooks_fire_once_a_token_and_change_nothing():
    decoder, seen = decoder_with(BASE), []
    caches = caches_of(decoder)
    decoder.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    decoder.forward_each(TOKENS, copy.deepcopy(caches))
    assert len(seen) == len(TOKENS)
    assert_same_as_alone(decoder, caches)


def test_a_gradient_flows_as_alone():
    decoder = decoder_with(BASE)
    caches = caches_of(decoder)
    assert decoder.forward_each(TOKENS, copy.deepcopy(caches))[0].logits.requires_grad
    with torch.no_grad():
        assert_same_as_alone(decoder, caches)


@torch.no_grad()
def test_a_record_has_the_order_of_one_after_the_other():
    decoder = decoder_with(BASE)
    caches, record = caches_of(decoder), RoutingRecord()
    copies = copy.deepcopy(caches)
    with record.recording():
        wanted = one_by_one(decoder, TOKENS, copies)
    with torch.no_grad():
        decoder.layers[0].mlp.router.weight.neg_()
    with record.replaying():
        outputs = decoder.forward_each(TOKENS, caches)
    for ours, theirs in zip(outputs, wanted, strict=True):
        assert torch.equal(ours.routings[0].expert_ids_A, theirs.routings[0].expert_ids_A)


@torch.no_grad()
def test_a_sequence_at_the_end_of_the_context_is_refused_before_any_moves():
    decoder = decoder_with(BASE, max_position_embeddings=301)
    caches = caches_of(decoder)
    decoder.forward_each(TOKENS, caches)
    with pytest.raises(ContextLengthError, match="302 tokens do not fit the model's context of 301"):
        decoder.forward_each(TOKENS, caches)
    assert [cache.length for cache in caches] == [past + 1 for past in PASTS]
