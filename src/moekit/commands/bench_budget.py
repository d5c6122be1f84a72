"""The budget case of `moekit bench`, printed and drawn."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.machine import readable_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from moekit.bench.budget import BudgetResult

__all__ = ["curve_bars", "run_budget"]

FAST_LIMIT = 700_000_000
"""Bytes, for one layer of the decoder: what programs and the vocabulary take, and some experts."""


def run_budget(cache: Path | None, trace: Path | None, fast: bool, console: Console) -> BudgetResult:
    """Measure and print."""
    from moekit.bench import FAST, FULL, ModelFiles
    from moekit.bench.budget import LIMIT, budget

    with ExitStack() as stack, console.status("a model within a budget") as status:
        folder = cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moekit-bench-")))
        files = ModelFiles(folder, FAST if fast else FULL, status.update)
        found = budget(files, FAST_LIMIT if fast else LIMIT, trace=trace, tell=status.update)
    _print_speeds(found, console)
    _print_curve(found, console)
    return found


def curve_bars(found: BudgetResult) -> dict[str, list[tuple[str, float]]]:
    """Panels of `bench.plot`."""
    bars = {"budget: warm tokens/s": [(name, each["warm"]) for name, each in found.tokens_per_second.items()]}
    for point in found.curve:
        title = f"{point.routing} routing, {point.share:.0%} of the experts in memory: hits"
        bars[title] = [("moekit " + name if name == "forecast" else name, hits) for name, hits in point.hits.items()]
        if point.tokens_per_second is not None:
            speed = ("moekit", point.tokens_per_second)
            bars.setdefault("tokens/s with 25, 50, 75, 100 % of the experts", []).append(speed)
    return bars


def _print_speeds(found: BudgetResult, console: Console) -> None:
    from rich.table import Table

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    line(f"\ndecode within {found.memory_limit / 1e6:,.0f} MB, {found.slots} of {found.experts} experts in memory")
    table = Table("contender", pad_edge=False)
    for column in ("cold tok/s", "warm tok/s"):
        table.add_column(column, justify="right")
    for name, speeds in found.tokens_per_second.items():
        style = "bold" if name == "moekit" else ""
        table.add_row(name, f"{speeds['cold']:.2f}", f"{speeds['warm']:.2f}", style=style)
    console.print(table)
    for text in found.missing:
        line(text)
    if found.ratio_to_llama_cpp_mmap is not None:
        cold, warm = (found.tokens_per_second["moekit"][when] / found.tokens_per_second["llama.cpp mmap"][when]
                      for when in ("cold", "warm"))  # fmt: skip
        line(
            f"{cold:.1f} times llama.cpp's mapped file cold, {warm:.1f} warm; its logits correlate with moekit's "
            f"by {found.llama_cpp_correlation:.3f}"
        )
    line(
        f"disk {found.disk_gb_s:.2f} GB/s; {found.missed_bytes_per_token / 1e6:.0f} MB a token missed, "
        f"{found.hit_share:.1%} hits; {found.share_of_bound:.0%} of the disk's bound"
    )
    if found.predicted_tokens_per_second is not None:
        line(
            f"predicted, if routing prefers no expert: at most {found.predicted_tokens_per_second:.1f} tokens a second"
        )
    peak = "" if found.peak_memory is None else f", highest use {readable_bytes(found.peak_memory)}"
    line(f"held to the limit by {_BY[found.limited_by]}{peak}, {found.kills} killed")
    line(f"tokens {'identical to' if found.tokens_identical else 'OTHER THAN'} those with all experts in memory")


def _print_curve(found: BudgetResult, console: Console) -> None:
    from rich.table import Table

    for routing in dict.fromkeys(point.routing for point in found.curve):
        points = [point for point in found.curve if point.routing == routing]
        console.print(f"\nhits with a share of the experts in memory, {routing} routing", markup=False, soft_wrap=True)
        table = Table("in memory", pad_edge=False)
        for column in (*points[0].hits, "÷ belady", "÷ best", "tok/s"):
            table.add_column(column, justify="right")
        for point in points:
            speed = "" if point.tokens_per_second is None else f"{point.tokens_per_second:.1f}"
            distances = (f"{point.misses_of_belady:.2f}", f"{point.misses_of_best_other:.3f}", speed)
            table.add_row(f"{point.share:.0%}", *(f"{hits:.1%}" for hits in point.hits.values()), *distances)
        console.print(table)
    console.print(
        "÷: misses of forecast, the default, over those of belady and of the best other policy", soft_wrap=True
    )
    for nbytes, rate in found.more:
        console.print(f"{nbytes / 1e9:.2f} GB more would give {rate:.1f} tokens a second", highlight=False)
    console.print(
        f"with a quarter in memory: a prompt reads each expert it needs {found.prompt_reads_per_expert:.2f} times; "
        f"a token alone reads {found.alone_bytes_per_token / 1e6:.0f} MB, one of 16 sequences together "
        f"{found.together_bytes_per_token / 1e6:.0f} MB",
        highlight=False,
        soft_wrap=True,
    )


_BY = {"cgroup": "a memory control group", "itself": "itself alone, for want of a control group"}
