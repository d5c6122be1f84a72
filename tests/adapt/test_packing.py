"""Packed folders written tensor by tensor: whole or absent, resumed after any ending, and right whatever happens."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from moekit.adapt.packing import write_packed
from moekit.adapt.quant import Recipe
from moekit.adapt.random_weights import RandomWeights
from moekit.errors import FileError
from same_folders import same
from tiny import tiny_config

RECIPE = Recipe.of("int4")


def random_tiny(seed: int = 0, recipe: Recipe = RECIPE) -> RandomWeights:
    return RandomWeights(tiny_config(), recipe, seed)


class Dies:
    """A maker that ends with `error` before its tensor number `at`."""

    def __init__(self, maker, at: int, error: BaseException) -> None:
        self.maker, self.at, self.error, self.made = maker, at, error, []
        self.decoder, self.job, self.threads = maker.decoder, maker.job, 1

    def make(self, name):
        if len(self.made) == self.at:
            raise self.error
        self.made.append(name)
        return self.maker.make(name)


@pytest.fixture
def whole(tmp_path) -> Path:
    write_packed(random_tiny(), tmp_path / "whole")
    return tmp_path / "whole"


def interrupted(folder: Path, at: int = 12) -> Path:
    """The hidden folder of work that was stopped after `at` tensors."""
    with pytest.raises(KeyboardInterrupt, match="is done and kept in"):
        write_packed(Dies(random_tiny(), at, KeyboardInterrupt()), folder)
    assert not folder.exists()
    return folder.with_name(f".{folder.name}.packing")


@pytest.mark.parametrize("at", [1, 2, 12, 20])
def test_goes_on_where_it_was_interrupted(tmp_path, whole, at):
    interrupted(tmp_path / "out", at)
    lines, rest = [], Dies(random_tiny(), -1, KeyboardInterrupt())
    done = write_packed(rest, tmp_path / "out", tell=lines.append)
    assert len(rest.made) == len(done.notes) - at
    assert [line.split(" holds: ")[1] for line in lines] == [f"{done.resumed / done.size:.0%} is done"]
    same(tmp_path / "out", whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_interrupted_before_anything_was_done(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_packed(Dies(random_tiny(), 0, KeyboardInterrupt()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def killed_at_call(number: int, out: Path) -> bool:
    """Write `out` in a process of its own that is killed at its call `number` of what changes files: after half of a
    write, before anything else. Whether it got so far."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    calls = [0]

    def dying(real, half):
        def call(*args, **kwargs):
            if calls[0] == number:
                half(real, *args)
                os.kill(os.getpid(), signal.SIGKILL)
            calls[0] += 1
            return real(*args, **kwargs)

        return call

    os.pwrite = dying(os.pwrite, lambda real, file, data, at: real(file, data[: len(data) // 2], at))
    for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
        setattr(module, name, dying(getattr(module, name), lambda real, *args: None))
    try:
        write_packed(random_tiny(), out)
    finally:
        os._exit(0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside threads: the child uses none of theirs
def test_killed_at_every_step(tmp_path, whole):
    number = 0
    while killed_at_call(number, tmp_path / "out"):
        if (tmp_path / "out").exists():
            same(tmp_path / "out", whole)
        write_packed(random_tiny(), tmp_path / "out")
        same(tmp_path / "out", whole)
        shutil.rmtree(tmp_path / "out")
        number += 1
    assert number > 30
    same(tmp_path / "out", whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


KILLED = """
import sys, time
from moekit.adapt.packing import write_packed
from moekit.adapt.quant import Recipe
from moekit.adapt.random_weights import RandomWeights
from moekit.models.archs import read_config
maker = RandomWeights(read_config(sys.argv[1]), Recipe.of("int4"))
make = maker.make
def slowly(name):
    time.sleep(0.01)
    return make(name)
maker.make = slowly
print("ready", flush=True)
write_packed(maker, sys.argv[2])
"""


@pytest.mark.heavy
@pytest.mark.parametrize("after", [0.0, 0.05, 0.1])
def test_killed_at_any_moment(tmp_path, whole, after):
    command = [sys.executable, "-c", KILLED, str(whole), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after)
        process.kill()
    if process.returncode == -signal.SIGKILL:
        assert not (tmp_path / "out").exists()
    write_packed(random_tiny(), tmp_path / "out")
    same(tmp_path / "out", whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def cut_journal(work: Path) -> None:
    data = (work / "journal").read_bytes()
    (work / "journal").write_bytes(data[:-7])


def scramble_journal(work: Path) -> None:
    (work / "journal").write_bytes(os.urandom(500) + b"\n" + b'{"name": 3}\n[]\n{"name": [], "xxh3": 1, "notes": 2}\n')


def lose_journal(work: Path) -> None:
    (work / "journal").unlink()


def cut_weights(work: Path) -> None:
    path = work / "folder" / "packed.safetensors"
    os.truncate(path, path.stat().st_size // 3)


def lose_weights(work: Path) -> None:
    shutil.rmtree(work / "folder")


def flip_a_byte(work: Path) -> None:
    data = bytearray((work / "folder" / "packed.safetensors").read_bytes())
    first = next(number for number, byte in enumerate(data) if byte)
    data[first] ^= 1
    (work / "folder" / "packed.safetensors").write_bytes(data)


def longer_weights(work: Path) -> None:
    with (work / "folder" / "packed.safetensors").open("ab") as file:
        file.write(bytes(5000))


def lose_the_job(work: Path) -> None:
    (work / "job.json").write_text("{")


HARM = (
    cut_journal,
    scramble_journal,
    lose_journal,
    cut_weights,
    lose_weights,
    flip_a_byte,
    longer_weights,
    lose_the_job,
)


@pytest.mark.parametrize("harm", HARM)
def test_what_is_left_may_be_broken(tmp_path, whole, harm):
    work = interrupted(tmp_path / "out")
    harm(work)
    write_packed(random_tiny(), tmp_path / "out")
    same(tmp_path / "out", whole)
    assert not work.exists()


def test_another_job_begins_again(tmp_path):
    interrupted(tmp_path / "out")
    lines = []
    done = write_packed(random_tiny(seed=1), tmp_path / "out", tell=lines.append)
    assert done.resumed == 0
    assert len(lines) == 1
    assert "is of another --seed: beginning again" in lines[0]
    write_packed(random_tiny(seed=1), tmp_path / "other")
    same(tmp_path / "out", tmp_path / "other")


def test_the_weights_decide_whether_an_old_folder_is_replaced(tmp_path, whole):
    """Over a folder that exists: it is as it was until the new one is whole."""
    write_packed(random_tiny(seed=1), tmp_path / "out")
    before = (tmp_path / "out" / "packed.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_packed(Dies(random_tiny(), 5, KeyboardInterrupt()), tmp_path / "out")
    assert (tmp_path / "out" / "packed.safetensors").read_bytes() == before
    write_packed(random_tiny(), tmp_path / "out")
    same(tmp_path / "out", whole)


def test_a_second_process_is_refused(tmp_path, whole):
    refused = []

    class Nested:
        """Tries the same folder while it is being written; flock holds between open files, of one process too."""

        def __init__(self) -> None:
            self.maker = random_tiny()
            self.decoder, self.job, self.threads = self.maker.decoder, self.maker.job, 1

        def make(self, name):
            if not refused:
                with pytest.raises(FileError, match=r"another process is packing into .*/out; wait"):
                    write_packed(random_tiny(), tmp_path / "out")
                refused.append(True)
            return self.maker.make(name)

    write_packed(Nested(), tmp_path / "out")
    assert refused
    same(tmp_path / "out", whole)


def test_no_room_is_said_before_any_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
    maker = Dies(random_tiny(), 0, AssertionError())
    with pytest.raises(FileError, match=r"out needs [\d,]+ bytes, and .* has 5,000 free"):
        write_packed(maker, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_room_later_keeps_what_is_done(tmp_path, whole, monkeypatch):
    interrupted(tmp_path / "out")
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))
        with pytest.raises(FileError, match="is done and kept in"):
            write_packed(random_tiny(), tmp_path / "out")
    assert write_packed(random_tiny(), tmp_path / "out").resumed
    same(tmp_path / "out", whole)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_the_disk_fails_in_the_middle(tmp_path, whole, monkeypatch, number):
    real, left = os.pwrite, [60_000]

    def failing(file, data, at):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(number, os.strerror(number))
        return real(file, data[: max(1, len(data) // 2)], at)  # and writes that are not whole

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(FileError) as caught:
            write_packed(random_tiny(), tmp_path / "out")
    assert ("the disk is full" if number == errno.ENOSPC else "Input/output error") in str(caught.value)
    assert "is done and kept in" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert write_packed(random_tiny(), tmp_path / "out").resumed > 0
    same(tmp_path / "out", whole)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileError, match="is a file"):
        write_packed(random_tiny(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_progress_counts_bytes_up_to_the_end(tmp_path):
    seen = []
    interrupted(tmp_path / "out")
    done = write_packed(random_tiny(), tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert [each for each, _ in seen] == sorted(each for each, _ in seen)
    assert {total for _, total in seen} == {done.size}
    notes = json.loads((tmp_path / "out" / "config.json").read_text())
    assert notes["quantization_config"]["version"] == "2"
    assert done.size - 3 * 4096 < seen[-1][0] <= done.size  # all but the header
