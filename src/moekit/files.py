"""Files that are there whole or not at all: written under a temporary name beside the final one, synced, renamed.

Whatever goes wrong on the way (a full disk, an exception, Ctrl-C) leaves nothing under the final name and no
temporary file. It knows nothing of what is written; every `OSError` becomes a `FileError` of one line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from moekit.errors import FileError, FormatError, MoekitError, UnsafeFileError, shown

__all__ = [
    "file_errors",
    "only_one",
    "open_regular",
    "parse_json",
    "put_folder",
    "read_json",
    "recall",
    "remember",
    "replacing",
    "replacing_folder",
    "stays_inside",
    "write_atomic",
]

_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def file_errors(path: str | os.PathLike[str], doing: str = "write") -> Iterator[None]:
    """Turn an `OSError` of the block into `FileError`: "cannot <doing> <path>: <reason>".

    >>> with file_errors("gone.txt", "read"):
    ...     open("gone.txt")
    Traceback (most recent call last):
    ...
    moekit.errors.FileError: cannot read gone.txt: No such file or directory
    """
    try:
        yield
    except MoekitError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            reason = "the disk is full (or its quota is used up); free some space and try again"
        raise FileError(f"cannot {doing} {os.fspath(path)}: {reason}") from error


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int]]:
    """(the file at `path` to read bytes from, its size); a pipe or a device, which may never end, is refused.

    Raises:
        FileError: it is missing, cannot be read, or is no file.
    """
    # Without O_NONBLOCK the opening of a pipe would wait for somebody to write.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    with file_errors(path, "read"), os.fdopen(os.open(path, flags), "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise FileError(f"cannot read {os.fspath(path)}: it is not a file")
        yield file, info.st_size


def stays_inside(folder: str | os.PathLike[str], name: str) -> Path:
    """The path of the file `name` of `folder`, links followed.

    A link may lead to the files that Hugging Face's cache keeps for the folder (`blobs`, beside `snapshots`).

    Raises:
        UnsafeFileError: `name` is a path, or a link that leads out of the folder.
    """
    if name != os.path.basename(name) or "\\" in name or name in ("", ".", "..") or not name.isprintable():
        raise UnsafeFileError(f"{shown(name)} is not the name of a file in {folder}")
    with file_errors(Path(folder, name), "read"):
        home = Path(folder).resolve()
        target = (home / name).resolve()
    allowed = {home} | ({home.parent.parent / "blobs"} if home.parent.name == "snapshots" else set())
    if target.parent not in allowed:
        raise UnsafeFileError(f"{Path(folder, name)} is a link to {target}, out of its folder; copy the file instead")
    return target


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in the file at `path`.

    Raises:
        FileError: the file is missing or cannot be read.
        FormatError: it holds no JSON object, or more than 100 MB.
    """
    with open_regular(path) as (file, size):
        if size > _MAX_JSON:
            raise FormatError(f"{path} has {size} bytes, and moekit reads JSON of at most {_MAX_JSON}")
        data = file.read()
    return parse_json(data, os.fspath(path))


_MAX_JSON = 100_000_000


def parse_json(data: bytes, source: str) -> dict[str, Any]:
    """The JSON object in `data`, which came from `source`; a name that occurs twice is refused."""
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{source} must hold a JSON object, not {type(value).__name__}")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {shown(name)} occurs twice")
            seen.add(name)
    return value


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` so that a reader sees the old file or the new one, never a part.

    Raises:
        FileError: it could not be written; what was there before is untouched.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def recall(name: str) -> dict[str, Any]:
    """What `remember` kept under `name`; empty if there is nothing, or nothing readable: it is made anew then."""
    try:
        return read_json(_user_cache() / name)
    except FileError:
        return {}


def remember(name: str, values: dict[str, Any]) -> None:
    """Keep `values` between runs, in the user's cache folder ($XDG_CACHE_HOME or ~/.cache, moekit/`name`).

    Where that folder cannot be written nothing is kept: it only saves work.
    """
    with contextlib.suppress(FileError):
        write_atomic(_user_cache() / name, json.dumps(values) + "\n")


def _user_cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of the XDG folders has relative paths ignored.
    return Path(given if os.path.isabs(given) else os.path.expanduser("~/.cache"), "moekit")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a name beside `path` to write a file under; at the end it takes `path`'s place. Missing folders are made.

    Raises:
        FileError: anything could not be written; what was there before is untouched.
    """
    final = Path(path)
    temporary = _beside(final)
    _make_folder(final.parent)
    with file_errors(final):
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(final.parent)


@contextmanager
def replacing_folder(path: str | os.PathLike[str], last: str = "") -> Iterator[Path]:
    """Yield an empty folder beside `path` to write files in; at the end it becomes `path`.

    A new folder appears in one rename. In a folder that exists, each file written replaces its namesake in one
    rename, the one named `last` after all others; files of other names stay.

    Raises:
        FileError: anything could not be written; nothing is left under a name that was not there before.
    """
    final = Path(path)
    temporary = _beside(final)
    _make_folder(final.parent)
    with file_errors(final):
        temporary.mkdir()
        try:
            yield temporary
            put_folder(temporary, final, last)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def put_folder(temporary: Path, final: Path, last: str = "") -> None:
    """Make the folder `temporary` become `final`, as `replacing_folder` does at its end; both on one file system."""
    with file_errors(final):
        _sync_tree(temporary)
        if final.exists():
            _move_files(temporary, final, last)
        else:
            os.rename(temporary, final)
        _sync(final.parent)


@contextmanager
def only_one(folder: Path, doing: str) -> Iterator[None]:
    """Hold `folder`, which is made where it is missing, for this process alone; a process that dies lets go.

    Raises:
        FileError: another process holds it; the message says what that is `doing`.
    """
    with file_errors(folder, "lock"):
        while (descriptor := _locked(folder, doing)) is None:
            pass
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(folder: Path, doing: str) -> int | None:
    """A descriptor that holds the folder; None when it lost its name before it was held, as its last holder may do."""
    _make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except BlockingIOError:
        os.close(descriptor)
        raise FileError(f"another process is {doing}; wait for it, or stop it") from None
    except FileNotFoundError:
        pass
    os.close(descriptor)
    return None


def _make_folder(folder: Path) -> None:
    with file_errors(folder, "make the folder"):
        folder.mkdir(parents=True, exist_ok=True)


def _beside(final: Path) -> Path:
    # The absolute path has a name even when the given one is "." or ends in "..".
    final = Path(os.path.abspath(final))
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")


def _move_files(source: Path, target: Path, last: str) -> None:
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    for name in sorted(files, key=lambda name: str(name) == last):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, target / name)
    _sync(target)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Wait until the file's bytes, or the folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
