"""The bench's decoder, small enough for a test."""

from __future__ import annotations

import dataclasses

from moekit.bench import FULL
from moekit.config import ModelConfig

__all__ = ["tiny_decoder"]


def tiny_decoder(experts: int) -> ModelConfig:
    """Two layers of so many experts, two a token."""
    assert FULL.moe is not None
    return dataclasses.replace(
        FULL,
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        moe=dataclasses.replace(FULL.moe, hidden_size=64, intermediate_size=32, num_experts=experts, top_k=2),
    )
