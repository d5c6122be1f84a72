"""Switch Transformers, of which moekit has no decoder: an encoder and a decoder, counted and no more (2101.03961)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moekit.config.base import from_dict, positive

__all__ = ["SwitchConfig"]


@dataclass(frozen=True, kw_only=True)
class SwitchConfig:
    """What transformers' config.json says of its size, in its names and with its defaults.

    >>> SwitchConfig(num_sparse_encoder_layers=6).encoder_sparse
    6
    """

    vocab_size: int = 32_128
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 2048
    num_heads: int = 12
    num_layers: int = 12
    num_decoder_layers: int = 12
    num_sparse_encoder_layers: int = 3
    num_sparse_decoder_layers: int = 3
    num_experts: int = 8
    relative_attention_num_buckets: int = 32
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        positive(self, "vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers")
        positive(self, "num_experts", "relative_attention_num_buckets")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], source: str) -> SwitchConfig:
        """From the keys of config.json. Raises `ConfigError` for a bad value."""
        names = {field.name for field in dataclasses.fields(cls)}
        return from_dict(cls, {key: value for key, value in values.items() if key in names}, source=source)

    @property
    def encoder_sparse(self) -> int:
        """Layers of the encoder that have experts."""
        return _sparse(self.num_layers, self.num_sparse_encoder_layers)

    @property
    def decoder_sparse(self) -> int:
        """Layers of the decoder that have experts."""
        return _sparse(self.num_decoder_layers, self.num_sparse_decoder_layers)


def _sparse(layers: int, wanted: int) -> int:
    """transformers puts experts into every n-th layer, n = layers // wanted, beginning with the second."""
    step = layers // wanted if wanted > 0 else layers
    return layers if step == 1 else sum(layer % step == 1 for layer in range(layers))
