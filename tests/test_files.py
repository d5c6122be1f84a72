"""Files are there whole or not at all."""

from __future__ import annotations

import errno
import os
import time

import pytest

from moekit.errors import FileError, FormatError, UnsafeFileError
from moekit.files import (
    file_errors,
    parse_json,
    read_json,
    replacing,
    replacing_folder,
    stays_inside,
    write_atomic,
)


def fail_with(code):
    def fail(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_atomic_writes_text_and_bytes(tmp_path):
    write_atomic(tmp_path / "deep" / "a.txt", "grün")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "grün".encode()
    write_atomic(tmp_path / "deep" / "a.txt", b"\x00\xff")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == b"\x00\xff"
    assert names(tmp_path / "deep") == ["a.txt"]


def test_reader_never_sees_part_of_a_file(tmp_path):
    target = tmp_path / "a"
    target.write_text("old")
    with replacing(target) as temporary:
        temporary.write_text("new, half")
        assert target.read_text() == "old"
        assert temporary.parent == target.parent
    assert target.read_text() == "new, half"


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_failure_keeps_the_old_file_and_no_temporary(tmp_path, error):
    write_atomic(tmp_path / "a", "old")

    def half_way():
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("new")
            raise error

    with pytest.raises(type(error)):
        half_way()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, name, fail_with(errno.ENOSPC))
    with pytest.raises(FileError, match=r"cannot write .*a\.txt: the disk is full") as caught:
        write_atomic(tmp_path / "a.txt", "x")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_other_reasons_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match=r"cannot write .*folder: Is a directory"):
        write_atomic(tmp_path / "folder", "x")
    with pytest.raises(FileError, match=r"cannot make the folder .*py: File exists"):
        write_atomic(__file__ + "/below", "x")
    assert names(tmp_path) == ["folder"]


def test_errors_of_moekit_pass_unchanged(tmp_path):
    with pytest.raises(FormatError, match=r"^mine$"), file_errors(tmp_path):
        raise FormatError("mine")


def test_new_folder_appears_whole(tmp_path):
    with replacing_folder(tmp_path / "model") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "sub" / "a").read_text() == "1"
    assert names(tmp_path) == ["model"]


def test_folder_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))
    with (
        pytest.raises(FileError, match=r"cannot write .*model: the disk is full"),
        replacing_folder(tmp_path / "model") as temporary,
    ):
        (temporary / "a").write_text("1")
    assert names(tmp_path) == []


def test_existing_folder_keeps_other_files_and_moves_the_last_one_last(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes.txt").write_text("kept")
    (target / "config.json").write_text("old")
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(os.path.basename(b)), replace(a, b)))
    with replacing_folder(target, last="config.json") as temporary:
        (temporary / "weights").write_text("new")
        (temporary / "config.json").write_text("new")
        (temporary / "a").write_text("new")
    assert moved == ["a", "weights", "config.json"]
    assert (target / "config.json").read_text() == "new"
    assert (target / "notes.txt").read_text() == "kept"
    assert names(tmp_path) == ["model"]


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(FileError, match=r"cannot write"), replacing_folder(tmp_path / "model") as temporary:
        (temporary / "a").write_text("1")
    assert (tmp_path / "model").read_text() == "a file"
    assert names(tmp_path) == ["model"]


def test_the_current_folder_can_be_named_by_a_dot(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with replacing_folder(".") as temporary:
        (temporary / "a").write_text("1")
    assert names(tmp_path / "here") == ["a"]
    assert names(tmp_path) == ["here"]


def test_pipes_and_folders_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "it is not a file"), (tmp_path, "directory"), ("/dev/zero", "not a file")):
        with pytest.raises(FileError, match=words):
            read_json(path)


def test_a_name_that_occurs_twice_among_many_is_found_at_once():
    names = ",".join(f'"{number}":0' for number in range(200_000))
    start = time.process_time()
    with pytest.raises(FormatError, match=r"the name '199999' occurs twice"):
        parse_json(f'{{{names},"199999":1}}'.encode(), "a")
    assert time.process_time() - start < 1


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "a\\b", "", ".", "..", "a\0", "a\n", "\ud800"])
def test_names_that_are_paths_or_no_text_are_refused(tmp_path, name):
    with pytest.raises(UnsafeFileError, match="is not the name of a file"):
        stays_inside(tmp_path, name)


def test_links_stay_in_their_folder_or_in_the_blobs_of_the_hub_cache(tmp_path):
    (tmp_path / "out").write_text("")
    folder = tmp_path / "repo" / "snapshots" / "abc"
    blobs = tmp_path / "repo" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1f").write_text("")
    for name, target in {"in": "real", "blob": "../../blobs/1f", "out": "../../../out", "deep": "../../blobs"}.items():
        (folder / name).symlink_to(target)
    assert stays_inside(folder, "in") == folder.resolve() / "real"
    assert stays_inside(folder, "blob") == (blobs / "1f").resolve()
    for name in ("out", "deep"):
        with pytest.raises(UnsafeFileError, match="out of its folder; copy the file instead"):
            stays_inside(folder, name)
    (tmp_path / "same").symlink_to(folder)
    assert stays_inside(tmp_path / "same", "real") == folder.resolve() / "real"
