"""The rows of a bench as bars: a panel a case, moekit's in colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moekit.figures import new_figure

__all__ = ["Bars", "draw"]

Bars = Mapping[str, Sequence[tuple[str, float]]]
"""Titles of panels to (name, value) from top to bottom; larger is better."""


def draw(bars: Bars, path: Path, unit: str) -> None:
    """Write a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    rows = sum(len(panel) + 1 for panel in bars.values())
    figure = new_figure(7, 0.6 + 0.28 * rows)
    heights = [len(panel) + 1 for panel in bars.values()]
    axes = figure.subplots(len(bars), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, panel) in zip(axes, bars.items(), strict=True):
        names, values = [name for name, _ in panel], [value for _, value in panel]
        colours = ["#d1495b" if name.startswith("moekit") else "#9aa5b1" for name in names]
        drawn = axis.barh(range(len(panel)), values, color=colours)
        axis.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
        axis.set_yticks(range(len(panel)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9, loc="left")
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
