"""The reader: right bytes or a clear error, whatever the disk does, and never a hang."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError

import pytest

from moekit.adapt.expert_reader import KINDS, Reader
from moekit.adapt.expert_slots import Slots
from moekit.adapt.store import Store
from moekit.errors import ConfigError, FileError, FormatError
from tiny_store import PAGE, flip, without_direct, write_store

TIMEOUT = 20


@pytest.fixture
def contents(tmp_path):
    return write_store(tmp_path, pages=3)


@pytest.fixture
def store(contents, tmp_path):
    return Store(tmp_path)


@pytest.fixture(params=KINDS)
def reader(store, request):
    try:
        made = Reader(store, request.param, threads=3, chunk=PAGE)
    except FileError as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture
def slots(store):
    return Slots(len(store.extents), store.largest)


def test_bytes_arrive(reader, slots, contents):
    keys = sorted(contents)
    random.Random(1).shuffle(keys)
    pendings = {key: reader.start(key, slots.view(slot), later=slot % 3 == 0) for slot, key in enumerate(keys)}
    for slot, key in enumerate(keys):
        pendings[key].wait()
        assert bytes(slots.view(slot)[: len(contents[key])].numpy()) == contents[key]
    assert reader.bytes_read == sum(map(len, contents.values()))
    assert 0 < reader.seconds < TIMEOUT


def test_arguments(store, reader, slots):
    for arguments in ({"kind": "io"}, {"threads": 0}, {"chunk": 0}, {"chunk": 5000}):
        with pytest.raises(ConfigError):
            Reader(store, **arguments)
    with pytest.raises(ConfigError, match="boundary"):
        reader.start((0, 0), slots.view(0)[1:])
    with pytest.raises(ConfigError, match="boundary"):
        reader.start((0, 2), slots.view(0)[:PAGE])
    with pytest.raises(ConfigError, match="no layer 9"):
        reader.start((9, 0), slots.view(0))


def test_a_flipped_byte_names_the_expert(store, reader, slots):
    flip(store, (1, 2), at=2 * PAGE + 5)
    good, bad = reader.start((1, 1), slots.view(0)), reader.start((1, 2), slots.view(1))
    good.wait()
    for _ in range(2):
        with pytest.raises(FormatError, match="layer 1, expert 2: checksum"):
            bad.wait()


def test_without_verify_the_checksum_is_not_looked_at(store, slots):
    flip(store, (1, 2))
    reader = Reader(Store(store.path, verify=False), "cached")
    reader.start((1, 2), slots.view(0)).wait()
    reader.close()


def test_a_file_cut_short(store, reader, slots):
    os.truncate(store.path, store.extents[2, 6].start + PAGE)
    with pytest.raises(FormatError, match="cut to"):
        reader.start((2, 6), slots.view(0)).wait()


def test_a_file_that_ends_early_without_a_trace(store, reader, slots, monkeypatch):
    monkeypatch.setattr(Store, "check", lambda self: None)
    os.truncate(store.path, store.extents[2, 6].start + PAGE)
    with pytest.raises(FormatError, match="ends inside layer 2, expert 6"):
        reader.start((2, 6), slots.view(0)).wait()


def test_a_file_replaced_while_in_use(store, reader, slots, tmp_path):
    shutil.copyfile(store.path, tmp_path / "copy")
    os.replace(tmp_path / "copy", store.path)
    with pytest.raises(FormatError, match="replaced"):
        reader.start((0, 0), slots.view(0)).wait()


def test_a_file_written_over_in_place(store, reader, slots, tmp_path):
    write_store(tmp_path / "other", pages=3, seed=1)
    store.path.write_bytes((tmp_path / "other" / "packed.safetensors").read_bytes())
    with pytest.raises(FormatError, match="replaced or changed"):
        reader.start((0, 0), slots.view(0)).wait()


def test_an_io_error_in_the_middle(store, reader, slots, contents, monkeypatch):
    bad, real = store.extents[1, 1], os.preadv

    def preadv(descriptor, buffers, offset):
        if offset == bad.start + PAGE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    pendings = [reader.start(key, slots.view(slot)) for slot, key in enumerate([(1, 0), (1, 1), (1, 2)])]
    with pytest.raises(FileError, match=r"cannot read layer 1, expert 1 of .*: Input/output error"):
        pendings[1].wait()
    pendings[0].wait()
    pendings[2].wait()
    monkeypatch.undo()
    reader.start((1, 1), slots.view(1)).wait()
    assert bytes(slots.view(1)[: bad.nbytes].numpy()) == contents[1, 1]


@pytest.mark.parametrize("most", [PAGE, PAGE + 700])
@pytest.mark.parametrize("kind", KINDS)
def test_short_reads(store, slots, contents, monkeypatch, kind, most):
    try:
        reader = Reader(store, kind, chunk=4 * PAGE)
    except FileError as error:
        pytest.skip(str(error))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: min(real(*arguments), most))
    for slot, key in enumerate(contents):
        reader.start(key, slots.view(slot)).wait()
        assert bytes(slots.view(slot)[: len(contents[key])].numpy()) == contents[key]
    reader.close()


class Gate:
    """os.preadv that stands still for chosen experts until it is opened."""

    def __init__(self, monkeypatch, store, keys):
        self.open, self.reached = threading.Event(), threading.Event()
        self.order: list[int] = []
        starts, real = {store.extents[key].start for key in keys}, os.preadv

        def preadv(descriptor, buffers, offset):
            self.order.append(offset)
            if offset in starts:
                self.reached.set()
                assert self.open.wait(TIMEOUT)
            return real(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)


def test_a_slow_expert_does_not_hold_the_others(store, reader, slots, contents, monkeypatch):
    gate = Gate(monkeypatch, store, [(0, 0)])
    slow = reader.start((0, 0), slots.view(0))
    for slot, key in enumerate(sorted(contents)[1:], 1):
        reader.start(key, slots.view(slot)).wait()
    assert not slow.done()
    gate.open.set()
    slow.wait()


def test_what_is_needed_goes_before_what_may_be(store, slots, monkeypatch):
    gate = Gate(monkeypatch, store, [(0, 0)])
    reader = Reader(store, "cached", threads=1, chunk=1 << 20)
    first = reader.start((0, 0), slots.view(0))
    assert gate.reached.wait(TIMEOUT)
    later = [reader.start((0, n), slots.view(n), later=True) for n in (1, 2, 3)]
    now = [reader.start((0, n), slots.view(n)) for n in (4, 5)]
    reader.hurry(later[1])
    gate.open.set()
    for pending in [first, *later, *now]:
        pending.wait()
    assert gate.order == [store.extents[0, n].start for n in (0, 4, 5, 2, 1, 3)]
    reader.close()


def test_cancelled_before_it_began(store, slots, monkeypatch):
    gate = Gate(monkeypatch, store, [(0, 0)])
    reader = Reader(store, "cached", threads=1)
    running = reader.start((0, 0), slots.view(0))
    assert gate.reached.wait(TIMEOUT)
    waiting = reader.start((0, 1), slots.view(1), later=True)
    assert waiting.cancel()
    assert not running.cancel()
    with pytest.raises(CancelledError):
        waiting.wait()
    gate.open.set()
    running.wait()
    reader.start((0, 2), slots.view(2)).wait()
    assert store.extents[0, 1].start not in gate.order
    assert not slots.view(1).any()
    reader.close()


def test_given_up_half_way_and_its_memory_used_again(store, slots, contents, monkeypatch):
    gate = Gate(monkeypatch, store, [(0, 2)])
    reader = Reader(store, "cached", threads=1, chunk=PAGE)
    wrong = reader.start((0, 2), slots.view(0), later=True)
    assert gate.reached.wait(TIMEOUT)
    reader.give_up(wrong)
    right = reader.start((0, 1), slots.view(0), after=wrong)
    assert not wrong.done()
    gate.open.set()
    right.wait()
    with pytest.raises(CancelledError):
        wrong.wait()
    assert bytes(slots.view(0)[: len(contents[0, 1])].numpy()) == contents[0, 1]
    assert store.extents[0, 2].start + PAGE not in gate.order  # its other chunks were not read
    reader.close()


def test_given_up_between_two_chunks(store, slots, monkeypatch):
    """No thread is at it, so nobody but `give_up` can end it."""
    gate, urgent = Gate(monkeypatch, store, [(0, 0)]), Gate(monkeypatch, store, [(0, 1)])
    reader = Reader(store, "cached", threads=1, chunk=PAGE)
    wrong = reader.start((0, 0), slots.view(0), later=True)
    assert gate.reached.wait(TIMEOUT)
    right = reader.start((0, 1), slots.view(1))
    gate.open.set()
    assert urgent.reached.wait(TIMEOUT)
    reader.give_up(wrong)
    with pytest.raises(CancelledError):
        wrong.result(timeout=TIMEOUT)
    urgent.open.set()
    right.wait()
    reader.close()


def test_closing_ends_what_waits(store, slots, monkeypatch):
    gate = Gate(monkeypatch, store, [(0, 0)])
    reader = Reader(store, "cached", threads=1, chunk=PAGE)
    running = reader.start((0, 0), slots.view(0))
    assert gate.reached.wait(TIMEOUT)
    waiting = reader.start((0, 1), slots.view(1))
    reader.close()
    with pytest.raises(CancelledError):
        waiting.wait()
    with pytest.raises(CancelledError):
        reader.start((0, 2), slots.view(2)).wait()
    gate.open.set()
    with pytest.raises(CancelledError):
        running.result(timeout=TIMEOUT)


def test_a_reader_that_is_forgotten_leaves_no_threads(store, slots):
    before = threading.active_count()
    descriptors = len(os.listdir("/proc/self/fd"))
    reader = Reader(store, "cached", threads=2)
    reader.start((0, 0), slots.view(0)).wait()
    del reader
    end = time.monotonic() + TIMEOUT
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_no_direct_reads_here(store, monkeypatch):
    without_direct(monkeypatch)
    with pytest.raises(FileError, match="O_DIRECT"):
        Reader(store, "direct")
    Reader(store, "cached").close()


OTHER = """
import os, threading, time
from moekit.adapt.expert_reader import Reader
from moekit.adapt.expert_slots import Slots
from moekit.adapt.store import Store
store = Store({folder!r})
reader, slots = Reader(store, "cached", threads=2), Slots(4, store.largest)
for turn in range(20):
    for key in store.extents:
        reader.start(key, slots.view(0)).wait()
begun = threading.Event()
def stuck(*arguments):
    begun.set()
    time.sleep(60)
os.preadv = stuck
for number in range(4):
    reader.start((0, number), slots.view(number))
begun.wait()
print("all read", flush=True)
"""


def test_two_processes_at_once_and_the_end_of_one_with_reads_under_way(store, slots):
    start = time.monotonic()
    reader = Reader(store, "cached")
    code = OTHER.format(folder=str(store.path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as other:
        while other.poll() is None:
            for key in store.extents:
                reader.start(key, slots.view(0)).wait()
        assert (other.returncode, other.stdout.read()) == (0, b"all read\n")
    assert time.monotonic() - start < 50
    reader.close()
