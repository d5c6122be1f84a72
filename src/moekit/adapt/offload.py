"""`OffloadedExperts`: packed experts that live in a store and come to memory when tokens need them.

They compute what `QuantExperts` compute, bit for bit: which experts are in memory, in what order others arrive, and how
many come at a time change no sum. Many tokens (a prompt) pass the experts in the order of their numbers, a few at a
time, while the next are read; a new token's experts work as they come (models/step_token.py).
Shapes: T tokens, K experts a token, R rows sorted by expert, D hidden, E experts.
"""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moekit.adapt.expert_cache import ExpertCache, Taken
from moekit.adapt.quant_modules import QuantExperts
from moekit.errors import UnsupportedError
from moekit.kernels.formats import Packed
from moekit.kernels.quant import Matrices, quant_grouped_mm, quant_moe
from moekit.moe import Routing
from moekit.moe.experts import plus_bias

__all__ = ["ExpertTraffic", "OffloadedExperts"]

WAVE = 8
"""Experts of a prompt that work together while as many are read."""


class ExpertTraffic:
    """What the layers of one model share: the cache, and a lock, because one thread at a time uses it.

    Attributes:
        cache: None while the model rehearses (`rehearsal`).
        most: experts that may be taken at once.
        token_bytes: of all the experts that a token passes, on average.
        foresight: whether to read ahead.
        first_layer: where a token begins.
    """

    def __init__(self, cache: ExpertCache | None = None) -> None:
        self.cache, self.lock = cache, threading.RLock()
        self.blank: Tensor | None = None
        self.token_bytes = 0.0
        self.foresight, self.first_layer = Foresight(), -1

    @property
    def most(self) -> int:
        return len(self.in_use.store.extents) if self.blank is not None else self.in_use.slots

    @property
    def in_use(self) -> ExpertCache:
        assert self.cache is not None, "the experts have no cache yet"
        return self.cache

    @contextmanager
    def rehearsal(self, nbytes: int) -> Iterator[None]:
        """Every expert is `nbytes` zeros, and nothing is read: to find out how much memory the rest needs."""
        self.blank = torch.zeros(nbytes, dtype=torch.uint8)
        try:
            yield
        finally:
            self.blank = None


class Foresight:
    """Whether reading ahead pays: tried for a few tokens at a time, in turn with not doing so, until it is clear. Not
    before the cache is full: until then a read finds room without an expert's leaving, and takes first-touched memory.

    Attributes:
        on: whether to read ahead now.
        gain: the time of a token without over that with; None while it is being tried.
    """

    TURN, TURNS, WORTH = 8, 6, 1.05

    def __init__(self) -> None:
        self.on = False
        self.gain: float | None = None
        self._took: dict[bool, list[float]] = {False: [], True: []}
        self._last, self._count = 0.0, 0

    def tick(self, full: bool) -> None:
        """Another lone token begins, with a full cache or not."""
        if self.gain is not None or not (full or self._count):
            return
        now, self._count = time.perf_counter(), self._count + 1
        if self._count % self.TURN > 1:  # the first of a turn has what the turn before left
            self._took[self.on].append(now - self._last)
        self._last = now
        if self._count % self.TURN == 0:
            self.on = not self.on
        if self._count == self.TURN * self.TURNS:
            without, with_it = (statistics.median(self._took[way]) for way in (False, True))
            self.gain = without / with_it
            self.on = self.gain > self.WORTH


class _Wave(NamedTuple):
    """Some experts in memory, in order, and their matrices."""

    experts: list[int]
    gate_up: Matrices
    down: Matrices


