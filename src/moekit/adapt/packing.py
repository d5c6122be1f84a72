"""A packed folder written tensor by tensor: bounded in memory, whole or absent, and resumed after any ending.

The work lies in a hidden folder beside the result, `.NAME.packing`: `job.json` says of what it is, `journal` has a line
for every tensor that is done, `folder` is what becomes the result in one rename. The journal is only a claim: whoever
goes on compares each tensor's bytes with its checksum and makes again what differs. So nothing needs to reach the disk
in any order, and neither a lost line nor a lost page can end in a wrong file.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moekit.adapt.packed_file import PackedWriter
from moekit.adapt.packed_folder import write_beside
from moekit.errors import FileError, FormatError
from moekit.files import file_errors, only_one, parse_json, put_folder, write_atomic
from moekit.models.decoder import Decoder
from moekit.models.tokenizer import Tokenizer
from moekit.models.weights import PACKED_WEIGHTS
from moekit.models.weights_write import remove_stale

__all__ = ["Maker", "Packing", "write_packed"]

Notes = list[Any]
"""What a maker says of a tensor, as JSON has it."""


class Maker(Protocol):
    """Where the tensors of a packed decoder come from.

    Attributes:
        decoder: what is written, without memory.
        job: of what the tensors are made, and how, by the name that people know it by: work that differs in it is
            begun again.
        threads: how many tensors are made at once.
    """

    decoder: Decoder
    job: Mapping[str, Any]
    threads: int

    def make(self, name: str) -> tuple[Tensor, Notes]:
        """The tensor called `name` in the decoder's state_dict, and what there is to say of it."""
        ...


@dataclass(frozen=True)
class Packing:
    """What `write_packed` did: bytes of the weights' file, those that were there from before, and a maker's notes on
    every tensor."""

    size: int
    resumed: int
    notes: Mapping[str, Notes]


Progress = Callable[[int, int], None]


