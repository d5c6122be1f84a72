"""A promise kept: a model whose experts come from disk, in a process that stays below so many bytes of memory.

What the process takes is measured, not estimated: it reads everything but the experts, runs one layer of each kind on
as many tokens as a prompt brings at a time, with blank experts, and asks the system for the highest it has been. What
is left of the budget becomes slots for experts. When a conversation's keys and values grow, experts leave for them.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from moekit.adapt.expert_cache import CacheStats, ExpertCache
from moekit.adapt.expert_heat import load_heat, save_heat
from moekit.adapt.expert_policies import DEFAULT
from moekit.adapt.expert_probe import ReaderChoice, probe
from moekit.adapt.offload import ExpertTraffic, OffloadedExperts
from moekit.adapt.packed_folder import empty_packed, put_packed
from moekit.adapt.quant import replace_modules
from moekit.adapt.quant_modules import QuantEmbedding, QuantExperts
from moekit.adapt.store import Store
from moekit.config import MoEConfig
from moekit.errors import BudgetError, UnsupportedError
from moekit.machine import peak_memory, readable_bytes, resident_memory, return_freed_memory
from moekit.models.cache import PREFILL_CHUNK, KVCache
from moekit.models.decoder import Decoder
from moekit.models.safetensors_file import SafetensorsFile

__all__ = ["BudgetReport", "MemoryBudget", "load_within"]

WARM_UP = 3.0
"""Seconds of reading the experts that were busiest in earlier runs, before the first prompt."""
_SPARE, _SPARE_SHARE = 16 << 20, 0.01  # of the budget: what Python and the system's allocator may come to need


@dataclass(frozen=True)
class BudgetReport:
    """What a budget was spent on, in bytes unless said otherwise.

    Attributes:
        limit: the budget.
        base: the process with everything but experts and conversations: programs, weights, the work of a prompt.
        resident: of it, weights.
        conversations: keys and values.
        slots, total_slots: experts that have room, and all there are.
        slot: bytes of one.
        expert_bytes: of all experts, on disk.
        token_expert_bytes: of the experts that a token passes.
        reader: how experts are read, and how fast the disk was when that was tried.
    """

    limit: int
    base: int
    resident: int
    conversations: int
    slots: int
    total_slots: int
    slot: int
    expert_bytes: int
    token_expert_bytes: float
    reader: ReaderChoice

    @property
    def hit_rate(self) -> float:
        """Of routing that prefers no expert: the share of experts that have room."""
        return self.slots / self.total_slots

    @property
    def missed_bytes(self) -> float:
        """That a token then waits for."""
        return (1.0 - self.hit_rate) * self.token_expert_bytes


class MemoryBudget:
    """Divides what is left of a limit between experts and conversations; a `models.cache.Room` for the latter.

    Args:
        limit, base, resident: see `BudgetReport`.
        least: slots without which nothing works.
        traffic: the experts', with its cache.
        reader: how they are read.

    Attributes:
        mapping: the embedding's in the file, or None where it is in memory.
    """

    def __init__(
        self, limit: int, base: int, resident: int, least: int, traffic: ExpertTraffic, reader: ReaderChoice
    ) -> None:
        self.limit, self._base, self._resident, self._least = limit, base, resident, least
        self._traffic, self._reader, self._conversations = traffic, reader, 0
        self.mapping: mmap.mmap | None = None

    def take(self, nbytes: int) -> None:
        """Make room for keys and values; experts leave for it.

        Raises:
            BudgetError: there is not enough.
        """
        with self._traffic.lock:
            self._conversations += nbytes
            try:
                self._divide()
            except BudgetError:
                self._conversations -= nbytes
                raise

    def give(self, nbytes: int) -> None:
        """Keys and values are gone."""
        with self._traffic.lock:
            self._conversations -= nbytes
            self._divide()

    def rehearse(self, work: Callable[[], object]) -> None:
        """Do `work` with blank experts, and leave it the memory that it needs beside experts and conversations.

        Raises:
            BudgetError: there is not enough.
        """
        cache = self._traffic.in_use
        with self._traffic.lock, self._traffic.rehearsal(cache.stride), peak_memory() as peak:
            work()
        with self._traffic.lock:
            self._base = max(self._base, peak.value - self._conversations - len(cache) * cache.stride)
            self._divide()

    def settle(self) -> None:
        """Let go of embeddings that were looked up, and compare with the system what the process takes; if it is above
        its limit, experts leave.

        Raises:
            BudgetError: there is not enough without them.
        """
        if self.mapping is not None:
            self.mapping.madvise(mmap.MADV_DONTNEED)
        above = resident_memory() - self.limit
        if above > 0:
            with self._traffic.lock:
                self._base += above
                self._divide()
        stats, cache = self.stats, self._traffic.in_use
        if stats.read_seconds > 1 and stats.bytes_read > 2e9 * self._reader.gb_s * stats.read_seconds:
            with self._traffic.lock:  # the disk was busy with something else when it was tried
                self._reader = probe(cache.store, again=True)

    @property
    def stats(self) -> CacheStats:
        """Of the experts' cache, so far."""
        return self._traffic.in_use.stats

    @property
    def report(self) -> BudgetReport:
        """As things stand."""
        cache, store = self._traffic.in_use, self._traffic.in_use.store
        return BudgetReport(
            limit=self.limit,
            base=self._base,
            resident=self._resident,
            conversations=self._conversations,
            slots=cache.slots,
            total_slots=len(store.extents),
            slot=cache.stride,
            expert_bytes=sum(extent.nbytes for extent in store.extents.values()),
            token_expert_bytes=self._traffic.token_bytes,
            reader=self._reader,
        )

    def _divide(self) -> None:
        cache = self._traffic.in_use
        slots = min(slots_within(self.limit, self._base + self._conversations, cache.stride), cache.maximum)
        if slots < self._least:
            need = limit_for(self._base + self._conversations, self._least, cache.stride)
            raise BudgetError(
                f"{readable_bytes(self.limit)} of memory do not hold this conversation, whose keys and values are "
                f"{readable_bytes(self._conversations)}: {readable_bytes(need)} would"
            )
        if slots != cache.slots:
            cache.resize(slots)