class OffloadedExperts(QuantExperts):
    """E packed MLPs in a store, for inference.

    Args:
        like: the packed experts they stand for, without memory (on torch's meta device).
        layer: the number of their layer in the store.
        traffic: the cache.

    Attributes:
        residency: themselves; see `moe.experts.Residency`.
    """

    def __init__(self, like: QuantExperts, layer: int, traffic: ExpertTraffic) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({**like.__dict__, "_buffers": {}})
        self.layer, self.traffic = layer, traffic
        if traffic.first_layer < 0:
            traffic.first_layer = layer
        with torch.device("meta"):
            pairs = [self._over(e, torch.empty(sum(self._sizes(each)), dtype=torch.uint8))
                     for e, each in enumerate(self.formats)]  # fmt: skip
        self.matrices: tuple[list[Packed], list[Packed]] = [up for up, _ in pairs], [down for _, down in pairs]

    @property
    def mean_bytes(self) -> float:
        """Of an expert, on disk and in memory."""
        return sum(sum(self._sizes(format)) for format in self.formats) / len(self.formats)

    @property
    def residency(self) -> OffloadedExperts:  # type: ignore[override]
        return self

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `QuantExperts.forward`.

        Raises:
            UnsupportedError: a gradient is wanted, for which the experts would have to come again.
            FileError, FormatError: an expert cannot be read, or is damaged.
        """
        if rows_RD.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError("experts on disk are for inference: load the model whole to train through it")
        ends = counts_E.cumsum(0).tolist()
        counts = counts_E.tolist()
        out_RD = torch.zeros_like(rows_RD)
        for wave in self._waves([e for e, count in enumerate(counts) if count]):
            first, last = wave.experts[0], wave.experts[-1]
            rows, only = slice(ends[first] - counts[first], ends[last]), torch.zeros_like(counts_E)
            only[first : last + 1] = counts_E[first : last + 1]
            hidden_RG = quant_grouped_mm(rows_RD[rows], wave.gate_up, counts_E[wave.experts])
            hidden_RG = plus_bias(hidden_RG, self.in_bias, only)
            out_RG = quant_grouped_mm(self._act(hidden_RG), wave.down, counts_E[wave.experts])
            out_RD[rows] = plus_bias(out_RG, self.down_bias, only)
        return out_RD

    def decode(self, x_TD: Tensor, routing: Routing) -> Tensor | None:
        """See `QuantExperts.decode`. Raises `FileError` and `FormatError` as `forward` does."""
        if routing.top_k is None or self.in_bias is not None or self.clamped or torch.is_grad_enabled():
            return None
        ids_TK = routing.expert_ids_TK
        out_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        for wave in self._waves(ids_TK.unique().tolist()):
            place_E = torch.full((len(self.formats),), -1)
            place_E[wave.experts] = torch.arange(len(wave.experts))
            quant_moe(
                x_TD, place_E[ids_TK], routing.weights_TK, wave.gate_up, wave.down, self.activation, self.gated,
                add_to=out_TD,
            )  # fmt: skip
        return out_TD.to(x_TD.dtype)

    def begin_lone_token(self) -> None:
        """See `moe.experts.Residency`."""
        if self.layer == self.traffic.first_layer and self.traffic.blank is None:
            self.traffic.foresight.tick(len(self.traffic.in_use) == self.traffic.most)

    @property
    def looks_ahead(self) -> bool:
        """See `moe.experts.Residency`."""
        return self.traffic.foresight.on and self.traffic.blank is None

    def expect(self, experts: Collection[int]) -> None:
        """See `moe.experts.Residency`."""
        self.traffic.in_use.prefetch([(self.layer, expert) for expert in experts])

    def together(self, wanted: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """See `moe.experts.Residency`."""
        group: list[int] = []
        experts: set[int] = set()
        for number, ids in enumerate(wanted):
            if group and len(experts.union(ids)) > self.traffic.most:
                yield group
                group, experts = [], set()
            group.append(number)
            experts.update(ids)
        if group:
            yield group

    @contextmanager
    def bring(self, experts: Collection[int]) -> Iterator[Iterator[list[tuple[int, int]]]]:
        """See `moe.experts.Residency`."""
        if self.traffic.blank is not None:
            yield iter([[(expert, self.traffic.blank.data_ptr()) for expert in experts]])
            return
        with self.traffic.lock, self._take(experts) as taken:
            yield self._arrivals(taken)

    def _arrivals(self, taken: Taken) -> Iterator[list[tuple[int, int]]]:
        yield [(key[1], address) for key, address in taken.ready]
        for (_, expert), address in taken.arriving():
            yield [(expert, address)]

    def _take(self, experts: Collection[int]) -> Taken:
        return self.traffic.in_use.take([(self.layer, expert) for expert in experts])

    def _waves(self, experts: list[int]) -> Iterator[_Wave]:
        """The experts in order, a few at a time, the next on their way."""
        if self.traffic.blank is not None:
            blank = self.traffic.blank
            yield self._wave(experts, [self._over(expert, blank) for expert in experts])
            return
        with self.traffic.lock:
            size = max(1, min(WAVE, self.traffic.most // 2))
            waves = [experts[at : at + size] for at in range(0, len(experts), size)]
            coming = [self._take(waves[0])] if waves else []
            try:
                for number, wave in enumerate(waves):
                    if number + 1 < len(waves):
                        coming.append(self._take(waves[number + 1]))
                    taken = coming[0]
                    found = {expert: address for (_, expert), address in (*taken.ready, *taken.arriving())}
                    yield self._wave(wave, [self._matrices_at(found[expert], expert) for expert in wave])
                    coming.pop(0).release()
            finally:
                for taken in coming:
                    taken.release()

    def _wave(self, experts: list[int], matrices: list[tuple[Packed, Packed]]) -> _Wave:
        return _Wave(experts, Matrices([up for up, _ in matrices]), Matrices([down for _, down in matrices]))

    def _matrices_at(self, address: int, expert: int) -> tuple[Packed, Packed]:
        size = sum(self._sizes(self.formats[expert]))
        memory = (ctypes.c_uint8 * size).from_address(address)
        return self._over(expert, torch.frombuffer(memory, dtype=torch.uint8))
