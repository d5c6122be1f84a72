"""`moekit bench`: moekit beside its peers and the machine's limits, in one process, losing rows included."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

    from moekit.bench import Row


@dataclass(frozen=True)
class Options:
    """Measure the MoE layer beside transformers and a dense layer of equal active FLOPs; prints medians and ratios."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and activations."""
    repeats: int = 5
    """Timed rounds; each runs every contender once."""
    fast: bool = False
    """The first shape only."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Print the limits and a table a shape; returns both."""
    import torch

    from moekit import bench

    with console.status("measuring the machine"):
        limits = bench.limits()
    threads = torch.get_num_threads()
    console.print(
        f"{threads} threads; memory read {limits['read_gb_s']:.0f} GB/s, "
        f"matrix product {limits['gemm_bf16_gflop_s']:.0f} GFLOP/s bf16, {limits['gemm_fp32_gflop_s']:.0f} fp32"
    )
    rows: list[Row] = []
    for shape in bench.LAYER_SHAPES[: 1 if options.fast else None]:
        for backward in (False, True):
            with console.status(str(shape)):
                rows += bench.layer(shape, getattr(torch, options.dtype), backward, options.repeats)
            _print(rows[-4:], console)
    return {"threads": threads, "limits": limits, "rows": [dataclasses.asdict(row) for row in rows]}


def _print(rows: list[Row], console: Console) -> None:
    from rich.table import Table

    console.print(f"\n{rows[0].what}", highlight=False, soft_wrap=True)
    table = Table("contender")
    for column in ("ms", "GFLOP/s", "of dense"):
        table.add_column(column, justify="right")
    for row in rows:
        style = "bold" if row.contender == "moekit" else ""
        table.add_row(row.contender, f"{row.milliseconds:.1f}", f"{row.gflops:.0f}", f"{row.ratio:.2f}", style=style)
    console.print(table)
