"""The cache of experts: whatever is taken is what the file holds, whatever fails leaves nothing held."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moekit.adapt.expert_cache import ExpertCache
from moekit.adapt.expert_policies import POLICIES
from moekit.adapt.expert_reader import Pending, Reader
from moekit.adapt.store import Store
from moekit.errors import ConfigError, FileError, FormatError, UnknownNameError
from tiny_store import PAGE, flip, write_store

TIMEOUT = 20


@pytest.fixture
def contents(tmp_path):
    return write_store(tmp_path)


@pytest.fixture
def store(contents, tmp_path):
    return Store(tmp_path)


@pytest.fixture
def reader(store):
    made = Reader(store, "cached", threads=2, chunk=PAGE)
    yield made
    made.close()


@pytest.fixture
def cache(store, reader):
    return ExpertCache(store, reader, 6)


def layer(number, *experts):
    return [(number, expert) for expert in experts]


def fetch(cache, keys, contents):
    """Take `keys`, compare their bytes with the file's, give them back; returns (ready, arrived)."""
    with cache.take(keys) as taken:
        arrived = list(taken.arriving())
        for key, address in taken.ready + arrived:
            assert ctypes.string_at(address, len(contents[key])) == contents[key]
    assert {key for key, _ in taken.ready + arrived} == set(keys)
    return [key for key, _ in taken.ready], [key for key, _ in arrived]


def nothing_held(cache):
    return cache._pinned == 0 and not any(entry.pins for entry in cache._entries.values())


def test_misses_arrive_and_are_hits_from_then_on(cache, contents):
    ready, arrived = fetch(cache, layer(0, 1, 2), contents)
    assert (ready, sorted(arrived)) == ([], layer(0, 1, 2))
    ready, arrived = fetch(cache, layer(0, 2, 1, 1, 3), contents)
    assert (ready, arrived) == (layer(0, 2, 1), layer(0, 3))
    stats = cache.stats
    assert (stats.hits, stats.misses) == (2, 3)
    assert stats.bytes_read == sum(len(contents[key]) for key in layer(0, 1, 2, 3))
    assert 0 < stats.wait_seconds < TIMEOUT
    assert 0 < stats.read_seconds < TIMEOUT
    assert cache.resident((0, 1)) is not None
    assert cache.resident((0, 1)) % PAGE == 0
    assert cache.resident((2, 1)) is None


def test_what_is_held_stays_and_the_rest_makes_room(cache, contents):
    with cache.take(layer(0, 0, 1, 2)) as held:
        where = dict(held.arriving())
        for expert in range(8):
            fetch(cache, layer(1, expert), contents)
        fetch(cache, layer(2, 0, 1, 2), contents)
        assert {key: cache.resident(key) for key in where} == where
        with pytest.raises(ConfigError, match="3 of 6 are held"):
            cache.take(layer(2, 0, 1, 2, 3))
        fetch(cache, layer(0, 0, 1, 2), contents)  # held twice
    assert nothing_held(cache)
    fetch(cache, layer(2, 0, 1, 2, 3, 4, 5), contents)


def test_more_than_fits_and_what_there_is_not(cache, contents):
    with pytest.raises(ConfigError, match="7 experts at once do not fit into a cache of 6"):
        cache.take(layer(0, *range(7)))
    with pytest.raises(ConfigError, match="no layer 0, expert 99"):
        cache.take(layer(0, 0, 99))
    with pytest.raises(ConfigError, match="no layer 5"):
        cache.prefetch(layer(5, 0))
    assert cache.stats.hits == cache.stats.misses == 0
    assert nothing_held(cache)
    fetch(cache, layer(0, *range(6)), contents)


def test_arguments(store, reader):
    for slots, maximum in ((0, None), (5, 4), (-1, 3)):
        with pytest.raises(ConfigError, match="slots"):
            ExpertCache(store, reader, slots, maximum=maximum)
    with pytest.raises(UnknownNameError, match="fifo"):
        ExpertCache(store, reader, 4, "fifo")
    with pytest.raises(ConfigError, match="address space"):
        ExpertCache(store, reader, 4, maximum=1 << 40)


def test_all_reads_of_a_step_are_asked_for_at_once(cache, reader, monkeypatch):
    asked = []
    real = reader.start
    monkeypatch.setattr(reader, "start", lambda key, *rest, **more: asked.append(key) or real(key, *rest, **more))
    with cache.take(layer(1, 0, 1, 2, 3)):
        assert asked == layer(1, 0, 1, 2, 3)


