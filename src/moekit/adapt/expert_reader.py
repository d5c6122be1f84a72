"""`Reader`: experts from disk into memory of the caller's, by a few threads, each expert checked against its checksum.

An expert is cut into chunks that different threads read, so that even one expert keeps the disk busy. What is needed
now goes before what may be needed; of the former, first asked is first read.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from concurrent.futures import CancelledError, Future

import xxhash
from torch import Tensor

from moekit.adapt.quant_modules import PAGE
from moekit.adapt.store import Key, Store
from moekit.errors import ConfigError, FormatError
from moekit.files import file_errors

__all__ = ["CHUNK", "KINDS", "THREADS", "Pending", "Reader"]

KINDS = ("direct", "cached")
THREADS = 8
CHUNK = 1 << 20


class Pending(Future[None]):
    """A read that was asked for. `done()`, `cancel()` (False once any of it has been read) and
    `add_done_callback` are those of `concurrent.futures.Future`; callbacks run in a reader's thread.
    """

    def __init__(self, key: Key, start: int, view: memoryview, later: bool, after: Pending | None) -> None:
        super().__init__()
        self.key, self.start, self.view, self.later, self.after = key, start, view, later, after
        self.next = 0  # where the first chunk starts that no thread has taken yet
        self.reading = 0  # chunks being read
        self.error: BaseException | None = None

    def wait(self) -> None:
        """Return when the bytes are there and are the right ones.

        Raises:
            FileError: the disk or the system failed; the message names layer and expert.
            FormatError: the file ends too early, has changed, or the bytes are not those of the checksum.
            concurrent.futures.CancelledError: it was cancelled.
        """
        self.result()

    def cancel(self) -> bool:
        """Whether it will never be read: its memory is the caller's again."""
        return super().cancel()


class Reader:
    """Reads experts of `store` on threads of its own.

    Args:
        store: where they are.
        kind: "direct" (O_DIRECT, past the page cache) or "cached" (through it).
        threads: how many chunks are read at once.
        chunk: bytes a thread reads at a time, whole pages.
    Raises:
        ConfigError: an unknown kind, or numbers out of range.
        FileError: the file's disk does not do "direct".
    """

    def __init__(self, store: Store, kind: str = "direct", threads: int = THREADS, chunk: int = CHUNK) -> None:
        if kind not in KINDS:
            raise ConfigError(f"reader {kind!r}: choose from {', '.join(KINDS)}")
        if threads < 1 or chunk < PAGE or chunk % PAGE:
            raise ConfigError(f"a reader needs threads (not {threads}) and chunks of whole {PAGE}-byte pages ({chunk})")
        self.store, self.kind = store, kind
        descriptor = store.open_direct() if kind == "direct" else _open_cached(store)
        self._work = _Work(store, descriptor, threads, chunk)
        self._stop = weakref.finalize(self, self._work.stop)
        for number in range(threads):
            # Daemons, so that a disk that never answers cannot keep the process from ending.
            threading.Thread(target=self._work.run, name=f"expert reader {number}", daemon=True).start()

    @property
    def bytes_read(self) -> int:
        """Bytes of the experts that arrived so far."""
        return self._work.bytes_read

    @property
    def seconds(self) -> float:
        """Time so far in which at least one read was under way."""
        return self._work.seconds

    def start(self, key: Key, out: Tensor, *, later: bool = False, after: Pending | None = None) -> Pending:
        """Begin to read an expert; returns at once.

        Args:
            key: (layer, expert).
            out: uint8, at a page's boundary, at least the expert's size; nobody else's until the read is done.
            later: read it when nothing without this is waiting.
            after: a read into the same memory that was given up: begin when it has ended.
        Raises:
            ConfigError: no such expert, or memory that does not fit.
        """
        extent = self.store.extent(key)
        if out.data_ptr() % PAGE or out.numel() < extent.nbytes or not out.is_contiguous():
            raise ConfigError(f"layer {key[0]}, expert {key[1]} needs {extent.nbytes} bytes at a page's boundary")
        pending = Pending(key, extent.start, out.numpy().data[: extent.nbytes], later, after)
        if after is None:
            self._work.add(pending)
        else:
            work = self._work
            after.add_done_callback(lambda _: work.add(pending))
        return pending

    def hurry(self, pending: Pending) -> None:
        """What was asked for later is needed now."""
        self._work.hurry(pending)

    def give_up(self, pending: Pending) -> None:
        """Cancel it, also half-way; it is done when no thread writes to its memory any more."""
        self._work.give_up(pending)

    def close(self) -> None:
        """Stop the threads; what they have not begun is cancelled, chunks being read are not waited for."""
        self._stop()


