"""Which expert leaves when room is needed.

A policy ranks what is resident. It sees steps: the distinct experts that one layer of one token (or of a chunk of
tokens) uses together, all of which must be resident at once. It holds no bytes; `expert_cache` does.

"lru" and "lfu" are the textbook's; "lfu" counts uses also of what has left. "lfuda" is LFU with dynamic aging (Arlitt
et al., "Evaluating content management techniques for Web proxy caches", 2000): uses since it came + age, where age is
the rank of what left last. "pinned" keeps the hottest and the rest by LRU. "forecast" is ours; see `Forecast`.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from moekit.adapt.store import Key
from moekit.errors import UnknownNameError

__all__ = [
    "DEFAULT",
    "HEAT_TURNS",
    "LFU",
    "LFUDA",
    "LRU",
    "POLICIES",
    "Busy",
    "Forecast",
    "Heap",
    "Pinned",
    "Policy",
    "make_policy",
]

Busy = Callable[[Key], bool]
HEAT_TURNS = 64  # turns of its layer that what was learnt in earlier runs is worth


class Policy:
    """The order in which residents leave.

    Args:
        slots: how many can be resident.
        heat: for experts, the share of their layer's turns that used them in earlier runs; or None.
    """

    def __init__(self, slots: int, heat: Mapping[Key, float] | None = None) -> None:
        self.slots = slots

    def use(self, keys: Sequence[Key]) -> None:
        """A step uses these, resident or not; those that are not get an `add` next."""
        raise NotImplementedError

    def add(self, key: Key) -> None:
        """It became resident."""
        raise NotImplementedError

    def remove(self, key: Key) -> None:
        """It is resident no more, for a reason of others: `victims` removes by itself."""
        raise NotImplementedError

    def victims(self, count: int, busy: Busy) -> list[Key]:
        """Remove and return the residents that leave first; those that are `busy` stay. Fewer, if there are fewer."""
        raise NotImplementedError


class LRU(Policy):
    """The least recently used leaves."""

    def __init__(self, slots: int, heat: Mapping[Key, float] | None = None) -> None:
        super().__init__(slots)
        self._order: OrderedDict[Key, None] = OrderedDict()

    def use(self, keys: Sequence[Key]) -> None:
        for key in keys:
            if key in self._order:
                self._order.move_to_end(key)

    def add(self, key: Key) -> None:
        self._order[key] = None

    def remove(self, key: Key) -> None:
        del self._order[key]

    def victims(self, count: int, busy: Busy) -> list[Key]:
        found = list(itertools.islice((key for key in self._order if not busy(key)), count))
        for key in found:
            del self._order[key]
        return found


class Heap:
    """The least of items whose ranks only rise: an item has one entry, put right when it comes to the top."""

    def __init__(self) -> None:
        self.rank: dict[Any, Any] = {}
        self._entries: list[tuple[Any, int, Any]] = []
        self._entry_of: dict[Any, int] = {}
        self._number = itertools.count()

    def add(self, item: Hashable, rank: Any) -> None:
        self.rank[item] = rank
        self._entry_of[item] = number = next(self._number)
        heapq.heappush(self._entries, (rank, number, item))
        if len(self._entries) > 2 * len(self.rank) + 64:  # entries of what was removed
            self._entries = [entry for entry in self._entries if self._entry_of.get(entry[2]) == entry[1]]
            heapq.heapify(self._entries)

    def remove(self, item: Hashable) -> None:
        del self.rank[item], self._entry_of[item]

    def least(self) -> Any:
        """None if it is empty."""
        entries = self._entries
        while entries:
            rank, number, item = entries[0]
            if self._entry_of.get(item) != number:
                heapq.heappop(entries)
            elif self.rank[item] != rank:
                heapq.heapreplace(entries, (self.rank[item], number, item))
            else:
                return item
        return None

    def pop(self, count: int, busy: Busy) -> list[tuple[Any, Any]]:
        """Remove the least that are not busy: (item, rank)."""
        found: list[tuple[Any, Any]] = []
        kept: list[tuple[Any, Any]] = []
        while len(found) < count and (item := self.least()) is not None:
            (kept if busy(item) else found).append((item, self.rank[item]))
            self.remove(item)
        for item, rank in kept:
            self.add(item, rank)
        return found


class LFU(Policy):
    """The one with the fewest uses leaves, the least recently used of several."""

    def __init__(self, slots: int, heat: Mapping[Key, float] | None = None) -> None:
        super().__init__(slots)
        self._uses: dict[Key, float] = {key: HEAT_TURNS * share for key, share in (heat or {}).items()}
        self._heap, self._clock = Heap(), itertools.count()

    def use(self, keys: Sequence[Key]) -> None:
        uses, rank = self._uses, self._heap.rank
        for key in keys:
            uses[key] = uses.get(key, 0) + 1
            if key in rank:
                rank[key] = (uses[key], next(self._clock))

    def add(self, key: Key) -> None:
        self._heap.add(key, (self._uses.get(key, 0), next(self._clock)))

    def remove(self, key: Key) -> None:
        self._heap.remove(key)

    def victims(self, count: int, busy: Busy) -> list[Key]:
        return [key for key, _ in self._heap.pop(count, busy)]


class LFUDA(Policy):
    """LFU with dynamic aging: the one with the least uses + age when last used leaves, and its rank is the new age."""

    def __init__(self, slots: int, heat: Mapping[Key, float] | None = None) -> None:
        super().__init__(slots)
        self._uses: dict[Key, int] = {}
        self._age = 0
        self._heap, self._clock = Heap(), itertools.count()

    def use(self, keys: Sequence[Key]) -> None:
        uses, rank = self._uses, self._heap.rank
        for key in keys:
            if key in rank:
                uses[key] += 1
                rank[key] = (uses[key] + self._age, next(self._clock))

    def add(self, key: Key) -> None:
        self._uses[key] = 1
        self._heap.add(key, (1 + self._age, next(self._clock)))

    def remove(self, key: Key) -> None:
        self._heap.remove(key)

    def victims(self, count: int, busy: Busy) -> list[Key]:
        found = self._heap.pop(count, busy)
        if found:
            self._age = found[-1][1][0]
        return [key for key, _ in found]


class Pinned(Policy):
    """The hottest three quarters of the slots stay, hottest by `heat`; the rest leave by LRU, and before them."""

    def __init__(self, slots: int, heat: Mapping[Key, float] | None = None) -> None:
        super().__init__(slots)
        hottest = sorted(heat or {}, key=lambda key: (-(heat or {})[key], key))
        self._place = {key: -number for number, key in enumerate(hottest)}
        self._pinned, self._rest = Heap(), LRU(slots)

    def use(self, keys: Sequence[Key]) -> None:
        self._rest.use(keys)

    def add(self, key: Key) -> None:
        if -self._place.get(key, -self.slots) < self.slots * 3 // 4:
            self._pinned.add(key, self._place[key])
        else:
            self._rest.add(key)

    def remove(self, key: Key) -> None:
        (self._pinned if key in self._pinned.rank else self._rest).remove(key)

    def victims(self, count: int, busy: Busy) -> list[Key]:
        found = self._rest.victims(count, busy)
        return found + [key for key, _ in self._pinned.pop(count - len(found), busy)]


class Forecast(Policy):
    """The one that is expected to be needed last leaves: after its layer's next turn and 1/p − 1 turns more.

    p is the chance that a turn of its layer uses the expert: its share of the layer's past turns, fading by half in
    each of `HALVES` turns, mixed by weights that follow what explains the uses best (a step of expectation
    maximisation at each step that misses). So it acts like LRU where routing sticks to its experts and like LFU where
    some are simply popular, and it knows that the layer just visited comes again last, where recency says the opposite.

    Steps of one layer in a row that share no expert are one turn: a prompt's experts, some at a time.
    After a miss the layer's residents are ranked anew in one pass over them; a victim then costs O(log layers).
    """

    HALVES = (0.5, 4.0, 64.0)
    _RATE = 0.01
    _LEAST = 1e-3  # a chance that even an expert never seen before has

    def __init__(self, slots: int, heat: Mapping[Key, float] | None = None) -> None:
        super().__init__(slots)
        self.weights = np.full(len(self.HALVES), 1 / len(self.HALVES))
        self._fade = 0.5 ** (1 / np.array(self.HALVES))[:, None]
        self._gain = 1 - self._fade
        self._known = bool(heat)
        self._steps = 0
        self._layers: dict[int, _Layer] = {}
        self._last: _Layer | None = None
        self._order: list[tuple[float, int, int]] = []  # a heap of (−expected of a layer's last, layer, its version)
        self._moved: set[int] = set()
        for (layer, expert), share in (heat or {}).items():
            self._layer(layer, expert).shares[:, expert] = share

    def use(self, keys: Sequence[Key]) -> None:
        for number, group in itertools.groupby(keys, key=_layer_of):
            chosen = [expert for _, expert in group]
            layer, experts = self._layer(number, max(chosen)), np.array(chosen)
            goes_on = layer is self._last and len(self._layers) > 1 and not layer.used[experts].any()
            if not goes_on:
                if layer.turns and not layer.resident[experts].all():
                    self._learn(layer.shares[:, experts] / self._scale(layer))
                layer.shares *= self._fade
                layer.turns += 1
                layer.when, self._steps = self._steps, self._steps + 1
                layer.used[:] = False
                self._last = layer
            layer.shares[:, experts] += self._gain
            layer.used[experts] = True
            self._moved.add(number)

    def add(self, key: Key) -> None:
        self._layer(*key).resident[key[1]] = True
        self._moved.add(key[0])

    def remove(self, key: Key) -> None:
        self._layers[key[0]].resident[key[1]] = False
        self._moved.add(key[0])

    def victims(self, count: int, busy: Busy) -> list[Key]:
        found: list[Key] = []
        if count:
            for number in self._moved:
                self._rank(number)
            self._moved.clear()
        while self._order and len(found) < count:
            _, number, version = heapq.heappop(self._order)
            layer = self._layers[number]
            if version != layer.version:
                continue
            key = (number, layer.ranked.pop()[1])
            self._push(number)
            if busy(key):
                self._moved.add(number)  # it is ranked again next time
            else:
                layer.resident[key[1]] = False
                found.append(key)
        return found

    def _layer(self, number: int, expert: int) -> _Layer:
        layer = self._layers.get(number)
        if layer is None:
            layer = self._layers[number] = _Layer(len(self.HALVES))
        if expert >= len(layer.resident):
            layer.grow(2 * expert + 1)
        return layer

    def _scale(self, layer: _Layer) -> Any:
        """Shares of a layer with few turns are a part of what they would be of one with many."""
        return 1.0 if self._known else 1 - self._fade**layer.turns

    def _learn(self, shares_HK: Any) -> None:
        explained = self.weights[:, None] * (shares_HK + self._LEAST)
        self.weights += self._RATE * ((explained / explained.sum(0)).mean(1) - self.weights)

    def _rank(self, number: int) -> None:
        """Sort a layer's residents by when they are expected to be needed, in rounds over the layers."""
        layer = self._layers[number]
        experts = np.flatnonzero(layer.resident)
        shares = layer.shares[:, experts] / (self._scale(layer) if layer.turns else 1.0)
        chance = np.maximum(self.weights @ shares, self._LEAST**2)
        expected = 1 / chance + layer.when / len(self._layers)
        order = np.argsort(expected, kind="stable")
        layer.ranked = list(zip(expected[order].tolist(), experts[order].tolist(), strict=True))
        layer.version += 1
        self._push(number)

    def _push(self, number: int) -> None:
        layer = self._layers[number]
        if layer.ranked:
            heapq.heappush(self._order, (-layer.ranked[-1][0], number, layer.version))


