"""The probe of readers and the heat of experts: what is measured, what is remembered, and what is refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time

import pytest

from moekit.adapt import expert_probe
from moekit.adapt.expert_heat import load_heat, save_heat
from moekit.adapt.expert_probe import probe
from moekit.adapt.expert_reader import KINDS, Reader
from moekit.adapt.store import Store
from moekit.errors import FileError, FormatError
from tiny_store import flip, without_direct, write_store

SECONDS = 0.04


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moekit"


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path, pages=4)
    return Store(tmp_path)


def slowed(monkeypatch, kind, seconds):
    """Reads of one kind take that much longer."""
    real = expert_probe.Reader

    class Slow(real):
        def start(self, *arguments, **more):
            time.sleep(seconds if self.kind == kind else 0)
            return super().start(*arguments, **more)

    monkeypatch.setattr(expert_probe, "Reader", Slow)


@pytest.mark.parametrize(("slow", "fast"), [KINDS, KINDS[::-1]])
def test_the_faster_kind_is_chosen(store, monkeypatch, slow, fast):
    with pytest.MonkeyPatch.context() as patched:
        try:
            Reader(store, "direct").close()
        except FileError as error:
            pytest.skip(str(error))
        patched.setattr(expert_probe, "_leaves_cache", lambda *_: True)
        slowed(patched, slow, 0.01)
        choice = probe(store, seconds=SECONDS)
    assert choice.kind == fast
    assert choice.rates[fast] > choice.rates[slow]
    assert choice.gb_s == choice.rates[fast]


def test_it_is_short(store):
    start = time.perf_counter()
    probe(store)
    assert time.perf_counter() - start < 5  # 0.4 s and what a busy machine adds


def test_a_file_that_stays_in_the_page_cache_does_not_fool_it(store, monkeypatch):
    try:
        Reader(store, "direct").close()
    except FileError as error:
        pytest.skip(str(error))
    store.path.read_bytes()
    os.sync()
    assert expert_probe._leaves_cache(store, (0, 0))
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    store.path.read_bytes()
    assert not expert_probe._leaves_cache(store, (0, 0))
    choice = probe(store, seconds=SECONDS)
    assert choice.kind == "direct"
    assert "page cache" in choice.refused["cached"]


def test_without_direct_reads_the_page_cache_is_chosen_and_the_reason_kept(store, monkeypatch):
    without_direct(monkeypatch)
    choice = probe(store, seconds=SECONDS)
    assert choice.kind == "cached"
    assert choice.gb_s > 0
    assert "O_DIRECT" in choice.refused["direct"]
    assert "Invalid argument" in choice.refused["direct"]
    choice.reader(store).close()


def test_direct_reads_that_open_and_then_fail(store, monkeypatch):
    real = os.preadv

    def preadv(descriptor, *rest):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", preadv)
    choice = probe(store, seconds=SECONDS)
    assert choice.kind == "cached"
    assert "Invalid argument" in choice.refused["direct"]


def test_a_damaged_store_and_a_disk_that_fails(store, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", broken)
        with pytest.raises(FileError, match="Input/output error"):
            probe(store, seconds=SECONDS)
    for key in store.extents:
        flip(store, key)
    with pytest.raises(FormatError, match="checksum"):
        probe(store, seconds=SECONDS)


def remembered(home):
    (path,) = (home / "readers").iterdir()
    return path


def test_it_is_remembered_and_damage_is_made_anew(store, home, monkeypatch):
    first = probe(store, seconds=SECONDS)
    monkeypatch.setattr(expert_probe, "measure", None)
    assert probe(store) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.parent))
    known = json.loads(remembered(home).read_text())
    lies = [{"kind": "x"}, {"threads": "many"}, {"chunk": 5}, {"gb_s": -1}, {"gb_s": "fast"}, {"more": 1}]
    for damage in ("", "[]", "{", "{}", *(json.dumps(known | lie) for lie in lies)):
        remembered(home).write_text(damage)
        assert probe(store, seconds=SECONDS).kind in KINDS
        assert json.loads(remembered(home).read_text())["gb_s"] > 0


def test_what_works_no_more_is_measured_again(store, home, monkeypatch):
    if probe(store, seconds=SECONDS).kind != "direct":
        pytest.skip("no direct reads here")
    without_direct(monkeypatch)
    assert probe(store, seconds=SECONDS).kind == "cached"


def test_a_cache_folder_that_cannot_be_written(store, home):
    home.parent.mkdir()
    home.write_text("a file where the folder should be")
    assert probe(store, seconds=SECONDS).kind in KINDS
    save_heat(store, {(0, 0): 1.0})
    assert load_heat(store) == {}


def test_heat_is_remembered_by_the_experts_not_the_path(store, tmp_path, home):
    save_heat(store, {(0, 1): 0.25, (2, 7): 1.0})
    write_store(tmp_path / "moved", pages=4)
    assert load_heat(Store(tmp_path / "moved")) == {(0, 1): 0.25, (2, 7): 1.0}
    write_store(tmp_path / "other", pages=4, seed=1)
    assert load_heat(Store(tmp_path / "other")) == {}
    path = home / "heat" / f"{store.identity}.json"
    path.write_text('{"0/1": 0.5, "9/9": 0.5, "0/2": "hot", "0/3": NaN, "0/4": 7, "x": 1, "1": 0.5}')
    assert load_heat(store) == {(0, 1): 0.5}
    path.write_text("{")
    assert load_heat(store) == {}


def test_a_relative_cache_folder_is_ignored(store, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    save_heat(store, {(0, 1): 0.25})
    assert (tmp_path / ".cache" / "moekit" / "heat").is_dir()
    assert load_heat(store) == {(0, 1): 0.25}
