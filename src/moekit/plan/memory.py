"""Bytes of a model in each format, by part; what fits, and how fast memory lets a token be. No torch until asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moekit.config import ModelConfig
from moekit.plan.count import flops_per_token, kv_cache_bytes, kv_cache_bytes_read
from moekit.plan.tensors import PARTS, AnyConfig, Weights, weights

__all__ = ["FORMATS", "Offload", "PartBytes", "decode_bound", "offload", "part_bytes", "prefill_bound"]

PLAIN = {"float32": 4, "bfloat16": 2}
FORMATS = (*PLAIN, "int8", "int4", "nf4", "mxfp4")
HEAD = "int8"
"""What `moekit pack` stores embedding and head in."""

PROCESS = 400 << 20
"""Bytes of a process beside weights, experts and cache: Python, its libraries, a tokenizer and the work of a prompt.
What one with SmolLM2 measured of itself (docs/budget.md: 429 MiB, 29 of them weights); wide models take more."""


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
    def packed(self) -> bool:
        """Whether `moekit pack` writes it."""
        return self.format not in PLAIN

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


@dataclass(frozen=True)
class Offload:
    """What a budget gives a packed model whose experts stay on disk, as `moekit.adapt.budget` divides it.

    Attributes:
        base: bytes of the process without experts and cache.
        slots, total_slots: experts that have room (none in a budget below `least`), and all there are.
        least: the budget without which nothing works.
        missed_bytes: that a token waits for, if routing prefers no expert.
        tokens_per_second: predicted; None where there are no slots, or bytes are missed and no rate is given.
    """

    base: int
    slots: int
    total_slots: int
    least: int
    missed_bytes: float
    tokens_per_second: float | None

    @property
    def hit_rate(self) -> float:
        """The share of experts that have room."""
        return self.slots / self.total_slots


def offload(
    config: ModelConfig, sizes: PartBytes, memory: int, context: int, bandwidth: float, disk: float | None
) -> Offload:
    """Experts on disk, `memory` for the whole process: a token reads its bytes from memory, and before that from disk
    those of the experts that are missing. `bandwidth` and `disk` in bytes a second. A prediction, not a bound: reading
    and computing overlap, routing prefers experts, and computing takes longer than reading memory.

    An embedding that is not the head too stays in the file as well: only rows of it are looked up.
    """
    from moekit.adapt.budget import limit_for, most_taken, slots_within  # import torch
    from moekit.adapt.quant_modules import PAGE

    assert config.moe is not None
    total = len(config.moe_layers) * config.moe.num_experts
    stride = -(-sizes.stored["experts"] // (total * PAGE)) * PAGE
    mapped = 0 if config.tie_word_embeddings else sizes.stored["embedding"]
    base = PROCESS + sizes.total - sizes.stored["experts"] - mapped
    taken = base + kv_cache_bytes(config, context, sizes.cache_value)
    least = limit_for(taken, max(2, most_taken(config.moe)), stride)
    slots = 0 if memory < least else min(total, slots_within(memory, taken, stride))
    missed = (1 - slots / total) * sizes.read["experts"]
    speed = None
    if slots and (disk is not None or not missed):
        speed = 1 / (1 / decode_bound(config, sizes, bandwidth, context) + (missed / disk if disk else 0))
    return Offload(base, slots, total, least, missed, speed)


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
