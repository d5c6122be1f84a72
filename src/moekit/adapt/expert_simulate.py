"""`simulate` runs a cache policy over a recorded trace; `Belady` is the yardstick that no policy passes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moekit.adapt.expert_policies import DEFAULT, Busy, Heap, Policy, make_policy
from moekit.adapt.store import Key
from moekit.errors import ConfigError

__all__ = ["Belady", "Hits", "simulate"]


class Belady(Policy):
    """The one whose next use is furthest away leaves (Belady 1966); it must be given the trace it will see."""

    def __init__(self, slots: int, trace: Sequence[Sequence[Key]]) -> None:
        super().__init__(slots)
        self._future: dict[Key, deque[int]] = {}
        for step, keys in enumerate(trace):
            for key in keys:
                self._future.setdefault(key, deque()).append(step)
        self._heap = Heap()

    def use(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._future[key].popleft()
            if key in self._heap.rank:  # further away than before: it goes towards the top, so it needs a new entry
                self.remove(key)
                self.add(key)

    def add(self, key: Key) -> None:
        future = self._future[key]
        self._heap.add(key, -future[0] if future else -math.inf)

    def remove(self, key: Key) -> None:
        self._heap.remove(key)

    def victims(self, count: int, busy: Busy) -> list[Key]:
        return [key for key, _ in self._heap.pop(count, busy)]


class Hits(NamedTuple):
    """Of all expert uses of a trace: those found resident, and those that were not."""

    hits: int
    misses: int


def simulate(
    trace: Sequence[Sequence[Key]], slots: int, policy: str = DEFAULT, heat: Mapping[Key, float] | None = None
) -> Hits:
    """Run `policy`, which may also be "belady", over a recorded trace, from an empty cache.

    Args:
        trace: for each step the keys that are used together.
        slots: experts that fit.
        policy: one of `POLICIES`, or "belady".
        heat: shares of earlier runs, as `ExpertCache.heat` gives them.
    Raises:
        ConfigError: a step uses more experts than fit.

    >>> steps = [[(0, 0)], [(1, 0)], [(2, 0)]] * 10
    >>> simulate(steps, 2, "lru"), simulate(steps, 2), simulate(steps, 2, "belady").hits
    (Hits(hits=0, misses=30), Hits(hits=14, misses=16), 14)
    """
    steps = [list(dict.fromkeys(keys)) for keys in trace]
    if any(len(keys) > slots for keys in steps):
        raise ConfigError(f"a step uses more experts than the {slots} that fit")
    order = Belady(slots, steps) if policy == "belady" else make_policy(policy, slots, heat)
    resident: set[Key] = set()
    hits = 0
    for keys in steps:
        missing = [key for key in keys if key not in resident]
        hits += len(keys) - len(missing)
        order.use(keys)
        resident.difference_update(order.victims(max(len(resident) + len(missing) - slots, 0), set(keys).__contains__))
        for key in missing:
            order.add(key)
        resident.update(missing)
    return Hits(hits, sum(map(len, steps)) - hits)