def test_a_damaged_expert_leaves_nothing_held(cache, store, contents):
    fetch(cache, layer(1, 1), contents)
    flip(store, (1, 4))
    with cache.take(layer(1, 1, 3, 4)) as taken:
        with pytest.raises(FormatError, match="layer 1, expert 4: checksum"):
            list(taken.arriving())
        assert nothing_held(cache)
        assert cache.resident((1, 4)) is None
    for _ in range(3):  # the slot is not lost, and the error not forgotten
        with pytest.raises(FormatError, match="expert 4"):
            fetch(cache, layer(1, 4), contents)
    fetch(cache, layer(0, *range(6)), contents)
    flip(store, (1, 4))
    fetch(cache, layer(1, 4), contents)


def test_two_steps_that_wait_for_the_same_damaged_expert(cache, store, contents):
    flip(store, (1, 4))
    first, second = cache.take(layer(1, 4)), cache.take(layer(1, 4, 5))
    for taken in (first, second):
        with pytest.raises(FormatError):
            list(taken.arriving())
        taken.release()
    assert nothing_held(cache)
    fetch(cache, layer(0, *range(6)), contents)


def test_a_disk_that_fails_for_a_while(cache, contents, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    fetch(cache, layer(0, 0, 1), contents)
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", broken)
        with pytest.raises(FileError, match="Input/output error"):
            fetch(cache, layer(0, 0, 2, 3), contents)
        cache.prefetch(layer(0, 4))
        fetch(cache, layer(0, 0, 1), contents)
    assert nothing_held(cache)
    fetch(cache, layer(0, 0, 2, 3, 4), contents)


def test_a_file_replaced_while_in_use(cache, store, contents, tmp_path):
    fetch(cache, layer(0, 0), contents)
    shutil.copyfile(store.path, tmp_path / "copy")
    os.replace(tmp_path / "copy", store.path)
    fetch(cache, layer(0, 0), contents)
    with pytest.raises(FormatError, match="replaced"):
        fetch(cache, layer(0, 1), contents)


class Stuck:
    """os.preadv that stands still until it is told to go on."""

    def __init__(self, monkeypatch):
        self.go, self.reached, real = threading.Event(), threading.Semaphore(0), os.preadv

        def preadv(*arguments):
            self.reached.release()
            assert self.go.wait(TIMEOUT)
            return real(*arguments)

        monkeypatch.setattr(os, "preadv", preadv)


def test_prefetched_in_time_and_too_late(cache, contents, monkeypatch):
    cache.prefetch(layer(1, 0, 1))
    for entry in list(cache._flying.values()):
        entry.pending.wait()
    ready, arrived = fetch(cache, layer(1, 0, 2), contents)
    assert (ready, arrived) == (layer(1, 0), layer(1, 2))
    stuck = Stuck(monkeypatch)
    cache.prefetch(layer(2, 0))
    with cache.take(layer(2, 0)) as taken:
        assert taken.ready == []
        stuck.go.set()
        assert [key for key, _ in taken.arriving()] == layer(2, 0)
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.useful) == (1, 2, 2)
    fetch(cache, layer(0, *range(6)), contents)
    assert cache.stats.useless == 1  # (1, 1) left untaken


def test_wrong_guesses_make_way(store, contents, monkeypatch):
    """Six slots, all of them being filled with what nobody wants, by a disk that is slow."""
    reader = Reader(store, "cached", threads=2, chunk=1 << 20)
    cache = ExpertCache(store, reader, 6)
    stuck = Stuck(monkeypatch)
    cache.prefetch(layer(1, 0, 1, 2) + layer(2, 0, 1, 2))
    for _ in range(2):
        assert stuck.reached.acquire(timeout=TIMEOUT)
    with cache.take(layer(1, 3, 4, 5, 6, 7, 2)) as taken:
        stuck.go.set()
        arrived = dict(taken.arriving())
        assert arrived.keys() == set(layer(1, 3, 4, 5, 6, 7, 2))
        for key, address in arrived.items():
            assert ctypes.string_at(address, len(contents[key])) == contents[key]
    assert cache.stats.useless == 5
    assert cache.stats.bytes_read == sum(len(contents[key]) for key in layer(1, 2, 3, 4, 5, 6, 7))
    reader.close()


