"""Bytes of a model in each format, by part; what fits, and how fast memory lets a token be. No torch until asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moekit.config import ModelConfig
from moekit.plan.count import flops_per_token, kv_cache_bytes_read
from moekit.plan.tensors import PARTS, AnyConfig, Weights, weights

__all__ = ["FORMATS", "PartBytes", "decode_bound", "part_bytes", "prefill_bound"]

PLAIN = {"float32": 4, "bfloat16": 2}
FORMATS = (*PLAIN, "int8", "int4", "nf4", "mxfp4")
HEAD = "int8"
"""What `moekit pack` stores embedding and head in."""


@dataclass(frozen=True)
class PartBytes:
    """Bytes by part (`PARTS`): `stored` in memory, `read` for one token: of the experts those that work, of the
    embedding one row, unless it is the head too."""

    format: str
    stored: Mapping[str, int]
    read: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.stored.values())

    @property
    def per_token(self) -> int:
        return sum(self.read.values())

    @property
    def cache_value(self) -> int:
        """Bytes of a number in the cache: it is 16-bit unless the model computes in float32."""
        return 4 if self.format == "float32" else 2


def part_bytes(config: AnyConfig, format: str) -> PartBytes:
    """What `config` takes in float32, bfloat16, or a format of `moekit pack`, to the byte: in those, embedding and
    head are int8; norms, biases and routers float32.

    Raises:
        UnknownNameError: no such format.
    """
    stored, read = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0.0)
    for each in weights(config):
        size = _tensor_bytes(each, format)
        stored[each.part] += each.copies * size
        if each.part != "embedding":
            read[each.part] += each.active * size
        elif not each.plain:
            read["embedding"] += size if config.tie_word_embeddings else size / each.shape[0]
    return PartBytes(format, stored, {part: round(number) for part, number in read.items()})


def decode_bound(config: ModelConfig, sizes: PartBytes, bandwidth: float, context: int) -> float:
    """Tokens a second that no program can pass: `bandwidth` over the bytes that a token must read, weights and past."""
    return bandwidth / (sizes.per_token + kv_cache_bytes_read(config, context, sizes.cache_value))


def prefill_bound(config: ModelConfig, rate: float, prompt: int) -> float:
    """Tokens a second of a prompt: `rate` in FLOP/s over the work of a token in its middle."""
    return rate / flops_per_token(config, prompt // 2)


def _tensor_bytes(each: Weights, format: str) -> int:
    if format in PLAIN:
        return each.numel * PLAIN[format]
    from moekit.kernels.formats import Format  # imports torch

    chosen = Format.parse(format)
    if each.plain:
        return each.numel * 4
    return (Format.parse(HEAD) if each.part in ("embedding", "head") else chosen).matrix_bytes(*each.shape)