class _Layer:
    """What `Forecast` knows of a layer: shares (halves, experts), who is resident, who was used in its last turn, and
    the last ranking of residents."""

    def __init__(self, halves: int) -> None:
        self.shares, self.resident = np.zeros((halves, 0)), np.zeros(0, dtype=bool)
        self.used = self.resident
        self.turns, self.when, self.version = 0, 0, 0
        self.ranked: list[tuple[float, int]] = []

    def grow(self, experts: int) -> None:
        more = experts - len(self.resident)
        self.shares = np.pad(self.shares, ((0, 0), (0, more)))
        self.resident, self.used = np.pad(self.resident, (0, more)), np.pad(self.used, (0, more))


def _layer_of(key: Key) -> int:
    return key[0]


POLICIES: dict[str, type[Policy]] = {"forecast": Forecast, "lfu": LFU, "lfuda": LFUDA, "lru": LRU, "pinned": Pinned}
DEFAULT = "forecast"


def make_policy(name: str, slots: int, heat: Mapping[Key, float] | None = None) -> Policy:
    """Raises `UnknownNameError`, which lists the names."""
    if name not in POLICIES:
        raise UnknownNameError(f"cache policy {name!r}: choose from {', '.join(POLICIES)}")
    return POLICIES[name](slots, heat)
