"""`ExpertCache`: experts of a store in memory, in slots of one reservation; what is not there is read on demand.

A step of a model takes its experts, computes those that are there while the others are read, and gives all back:

    with cache.take(keys) as taken:
        for key, address in taken.ready: ...
        for key, address in taken.arriving(): ...

Which expert leaves is a policy's choice (`expert_policies`), how bytes get here is the reader's. One thread uses a
cache; the reader's threads only ever write into slots that nobody looks at.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Self

from moekit.adapt.expert_policies import DEFAULT, HEAT_TURNS, make_policy
from moekit.adapt.expert_reader import Pending, Reader
from moekit.adapt.expert_slots import Slots
from moekit.adapt.quant_modules import PAGE
from moekit.adapt.store import Key, Store
from moekit.errors import ConfigError, FileError

__all__ = ["CacheStats", "ExpertCache", "Taken"]


@dataclass(frozen=True)
class CacheStats:
    """What a cache did so far.

    Attributes:
        hits, misses: experts taken that were in memory, and that were not (also those still being prefetched).
        useful, useless: prefetched experts that were taken, and that left without.
        bytes_read: of experts that arrived, prefetched ones included.
        wait_seconds: time a step stood still for want of an expert.
        read_seconds: time in which at least one read was under way.
    """

    hits: int
    misses: int
    useful: int
    useless: int
    bytes_read: int
    wait_seconds: float
    read_seconds: float


class _Entry:
    """An expert that has a slot: its bytes are there when `pending` is None, and stay while it has `pins`."""

    __slots__ = ("address", "key", "pending", "pins", "slot", "unused")

    def __init__(self, key: Key, slot: int, address: int) -> None:
        self.key, self.slot, self.address, self.pins = key, slot, address, 0
        self.unused = False  # prefetched, and not taken so far
        self.pending: Pending | None = None


class Taken:
    """The experts of one step, which stay where they are until `release`; a context manager, which releases.

    Attributes:
        ready: those in memory already: (key, address of its first byte).
    """

    def __init__(self, cache: ExpertCache, held: list[_Entry], waiting: dict[Key, _Entry]) -> None:
        self._cache, self._held, self._waiting = cache, held, waiting
        self.ready: list[tuple[Key, int]] = [(entry.key, entry.address) for entry in held if entry.pending is None]

    def arriving(self) -> Iterator[tuple[Key, int]]:
        """The others, each when its bytes are there.

        Raises:
            FileError, FormatError: one could not be read; nothing of this step is held any more.
        """
        landed: SimpleQueue[Key] = SimpleQueue()
        for entry in self._waiting.values():
            if entry.pending is None:  # settled by another step
                landed.put(entry.key)
            else:
                entry.pending.add_done_callback(partial(_put, landed, entry.key))
        while self._waiting:
            entry = self._waiting.pop(self._cache._wait(landed))
            try:
                self._cache._settle(entry)
            except BaseException:
                self.release()
                raise
            yield entry.key, entry.address

    def release(self) -> None:
        """Let them leave; their addresses mean nothing any more. Reads that nobody waited for go on."""
        self._cache._unpin(self._held)
        self._held, self._waiting = [], {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class ExpertCache:
    """Slots for experts, the policy that empties them and the reader that fills them.

    Args:
        store: where the experts are.
        reader: reads them.
        slots: how many are kept; memory is taken as slots are filled, each the largest expert's size.
        policy: one of `expert_policies.POLICIES`.
        heat: what `heat` gave in an earlier run.
        maximum: what `slots` can grow to; all experts unless given. Address space only, not memory.
    Raises:
        ConfigError: numbers out of range, or no address space.
        UnknownNameError: no such policy.
    """

    def __init__(
        self,
        store: Store,
        reader: Reader,
        slots: int,
        policy: str = DEFAULT,
        heat: Mapping[Key, float] | None = None,
        *,
        maximum: int | None = None,
    ) -> None:
        self.maximum = max(slots, len(store.extents)) if maximum is None else maximum
        if not 1 <= slots <= self.maximum:
            raise ConfigError(f"a cache has 1 to {self.maximum} slots, not {slots}")
        self.store, self.slots, self.stride = store, slots, -(-store.largest // PAGE) * PAGE
        self._reader = reader
        self._before = dict(heat or {})
        self._policy = make_policy(policy, slots, heat)
        self._slots = Slots(self.maximum, self.stride, slots)
        self._entries: dict[Key, _Entry] = {}
        self._flying: dict[Key, _Entry] = {}  # those with a read that has not been settled
        self._free = list(range(slots - 1, -1, -1))
        self._ending: dict[int, Pending] = {}  # free slots into which a read that was given up may still write
        self._pinned = 0
        self._uses: Counter[Key] = Counter()
        self._turns, self._turn = Counter[int](), set[Key]()
        self._hits = self._misses = self._useful = self._useless = 0
        self._waited = 0.0

    def take(self, keys: Sequence[Key]) -> Taken:
        """Hold the experts `keys`, and begin to read all that are not there; never waits.

        Raises:
            ConfigError: the store has no such expert, or they do not fit beside those that others hold.
        """
        wanted = dict.fromkeys(keys)
        if self._flying:
            self._clear_flying(wanted)
        held = [entry for key in wanted if (entry := self._entries.get(key)) is not None]
        missing = [key for key in wanted if key not in self._entries] if len(held) < len(wanted) else []
        self._check_room(len(wanted), missing, held)
        self._pin(held)
        self._policy.use(list(wanted))
        self._count(wanted)
        waiting: dict[Key, _Entry] = {}
        if self._flying:
            waiting = {entry.key: entry for entry in held if entry.pending is not None}
            for entry in waiting.values():
                self._reader.hurry(_pending(entry))
        self._hits += len(held) - len(waiting)
        self._misses += len(missing) + len(waiting)
        if missing:
            for key, slot in zip(missing, self._room(len(missing), force=True), strict=True):
                waiting[key] = self._start(key, slot)
            started = [waiting[key] for key in missing]
            self._pin(started)
            held += started
        return Taken(self, held, waiting)

    def prefetch(self, keys: Sequence[Key]) -> None:
        """Begin to read what a later step may take, after all that steps wait for, as far as there is room without
        the experts that are held. If the next step of its layer takes others, what is not read yet is given up.

        Raises:
            ConfigError: the store has no such expert.
        """
        for key in dict.fromkeys(keys):
            self.store.extent(key)
            if key not in self._entries:
                for slot in self._room(1):
                    self._start(key, slot, later=True).unused = True

    def warm_up(self, keys: Sequence[Key] | None = None, window: int = 16) -> int:
        """Read experts into free slots, the hottest of earlier runs unless `keys` are given; returns how many.

        Ctrl-C ends it, with a cache that is whole.

        Raises:
            FileError, FormatError: one could not be read.
        """
        hottest = sorted(self._before, key=lambda key: (-self._before[key], key)) if keys is None else keys
        chosen = [key for key in hottest if key in self.store.extents and key not in self._entries][: len(self._free)]
        begun: deque[_Entry] = deque()
        try:
            for key in chosen:
                begun.append(self._start(key, self._free.pop(), later=True))
                if len(begun) == window:
                    self._settle(begun.popleft())
            while begun:
                self._settle(begun.popleft())
        finally:
            for entry in begun:
                self._drop(entry)
        return len(chosen)

    def resident(self, key: Key) -> int | None:
        """The address of an expert that is in memory, which means something until the next call of anything else."""
        entry = self._entries.get(key)
        return entry.address if entry is not None and entry.pending is None else None

    def resize(self, slots: int) -> None:
        """Have so many slots from now on. Fewer: those least worth keeping leave, others may move to other addresses,
        the memory goes back to the system at once; reads under way are given up and their last chunk waited for.

        Raises:
            ConfigError: not in 1 to `maximum`, or fewer while experts are held.
        """
        if not 1 <= slots <= self.maximum:
            raise ConfigError(f"a cache has 1 to {self.maximum} slots, not {slots}")
        if slots < self.slots:
            if self._pinned:
                raise ConfigError(f"{self._pinned} experts are in use: a cache cannot shrink before they are released")
            self._shrink(slots)
        self._free[:0] = range(slots - 1, self.slots - 1, -1)
        self.slots = self._policy.slots = slots

    def heat(self) -> dict[Key, float]:
        """For experts, the share of their layer's turns that used them, here and in the runs before."""
        known = HEAT_TURNS if self._before else 0
        return {
            key: (known * self._before.get(key, 0.0) + self._uses[key]) / (known + self._turns[key[0]])
            for key in sorted(self._before.keys() | self._uses.keys())
        }

    def __len__(self) -> int:
        """Slots that hold an expert, or will."""
        return len(self._entries)

    @property
    def stats(self) -> CacheStats:
        """So far; what the reader did is all it did, also for others."""
        counts, reader = (self._hits, self._misses, self._useful, self._useless), self._reader
        return CacheStats(*counts, reader.bytes_read, self._waited, reader.seconds)

    def close(self) -> None:
        """Give up what is being read and give the memory back; nothing can be taken any more."""
        for entry in list(self._flying.values()):
            self._drop(entry)
        self._entries.clear()
        self._free, self.slots, self.maximum = [], 0, 0
        self._slots.close()

    def _count(self, wanted: Mapping[Key, None]) -> None:
        """For `heat`: uses and turns. What goes on with a layer, with other experts, is the same turn."""
        layers = {key[0] for key in wanted}
        if len(self._turns) < 2 or layers != {key[0] for key in self._turn} or not self._turn.isdisjoint(wanted):
            self._turn = set()
            self._turns.update(layers)
        self._turn |= wanted.keys()
        self._uses.update(wanted.keys())

    def _check_room(self, wanted: int, missing: list[Key], held: list[_Entry]) -> None:
        for key in missing:
            self.store.extent(key)
        if wanted > self.slots:
            raise ConfigError(f"{wanted} experts at once do not fit into a cache of {self.slots}")
        others = self._pinned - sum(entry.pins > 0 for entry in held)
        if missing and wanted > self.slots - others:
            raise ConfigError(f"{wanted} experts at once do not fit: {others} of {self.slots} are held by others")

    def _pin(self, entries: list[_Entry]) -> None:
        for entry in entries:
            if not entry.pins:
                self._pinned += 1
            entry.pins += 1
            if entry.unused:
                entry.unused = False
                self._useful += 1

    def _unpin(self, entries: list[_Entry]) -> None:
        for entry in entries:
            if entry.pins:  # else it could not be read, and is forgotten
                entry.pins -= 1
                if not entry.pins:
                    self._pinned -= 1

    def _clear_flying(self, wanted: Mapping[Key, None]) -> None:
        """Settle what has arrived; of these layers, give up what was guessed wrongly. What failed is read again."""
        layers = {key[0] for key in wanted}
        for entry in list(self._flying.values()):
            if entry.pins:
                continue
            if _pending(entry).done():
                with contextlib.suppress(FileError, CancelledError):
                    self._settle(entry)
            elif entry.key[0] in layers and entry.key not in wanted:
                self._drop(entry)

    def _room(self, count: int, force: bool = False) -> list[int]:
        """Up to `count` slots; with `force` all, also of reads that no step waits for."""
        slots = [self._free.pop() for _ in range(min(count, len(self._free)))]
        for key in self._policy.victims(count - len(slots), self._busy):
            entry = self._entries.pop(key)
            self._flying.pop(key, None)
            self._useless += entry.unused
            slots.append(entry.slot)
        if force:
            idle = [entry for entry in reversed(self._flying.values()) if not entry.pins]
            for entry in idle[: count - len(slots)]:
                self._drop(entry)
                slots.append(self._free.pop())
        return slots

    def _busy(self, key: Key) -> bool:
        entry = self._entries[key]
        return entry.pins > 0 or (entry.pending is not None and not entry.pending.done())

    def _start(self, key: Key, slot: int, later: bool = False) -> _Entry:
        entry = _Entry(key, slot, self._slots.address(slot))
        out, after = self._slots.view(slot), self._ending.pop(slot, None)
        entry.pending = self._reader.start(key, out, later=later, after=after)
        self._entries[key] = self._flying[key] = entry
        self._policy.add(key)
        return entry

    def _wait(self, landed: SimpleQueue[Key]) -> Key:
        began = time.perf_counter()
        try:
            return landed.get()
        finally:
            self._waited += time.perf_counter() - began

    def _settle(self, entry: _Entry) -> None:
        """Wait for its bytes; raise, and forget it, if they do not come."""
        if entry.pending is None:
            return
        try:
            entry.pending.wait()
        except BaseException:
            self._drop(entry)
            raise
        entry.pending = None
        del self._flying[entry.key]

    def _drop(self, entry: _Entry) -> None:
        """Forget an expert that is not there; its slot is free, if need be after its read has ended."""
        if self._flying.get(entry.key) is not entry:
            return
        del self._entries[entry.key], self._flying[entry.key]
        self._policy.remove(entry.key)
        self._useless += entry.unused
        self._pinned -= entry.pins > 0
        entry.pins = 0
        pending = _pending(entry)
        self._reader.give_up(pending)
        ending = pending.after if pending.cancelled() else pending
        if ending is not None and not ending.done():
            self._ending[entry.slot] = ending
        self._free.append(entry.slot)

    def _shrink(self, slots: int) -> None:
        for entry in list(self._flying.values()):
            self._drop(entry)
        for pending in self._ending.values():
            with contextlib.suppress(FileError, CancelledError):
                pending.wait()
        self._ending.clear()
        for key in self._policy.victims(max(len(self._entries) - slots, 0), self._busy):
            self._useless += self._entries.pop(key).unused
        free = set(range(slots)) - {entry.slot for entry in self._entries.values()}
        for entry in self._entries.values():
            if entry.slot >= slots:
                slot = free.pop()
                self._slots.view(slot).copy_(self._slots.view(entry.slot))
                entry.slot, entry.address = slot, self._slots.address(slot)
        self._slots.give_back(slots, self.slots)
        self._free = sorted(free, reverse=True)


def _put(landed: SimpleQueue[Key], key: Key, _: object) -> None:
    landed.put(key)


def _pending(entry: _Entry) -> Pending:
    assert entry.pending is not None
    return entry.pending
