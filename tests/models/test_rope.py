"""Angles of every rotary variant against transformers' own functions, within the original context and beyond it."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from moekit.models import read_config
from moekit.models.rope import rotary_factors, rotate
from tolerances import near

LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0, 4.0, 5.0, 6.0]}
VARIANTS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, all keys": {
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    "yarn, given attention factor": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.3,
    },
    "longrope": {**LONG, "factor": 2.0, "original_max_position_embeddings": 32},
    "longrope, factor of lengths": {**LONG, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("length", [16, 64, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_factors_equal_those_of_transformers(variant, length, tmp_path):
    parameters = {"rope_type": variant.split(",")[0], "rope_theta": 200.0, **VARIANTS[variant]}
    theirs = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=64, rope_parameters=parameters
    )
    theirs.save_pretrained(tmp_path)
    positions = torch.arange(length)[None]
    expected = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions)
    for got, want in zip(rotary_factors(positions, read_config(tmp_path)), expected, strict=True):
        torch.testing.assert_close(got[:, 0], want, **near("fp32 twin"))


@pytest.mark.parametrize("dims", [4, 8])
def test_neighbours_are_rotated_as_complex_numbers(dims):
    """2104.09864 eq 13: the pair (2i, 2i + 1) as a complex number times exp(i · position · frequency)."""
    x, angles = torch.randn(2, 3, 5, 8), torch.rand(1, 1, 5, dims // 2)
    factors = [torch.cat([each, each], dim=-1) for each in (angles.cos(), angles.sin())]
    pairs = torch.view_as_complex(x[..., :dims].reshape(2, 3, 5, dims // 2, 2))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    got = rotate(x, *factors, interleaved=True)
    torch.testing.assert_close(got[..., :dims], expected, **near("fp32 twin"))
    assert torch.equal(got[..., dims:], x[..., dims:])
