"""Which experts worked, as rows of coloured cells: one row a layer, one cell an expert."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["heat_table"]

SHADES = " ▁▂▃▄▅▆▇█"


def heat_table(counts: Sequence[Sequence[int]], layers: Sequence[int]) -> Table:
    """A table of counts (MoE layer × expert); a full cell is the layer's busiest expert, balance is σ ÷ mean.

    Args:
        counts: assignments of each expert, one row an MoE layer.
        layers: the layers' numbers in the model.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table("layer", "experts", title="share of the work of each expert", title_justify="left")
    table.add_column("balance", justify="right")
    table.add_column("busiest", justify="right")
    table.add_column("idle", justify="right")
    for layer, row in zip(layers, counts, strict=True):
        total, most = sum(row), max(row)
        busiest = f"{list(row).index(most)}: {most / total:.0%}" if total else "-"
        cells = Text("".join(_shade(count, most) for count in row), style="cyan", overflow="fold")
        balance = f"{statistics.pstdev(row) * len(row) / total:.2f}" if total else "-"
        table.add_row(str(layer), cells, balance, busiest, str(list(row).count(0)))
    return table


def _shade(count: int, most: int) -> str:
    """Blank for no work at all, and something visible for any."""
    return SHADES[-(-count * (len(SHADES) - 1) // most)] if count else SHADES[0]