class _Work:
    """What the threads share; it must not know the `Reader`, whose end stops them."""

    def __init__(self, store: Store, descriptor: int, threads: int, chunk: int) -> None:
        self.store, self.descriptor, self.chunk = store, descriptor, chunk
        self.threads = threads
        self.condition = threading.Condition()
        self.now: deque[Pending] = deque()
        self.later: deque[Pending] = deque()
        self.stopped = False
        self.active = 0  # reads begun and not done
        self.began = 0.0
        self.bytes_read, self.seconds = 0, 0.0

    def add(self, pending: Pending) -> None:
        with self.condition:
            if not self.stopped:
                (self.later if pending.later else self.now).append(pending)
                self.condition.notify(-(-len(pending.view) // self.chunk))
                return
        pending.cancel()

    def hurry(self, pending: Pending) -> None:
        with self.condition:
            pending.later = False
            if pending in self.later:
                self.later.remove(pending)
                self.now.append(pending)

    def give_up(self, pending: Pending) -> None:
        if pending.cancel() or pending.done():
            return
        with self.condition:
            pending.error = pending.error or CancelledError()
            nobody = self._drop(pending) and pending.reading == 0
        if nobody:
            self._finish(pending)

    def stop(self) -> None:
        with self.condition:
            self.stopped = True
            waiting = [*self.now, *self.later]
            self.condition.notify_all()
        for pending in waiting:
            self.give_up(pending)

    def run(self) -> None:
        """A thread's life."""
        while (taken := self._take()) is not None:
            pending, offset, size = taken
            error = None
            try:
                _read(self, pending, offset, size)
            except BaseException as caught:
                error = caught
            last = self._landed(pending, error)
            del taken, error
            if last:
                self._finish(pending)
            del pending  # the memory it points to is not this thread's to keep
        with self.condition:
            self.threads -= 1
            if self.threads == 0:
                os.close(self.descriptor)

    def _take(self) -> tuple[Pending, int, int] | None:
        """The next chunk to read: (read, offset, size); None at the end."""
        with self.condition:
            while True:
                if self.stopped:
                    return None
                queue = self.now or self.later
                if not queue:
                    self.condition.wait()
                    continue
                pending = queue[0]
                if pending.next == 0 and not self._begin(pending):
                    queue.popleft()
                    continue
                offset = pending.next
                pending.next = min(offset + self.chunk, len(pending.view))
                pending.reading += 1
                if pending.next == len(pending.view):
                    queue.popleft()
                return pending, offset, pending.next - offset

    def _begin(self, pending: Pending) -> bool:
        if not pending.set_running_or_notify_cancel():
            return False
        if self.active == 0:
            self.began = time.perf_counter()
        self.active += 1
        return True

    def _landed(self, pending: Pending, error: BaseException | None) -> bool:
        """Whether this chunk was the read's last."""
        with self.condition:
            pending.reading -= 1
            if error is not None:
                pending.error = pending.error or error
                self._drop(pending)
            ended = pending.next == len(pending.view) or pending.error is not None
            return ended and pending.reading == 0

    def _drop(self, pending: Pending) -> bool:
        """Read no more of it; whether there was more."""
        for queue in (self.now, self.later):
            if pending in queue:
                queue.remove(pending)
                return True
        return False

    def _finish(self, pending: Pending) -> None:
        try:
            if pending.error is None:
                _verify(self.store, pending)
        except BaseException as caught:
            pending.error = caught
        with self.condition:
            self.active -= 1
            if self.active == 0:
                self.seconds += time.perf_counter() - self.began
            if pending.error is None:
                self.bytes_read += len(pending.view)
        if pending.error is None:
            pending.set_result(None)
        else:
            pending.set_exception(pending.error)


def _open_cached(store: Store) -> int:
    descriptor = os.dup(store.descriptor)
    # What follows an expert is another expert, which nobody asked for: no reading ahead.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor


def _read(work: _Work, pending: Pending, offset: int, size: int) -> None:
    store, name = work.store, _name(pending.key)
    if offset == 0:
        store.check()
    view, at = pending.view[offset : offset + size], pending.start + offset
    with file_errors(store.path, f"read {name} of"):
        while view:
            count = os.preadv(work.descriptor, [view], at)
            if count < len(view):
                count -= count % PAGE  # the next direct read must start at a page again
            if count == 0:
                store.check()
                raise FormatError(f"{store.path} ends inside {name}")
            view, at = view[count:], at + count


def _verify(store: Store, pending: Pending) -> None:
    wanted = store.extents[pending.key].checksum
    if store.verify and (found := xxhash.xxh3_64_intdigest(pending.view)) != wanted:
        store.check()
        raise FormatError(
            f"{store.path}: {_name(pending.key)}: checksum {found:016x}, the header says {wanted:016x}: the file is "
            "damaged; pack it again"
        )


def _name(key: Key) -> str:
    return f"layer {key[0]}, expert {key[1]}"