def slots_within(limit: int, taken: int, stride: int) -> int:
    """Slots of `stride` bytes that fit into a budget of which so much is taken."""
    return max(0, int(limit * (1 - _SPARE_SHARE)) - _SPARE - taken) // stride


def limit_for(taken: int, slots: int, stride: int) -> int:
    """The budget in which so many slots fit."""
    return int((taken + slots * stride + _SPARE) / (1 - _SPARE_SHARE)) + 1


def most_taken(moe: MoEConfig) -> int:
    """Experts of a layer that one token may take."""
    return moe.num_experts if moe.router in ("top_p", "expert_choice") else moe.top_k


def load_within(
    folder: str | os.PathLike[str],
    limit: int,
    policy: str = DEFAULT,
    reader: ReaderChoice | None = None,
    most: int | None = None,
) -> Decoder:
    """The decoder in a folder of `moekit pack`, its experts on disk and some of them in memory: with everything else
    that the process is, at most `limit` bytes. Its numbers are those of `load_packed`, bit for bit.

    Args:
        policy: which experts leave for others, see `expert_policies.POLICIES`.
        reader: how experts are read; None tries the ways there are, once a machine and disk.
        most: experts to keep in memory at most, to measure what fewer cost; None: as many as fit.
    Raises:
        BudgetError: the limit is too low; the message has the least that works.
        UnsupportedError: the model has no experts.
        FileError, FormatError: as `load_packed` has it.
    """
    return_freed_memory()
    decoder, file = empty_packed(folder)
    traffic = ExpertTraffic()
    found: dict[nn.Module, OffloadedExperts] = {
        module: OffloadedExperts(module, int(name.split(".")[1]), traffic)
        for name, module in decoder.named_modules()
        if isinstance(module, QuantExperts)
    }
    if not found:
        raise UnsupportedError(f"{folder} has no packed experts to leave on disk: load it without memory")
    replace_modules(decoder, found)
    store = Store(folder)
    before = resident_memory()
    mapping = _read_others(decoder, file, store)
    resident = resident_memory() - before
    for experts in found.values():
        traffic.token_bytes += _taken(decoder, experts) * experts.mean_bytes
    base = _rehearse(decoder, traffic, store.largest)
    least = max(2, *(_taken(decoder, each) for each in found.values()))
    choice = probe(store) if reader is None else reader
    most = len(store.extents) if most is None else min(most, len(store.extents))
    slots = min(slots_within(limit, base, store.largest), most)
    if slots < least:
        need = limit_for(base, least, store.largest)
        raise BudgetError(
            f"{readable_bytes(limit)} of memory are too little for this model: {readable_bytes(need)} is the least "
            f"({readable_bytes(base)} without experts, and {least} experts of {readable_bytes(store.largest)}), which "
            f"would give at most {1e9 * choice.gb_s / traffic.token_bytes:.1f} tokens a second"
        )
    heat = load_heat(store)
    traffic.cache = cache = ExpertCache(store, choice.reader(store), slots, policy, heat, maximum=most)
    cache.warm_up(sorted(heat, key=lambda key: -heat[key])[: int(WARM_UP * 1e9 * choice.gb_s / store.largest)])
    decoder.room = room = MemoryBudget(limit, base, resident, least, traffic, choice)
    room.mapping = mapping
    weakref.finalize(room, _remember, store, cache)
    return decoder


def _remember(store: Store, cache: ExpertCache) -> None:
    save_heat(store, cache.heat())


def _read_others(decoder: Decoder, file: SafetensorsFile, store: Store) -> mmap.mmap | None:
    """Everything but the experts. Of an embedding that is not the head too, only rows are looked up: it is mapped, and
    what was read of it is let go from time to time. Returns the mapping."""
    lookup = isinstance(decoder.embed, QuantEmbedding) and not decoder.config.tie_word_embeddings
    experts = {f"layers.{layer}.mlp.experts.expert_{expert}" for layer, expert in store.extents}
    mapping = None
    for name in file.tensors.keys() - experts:
        if lookup and name == "embed.data":
            value, mapping = file.map(name)
            put_packed(decoder, name, value)
        else:
            put_packed(decoder, name, store.read(name))
    if lookup:  # the system kills whoever looks at mapped bytes of a file that was cut
        decoder.embed.register_forward_pre_hook(lambda *_: store.check())
    decoder.eval()
    return mapping


def _taken(decoder: Decoder, experts: OffloadedExperts) -> int:
    """Experts that one token may take."""
    assert decoder.config.moe is not None
    return most_taken(decoder.config.moe.for_layer(experts.layer))


@torch.inference_mode()
def _rehearse(decoder: Decoder, traffic: ExpertTraffic, largest: int) -> int:
    """Bytes at the highest point of a prompt's chunk through one layer of each kind, and the head."""
    layers, config = decoder.layers, decoder.config
    kinds = {type(block.mlp): block for block in layers}
    ids = torch.arange(min(PREFILL_CHUNK, config.max_position_embeddings - 1))[None] % config.vocab_size
    try:
        decoder.layers = nn.ModuleList(kinds.values())
        with traffic.rehearsal(largest), peak_memory() as peak:
            decoder(ids, cache=KVCache(config, dtype=decoder.cache_dtype), last_only=True)
    finally:
        decoder.layers = layers
    return max(peak.value, resident_memory())
