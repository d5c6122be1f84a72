"""Upcycling keeps the dense model's function where the mathematics allows, and says where not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moekit.adapt import upcycle, upcycled_config
from moekit.config import ModelConfig, UpcycleConfig
from moekit.errors import ConfigError, UnsupportedError
from moekit.models.decoder import Decoder
from tolerances import near

DENSE = ModelConfig(
    arch="llama",
    vocab_size=61,
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def dense(**changes) -> Decoder:
    return Decoder(dataclasses.replace(DENSE, **changes))


@pytest.mark.parametrize(
    "config",
    [
        UpcycleConfig(),
        UpcycleConfig(method="copy", num_experts=3, top_k=2),
        UpcycleConfig(num_experts=12, top_k=3, splits=3),
        UpcycleConfig(num_experts=8, top_k=4, splits=2),  # two groups a token, unequal weights
        UpcycleConfig(num_experts=2, top_k=2, splits=2),  # one group: no choice to make
    ],
    ids=lambda c: f"{c.method} {c.num_experts}/{c.top_k}",
)
@pytest.mark.parametrize("tied", [True, False])
def test_output_is_the_dense_models(config, tied):
    model = dense(tie_word_embeddings=tied).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(61, (4, 30))
    sparse = upcycle(model, config)
    output = sparse(ids)
    # fp64, but the router chooses in fp64 too: only the order of sums differs.
    torch.testing.assert_close(output.logits, model(ids).logits, **near("fp64"))
    groups = config.splits if config.method == "split" else 1
    for routing in output.routings:
        chosen = (routing.expert_ids_TK // groups).view(-1, config.top_k // groups, groups)
        assert (chosen == chosen[..., :1]).all(), "a token met only part of an MLP"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_equal_active_flops():
    sparse = upcycled_config(DENSE, UpcycleConfig())
    assert sparse.moe.top_k * sparse.moe.intermediate_size == DENSE.intermediate_size


def test_noise_is_near_not_equal_and_its_experts_differ():
    model, ids = dense(), torch.randint(61, (2, 20))
    sparse = upcycle(model, UpcycleConfig(method="noise", num_experts=4, top_k=2, noise=0.01))
    difference = (sparse(ids).logits - model(ids).logits).abs().max().item()
    assert 0 < difference < 0.05 * model(ids).logits.abs().max().item()
    weight = sparse.layers[0].mlp.experts.down_proj
    expected = 0.01 * model.layers[0].mlp.down_proj.weight.std()
    spread = (weight - model.layers[0].mlp.down_proj.weight).std(dim=(1, 2))
    torch.testing.assert_close(spread, expected.expand(4), **near("standard deviation of few"))
    assert not torch.equal(weight[0], weight[1])


def test_a_seed_is_a_model():
    model = dense()
    same, again = upcycle(model, UpcycleConfig(seed=3)), upcycle(model, UpcycleConfig(seed=3))
    other = upcycle(model, UpcycleConfig(seed=4))
    for name, value in same.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value, other.state_dict()[name]) != ("router" in name)


def test_trains_apart_from_the_dense_model():
    model = dense()
    sparse = upcycle(model, UpcycleConfig())
    assert all(parameter.requires_grad for parameter in sparse.parameters())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in sparse.parameters()}
    assert not shared
    # The pairs leave each other: their router rows get different gradients although they are equal.
    ids = torch.randint(61, (4, 30))
    sparse(ids).logits.logsumexp(-1).sum().backward()
    gradient = sparse.layers[0].mlp.router.weight.grad
    assert not torch.allclose(gradient[0], gradient[1])


def test_refusals_name_the_reason():
    with pytest.raises(ConfigError, match=r"splits \(5\) must divide .* intermediate_size \(36\)"):
        upcycle(dense(), UpcycleConfig(num_experts=10, top_k=5, splits=5))
    with pytest.raises(UnsupportedError, match="already"):
        upcycle(upcycle(dense(), UpcycleConfig()), UpcycleConfig())
    with pytest.raises(UnsupportedError, match="attention biases"):
        upcycle(dense(attention_bias=True), UpcycleConfig())
