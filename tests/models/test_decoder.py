"""The decoder against transformers, and against itself in pieces, packed, padded and recomputed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from twins import TWINS, tokens, write

from moekit import kernels
from moekit.errors import ConfigError, ContextLengthError
from moekit.models import KVCache, load_decoder
from moekit.moe import TopKRouter
from tolerances import near


@pytest.fixture(params=TWINS)
def pair(request, tmp_path):
    """(ours, transformers') with the same weights."""
    theirs = write(request.param, tmp_path)
    return load_decoder(tmp_path), theirs


@pytest.fixture
def decoder(tmp_path):
    write("qwen3_moe", tmp_path)
    return load_decoder(tmp_path)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **near("fp32 twin"))


@pytest.mark.parametrize("cuts", [(5, 1, 1, 5), (12,)])
def test_cached_decode_equals_one_full_pass_of_transformers(pair, cuts):
    ours, theirs = pair
    ids = tokens(2, 12)
    cache = KVCache(ours.config, batch=2, capacity=4)
    with torch.no_grad():
        pieces = [ours(piece, cache=cache).logits for piece in ids.split(cuts, dim=1)]
        close(torch.cat(pieces, dim=1), theirs(ids).logits)
    assert cache.length == 12


def test_truncated_cache_goes_on_from_the_common_prefix(decoder):
    first, second = tokens(1, 9), tokens(1, 9)
    second[:, :5] = first[:, :5]
    cache = KVCache(decoder.config)
    with torch.no_grad():
        decoder(first, cache=cache)
        cache.truncate(5)
        close(decoder(second[:, 5:], cache=cache).logits, decoder(second).logits[:, 5:])


def test_last_only_is_the_last_position(decoder):
    ids = tokens(2, 7)
    with torch.no_grad():
        close(decoder(ids, last_only=True).logits, decoder(ids).logits[:, -1:])


def test_packed_documents_equal_separate_runs(decoder):
    documents = [tokens(1, n) for n in (4, 1, 7)]
    document_ids = torch.tensor([[0] * 4 + [1] + [2] * 7])
    with torch.no_grad():
        packed = decoder(torch.cat(documents, dim=1), document_ids=document_ids).logits
        close(packed, torch.cat([decoder(document).logits for document in documents], dim=1))


def test_padding_changes_no_real_token_and_is_not_counted(decoder):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    with torch.no_grad():
        padded, alone = decoder(ids, mask=mask), decoder(ids[:1, :6])
        close(padded.logits[0, :6], alone.logits[0])
        close(padded.logits[1], decoder(ids[1:]).logits[0])
    assert [r.counts_E.sum().item() for r in padded.routings] == [15 * 3] * len(padded.routings)


def losses(decoder, ids, **options):
    features = decoder.features(ids, **options)
    return F.cross_entropy(decoder.logits(features.hidden_BLD[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def gradients(decoder, ids, **options):
    decoder.zero_grad()
    losses(decoder, ids, **options).backward()
    return {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}


@pytest.mark.parametrize("checkpointing", ["moe", "block"])
def test_recomputing_gives_the_same_gradients(decoder, checkpointing):
    ids = tokens(2, 11)
    plain, recomputed = gradients(decoder, ids), gradients(decoder, ids, checkpointing=checkpointing)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("checkpointing", ["moe", "block"])
def test_recomputing_follows_the_recorded_routes(decoder, checkpointing, monkeypatch):
    """Turn the routers round between forward and backward: a recompute that chose again would choose others."""
    seen = []
    original = TopKRouter.forward

    def spy(router, *args):
        routing = original(router, *args)
        seen.append((routing.expert_ids_TK, kernels.top_k(routing.logits_TE, routing.top_k)))
        return routing

    monkeypatch.setattr(TopKRouter, "forward", spy)
    loss = losses(decoder, tokens(2, 11), checkpointing=checkpointing)
    forward = [used for used, _ in seen]
    with torch.no_grad():
        for block in decoder.layers:
            if hasattr(block.mlp, "router"):
                block.mlp.router.weight.neg_()
    seen.clear()
    loss.backward()
    assert len(seen) == len(forward) == 2
    for (used, fresh), recorded in zip(reversed(seen), forward, strict=True):
        assert torch.equal(used, recorded)
        assert not torch.equal(fresh, recorded)


def test_bad_input_is_named(decoder):
    with pytest.raises(ContextLengthError, match="65 tokens do not fit the model's context of 64"):
        decoder(tokens(1, 65))
    with pytest.raises(ConfigError, match="empty"):
        decoder(tokens(1, 0))
    with pytest.raises(ConfigError, match="cache cannot be combined"):
        decoder(tokens(1, 3), cache=KVCache(decoder.config), mask=torch.ones(1, 3, dtype=torch.bool))


def test_positions_restart_with_each_document():
    """Seen here alone: rotary attention depends on differences of positions, which a common shift leaves alone."""
    from moekit.models.decoder import _positions

    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert _positions(torch.zeros(2, 6), 0, documents).tolist() == expected
    assert _positions(torch.zeros(2, 3), 4, None).tolist() == [[4, 5, 6]]
