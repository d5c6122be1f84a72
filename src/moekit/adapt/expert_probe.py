"""`probe` measures, in less than a second, how a store is read fastest on this machine, and remembers it."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import random
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from moekit.adapt.expert_reader import CHUNK, KINDS, THREADS, Pending, Reader
from moekit.adapt.expert_slots import Slots
from moekit.adapt.quant_modules import PAGE
from moekit.adapt.store import Key, Store
from moekit.errors import ConfigError, FileError, FormatError
from moekit.files import file_errors, recall, remember

__all__ = ["CANDIDATES", "ReaderChoice", "measure", "probe"]

OUTSTANDING = 6
# (threads, chunk): the second reads whole experts, for disks that like few and large requests.
CANDIDATES = ((THREADS, CHUNK), (OUTSTANDING, 64 * CHUNK))
Setting = tuple[str, int, int]  # kind, threads, chunk

# The page cache's copy takes a core from the computation, so it must be clearly faster.
_ADVANTAGE = 1.15


@dataclass(frozen=True)
class ReaderChoice:
    """How a store is read best: the arguments of `Reader`, and what was measured with cold files.

    Attributes:
        kind, threads, chunk: for `Reader`.
        gb_s: 10⁹ bytes a second, checksums included; 0 if nothing could be read.
        rates: the best rate of each kind that was measured.
        refused: kinds that were not, and why.
    """

    kind: str
    threads: int
    chunk: int
    gb_s: float
    rates: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def reader(self, store: Store) -> Reader:
        """The `Reader` it describes."""
        return Reader(store, self.kind, self.threads, self.chunk)


def probe(store: Store, *, seconds: float = 0.4, again: bool = False) -> ReaderChoice:
    """The fastest reader for `store`; measured once a machine and disk, or if `again`.

    Raises:
        FileError, FormatError: experts cannot be read in any way.
    """
    where = f"{platform.node()} {os.fstat(store.descriptor).st_dev}"
    name = f"readers/{xxhash.xxh3_64_hexdigest(where.encode())}.json"
    if not again and (known := _recalled(recall(name), store)) is not None:
        return known
    choice = _measured(store, seconds)
    remember(name, asdict(choice))
    return choice


def measure(reader: Reader, keys: Iterator[Key], slots: Slots, seconds: float) -> tuple[int, float]:
    """Read experts, as many at a time as there are slots, for about `seconds`: (bytes, seconds).

    Raises:
        FileError, FormatError: one could not be read.
    """
    store, free = reader.store, deque(range(slots.count))
    begun: deque[tuple[Pending, int]] = deque()
    start, before = time.perf_counter(), reader.bytes_read
    try:
        while time.perf_counter() - start < seconds or not begun:
            while free:
                key, slot = next(keys), free.popleft()
                extent = store.extents[key]
                os.posix_fadvise(store.descriptor, extent.start, extent.nbytes, os.POSIX_FADV_DONTNEED)
                begun.append((reader.start(key, slots.view(slot)), slot))
            pending, slot = begun.popleft()
            pending.wait()
            free.append(slot)
    finally:
        for pending, _ in begun:
            with contextlib.suppress(FileError, CancelledError):
                pending.wait()
    return reader.bytes_read - before, time.perf_counter() - start


def _measured(store: Store, seconds: float) -> ReaderChoice:
    refused: dict[str, str] = {}
    best: dict[str, tuple[float, Setting]] = {}
    for setting, rate in _rates(store, seconds, refused).items():
        best[setting[0]] = max(best.get(setting[0], (0.0, setting)), (rate, setting))
    rates = {kind: rate for kind, (rate, _) in best.items()}
    kind = "cached" if rates.get("cached", 0.0) > _ADVANTAGE * rates.get("direct", 0.0) else "direct"
    rate, (_, threads, chunk) = best[kind]
    return ReaderChoice(kind, threads, chunk, rate, rates, refused)


def _rates(store: Store, seconds: float, refused: dict[str, str]) -> dict[Setting, float]:
    """10⁹ bytes a second of each setting; `refused` gets the kinds that do not work here, and why."""
    slots = Slots(OUTSTANDING, store.largest)
    for slot in range(slots.count):
        slots.view(slot).zero_()  # the first touch of memory is not the disk's time
    keys = itertools.cycle(random.sample(sorted(store.extents), len(store.extents)))
    settings = [(kind, *candidate) for kind in KINDS for candidate in CANDIDATES]
    share = seconds / (2 * len(settings))
    done: dict[Setting, list[tuple[int, float]]] = {}
    for setting in 2 * settings:  # in turn and twice, because disks have moods
        kind = setting[0]
        if kind == "cached" and "direct" not in refused and not _leaves_cache(store, next(keys)):
            refused[kind] = "the file stays in the page cache, so its disk cannot be measured through that"
        if kind not in refused:
            try:
                done.setdefault(setting, []).append(_measure_once(store, setting, keys, slots, share))
            except FormatError:
                raise
            except FileError as error:
                refused[kind] = str(error)
                if len(refused) == len(KINDS):
                    raise
    return {
        setting: sum(nbytes for nbytes, _ in each) / sum(took for _, took in each) / 1e9
        for setting, each in done.items()
        if setting[0] not in refused
    }


def _measure_once(
    store: Store, setting: Setting, keys: Iterator[Key], slots: Slots, seconds: float
) -> tuple[int, float]:
    reader = Reader(store, *setting)
    try:
        return measure(reader, keys, slots, seconds)
    finally:
        reader.close()


def _leaves_cache(store: Store, key: Key) -> bool:
    """Whether the page cache forgets an expert when asked to: not if somebody maps its pages, nor in tmpfs."""
    extent = store.extents[key]
    page = bytearray(PAGE)
    # A descriptor of its own, because asking whether a page is there starts to read ahead unless that is off.
    with file_errors(store.path, "read"):
        descriptor = os.open(store.path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(descriptor, extent.start, extent.nbytes, os.POSIX_FADV_DONTNEED)
        os.preadv(descriptor, [page], extent.start + extent.nbytes - PAGE, os.RWF_NOWAIT)
    except OSError:  # EAGAIN: it would have to wait for the disk. Others: the file system cannot tell
        return True
    finally:
        os.close(descriptor)
    return False


def _recalled(values: dict[str, Any], store: Store) -> ReaderChoice | None:
    """What was remembered, if it makes sense and works still."""
    try:
        choice = ReaderChoice(**values)
        if not choice.gb_s > 0:
            return None
        choice.reader(store).close()
    except (TypeError, ConfigError, FileError):
        return None
    return choice