def test_wrong_guesses_of_a_layer_are_not_read_any_more(store, contents, monkeypatch):
    """Also where there is room for all of them."""
    reader = Reader(store, "cached", threads=1, chunk=1 << 20)
    cache = ExpertCache(store, reader, 24)
    stuck = Stuck(monkeypatch)
    cache.prefetch(layer(1, 0, 1, 2) + layer(2, 0))
    assert stuck.reached.acquire(timeout=TIMEOUT)
    with cache.take(layer(1, 3)) as taken:
        stuck.go.set()
        assert [key for key, _ in taken.arriving()] == layer(1, 3)
    fetch(cache, layer(2, 0), contents)
    assert cache.stats.bytes_read == len(contents[1, 3]) + len(contents[2, 0])
    reader.close()


def test_a_cancelled_follower_does_not_free_memory_that_is_written_to(store, contents, monkeypatch):
    """Three reads into one slot, the first under way, the second given up before it began."""
    reader = Reader(store, "cached", threads=2, chunk=1 << 20)
    cache = ExpertCache(store, reader, 1)
    stuck = Stuck(monkeypatch)
    cache.prefetch(layer(1, 0))
    assert stuck.reached.acquire(timeout=TIMEOUT)
    cache.take(layer(1, 1)).release()
    with cache.take(layer(1, 2)) as taken:
        assert not stuck.reached.acquire(timeout=0.1)  # the other thread has not begun
        stuck.go.set()
        ((_, address),) = taken.arriving()
        assert ctypes.string_at(address, len(contents[1, 2])) == contents[1, 2]
    assert cache.stats.bytes_read == len(contents[1, 2])
    reader.close()


def test_prefetch_takes_nothing_that_is_held(cache, contents):
    with cache.take(layer(0, *range(6))) as taken:
        where = dict(taken.arriving())
        cache.prefetch(layer(1, 0, 1))
        assert cache.resident((1, 0)) is None
        for key, address in where.items():
            assert ctypes.string_at(address, len(contents[key])) == contents[key]


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_shrinking_gives_memory_back_and_growing_takes_it(tmp_path):
    contents = write_store(tmp_path, layers=1, experts=16, pages=512)  # 2 MB each
    store = Store(tmp_path)
    reader = Reader(store, "cached")
    cache = ExpertCache(store, reader, 16)
    fetch(cache, layer(0, *range(16)), contents)
    full = resident_pages()
    cache.take(layer(0, 14)).release()
    cache.resize(2)
    assert full - resident_pages() > 13 * 512
    assert cache.resident((0, 14)) is not None
    fetch(cache, layer(0, 14), contents)  # moved, and whole
    with pytest.raises(ConfigError):
        cache.take(layer(0, 1, 2, 3))
    cache.resize(16)
    fetch(cache, layer(0, *range(16)), contents)
    with cache.take(layer(0, 1)), pytest.raises(ConfigError, match="in use"):
        cache.resize(4)
    for slots in (0, 17):
        with pytest.raises(ConfigError, match="1 to 16"):
            cache.resize(slots)
    cache.close()
    assert full - resident_pages() > 15 * 512
    reader.close()


def test_shrinking_waits_for_reads_under_way(cache, contents, monkeypatch):
    stuck = Stuck(monkeypatch)
    cache.prefetch(layer(1, *range(6)))
    assert stuck.reached.acquire(timeout=TIMEOUT)
    threading.Timer(0.05, stuck.go.set).start()
    cache.resize(2)
    assert stuck.go.is_set()
    assert not cache._flying
    fetch(cache, layer(0, 0, 1), contents)


def test_heat_and_warm_up(store, reader, contents):
    cold = ExpertCache(store, reader, 6)
    assert (cold.heat(), cold.warm_up()) == ({}, 0)
    for turn in range(4):
        fetch(cold, layer(0, 1, 2 + turn % 2), contents)
        fetch(cold, layer(2, 5), contents)
    heat = cold.heat()
    assert heat == {(0, 1): 1.0, (0, 2): 0.5, (0, 3): 0.5, (2, 5): 1.0}
    warm = ExpertCache(store, reader, 3, heat=heat | {(9, 9): 1.0})
    assert warm.warm_up() == 3
    assert all(warm.resident(key) for key in [(0, 1), (2, 5), (0, 2)])
    assert fetch(warm, layer(0, 1), contents) == (layer(0, 1), [])
    assert warm.heat()[0, 2] == pytest.approx(0.5 * 64 / 65)
    assert warm.heat()[0, 1] == 1.0