def write_packed(
    maker: Maker,
    out: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    progress: Progress = lambda done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Packing:
    """Write what `maker` makes to the folder `out`, which appears whole, as with `save_packed`.

    In memory is one tensor a thread. Whatever ends the work early, the same call goes on where it was.

    Args:
        maker: of the tensors.
        out: the folder.
        tokenizer: to write beside them.
        progress: called with (bytes done, bytes in all).
        tell: called with one line when earlier work is gone on with, or is begun again.
    Raises:
        FileError: there is no room for it, the disk failed, or another process is writing the same folder.
        UnsupportedError: the family cannot express the model.
        What the maker raises.
    """
    final = Path(os.path.abspath(out))
    if final.exists() and not final.is_dir():
        raise FileError(f"{final} is a file; give the name of a folder")
    work = _Work(final.with_name(f".{final.name}.packing"), maker, tell)
    with only_one(work.folder, f"packing into {final}"):
        writer = PackedWriter(work.result / PACKED_WEIGHTS, maker.decoder)
        with work.kept_unless_done(writer):
            work.begin()
            _refuse_without_room(writer, final)
            with writer:
                resumed = work.go_on(writer, progress)
                work.fill(writer, resumed, progress)
                writer.finish()
            write_beside(maker.decoder, work.result, tokenizer)
            put_folder(work.result, final, last="config.json")
    remove_stale(final, {PACKED_WEIGHTS})
    return Packing(writer.size, resumed, work.notes)


class _Work:
    """The hidden folder."""

    def __init__(self, folder: Path, maker: Maker, tell: Callable[[str], None]) -> None:
        self.folder, self.maker, self.tell = folder, maker, tell
        self.result, self.journal = folder / "folder", folder / "journal"
        self.claims: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Notes] = {}

    @contextmanager
    def kept_unless_done(self, writer: PackedWriter) -> Iterator[None]:
        """Remove the folder at the end; where work remains in it, keep it and say so."""
        try:
            yield
        except BaseException as error:
            if not self.claims and not self.notes:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
            done = sum(_nbytes(writer, name) for name in self.notes or self.claims) / writer.size
            kept = f"{done:.0%} is done and kept in {self.folder}: the same command goes on from there"
            if isinstance(error, FileError):
                raise FileError(f"{error}; {kept}") from None
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(kept) from None
            raise
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self) -> None:
        """Make the folder ready, and read what the journal of the same job claims."""
        job = json.loads(json.dumps(dict(self.maker.job)))
        was = _read_or_nothing(self.folder / "job.json")
        changed = next((key for key in {**was, **job} if was.get(key) != job.get(key)), None)
        if was and changed is not None:
            self.tell(f"what {self.folder} holds is of another {changed}: beginning again")
        elif was:
            self.claims = {claim["name"]: claim for claim in _claims(self.journal)}
        with file_errors(self.folder):
            if not self.claims:
                shutil.rmtree(self.result, ignore_errors=True)
                self.journal.unlink(missing_ok=True)
            self.result.mkdir(exist_ok=True)
            for path in self.result.iterdir():  # of an ending while these were written; they are written again
                if path.name != PACKED_WEIGHTS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_atomic(self.folder / "job.json", json.dumps(job))

    def go_on(self, writer: PackedWriter, progress: Progress) -> int:
        """Keep the tensors that are what the journal claims; bytes of them."""
        done = 0
        for name in writer.places:
            claim = self.claims.get(name)
            if claim is not None and writer.keep(name, claim["xxh3"]):
                self.notes[name] = claim["notes"]
                done += _nbytes(writer, name)
                progress(done, writer.size)
        if self.claims:
            self.tell(f"going on with what {self.folder} holds: {done / writer.size:.0%} is done")
        return done

    def fill(self, writer: PackedWriter, done: int, progress: Progress) -> None:
        """Make and write the tensors that are missing."""

        def one(name: str) -> tuple[str, Notes]:
            value, notes = self.maker.make(name)
            writer.write(name, value)
            return name, notes

        missing = [name for name in writer.places if name not in self.notes]
        with file_errors(self.journal), self.journal.open("ab", buffering=0) as journal:
            journal.write(b"\n")  # the last line may have been cut short
            for name, notes in _in_threads(one, missing, self.maker.threads):
                line = {"name": name, "xxh3": writer.sums[name], "notes": notes}
                journal.write(json.dumps(line).encode() + b"\n")
                self.notes[name] = notes
                done += _nbytes(writer, name)
                progress(done, writer.size)


def _in_threads(
    work: Callable[[str], tuple[str, Notes]], names: Iterable[str], threads: int
) -> Iterator[tuple[str, Notes]]:
    """The results in order; one more than there are threads are begun before they are asked for.

    PyTorch works with one thread in each of them: matrices side by side take half the time of matrices in parallel.
    """
    begun: deque[Future[tuple[str, Notes]]] = deque()
    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for name in names:
                begun.append(pool.submit(work, name))
                if len(begun) > threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            with _undisturbed():
                pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)  # new threads take the number that was set last, in any thread


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait. A second Ctrl-C while threads are waited for would make Python take them for ended (Thread.join,
    `_wait_for_tstate_lock`), and leaving while one computes aborts the process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _refuse_without_room(writer: PackedWriter, final: Path) -> None:
    with file_errors(final):
        path = writer.path
        there = path.stat().st_blocks * 512 if path.exists() else 0
        free = shutil.disk_usage(path.parent).free
    if writer.size > free + there:
        raise FileError(
            f"{final} needs {writer.size - there:,} bytes, and {final.parent} has {free:,} free: free some space, "
            "or give another folder"
        )


def _nbytes(writer: PackedWriter, name: str) -> int:
    return writer.places[name].end - writer.places[name].start


def _read_or_nothing(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes(), str(path))
    except (FileNotFoundError, FormatError):
        return {}


def _claims(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole: the last may have been cut short."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            claim = parse_json(line, str(path))
        except FormatError:
            continue
        if claim.keys() == {"name", "xxh3", "notes"} and isinstance(claim["name"], str):
            yield claim
