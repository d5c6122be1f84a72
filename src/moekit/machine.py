"""What this machine has: memory, cores, instruction sets. Read from the system, without torch."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from moekit.errors import ConfigError

__all__ = [
    "available_memory",
    "cores",
    "instruction_sets",
    "parse_bytes",
    "peak_memory",
    "processor",
    "readable_bytes",
    "resident_memory",
    "return_freed_memory",
    "total_memory",
]

INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
}
"""Names in /proc/cpuinfo of what matters to matrix products, and what people call them."""

CGROUP_LIMITS = {"0": ("/sys/fs/cgroup", "memory.max"), "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")}
"""Where a control group of version 2 (hierarchy 0) and 1 keeps its limit: root folder and file."""


def total_memory() -> int:
    """Bytes this process may use in all: of the machine, or of its container or control group if that allows less."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [int(text) for path in _limit_files() if (text := _read(path).strip()).isdigit()]
    return min([pages, *limits])


def _limit_files() -> Iterator[str]:
    """Of the process's own control group, and of those above it."""
    for line in _read("/proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        for kind in {number, *controllers.split(",")} & CGROUP_LIMITS.keys():
            root, name = CGROUP_LIMITS[kind]
            for folder in (PurePosixPath(path), *PurePosixPath(path).parents):
                yield f"{root}{folder}/{name}"


def available_memory() -> int:
    """Bytes that are free or can be freed at once."""
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, total_memory())
    return total_memory()


def resident_memory() -> int:
    """Bytes of this process in memory now, programs and mapped files included (VmRSS)."""
    return _own_status("VmRSS")


class Peak:
    """`value`: the highest that `resident_memory` has been."""

    value = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Find out the highest `resident_memory` inside: where the system keeps it (Linux), else that of the whole run."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the highest is now; see proc(5)
    peak = Peak()
    yield peak
    peak.value = _own_status("VmHWM")


def return_freed_memory() -> None:
    """From now on blocks of 1 MiB and more go back to the system when they are freed, for the rest of the process.

    glibc raises that size by itself to the largest block that was freed, and then keeps holes between small blocks.
    With another C library nothing is changed.
    """
    if platform.libc_ver()[0] == "glibc":
        import ctypes

        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, see mallopt(3)


def _own_status(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", _read("/proc/self/status"), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_sets() -> list[str]:
    """Those of `INSTRUCTION_SETS` that the processor has."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            flags = set(line.split(":", 1)[1].split())
            return [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]
    return [platform.machine()]


def processor() -> str:
    """The processor's name, or the architecture where the system tells none."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return " ".join(line.split(":", 1)[1].split())
    return platform.machine()


def readable_bytes(count: float) -> str:
    """A size for people, in powers of 1024.

    >>> readable_bytes(269_030_016)
    '256.6 MiB'
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(int(count).bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{count / 1024**power:.{min(power, 1)}f} {units[power]}"


def parse_bytes(text: str) -> int:
    """A size as people write it: GB is 1000³ bytes, GiB (or G) 1024³.

    Raises:
        ConfigError: it is none.

    >>> parse_bytes("16GB"), parse_bytes("1.5 GiB"), parse_bytes("900m")
    (16000000000, 1610612736, 943718400)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", text.strip().lower())
    unit = 1000 if found and found[3] == "b" else 1024
    size = int(float(found[1]) * unit ** " kmgt".index(found[2] or " ")) if found else 0
    if size < 1:
        raise ConfigError(f"a size is written 16GB, 900MB or 16GiB, not {text!r}")
    return size


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
