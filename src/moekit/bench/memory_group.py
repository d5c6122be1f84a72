"""A control group of the Linux kernel that bounds the memory of child processes, what they cache of files included."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moekit.errors import UnsupportedError

__all__ = ["MemoryGroup", "memory_group"]


@dataclass(frozen=True)
class MemoryGroup:
    """A group that exists.

    Attributes:
        folder: it, in the cgroup file system.
        version: 1 or 2, of the interface (Documentation/admin-guide/cgroup-v1/memory.rst, cgroup-v2.rst).
    """

    folder: Path
    version: int

    def command(self, command: Sequence[str]) -> list[str]:
        """`command`, begun inside the group: all it touches is counted."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]

    @property
    def peak(self) -> int | None:
        """The most bytes that were in use; None where the kernel does not say."""
        path = self.folder / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")
        return int(path.read_text()) if path.exists() else None

    @property
    def kills(self) -> int:
        """Processes that the kernel ended for want of memory."""
        path = self.folder / ("memory.oom_control" if self.version == 1 else "memory.events")
        facts = dict(line.split() for line in path.read_text().splitlines())
        return int(facts.get("oom_kill", 0))


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """A group of at most `limit` bytes and no swap, gone afterwards.

    Raises:
        UnsupportedError: this system has none, or they need root.
    """
    parent, version = _parent()
    group = MemoryGroup(parent / f"moekit-bench-{os.getpid()}", version)
    try:
        group.folder.mkdir()
    except OSError as error:
        raise UnsupportedError(f"a memory control group needs root: {error.strerror}: {error.filename}") from None
    try:
        names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        limits = dict.fromkeys(names, limit) if version == 1 else {"memory.max": limit, "memory.swap.max": 0}
        for name, value in limits.items():
            path = group.folder / name
            if path.exists():  # kernels without swap accounting have no file for it
                path.write_text(str(value))
        yield group
    finally:
        _remove(group.folder)


def _parent() -> tuple[Path, int]:
    """Where a group can be made: of version 1 below our own; of version 2 where groups below may bound memory, which
    a group with processes in it may not."""
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            own = Path(f"/sys/fs/cgroup/memory{path}")
            return own if own.is_dir() else Path("/sys/fs/cgroup/memory"), 1
        if not controllers:
            own = Path(f"/sys/fs/cgroup{path}")
            for folder in (own, *own.parents):
                if "memory" in " ".join(_lines(folder / "cgroup.subtree_control")).split():
                    return folder, 2
    raise UnsupportedError("this system has no control groups that bound memory")


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _remove(folder: Path) -> None:
    for _ in range(50):  # the kernel may still be busy with a process that has ended
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)