def test_heat_of_a_prompt_in_parts(cache, contents):
    for number in (0, 1, 2, 1):
        for first in range(0, 8, 2):
            fetch(cache, layer(number, first, first + 1), contents)
    assert cache.heat()[1, 5] == cache.heat()[2, 0] == 1.0


def test_warming_up_can_be_interrupted(store, reader, contents, monkeypatch):
    cache = ExpertCache(store, reader, 24)
    flip(store, (1, 0))
    with pytest.raises(FormatError, match="layer 1, expert 0"):
        cache.warm_up(list(contents), window=2)
    monkeypatch.setattr(Pending, "wait", lambda pending: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache.warm_up(list(contents), window=2)
    monkeypatch.undo()
    while reader._work.active:  # reads that were given up, and must not meet a file that is being changed
        time.sleep(0.001)
    flip(store, (1, 0))
    for number in range(3):
        fetch(cache, layer(number, *range(8)), contents)


def test_a_closed_cache_and_a_closed_reader(store, contents):
    reader = Reader(store, "cached")
    cache = ExpertCache(store, reader, 4)
    fetch(cache, layer(0, 0), contents)
    reader.close()
    fetch(cache, layer(0, 0), contents)
    with pytest.raises(CancelledError):
        fetch(cache, layer(0, 1), contents)
    assert nothing_held(cache)
    cache.close()
    with pytest.raises(ConfigError):
        cache.take(layer(0, 0))


STEPS = st.tuples(st.integers(0, 2), st.lists(st.integers(0, 7), min_size=1, max_size=4))
KEYS = STEPS.map(lambda step: layer(step[0], *step[1]))


class AnyOrder(RuleBasedStateMachine):
    """Takes, prefetches, resizes and releases in any order; what is held always holds the file's bytes."""

    @initialize(slots=st.integers(4, 12), policy=st.sampled_from(sorted(POLICIES)))
    def begin(self, slots, policy):
        self.folder = tempfile.mkdtemp()
        self.contents = write_store(Path(self.folder))
        self.store = Store(self.folder)
        self.reader = Reader(self.store, "cached", threads=2, chunk=PAGE)
        self.cache = ExpertCache(self.store, self.reader, slots, policy)
        self.held: list = []

    def teardown(self):
        if hasattr(self, "reader"):
            self.cache.close()
            self.reader.close()
            self.store.close()
            shutil.rmtree(self.folder)

    @rule(keys=KEYS, wait=st.booleans())
    def take(self, keys, wait):
        holding = {key for _, keys, _ in self.held for key in keys}
        if len(holding | set(keys)) > self.cache.slots:
            with pytest.raises(ConfigError):
                self.cache.take(keys)
            return
        taken = self.cache.take(keys)
        where = dict(taken.ready)
        if wait:
            where |= dict(taken.arriving())
            assert where.keys() == set(keys)
        self.held.append((taken, set(keys), where))

    @rule(keys=KEYS)
    def prefetch(self, keys):
        self.cache.prefetch(keys)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def arrive(self, data):
        taken, keys, where = data.draw(st.sampled_from(self.held))
        where |= dict(taken.arriving())
        assert where.keys() == keys

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        entry = data.draw(st.sampled_from(self.held))
        self.held.remove(entry)
        entry[0].release()

    @rule(slots=st.integers(4, 24))
    def resize(self, slots):
        if self.held and slots < self.cache.slots:
            with pytest.raises(ConfigError):
                self.cache.resize(slots)
        else:
            self.cache.resize(slots)

    @invariant()
    def bytes_are_the_files(self):
        if not hasattr(self, "held"):
            return
        places = []
        for _, _, where in self.held:
            for key, address in where.items():
                assert ctypes.string_at(address, len(self.contents[key])) == self.contents[key]
        for key in self.contents:
            if (address := self.cache.resident(key)) is not None:
                assert ctypes.string_at(address, len(self.contents[key])) == self.contents[key]
                places.append(address)
        used = [entry.slot for entry in self.cache._entries.values()]
        assert sorted(used + self.cache._free) == list(range(self.cache.slots))
        assert len(set(places)) == len(places)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
